"""The engine: it runs where it says, and neither batches nor threads change an answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from bundle.files import read
from longtail import adjustment as formula
from longtail.priors import checked_source_prior, prior_from_counts
from service.adapters import onnx_engine, onnx_session
from service.adapters.onnx_engine import OnnxEngine, build
from service.adapters.onnx_session import BoundRuns, ProviderError, open_session
from service.adapters.serving_graph import compose, with_constant_top_k
from service.core.ports import DeviceLostError, EngineError
from tests import tiny
from tests.service import networks
from tests.service.gpu import needs_gpu, needs_no_gpu

RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (16, tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)


@pytest.fixture
def graph(tmp_path):
    return compose(tiny.make(tmp_path / "tiny", n_classes=6))


def test_an_image_gets_the_same_answer_alone_and_in_any_batch(graph):
    engine = OnnxEngine(graph, "cpu", largest_batch=16)
    table = RNG.normal(0, 20, (3, 6))
    rows = RNG.integers(0, 3, 16)
    whole = engine.run(PIXELS, table, rows, 6)
    for i in range(16):
        alone = engine.run(PIXELS[i : i + 1], table[rows[i]][None], np.zeros(1, dtype=np.int64), 6)
        for field in whole.__dataclass_fields__:
            np.testing.assert_allclose(
                getattr(whole, field)[i], getattr(alone, field)[0], rtol=1e-6, atol=1e-6
            )


def test_what_is_kept_of_the_last_table_is_that_of_this_one(graph):
    engine, fresh = (OnnxEngine(graph, "cpu", largest_batch=16) for _ in range(2))
    table, others, rows = RNG.normal(0, 5, (1, 6)), RNG.normal(0, 5, (1, 6)), np.zeros(16, dtype=np.int64)
    factors = RNG.uniform(0.5, 2, (1, 6))
    for offsets, of in [(table, None), (others, None), (table, factors), (table, None), (table, None)]:
        found = engine.run(PIXELS, offsets, rows, 3, factors=of)
        expected = fresh.run(PIXELS, offsets.copy(), rows, 3, factors=of)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_many_threads_may_run_one_engine(graph):
    engine = OnnxEngine(graph, "cpu", largest_batch=16)
    table, rows = RNG.normal(0, 5, (16, 6)), np.arange(16)
    expected = engine.run(PIXELS, table, rows, 3)
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: engine.run(PIXELS, table, rows, 3), range(40)):
            for field in out.__dataclass_fields__:
                np.testing.assert_array_equal(getattr(out, field), getattr(expected, field))


def test_top_k_beyond_the_classes_is_cut(graph):
    engine = OnnxEngine(graph, "cpu", largest_batch=2)
    out = engine.run(PIXELS[:1], np.zeros((1, 6)), np.zeros(1, dtype=np.int64), 10**6)
    assert sorted(out.indices[0].tolist()) == list(range(6))


def test_offsets_of_any_size_leave_the_winners_as_exact_as_the_logits(graph):
    engine = OnnxEngine(graph, "cpu", largest_batch=2)
    table = np.array([[1e7, 1e7 + 0.125, 1e7 - 3, -1e7, -np.inf, 0]])
    out = engine.run(PIXELS[:4], table, np.zeros(4, dtype=np.int64), 3)
    scores = out.logits.astype(np.float64) + table
    np.testing.assert_allclose(out.scores, np.take_along_axis(scores, out.indices, 1), atol=1e-5, rtol=0)


def test_a_network_that_mixes_up_its_images_is_found_at_warm_up(tmp_path):
    network = networks.linear()
    network.graph.initializer.append(numpy_helper.from_array(np.array([1, -1], np.int64), "flat"))
    network.graph.node.append(helper.make_node("Reshape", ["scores", "flat"], ["mixed"]))
    network.graph.output[0].CopyFrom(helper.make_tensor_value_info("mixed", onnx.TensorProto.FLOAT, None))
    said = networks.manifest(graph={"input": "pixels", "output": "mixed"})
    mixed = compose(networks.bundle(tmp_path / "m", network, said))
    with pytest.raises(EngineError, match="does not run on cpu"):
        OnnxEngine(mixed, "cpu", largest_batch=4)


def test_an_operator_that_nobody_knows_is_said_in_one_line_without_paths(tmp_path):
    network = networks.linear()
    network.graph.node[0].op_type = "Frobnicate"
    unknown = compose(networks.bundle(tmp_path / "m", network, networks.manifest()))
    with pytest.raises(EngineError, match="Frobnicate") as failure:
        OnnxEngine(unknown, "cpu", largest_batch=4)
    assert "\n" not in str(failure.value)
    assert "/onnxruntime" not in str(failure.value)


@needs_no_gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_named_provider_that_cannot_be_had_is_an_error_and_never_the_cpu(graph, provider):
    with pytest.raises(ProviderError, match=provider):
        build(graph, provider, largest_batch=4)


@pytest.fixture
def promised_cuda(monkeypatch):
    """What the GPU wheel does where its libraries are missing: it lists CUDA and opens a CPU session."""
    real = onnxruntime.InferenceSession

    def open_on_the_cpu(model, options, **_):
        return real(model, onnxruntime.SessionOptions(), providers=["CPUExecutionProvider"])

    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_the_cpu)


def test_a_session_that_fell_back_to_the_cpu_is_not_taken_for_cuda(graph, promised_cuda, monkeypatch):
    monkeypatch.setattr(onnx_session, "missing_libraries", list)
    with pytest.raises(ProviderError, match="CPUExecutionProvider"):
        build(graph, "cuda", largest_batch=4)


def test_auto_says_that_it_took_the_cpu_and_why(graph, promised_cuda, caplog, monkeypatch):
    monkeypatch.setattr(onnx_session, "missing_libraries", list)
    assert build(graph, "auto", largest_batch=4).provider == "cpu"
    assert "CUDA is built in but not to be had, the CPU is taken" in caplog.text
    assert "CPUExecutionProvider" in caplog.text


@pytest.mark.gpu
@needs_gpu
def test_cuda_gives_the_answers_of_the_cpu_in_batches_of_any_size(graph):
    gpu, cpu = (OnnxEngine(graph, provider, largest_batch=16) for provider in ("cuda", "cpu"))
    assert build(graph, "auto", largest_batch=4).provider == "cuda"
    table = RNG.normal(0, 20, (16, 6))
    for size in range(1, 17):
        found = gpu.run(PIXELS[:size], table, np.arange(size), 6)
        expected = cpu.run(PIXELS[:size], table, np.arange(size), 6)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_allclose(found.scores, expected.scores, atol=0.01)


@needs_no_gpu
def test_where_there_is_no_driver_the_reason_says_so(graph, promised_cuda):
    with pytest.raises(ProviderError, match="no NVIDIA driver"):
        build(graph, "cuda", largest_batch=4)


def test_gpu_batches_are_filled_up_to_a_closed_set_of_sizes():
    assert onnx_engine._batch_sizes("cuda", 16) == (1, 2, 4, 8, 16)
    assert onnx_engine._batch_sizes("cuda", 12) == (1, 2, 4, 8, 12)
    assert onnx_engine._batch_sizes("cuda", 1) == (1,)
    assert onnx_engine._batch_sizes("cpu", 16) == (1, 2)
    assert onnx_engine._batch_sizes("cpu", 1) == (1,)


def test_a_lone_run_on_more_threads_gives_the_same_answer(graph):
    engine = OnnxEngine(graph, "cpu", largest_batch=4, lone_threads=2)
    assert engine._lone is not engine._runs
    table, rows = RNG.normal(0, 20, (1, 6)), np.zeros(1, dtype=np.int64)
    usual, alone = (engine.run(PIXELS[:1], table, rows, 6, alone=alone) for alone in (False, True))
    np.testing.assert_array_equal(usual.indices, alone.indices)
    np.testing.assert_allclose(usual.logits, alone.logits, atol=1e-5)


@pytest.mark.parametrize(("spread_s", "kept"), [(0.0008, True), (0.00095, False), (0.002, False)])
def test_more_threads_for_a_lone_run_are_kept_only_where_they_are_measured_to_pay(
    graph, monkeypatch, spread_s, kept
):
    monkeypatch.setattr(onnx_engine, "cores", lambda: 2)
    monkeypatch.setattr(OnnxEngine, "_shortest_runs", lambda *_: [0.001, spread_s])
    engine = OnnxEngine(graph, "cpu", largest_batch=4, lone_threads=None)
    assert (engine._lone is not engine._runs) == kept


def test_on_one_core_there_is_nothing_to_spread_over(graph, monkeypatch):
    monkeypatch.setattr(onnx_engine, "cores", lambda: 1)
    engine = OnnxEngine(graph, "cpu", largest_batch=4, lone_threads=None)
    assert engine._lone is engine._runs


@pytest.fixture
def gpu_on_a_cpu(monkeypatch):
    """What a GPU's engine does, with its buffers in the CPU's memory: all of it but the device."""
    real_session, real_runs, asked = onnx_session.open_session, onnx_session.BoundRuns, []

    def open_on_the_cpu(graph, provider, threads, **options):
        asked.append((provider, options))
        return real_session(graph, "cpu", threads)

    def bound(session, graph, sizes, *, capture):
        return real_runs(session, graph, sizes, device="cpu", capture=capture)

    monkeypatch.setattr(onnx_session, "is_built_in", lambda provider: True)
    monkeypatch.setattr(onnx_session, "missing_libraries", list)
    monkeypatch.setattr(onnx_engine, "open_session", open_on_the_cpu)
    monkeypatch.setattr(onnx_engine, "BoundRuns", bound)
    return asked


def test_bound_batches_of_any_size_give_the_answers_of_plain_ones(graph, gpu_on_a_cpu):
    bound, plain = (OnnxEngine(graph, provider, largest_batch=12) for provider in ("cuda", "cpu"))
    assert (bound.provider, gpu_on_a_cpu[0][1]["capture"]) == ("cuda", True)
    table, factors = RNG.normal(0, 20, (16, 6)), RNG.uniform(0.5, 2, (16, 6))
    for size in (12, 1, 3, 2, 5, 7, 8, 11):  # rows that a larger batch left behind change nothing
        for top_k in (1, 2, 6):
            for of in (None, factors):
                rows = RNG.integers(0, 16, size)
                found = bound.run(PIXELS[:size], table, rows, top_k, factors=of)
                expected = plain.run(PIXELS[:size], table, rows, top_k, factors=of)
                np.testing.assert_array_equal(found.indices, expected.indices)
                np.testing.assert_array_equal(found.unadjusted_index, expected.unadjusted_index)
                for name in (
                    "scores",
                    "log_partition",
                    "unadjusted_score",
                    "unadjusted_log_partition",
                    "logits",
                ):
                    np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)


def test_more_classes_than_the_graph_ranks_are_ranked_from_the_logits(graph, gpu_on_a_cpu, monkeypatch):
    monkeypatch.setattr(onnx_engine, "_CONSTANT_TOP_K", 2)
    bound, plain = (OnnxEngine(graph, provider, largest_batch=4) for provider in ("cuda", "cpu"))
    table = RNG.normal(0, 20, (4, 6))
    table[1, 3] = -np.inf
    for of in (None, RNG.uniform(0.5, 2, (4, 6))):
        found = bound.run(PIXELS[:4], table, np.arange(4), 5, factors=of)
        expected = plain.run(PIXELS[:4], table, np.arange(4), 5, factors=of)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(found.log_partition, expected.log_partition, atol=1e-5)


def test_a_network_that_cannot_be_recorded_runs_on_the_gpu_without(graph, gpu_on_a_cpu, monkeypatch, caplog):
    caplog.set_level("INFO")
    bound = onnx_engine.BoundRuns

    def refuse(session, graph, sizes, *, capture):
        if capture:
            raise RuntimeError("This session cannot use the graph capture feature: it has control flow nodes")
        return bound(session, graph, sizes, capture=capture)

    monkeypatch.setattr(onnx_engine, "BoundRuns", refuse)
    engine = OnnxEngine(graph, "cuda", largest_batch=4)
    assert [options["capture"] for _, options in gpu_on_a_cpu] == [True, False]
    assert "control flow nodes" in caplog.text
    assert engine.run(PIXELS[:3], np.zeros((1, 6)), np.zeros(3, np.int64), 1).indices.shape == (3, 1)


def test_the_constant_k_is_no_input_any_more_and_shapes_follow_from_the_batch(graph):
    fixed = with_constant_top_k(graph, 3)
    session = open_session(fixed, "cpu", 1)
    assert graph.inputs.top_k not in {one.name for one in session.get_inputs()}
    runs = BoundRuns(session, fixed, (1, 2), device="cpu")
    offsets = RNG.normal(0, 1, (2, 6)).astype(np.float32)
    answers = runs(PIXELS[:2], np.ones_like(offsets), offsets, np.arange(2), 3)
    expected = [shape for _, shape, _ in fixed.output_shapes(2, 3)]
    assert [answer.shape for answer in answers] == expected


def test_tensorrt_keeps_its_engines_by_network_and_runtime(graph, tmp_path):
    cache = tmp_path / "engines"
    options = onnx_session._tensorrt_options(graph, (1, 2, 16), cache)
    (folder,) = cache.iterdir()
    assert options["trt_engine_cache_path"] == str(folder)
    assert onnxruntime.__version__ in folder.name
    names = graph.inputs
    assert f"{names.pixels}:16x{tiny.SIZE}x{tiny.SIZE}x3" in options["trt_profile_max_shapes"]
    assert f"{names.offsets}:1x6" in options["trt_profile_min_shapes"]
    other = with_constant_top_k(graph, 3)
    onnx_session._tensorrt_options(other, (1,), cache)
    assert len(list(cache.iterdir())) == 2


SHIPPED = Path(__file__).parents[2] / "models" / "cifar100-lt-erm"


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 32])
def test_a_real_network_in_the_serving_graph_is_the_network_and_the_formula(size):
    bundle = read(SHIPPED)
    manifest = bundle.manifest
    pixels = RNG.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
    spec = manifest.input
    scaled = (pixels * spec.scale - np.array(spec.mean)) / np.array(spec.std)
    session = onnxruntime.InferenceSession(bundle.model_bytes(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {manifest.graph.input: scaled.transpose(0, 3, 1, 2).astype(np.float32)})
    engine = OnnxEngine(compose(bundle), "cpu", largest_batch=32)
    source = checked_source_prior(manifest.source_prior)
    classes = len(source)
    target = prior_from_counts(RNG.integers(0, 50, classes))
    taus = [0.0, 0.5, 1.0, 1.7, 10.0, 100.0]
    for tau in taus:
        offset = np.array(manifest.logit_offset) + formula.adjustment(source, target, tau)
        out = engine.run(pixels, offset[None], np.zeros(size, dtype=np.int64), classes)
        allowed = 1e-5 * max(1, np.abs(logits).max())
        np.testing.assert_allclose(out.logits, logits, atol=allowed)
        scores = out.logits.astype(np.float64) + offset
        best = formula.top_k(scores, 1)[:, 0]
        np.testing.assert_array_equal(out.indices[:, 0], best)
        possible = np.isfinite(np.take_along_axis(scores, out.indices, axis=1))
        found, exact = out.scores[possible], np.take_along_axis(scores, out.indices, axis=1)[possible]
        assert (np.abs(found - exact) <= np.maximum(1e-4, 1e-6 * np.abs(exact))).all()


class Broken:
    """A session whose provider fails as onnxruntime's does."""

    def __init__(self, message):
        self.message = message

    def __call__(self, *_):
        raise RuntimeError(self.message)


