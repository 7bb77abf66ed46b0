"""The benchmark of serving measures real servers, checks their answers and judges the goals."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bench import gpu, serving
from bench.limit import Limit, Pace, pace
from bench.load import Load
from bench.models import ModelError, prepared
from bench.pipeline import Pipeline, top_five
from bench.report import Measured, Turn, report
from bench.servers import Model, Server, ServerError
from service.adapters.onnx_session import cores
from tests import tiny

HERE = Path(sys.executable)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny bundle, prepared as the benchmark does."""
    folder = tmp_path_factory.mktemp("bench")
    tiny.make(folder / "tiny")
    return prepared(folder / "tiny", folder / "cache")


def test_the_network_that_everybody_runs_gives_the_logits_of_the_bundle(model):
    pipeline = Pipeline(model.network, threads=1)
    pixels = np.stack([pipeline.decode(path.read_bytes()) for path in sorted(model.images.iterdir())])
    assert np.allclose(pipeline.run(pixels), tiny.logits(pixels), atol=1e-5)
    assert len({data.tobytes() for data in pixels}) == len(pixels)


def test_the_five_best_are_those_of_a_softmax_best_first():
    logits = np.random.default_rng(0).normal(0, 4, (7, 12)).astype(np.float32)
    indices, probabilities = top_five(logits)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert (indices == np.argsort(-logits, axis=1)[:, :5]).all()
    assert np.allclose(probabilities, np.take_along_axis(softmax, indices, axis=1), atol=1e-6)


def test_a_pace_counts_the_steps_of_every_thread():
    made = []

    def work():
        steps = []
        made.append(steps)
        return lambda: steps.append(sum(range(2000)))

    began = time.perf_counter()
    measured = pace(work, images=3, seconds=0.2)
    longest = time.perf_counter() - began
    images = 3 * sum(len(steps) - 1 for steps in made)  # each takes one step to warm up
    assert images / longest <= measured.per_s <= images / 0.2
    assert all(len(steps) > 1 for steps in made)


@pytest.mark.slow
def test_ours_and_the_naive_app_are_measured_beside_the_limit(model):
    measured = serving.measure(model, {"ours": HERE, "naive": HERE}, 1, 1, [1, 8])
    for name in ("ours", "naive"):
        (turn,) = measured.turns[name]
        assert all(load.requests > 20 and load.refused == load.broken == 0 for load in turn.loads.values())
        assert turn.memory_mib > 20
        assert all(0 < spent < 1e6 for spent in turn.cpu_us.values())
    text = report([measured])
    assert text.count("| **ours** |") == text.count("| naive FastAPI |") == 2
    assert "| bare limit (batches of " in text
    assert "tiny, at 8 connections at least 0.72 of the limit: " in text


@pytest.mark.slow
def test_a_server_that_decides_otherwise_ends_the_benchmark(model, tmp_path):
    other = tiny.make(tmp_path / "other", seed=5).folder
    swapped = Model(model.name, other, model.network, model.images, model.kind)
    with pytest.raises(ServerError, match=r"ours decides \[.*\] where the bare loop decides \["):
        serving.measure(swapped, {"ours": HERE}, 1, 1, [1])


@pytest.mark.slow
def test_a_stopped_server_leaves_no_process_and_one_that_cannot_start_says_why(model, tmp_path):
    server = Server("ours", model, HERE, tmp_path)
    server.until_good(next(iter(sorted(model.images.iterdir()))).read_bytes())
    pids = server._pids()
    assert server.memory_mib() > 20
    server.stop()
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)
    (tmp_path / "again").mkdir()
    server = Server("ours", model, HERE, tmp_path / "again", TARE_WORKERS="none")
    with pytest.raises(ServerError, match="TARE_WORKERS"):
        server.until_good(b"")
    server.stop()


