"""What the command refuses: in one line, with exit code 2 and nothing written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.training import graphs
from training.export import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def refusal(tmp_path: Path, classes: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that exports what must be refused, and returns the one line that says why."""

    def run(model: onnx.ModelProto | bytes | None, *options: str | Path) -> str:
        if isinstance(model, bytes):
            (tmp_path / "theirs.onnx").write_bytes(model)
        elif model is not None:
            onnx.save(model, tmp_path / "theirs.onnx")
        out = tmp_path / "models" / "theirs"
        arguments = ["--onnx", tmp_path / "theirs.onnx", "--classes", classes, "--out", out, *options]
        try:
            code = main([str(part) for part in arguments])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        printed, said = capfd.readouterr()
        assert code == 2
        assert not printed
        assert said.startswith("training.export: ")
        assert said.count("\n") == 1
        assert not list((tmp_path / "models").glob("*")) if (tmp_path / "models").exists() else True
        return said

    return run


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no class"),
        ("label,count\n", "names no class"),
        ("ant,1\nbee\n", "line 2: label,count"),
        ("ant,1\nbee,2,3\n", "line 2: label,count"),
        ("ant,1\nbee,two\n", "line 2: the count of 'bee' is 'two'"),
        ("ant,1\nbee,-2\n", "line 2"),
        ("ant,1\nbee,1.5\n", "line 2"),
        ("ant,1\nbee,nan\n", "line 2"),
        ("name,number\nant,1\n", "line 1: the count of 'name' is 'number'"),
        ("ant,1\n ,2\n", "line 2: a label has 1 to 1,000"),
        ("ant,1\n" + "b" * 1001 + ",2\n", "line 2: a label has 1 to 1,000"),
        ("ant,1\n\nant,2\n", "line 3: the label 'ant' stands in line 1"),
        ('ant,1\n"bee,2\n', "line 2"),
        ("a,1\nb,2\nc,3\nd,4\n", "names 4 classes"),
        ("a,1\nb,2\nc,3\nd,4\ne,5\nf,6\n", "names 6 classes"),
        ("a,1\nb,2\nc,3\nd,0\ne,5\n", "class 'd' has no training image"),
        ("a,0\nb,0\nc,0\nd,0\ne,0\n", "zero"),
    ],
)
def test_a_faulty_class_file_is_refused_with_its_line(
    refusal: Callable[..., str], classes: Path, text: str, says: str
) -> None:
    classes.write_text(text)
    assert says in refusal(graphs.classifier())


def test_class_files_that_are_no_text_or_not_there_are_refused(
    refusal: Callable[..., str], classes: Path
) -> None:
    classes.write_bytes(b"\xff\xfe\x00,1\n")
    assert "UTF-8" in refusal(graphs.classifier())
    classes.unlink()
    assert "No such file" in refusal(graphs.classifier())


def without_batch_freedom() -> onnx.ModelProto:
    """A graph that mixes the images of a batch: each loses the batch's mean."""
    model = graphs.classifier()
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.extend(
        [
            onnx.helper.make_node("ReduceMean", ["raw", "first"], ["mean"], keepdims=1),
            onnx.helper.make_node("Sub", ["raw", "mean"], ["logits"]),
        ]
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "first"))
    return model


def with_nan() -> onnx.ModelProto:
    model = graphs.classifier()
    matrix = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    matrix[0, 0] = np.nan
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(matrix, "matrix"))
    return model


