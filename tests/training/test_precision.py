"""A variant in fewer bits: what it is made of, how the gate judges it, and that it is served so."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from bundle.files import read
from longtail.adjustment import adjustment
from longtail.metrics import balanced_error
from longtail.priors import uniform_prior
from service.adapters.onnx_engine import OnnxEngine
from service.adapters.serving_graph import compose
from training import checkpoint as checkpoints
from training.calibrate import calibrate
from training.data import split
from training.exceptions import RunError
from training.export import main
from training.npz import read_npz
from training.onnx_graph import GraphError
from training.precision import Answers, Variant, Wanted, judged

if TYPE_CHECKING:
    from pathlib import Path

    from bundle.files import Bundle
    from training.data import Split


@pytest.fixture(scope="session")
def original(tiny_run: Path) -> Bundle:
    return read(tiny_run / "models" / "tiny")


@pytest.fixture(scope="session")
def cut(tiny_files: tuple[Path, Path]) -> Split:
    return split(read_npz(*tiny_files), 0.1, seed=0)


@pytest.fixture(scope="session")
def variants(original: Bundle, cut: Split) -> dict[str, Variant]:
    return {
        name: Variant(original.model_bytes(), name, original.manifest.input, cut.trained)
        for name in ("int8", "fp16")
    }


@pytest.fixture(scope="session")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The bundles that the command makes of the tiny run; 19 held-out images may miss a gate by one."""
    folder = tmp_path_factory.mktemp("variants")
    for name in ("int8", "fp16"):
        words = ["--checkpoint", str(tiny_run / "runs" / "tiny"), "--out", str(folder / name)]
        assert main([*words, "--precision", name, "--force-precision"]) == 0
    return {name: read(folder / name) for name in ("int8", "fp16")}


def spoilt(run: Path, folder: Path, outlier: float) -> Path:
    """Write the run again with one channel that is far larger than all others, and that nothing reads.

    The float32 network decides as before; whoever scales all channels alike has no steps left for the others.
    """
    checkpoint = checkpoints.load(run / "checkpoint.pt")
    weights = {name: value.clone() for name, value in checkpoint.weights.items()}
    weights["stem_norm.weight"][0] = 0
    weights["stem_norm.bias"][0] = outlier
    place, width = 0, 16
    for block in range(9):
        prefix = f"blocks.{block}."
        weights[f"{prefix}first.weight"][:, place] = 0
        if weights[f"{prefix}first.weight"].shape[0] != width:  # the shortcut moves it to the middle
            place, width = place + width // 2, 2 * width
        weights[f"{prefix}second_norm.weight"][place] = 0
        weights[f"{prefix}second_norm.bias"][place] = 0
    weights["head.weight"][:, place] = 0
    folder.mkdir()
    checkpoints.save(replace(checkpoint, network=weights, average=None), folder / "checkpoint.pt")
    return folder


def decisions(bundle: Bundle, logits: np.ndarray, tau: float) -> np.ndarray:
    manifest = bundle.manifest
    added = adjustment(manifest.source_prior, uniform_prior(len(manifest.classes)), tau)
    return (logits.astype(np.float64) + manifest.logit_offset + added).argmax(axis=1)


def test_int8_keeps_one_scale_a_channel_of_int8_weights_and_the_head_in_float32(
    variants: dict[str, Variant], original: Bundle
) -> None:
    model = onnx.load_from_string(variants["int8"].model)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Conv"] == 21
    for node in model.graph.node:
        if node.op_type == "Conv":
            weights, scale = (held[name] for name in makers[node.input[1]].input[:2])
            assert weights.data_type == TensorProto.INT8
            assert list(scale.dims) == [weights.dims[0]]
            pixels = makers[node.input[0]]
            assert held[pixels.input[2]].data_type == TensorProto.UINT8
        if node.op_type == "Gemm":
            plain = {
                tensor.name: tensor
                for tensor in onnx.load_from_string(original.model_bytes()).graph.initializer
            }
            np.testing.assert_array_equal(
                numpy_helper.to_array(held[node.input[1]]), numpy_helper.to_array(plain[node.input[1]])
            )
    assert kinds["Gemm"] == 1


@pytest.mark.parametrize("name", ["int8", "fp16"])
def test_a_variant_is_of_the_default_operators_in_versions_that_both_wheels_read(
    variants: dict[str, Variant], name: str
) -> None:
    model = onnx.load_from_string(variants[name].model)
    assert [(entry.domain, entry.version <= 20) for entry in model.opset_import] == [("", True)]
    assert model.ir_version <= 10
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [1, 1]
    kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {TensorProto.INT8 if name == "int8" else TensorProto.FLOAT16}


