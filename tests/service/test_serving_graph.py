"""The composed graph against the formula in longtail, and the refusal of what cannot be composed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundle.files import BundleError
from bundle.manifest import ImageInput
from longtail import adjustment as formula
from service.adapters.onnx_engine import OnnxEngine
from service.adapters.serving_graph import compose
from tests.service import networks

PIXELS = np.random.default_rng(1).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)


def run(bundle, pixels, offsets=None, rows=None, top_k=4):
    graph = compose(bundle)
    onnx.checker.check_model(onnx.load_model_from_string(graph.model), full_check=True)
    offsets = np.zeros((1, graph.n_classes)) if offsets is None else offsets
    rows = np.zeros(len(pixels), dtype=np.int64) if rows is None else rows
    return OnnxEngine(graph, "cpu", largest_batch=8).run(pixels, offsets, rows, top_k)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("colour", ["RGB", "BGR"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(TensorProto.FLOAT, 1e-5), (TensorProto.DOUBLE, 1e-5), (TensorProto.FLOAT16, 0.02)],
)
def test_pixels_reach_the_network_scaled_in_its_colour_order_layout_and_precision(
    tmp_path, layout, colour, dtype, tolerance
):
    spec = ImageInput(
        height=6, width=4, colour=colour, mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3], layout=layout
    )
    bundle = networks.bundle(
        tmp_path / "m", networks.linear(layout=layout, dtype=dtype), networks.manifest(input=spec)
    )
    out = run(bundle, PIXELS)
    np.testing.assert_allclose(out.logits, networks.logits(PIXELS, spec), atol=tolerance)
    assert out.logits.dtype == np.float32


def test_a_grey_network_gets_one_channel(tmp_path):
    spec = ImageInput(height=6, width=4, colour="L", mean=[0.5], std=[0.2])
    bundle = networks.bundle(tmp_path / "m", networks.linear(channels=1), networks.manifest(input=spec))
    grey = PIXELS[..., :1]
    np.testing.assert_allclose(run(bundle, grey).logits, networks.logits(grey, spec), atol=1e-5)


def test_a_network_that_normalises_inside_gets_the_bytes_as_they_are(tmp_path):
    spec = ImageInput(height=6, width=4, scale=1, mean=[0, 0, 0], std=[1, 1, 1], layout="NHWC")
    network = networks.linear(layout="NHWC", dtype=TensorProto.UINT8)
    bundle = networks.bundle(tmp_path / "m", network, networks.manifest(input=spec))
    np.testing.assert_allclose(run(bundle, PIXELS).logits, networks.logits(PIXELS, spec), rtol=1e-5)


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 20])
def test_every_opset_that_is_taken_gives_the_formula(tmp_path, opset):
    offset = [0.0, -1.5, 2.5, 0.25]
    said = networks.manifest(logit_offset=offset, temperature=1.7)
    bundle = networks.bundle(tmp_path / "m", networks.linear(opset=opset), said)
    table = np.array([[0.0, 1, 2, 3], [300, -np.inf, 299.5, -4000]])
    rows = np.array([0, 1, 0, 1, 1])
    out = run(bundle, PIXELS, table, rows)
    logits = out.logits.astype(np.float64)
    for scores, indices, best, log_partition in (
        (logits + table[rows], out.indices, out.scores, out.log_partition),
        (
            logits + np.array(offset),
            out.unadjusted_index[:, None],
            out.unadjusted_score[:, None],
            out.unadjusted_log_partition,
        ),
    ):
        np.testing.assert_array_equal(indices, formula.top_k(scores, indices.shape[1]))
        np.testing.assert_allclose(best, np.take_along_axis(scores, indices, 1), rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(log_partition, formula.log_partition(scores, 1.7), rtol=1e-6, atol=1e-5)


def test_ties_go_to_the_lower_index(tmp_path):
    network = networks.linear()
    network.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((3, 4), np.float32), "W"))
    bundle = networks.bundle(tmp_path / "m", network, networks.manifest())
    out = run(bundle, PIXELS, np.array([[1.0, 2, 2, 1]]))
    assert out.indices.tolist() == [[1, 2, 0, 3]] * 5
    assert out.unadjusted_index.tolist() == [0] * 5


@pytest.mark.parametrize("prefix", ["tare_", "tare__", "tare_constant0"])
def test_our_names_never_meet_the_networks(tmp_path, prefix):
    said = networks.manifest(prefix=prefix)
    bundle = networks.bundle(tmp_path / "m", networks.linear(prefix=prefix), said)
    np.testing.assert_allclose(run(bundle, PIXELS).logits, networks.logits(PIXELS, said.input), atol=1e-5)


def test_weights_listed_as_inputs_stay_weights(tmp_path):
    network = networks.linear(ir=3, opset=11)
    network.graph.input.append(helper.make_tensor_value_info("W", TensorProto.FLOAT, [3, 4]))
    said = networks.manifest()
    bundle = networks.bundle(tmp_path / "m", network, said)
    np.testing.assert_allclose(run(bundle, PIXELS).logits, networks.logits(PIXELS, said.input), atol=1e-5)


def test_one_class_is_enough(tmp_path):
    said = networks.manifest(n_classes=1)
    out = run(networks.bundle(tmp_path / "m", networks.linear(n_classes=1), said), PIXELS)
    assert out.indices.tolist() == [[0]] * 5
    np.testing.assert_allclose(out.scores[:, 0] / said.temperature, out.log_partition)


def altered(change):
    network = networks.linear()
    change(network)
    return network


def external(network):
    tensor = network.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def weight(value):
    def change(network):
        values = networks.weights(3, 4).astype(np.float32)
        values[1, 2] = value
        network.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "W"))

    return change


def inner_nan(network):
    """A NaN in a branch of an If."""
    value = numpy_helper.from_array(np.full(2, np.nan, np.float32))
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=value)],
        "branch",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [2])],
    )
    condition = numpy_helper.from_array(np.array(True), "yes")
    network.graph.initializer.append(condition)
    network.graph.node.append(
        helper.make_node("If", ["yes"], ["unused"], then_branch=branch, else_branch=branch)
    )


REFUSED = {
    "model-not-onnx": [b"", b"no model at all", b"PK\x03\x04" + bytes(100)],
    "model-external-data": [altered(external)],
    "model-non-finite": [altered(weight(np.nan)), altered(weight(-np.inf)), altered(inner_nan)],
    "model-classes": [networks.linear(n_classes=5)],
    "model-opset": [networks.linear(opset=10), networks.linear(opset=21)],
    "model-ir-version": [networks.linear(ir=11)],
    "model-input": [
        networks.linear(size=(4, 6)),
        networks.linear(channels=1),
        networks.linear(layout="NHWC"),
        networks.linear(prefix="other_"),
        altered(lambda n: n.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))),
    ],
    "model-output": [
        altered(lambda n: setattr(n.graph.output[0], "name", "m")),
        altered(lambda n: n.graph.output[0].type.tensor_type.shape.dim.add(dim_value=1)),
    ],
    "model-batch": [networks.linear(batch=1), networks.linear(batch=16)],
    "model-dtype": [
        networks.linear(dtype=TensorProto.UINT8),  # while the manifest asks for mean and std
        altered(lambda n: setattr(n.graph.input[0].type.tensor_type, "elem_type", TensorProto.INT64)),
        altered(lambda n: setattr(n.graph.output[0].type.tensor_type, "elem_type", TensorProto.INT64)),
    ],
}


@pytest.mark.parametrize(
    ("code", "model"), [(code, model) for code, many in REFUSED.items() for model in many]
)
def test_what_cannot_be_served_is_refused_by_code_and_one_sentence(tmp_path, code, model):
    bundle = networks.bundle(tmp_path / "m", model, networks.manifest())
    with pytest.raises(BundleError) as refused:
        compose(bundle)
    assert refused.value.code == code
    assert "\n" not in refused.value.detail


@pytest.mark.parametrize(
    "changes", [{"temperature": 1e-60}, {"temperature": 1e60}, {"logit_offset": [0, 0, 0, 1e39]}]
)
def test_a_manifest_with_numbers_that_no_float32_holds_is_refused(tmp_path, changes):
    bundle = networks.bundle(tmp_path / "m", networks.linear(), networks.manifest(**changes))
    with pytest.raises(BundleError) as refused:
        compose(bundle)
    assert refused.value.code == "manifest-range"


def test_a_lone_infinity_is_a_mask_and_no_weight(tmp_path):
    network = networks.linear()
    network.graph.initializer.append(numpy_helper.from_array(np.array(-np.inf, np.float32), "mask"))
    network.graph.node.append(helper.make_node("Max", ["scores", "mask"], ["masked"]))
    network.graph.output[0].name = "masked"
    said = networks.manifest(graph={"input": "pixels", "output": "masked"})
    out = run(networks.bundle(tmp_path / "m", network, said), PIXELS)
    np.testing.assert_allclose(out.logits, networks.logits(PIXELS, said.input), atol=1e-5)


def test_the_bytes_on_disk_are_checked_again_when_they_are_composed(tmp_path):
    bundle = networks.bundle(tmp_path / "m", networks.linear(), networks.manifest())
    Path(bundle.folder / "model.onnx").write_bytes(networks.linear(n_classes=5).SerializeToString())
    with pytest.raises(BundleError) as refused:
        compose(bundle)
    assert refused.value.code == "bundle-checksum"