def two_inputs() -> onnx.ModelProto:
    model = graphs.classifier()
    model.graph.input.append(onnx.helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch"]))
    return model


def spelt_out_softmax() -> onnx.ModelProto:
    model = graphs.classifier()
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.extend(
        [
            onnx.helper.make_node("Exp", ["raw"], ["exp"]),
            onnx.helper.make_node("ReduceSum", ["exp", "axis"], ["sum"], keepdims=1),
            onnx.helper.make_node("Div", ["exp", "sum"], ["logits"]),
        ]
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    return model


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (lambda: b"", [], "not an ONNX file"),
        (lambda: b"\x89PNG not a model", [], "not an ONNX file"),
        (lambda: None, [], "does not exist"),
        (two_inputs, [], "has 2: image, mask"),
        (with_nan, [], "NaN"),
        (without_batch_freedom, [], "otherwise than alone"),
        (spelt_out_softmax, [], "probabilities"),
        (lambda: graphs.classifier(sigmoid=True), [], "Sigmoid"),
        (lambda: graphs.classifier(aux=True), [], "--output: logits, aux"),
        (graphs.classifier, ["--output", "nope"], "outputs are logits"),
        (lambda: graphs.classifier(n_classes=4), [], "shape ['batch', 4]"),
        (lambda: graphs.classifier(size=("h", "w")), [], "--input-size"),
        (graphs.classifier, ["--input-size", "8x10"], "not what the graph takes: 6 x 10"),
        (graphs.classifier, ["--input-size", "8"], "HEIGHTxWIDTH"),
        (lambda: graphs.classifier(size=(6, 3)), [], "--layout"),
        (lambda: graphs.classifier(channels=4), [], "channels"),
        (lambda: graphs.classifier(dtype=TensorProto.DOUBLE), [], "double"),
        (graphs.classifier, ["--colour", "L"], "3 channels"),
        (graphs.classifier, ["--mean", "1,2"], "2 numbers"),
        (graphs.classifier, ["--mean", "a"], "numbers separated by commas"),
        (graphs.classifier, ["--mean", "nan"], "mean"),
        (graphs.classifier, ["--std", "0"], "std"),
        (graphs.classifier, ["--scale", "0"], "scale"),
        (graphs.classifier, ["--normalisation", "raw", "--scale", "2"], "one or the others"),
        (lambda: graphs.classifier(dtype=TensorProto.UINT8), ["--mean", "3"], "uint8"),
        (graphs.classifier, ["--resize", "crop"], "shorter_side"),
        (graphs.classifier, ["--resize", "crop", "--shorter-side", "8"], "smaller than the crop"),
        (graphs.classifier, ["--loss-offset", "fitted"], "needs --holdout"),
        (graphs.classifier, ["--loss-tau", "1"], "--loss-offset"),
        (graphs.classifier, ["--loss-offset", "log-prior", "--loss-tau", "nan"], "between 0 and 100"),
        (graphs.classifier, ["--loss-offset", "log-prior", "--loss-tau", "-1"], "between 0 and 100"),
        (graphs.classifier, ["--smoothing", "nan"], "moothing"),
        (graphs.classifier, ["--std", "inf"], "std"),
        (graphs.classifier, ["--input-size", "6x10", "--resize", "crop", "--shorter-side", "9999"], "8192"),
        (graphs.classifier, ["--smoothing", "-1"], "moothing"),
        (graphs.classifier, ["--name", "no spaces"], "cannot name a model"),
        (graphs.classifier, ["--images", "/nowhere"], "no folder"),
        (graphs.classifier, ["--holdout", "/nowhere.npz"], "does not exist"),
        (graphs.classifier, ["--holdout", "a.npz", "--images", "b"], "exclude"),
        (graphs.classifier, ["--normalise"], "unrecognized"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_one_line_with_nothing_written(
    refusal: Callable[..., str], model: Callable[[], Any], options: list[str], says: str
) -> None:
    assert says in refusal(model(), *options)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"logits": np.zeros((3, 5))}, "arrays logits and labels"),
        ({"logits": np.zeros((3, 4)), "labels": np.zeros(3, int)}, "5 classes"),
        ({"logits": np.zeros((3, 5)), "labels": np.zeros(2, int)}, "2 labels"),
        ({"logits": np.zeros((0, 5)), "labels": np.zeros(0, int)}, "0 labels"),
        ({"logits": np.full((3, 5), np.inf), "labels": np.zeros(3, int)}, "row 0 are not finite"),
        ({"logits": np.zeros((3, 5)), "labels": np.array([0, 1, 5])}, "outside 0 to 4"),
        ({"logits": np.zeros((3, 5)), "labels": np.array([0, -1, 1])}, "outside 0 to 4"),
        ({"logits": np.zeros((3, 5), int), "labels": np.zeros(3, int)}, "floats"),
        ({"logits": np.full((3, 5), 0.2), "labels": np.zeros(3, int)}, "probabilities"),
        ({"logits": np.array([[{}]]), "labels": np.zeros(1, int)}, "arrays logits and labels"),
    ],
)
def test_faulty_held_out_logits_are_refused(
    refusal: Callable[..., str], tmp_path: Path, arrays: dict[str, Any], says: str
) -> None:
    np.savez(tmp_path / "held.npz", **arrays)
    assert says in refusal(graphs.classifier(), "--holdout", tmp_path / "held.npz")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no image"),
        ({"ant/1.png": b"not an image"}, "ant/1.png: the first bytes name no image format"),
        ({"ant/1.png": b"\x89PNG\r\n\x1a\nbroken"}, "ant/1.png: the PNG image cannot be decoded"),
        ({"wolf/1.png": b""}, "'wolf' is no class"),
    ],
)
def test_faulty_labelled_folders_are_refused_with_the_file(
    refusal: Callable[..., str], tmp_path: Path, files: dict[str, bytes], says: str
) -> None:
    (tmp_path / "held").mkdir()
    for name, data in files.items():
        (tmp_path / "held" / name).parent.mkdir()
        (tmp_path / "held" / name).write_bytes(data)
    assert says in refusal(graphs.classifier(), "--images", tmp_path / "held")


def test_weights_that_lie_outside_the_folder_or_nowhere_are_refused(
    refusal: Callable[..., str], tmp_path: Path
) -> None:
    model = graphs.classifier()
    onnx.save_model(
        model, tmp_path / "theirs.onnx", save_as_external_data=True, location="w.data", size_threshold=0
    )
    (tmp_path / "w.data").unlink()
    assert "w.data" in refusal(None)
    broken = onnx.load_model(tmp_path / "theirs.onnx", load_external_data=False)
    (tmp_path.parent / "secret.data").write_bytes(bytes(1000))
    for tensor in broken.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../secret.data" if entry.key == "location" else entry.value
    assert "cannot be taken in" in refusal(broken.SerializeToString())