@pytest.mark.slow
def test_the_same_images_make_the_same_bytes_and_held_out_ones_have_no_part_in_it(
    variants: dict[str, Variant], exported: dict[str, Bundle], original: Bundle, cut: Split
) -> None:
    assert exported["int8"].model_bytes() == variants["int8"].model
    assert exported["fp16"].model_bytes() == variants["fp16"].model
    network, spec = original.model_bytes(), original.manifest.input
    assert Variant(network, "int8", spec, cut.holdout).model != variants["int8"].model


@pytest.mark.slow
def test_onnx_runtime_runs_every_convolution_of_the_served_int8_graph_in_integers(
    exported: dict[str, Bundle], tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    model = compose(exported["int8"]).model
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert (kinds["QLinearConv"], kinds["Conv"], kinds["QLinearAdd"]) == (21, 0, 9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "fp16"])
def test_what_is_served_is_the_formula_on_the_logits_that_were_judged(
    exported: dict[str, Bundle], cut: Split, name: str
) -> None:
    bundle = exported[name]
    manifest, held = bundle.manifest, bundle.holdout()
    engine = OnnxEngine(compose(bundle), "cpu", largest_batch=16)
    taus = [0.0, 1.0, 40.0]
    table = np.array([adjustment(manifest.source_prior, uniform_prior(4), tau) for tau in taus])
    for start in range(0, len(held.labels), 5):
        pixels = cut.holdout.images[start : start + 5]
        rows = np.arange(len(pixels)) % len(taus)
        out = engine.run(pixels, table[rows] + manifest.logit_offset, np.arange(len(pixels)), 4)
        recorded = held.logits[start : start + 5].astype(np.float64)
        np.testing.assert_allclose(out.logits, recorded, atol=1e-2)
        scores = out.logits.astype(np.float64) + table[rows] + manifest.logit_offset
        np.testing.assert_array_equal(out.indices, np.argsort(-scores, axis=1, kind="stable"))
        np.testing.assert_allclose(out.scores, np.take_along_axis(scores, out.indices, 1), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "fp16"])
def test_the_manifest_states_agreement_and_errors_and_rests_on_the_logits_of_the_variant(
    exported: dict[str, Bundle], original: Bundle, name: str
) -> None:
    manifest, held, before = exported[name].manifest, exported[name].holdout(), original.holdout()
    said = manifest.precision
    assert said is not None
    assert (said.name, said.tau) == (name, original.manifest.tau)
    assert said.calibration_images == (177 if name == "int8" else 0)
    assert abs(held.logits - before.logits).max() > 0
    old, new = (decisions(original, logits, said.tau) for logits in (before.logits, held.logits))
    assert said.holdout.images == 19
    assert said.holdout.agreement == np.mean(old == new)
    assert said.holdout.balanced_error_before == balanced_error(held.labels, old, 4)
    assert said.holdout.balanced_error == balanced_error(held.labels, new, 4)
    assert said.test.images == 120
    assert said.forced == (said.holdout.agreement < said.least_agreement)
    again = calibrate(
        held.logits,
        held.labels,
        logit_offset=np.array(manifest.logit_offset),
        source_prior=np.array(manifest.source_prior),
        groups=manifest.groups,
    )
    assert (manifest.temperature, manifest.tau) == (again.temperature, again.tau)
    assert manifest.tau_curve == again.tau_curve
    assert manifest.temperature != original.manifest.temperature


@pytest.mark.slow
def test_weight_normalisation_has_the_norms_of_the_head_that_is_in_the_graph(
    exported: dict[str, Bundle],
) -> None:
    for name, bundle in exported.items():
        graph = onnx.load_from_string(bundle.model_bytes()).graph
        tolerance = 1e-6 if name == "int8" else 1e-3
        (head,) = (node for node in graph.node if node.op_type == "Gemm")
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        norms = np.linalg.norm(held[head.input[1]].astype(np.float64).reshape(4, -1), axis=1)
        np.testing.assert_allclose(bundle.manifest.weight_normalisation.norms, norms, rtol=tolerance)
        np.testing.assert_allclose(
            bundle.manifest.weight_normalisation.biases,
            held[head.input[2]].astype(np.float64),
            rtol=tolerance,
        )