POISONED = (
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; "
    "hostname=box ; file=/onnxruntime_src/core/cuda_call.cc ; line=129 ; expr=cudaStreamSynchronize()"
)
OUT_OF_MEMORY = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : CUDA failure 2: out of memory ; GPU=0"


@pytest.mark.parametrize(
    ("provider", "message", "kind"),
    [
        ("cuda", POISONED, DeviceLostError),
        ("tensorrt", "CUDA error 719: unspecified launch failure", DeviceLostError),
        ("cuda", "CUDA failure 710: device-side assert triggered", DeviceLostError),
        ("cuda", OUT_OF_MEMORY, EngineError),
        ("cuda", "CUDNN failure 7000: CUDNN_STATUS_INTERNAL_ERROR", EngineError),
        ("cpu", POISONED, EngineError),
    ],
)
def test_a_poisoned_cuda_context_is_told_from_failures_that_pass(graph, provider, message, kind):
    engine = OnnxEngine(graph, "cpu", largest_batch=1)
    engine._provider = provider
    engine._runs = Broken(message)
    with pytest.raises(EngineError) as failure:
        engine.run(PIXELS[:1], np.zeros((1, 6)), np.zeros(1, dtype=np.int64), 1)
    assert type(failure.value) is kind
    assert "/onnxruntime_src" not in str(failure.value)
