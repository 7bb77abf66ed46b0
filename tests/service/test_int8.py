"""A network of whole numbers gives the same sums on every CPU, and shows in GET /models what it is."""

from __future__ import annotations

import platform
import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundle.manifest import ImageInput, Precision, PrecisionCheck
from service.adapters import onnx_session
from service.adapters.onnx_engine import OnnxEngine
from service.adapters.onnx_session import EXACT_INT8, open_session, saturates
from service.adapters.serving_graph import compose
from tests import tiny
from tests.service import networks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from starlette.testclient import TestClient

    from bundle.files import Bundle

CHANNELS, SIDE = 3, 4
SPEC = ImageInput(height=SIDE, width=SIDE, scale=1, mean=[0, 0, 0], std=[1, 1, 1])
WEIGHTS = np.repeat(np.array([127, -127, 90, 1], dtype=np.int8)[:, None, None, None], CHANNELS, axis=1)
STEP = 12_000
SAID = Precision(
    name="int8",
    method="by hand",
    tau=1.0,
    least_agreement=0.93,
    forced=False,
    holdout=PrecisionCheck(images=50, agreement=0.98, balanced_error_before=0.4, balanced_error=0.41),
    test=None,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """logits = the sum of pixel times weight, by a convolution in QDQ form, in steps of STEP."""
    kernel = np.broadcast_to(WEIGHTS, (4, CHANNELS, SIDE, SIDE)).copy()
    held = {
        "one": np.float32(1),
        "zero": np.uint8(0),
        "W": kernel,
        "ones": np.ones(4, np.float32),
        "zeros": np.zeros(4, np.int8),
        "step": np.float32(STEP),
        "middle": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["pixels", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["W", "ones", "zeros"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["sums"]),
        helper.make_node("QuantizeLinear", ["sums", "step", "middle"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "step", "middle"], ["rounded"]),
        helper.make_node("Flatten", ["rounded"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", CHANNELS, SIDE, SIDE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return networks.bundle(tmp_path / "sums", model, networks.manifest(input=SPEC, precision=SAID))


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the processor say that it can do something."""

    def say(flag: str) -> None:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu sse4_2 {flag}\n")
        monkeypatch.setattr(onnx_session, "_CPU_INFO", tmp_path / "cpuinfo")

    return say


@pytest.mark.parametrize("hidden", [False, True])
def test_sums_beyond_16_bits_are_not_clipped_with_the_fast_instructions_or_without(
    bundle: Bundle, pretend: Callable[[str], None], hidden: bool
) -> None:
    if hidden:
        pretend("avx2")
    pixels = np.random.default_rng(0).integers(200, 256, (5, SIDE, SIDE, CHANNELS), dtype=np.uint8)
    engine = OnnxEngine(compose(bundle), "cpu", largest_batch=5)
    out = engine.run(pixels, np.zeros((1, 4)), np.zeros(5, np.int64), 4)
    sums = np.einsum("bhwc,kc->bk", pixels.astype(np.int64), WEIGHTS[:, :, 0, 0].astype(np.int64))
    assert abs(sums).max() > 2**15
    np.testing.assert_array_equal(out.logits, STEP * np.rint(sums / STEP))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors do not clip")
def test_the_exact_kernels_are_asked_for_only_where_the_fast_ones_clip(
    bundle: Bundle, pretend: Callable[[str], None]
) -> None:
    graph = compose(bundle)
    pretend("avx2")
    options = open_session(graph, "cpu", 1).get_session_options()
    assert options.get_session_config_entry(EXACT_INT8) == "1"
    pretend("avx512_vnni")
    options = open_session(graph, "cpu", 1).get_session_options()
    with pytest.raises(RuntimeError, match=EXACT_INT8):
        options.get_session_config_entry(EXACT_INT8)


@pytest.mark.parametrize(
    ("machine", "flags", "clips"),
    [
        ("x86_64", {"avx2"}, True),
        ("x86_64", set(), True),
        ("AMD64", {"avx2", "avx512f"}, True),
        ("x86_64", {"avx2", "avx_vnni"}, False),
        ("x86_64", {"avx512f", "avx512_vnni"}, False),
        ("aarch64", set(), False),
    ],
)
def test_sums_are_clipped_on_x86_without_vnni(machine: str, flags: set[str], clips: bool) -> None:
    assert saturates(machine, flags) == clips


def test_a_model_says_how_it_was_made_faster_or_that_it_was_not(
    bundle: Bundle, client_for: Callable[..., TestClient], tiny_models: Path
) -> None:
    shutil.copytree(tiny_models / "tiny", bundle.folder.parent / "models" / "tiny")
    shutil.copytree(bundle.folder, bundle.folder.parent / "models" / "linear")
    client = client_for(models_dir=bundle.folder.parent / "models")
    whole = client.get("/models/linear").json()
    assert whole["precision"] == bundle.manifest.precision.model_dump(mode="json")
    assert whole["precision"]["holdout"]["agreement"] == 0.98
    assert client.get("/models/tiny").json()["precision"] is None
    assert (
        client.post("/predict?model=linear", content=tiny.png(np.zeros((4, 4, 3), np.uint8))).status_code
        == 200
    )