@pytest.mark.slow
def test_the_command_prints_its_tables_and_writes_them_to_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny.make(tmp_path / "tiny")
    words = ["--quick", "--models", "none", "--servers", "ours", "--connections", "8"]
    assert serving.main([*words, "--bundle", str(tmp_path / "tiny"), "--out", str(tmp_path / "out.md")]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out.md").read_text() == printed
    assert "### tiny" in printed
    assert "flags: " in printed
    assert "tiny, at 8 connections at least 0.72 of the limit: " in printed


def test_what_cannot_be_measured_is_refused_with_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    assert serving.main(["--models", "none", "--bundle", str(tmp_path / "empty")]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err
    for words, said in (
        (["--servers", "ours,torchserve"], "'torchserve' is none of"),
        (["--connections", "8,0"], "numbers separated by commas"),
    ):
        with pytest.raises(SystemExit, match="2"):
            serving.main(words)
        assert said in capsys.readouterr().err


def test_a_bundle_of_tensors_is_refused(tmp_path):
    spec = {"kind": "tensor", "datatype": "FP32", "shape": [3, 8, 8]}
    tiny.make(tmp_path / "rows", input=spec)
    with pytest.raises(ModelError, match="no bundle for colour images"):
        prepared(tmp_path / "rows", tmp_path)


def _turn(limit, at_8, at_64, p99_ms=30.0):
    turn = Turn(Pace(limit, cores() * 1e6 / limit), start_s=1.0)  # it had all cores
    turn.add(8, Load(at_8, 1.0, 0, 0, 4, 8, at_8), at_8 * 1e-3)
    turn.add(64, Load(at_64, 1.0, 0, 0, 20, p99_ms, at_64), at_64 * 1e-3)
    turn.memory_mib = 100
    return turn


def _measured(*turns, kind="small", **others):
    model = Model(kind, Path("bundle"), Path("network"), Path("images"), kind)
    return Measured(model, 4, [Pace(1200, 600)], {"ours": list(turns), **others})


def test_a_share_is_the_median_of_shares_of_the_same_round():
    one = _measured(_turn(1000, 700, 900), _turn(500, 400, 475), _turn(2000, 100, 1900))
    assert one.share("ours", 64) == 0.95
    assert one.share("ours", 8) == 0.7
    text = report([one])
    assert "| **ours** | 400 (.70) | 900 (.95) |" in text
    assert "small, at 64 connections at least 0.92 of the limit: reached (0.95)" in text
    assert "small, at 8 connections at least 0.72 of the limit: **not reached** (0.70)" in text
    assert "p99 at 64 connections under twice p50: reached (1.50 times)" in text


def test_on_a_busy_machine_nothing_is_judged_by_the_clock():
    one, peer = _turn(1000, 700, 950), _turn(1000, 1, 1)
    peer.memory_mib = 300
    measured = _measured(one, litserve=[peer])
    assert "busy" not in report([measured])
    assert "The machine was not quiet" not in report([measured])
    one.limit = peer.limit = Pace(1000, cores() * 1e6 / 1000 / 2)
    text = report([measured])
    assert "The machine was not quiet" in text
    verdicts = [line.split(": ")[1].split(" (")[0] for line in text.splitlines() if line.startswith("- ")]
    assert verdicts.count("reached") == 1  # of memory
    assert set(verdicts) == {"reached", "not judged, the machine was busy"}


def test_a_quantised_network_is_held_to_its_own_limit_and_to_that_of_float32():
    small, quantised = _measured(_turn(1000, 800, 950)), _measured(_turn(2000, 900, 1650), kind="int8")
    text = report([small, quantised])
    assert "int8, at 64 connections at least 0.85 of the limit: **not reached** (0.82)" in text
    assert "int8, 1.6 times the limit of small: reached (1.65)" in text


def test_memory_is_held_to_the_peers_but_not_to_the_naive_app():
    lean, fat = _turn(1000, 1, 1), _turn(1000, 1, 1)
    lean.memory_mib, fat.memory_mib = 50, 300
    ours = _turn(1000, 800, 950)
    text = report([_measured(ours, naive=[lean], litserve=[fat])])
    assert "less memory than every peer but the naive app: reached (100 MiB, the leanest of them 300)" in text
    fat.memory_mib = 90
    assert "naive app: **not reached** (100 MiB" in report([_measured(ours, naive=[lean], litserve=[fat])])


@pytest.mark.slow
def test_the_limit_answers_orders_and_sleeps_in_between(model):
    with Limit(model.network, model.images) as limit:
        assert limit.batch in {1, 4, 16}
        paces = [limit.measure(what, 0.1) for what in ("limit", "session", "decode")]
        assert all(pace.per_s > 0 and pace.cpu_us > 0 for pace in paces)


def test_without_a_gpu_the_benchmark_says_so_and_its_table_is_empty(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "why_no_gpu", lambda: "there is no NVIDIA driver (libcuda.so.1)")
    assert gpu.main([]) == 0
    said = capsys.readouterr()
    assert said.err == "bench.gpu: no GPU to measure on: there is no NVIDIA driver (libcuda.so.1)\n"
    assert len(said.out.splitlines()) == 2
