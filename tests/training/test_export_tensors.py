"""Networks of other things than images, imported by the command and run by the service's engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from bundle.files import read
from service.adapters.onnx_engine import OnnxEngine
from service.adapters.serving_graph import compose
from tests.service import rows
from training.export import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that exports a graph as rows of numbers: the exit code, and what was said."""
    classes = tmp_path / "classes.csv"
    classes.write_text("red,400\ngreen,100\nblue,30\ngrey,5\n")

    def run(model: onnx.ModelProto, *options: str) -> tuple[int, str]:
        onnx.save(model, tmp_path / "theirs.onnx")
        files = ["--onnx", str(tmp_path / "theirs.onnx"), "--classes", str(classes)]
        code = main([*files, "--out", str(tmp_path / "theirs"), "--input", "tensor", *options])
        return code, capfd.readouterr().err

    return run


@pytest.mark.parametrize("batch", ["n", 4])
def test_measurements_become_a_bundle_that_is_served(export, tmp_path, batch) -> None:
    values = np.random.default_rng(0).normal(0, 1, (40, *rows.SHAPE)).astype(np.float32)
    logits = rows.of_vectors(values).astype(np.float32)
    np.savez(tmp_path / "held-out.npz", logits=logits, labels=np.arange(40) % 4)
    code, said = export(rows.vectors(batch=batch), "--holdout", str(tmp_path / "held-out.npz"))
    assert code == 0, said
    bundle = read(tmp_path / "theirs")
    assert bundle.manifest.input.model_dump() == {
        "kind": "tensor",
        "datatype": "FP32",
        "shape": [3, 2],
        "low": None,
        "high": None,
    }
    assert bundle.manifest.calibration.images == 40
    assert "FP32 of shape [3, 2]" in (tmp_path / "theirs" / "README.md").read_text()
    engine = OnnxEngine(compose(bundle), "cpu", largest_batch=8)
    out = engine.run(values[:8], np.zeros((1, 4)), np.zeros(8, dtype=np.int64), 4)
    np.testing.assert_allclose(out.logits, logits[:8], atol=1e-4)


def test_tokens_become_a_bundle_with_their_bounds(export, tmp_path) -> None:
    code, said = export(rows.tokens("length"), "--input-shape", "5", "--input-range", "0:9")
    assert code == 0, said
    spec = read(tmp_path / "theirs").manifest.input
    assert (spec.datatype, spec.shape, spec.low, spec.high) == ("INT64", [5], 0, 9)
    assert "from 0 to 9" in (tmp_path / "theirs" / "README.md").read_text()


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (rows.tokens(), [], "--input-range"),
        (rows.tokens(), ["--input-range", "0:10"], "fails on a batch of 1"),
        (rows.tokens("length"), ["--input-range", "0:9"], "--input-shape"),
        (rows.tokens(), ["--input-range", "0:9", "--input-shape", "4"], "--input-shape"),
        (rows.tokens(), ["--input-range", "0:9", "--input-shape", "5x1"], "--input-shape"),
        (rows.vectors(TensorProto.BOOL), [], "bool"),
        (rows.vectors(), ["--layout", "NCHW"], "--layout goes with --input image"),
        (rows.vectors(), ["--images", "here"], "--images goes with --input image"),
        (rows.vectors(), ["--resize", "crop"], "--resize"),
        (rows.vectors(), ["--input", "image", "--input-range", "0:9"], "goes with --input tensor"),
        (rows.vectors(), ["--input", "image"], "3 dimensions"),
    ],
)
def test_what_cannot_be_a_row_is_refused_in_one_line(export, tmp_path, model, options, says) -> None:
    code, said = export(model, *options)
    assert code == 2
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize(
    "option", ["--input-shape=0x3", "--input-shape=3x", "--input-range=9", "--input-range=a:b"]
)
def test_a_shape_or_range_that_is_none_is_refused(export, option, capfd) -> None:
    with pytest.raises(SystemExit) as stopped:
        export(rows.vectors(), option)
    assert stopped.value.code == 2
    assert "expected" in capfd.readouterr().err