@pytest.mark.parametrize(("name", "least"), [("int8", 930), ("fp16", 995)])
def test_the_gate_opens_at_its_threshold_and_names_the_measured_share_below_it(
    variants: dict[str, Variant], name: str, least: int
) -> None:
    labels = np.zeros(1000, dtype=np.int64)
    original = np.tile([1.0, 0.0], (1000, 1))

    def judge(equal: int, *, force: bool = False, held_out: bool = True):
        other = original.copy()
        other[equal:] = [0.0, 1.0]
        answers = Answers(original, other, labels)
        nothing = Answers(original[:0], original[:0], labels[:0])
        return judged(
            variants[name],
            Wanted(name, force),
            tau=1.0,
            adjustment=np.zeros(2),
            holdout=answers if held_out else nothing,
            test=nothing,
        )

    assert not judge(least).forced
    assert not judge(least, force=True).forced
    assert judge(least - 1, force=True).forced
    unjudged = judge(0, force=True, held_out=False)
    assert (unjudged.forced, unjudged.holdout) == (True, None)
    with pytest.raises(RunError, match="nothing was held out to judge it by"):
        judge(0, held_out=False)
    with pytest.raises(RunError, match=rf"on {(least - 1) / 10:.2f} % of 1,000 held-out images"):
        judge(least - 1)


def test_decisions_are_compared_as_they_are_served_with_offset_and_tau(variants: dict[str, Variant]) -> None:
    before, after = np.array([[2.0, 0.0]]), np.array([[1.0, 0.0]])
    answers = Answers(before, after, np.array([1]))
    for added, agreement in ((0.0, 1.0), (1.5, 0.0)):
        said = judged(
            variants["int8"],
            Wanted("int8", force=True),
            tau=1.0,
            adjustment=np.array([0.0, added]),
            holdout=answers,
            test=answers,
        )
        assert said.holdout.agreement == said.test.agreement == agreement
    assert (said.holdout.balanced_error_before, said.holdout.balanced_error) == (1.0, 0.0)


@pytest.mark.slow
def test_a_variant_that_decides_otherwise_is_refused_in_one_line_with_nothing_changed_unless_forced(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = spoilt(tiny_run / "runs" / "tiny", tmp_path / "run", 3000.0)
    out = tmp_path / "models" / "tiny"
    shutil.copytree(tiny_run / "models" / "tiny", out)
    before = read(out).version
    words = ["--checkpoint", str(run), "--out", str(out), "--precision", "int8", "--force"]
    capfd.readouterr()
    assert main(words) == 2
    printed, said = capfd.readouterr()
    assert not printed
    assert said.count("\n") == 1
    assert " % of 19 held-out images, under 93 %; --force-precision writes it all the same" in said
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    assert read(out).version == before

    assert main([*words, "--force-precision"]) == 0
    forced = read(out)
    assert forced.manifest.precision.forced
    assert forced.manifest.precision.holdout.agreement < 0.93
    assert forced.version != before
    assert "written by force" in capfd.readouterr().err


def test_a_network_whose_numbers_no_float16_holds_is_refused(original: Bundle, cut: Split) -> None:
    model = onnx.load_from_string(original.model_bytes())
    head = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(5e3), "huge"))
    place = list(model.graph.node).index(head)
    for given, scaled in (("scaled", "more"), (head.input[0], "scaled")):
        model.graph.node.insert(place, onnx.helper.make_node("Mul", [given, "huge"], [scaled]))
    head.input[0] = "more"
    with pytest.raises(
        GraphError, match=r"--precision fp16: numbers inside the network reach .*, float16 ends at 65,504"
    ):
        Variant(model.SerializeToString(), "fp16", original.manifest.input, cut.trained)


@pytest.mark.slow
def test_only_the_manifest_of_a_variant_names_a_precision(
    original: Bundle, exported: dict[str, Bundle]
) -> None:
    assert "precision" not in json.loads((original.folder / "manifest.json").read_text())
    assert json.loads((exported["int8"].folder / "manifest.json").read_text())["precision"]["name"] == "int8"
    card = (exported["int8"].folder / "README.md").read_text()
    assert "--out models/tiny\n    python -m training.export --checkpoint runs/tiny --precision int8" in card
    assert "On 120 test images it decides as the float32 network does" in card
    assert "int8" not in (original.folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--onnx", "a.onnx", "--classes", "a.csv", "--precision", "int8"],
            "--precision goes with --checkpoint",
        ),
        (["--checkpoint", "runs/none", "--force-precision"], "--force-precision goes with --precision"),
        (
            ["--checkpoint", "runs/none", "--precision", "int4"],
            "argument --precision: invalid choice: 'int4'",
        ),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    try:
        code = main([*words, "--out", str(tmp_path / "m")])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
