"""Bundles that lie, break or overreach: each refused by its code and a reason, while the good ones serve."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from bundle.files import write
from service.adapters.bundles import load_all
from service.core.batcher import Capacity
from tests import tiny
from tests.service import networks

N_CLASSES = 4


def saved(folder, network, **said):
    """A bundle whose checksums hold, of any bytes or model."""
    data = network if isinstance(network, bytes) else network.SerializeToString()
    return write(folder, networks.manifest(folder.name, **said), {"model.onnx": data})


def changed(change):
    """A good network with something done to it."""

    def make(folder):
        network = networks.linear()
        replaced = change(network)
        saved(folder, network if replaced is None else replaced)

    return make


def weight(**fields):
    """The network's weights with other fields of the tensor."""

    def change(network):
        tensor = network.graph.initializer[0]
        for name, value in fields.items():
            if isinstance(value, list):
                tensor.ClearField(name)
                getattr(tensor, name).extend(value)
            else:
                setattr(tensor, name, value)

    return changed(change)


def weights(number):
    """One weight is this number."""

    def change(network):
        matrix = networks.weights(3, N_CLASSES).astype(np.float32)
        matrix[1, 2] = number
        network.graph.initializer[0].CopyFrom(numpy_helper.from_array(matrix, "W"))

    return changed(change)


def elsewhere(tensor, place="weights.bin"):
    """Let a tensor say that its numbers are in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    return tensor


def external(place):
    def make(folder):
        network = networks.linear()
        elsewhere(network.graph.initializer[0], place)
        saved(folder, network)
        (folder.parent / "weights.bin").write_bytes(bytes(48))
        (folder / "weights.bin").write_bytes(bytes(48))

    return make


def branch(name, tensor):
    """A graph that gives one constant."""
    shape = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    return helper.make_graph(
        [helper.make_node("Identity", [tensor.name], [name])], name, [], [shape], [tensor]
    )


def in_a_branch(operator):
    """External data in a graph inside an If or a Loop."""

    def change(network):
        hidden = elsewhere(numpy_helper.from_array(np.zeros(4, np.float32), "hidden"), "../../secret")
        body = branch("inner", hidden)
        if operator == "If":
            plain = branch("plain", numpy_helper.from_array(np.zeros(4, np.float32), "zeros"))
            node = helper.make_node("If", ["yes"], ["unused"], then_branch=plain, else_branch=body)
        else:
            node = helper.make_node("Loop", ["often", "yes"], ["unused"], body=body)
        network.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        network.graph.initializer.append(numpy_helper.from_array(np.array(1), "often"))
        network.graph.node.append(node)

    return changed(change)


def scaled(scale, *, kind=TensorProto.FLOAT):
    """An int8 network: pixels quantised and back, with this scale."""
    number = np.float32 if kind == TensorProto.FLOAT else np.float16

    def make(folder):
        nodes = [
            helper.make_node("Cast", ["pixels"], ["x"], to=kind),
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            helper.make_node("ReduceMean", ["d", "axes"], ["m"], keepdims=0),
            helper.make_node("MatMul", ["m", "W"], ["s"]),
            helper.make_node("Cast", ["s"], ["scores"], to=TensorProto.FLOAT),
        ]
        graph = helper.make_graph(
            nodes,
            "int8",
            [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 6, 4])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", N_CLASSES])],
            [
                numpy_helper.from_array(np.array(scale, number), "scale"),
                numpy_helper.from_array(np.array(3, np.uint8), "zero"),
                numpy_helper.from_array(np.array([2, 3]), "axes"),
                numpy_helper.from_array(networks.weights(3, N_CLASSES).astype(number), "W"),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
        model.ir_version = 9
        saved(folder, model)

    return make


def operator(name, domain="", **attributes):
    """The network's logits go through one more node."""

    def change(network):
        network.graph.node[-1].output[0] = "before"
        network.graph.node.append(helper.make_node(name, ["before"], ["scores"], domain=domain, **attributes))
        if domain:
            network.opset_import.append(helper.make_opsetid(domain, 1))

    return changed(change)


def huge_constant(network):
    """Numbers made of nothing when the model is loaded: four exabytes of them."""
    network.graph.initializer.append(numpy_helper.from_array(np.array([1 << 60]), "shape"))
    network.graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["much"]))
    network.graph.node.insert(1, helper.make_node("ReduceSum", ["much"], ["sum"], keepdims=0))
    network.graph.node[-1].output[0] = "before"
    network.graph.node.append(helper.make_node("Add", ["before", "sum"], ["scores"]))


def rank_of_output(shape):
    def change(network):
        network.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", TensorProto.FLOAT, shape))

    return changed(change)


def undeclared_logits(axes):
    """The output's shape is not declared, and when it runs it is another than batch x classes."""

    def change(network):
        network.graph.initializer.append(numpy_helper.from_array(np.array(axes), "more"))
        network.graph.node[-1].output[0] = "before"
        network.graph.node.append(helper.make_node("Unsqueeze", ["before", "more"], ["scores"]))
        network.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("scores"))
        network.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT

    return changed(change)


def manifest(change):
    """A good bundle whose manifest is changed afterwards, as text or as an object."""

    def make(folder):
        saved(folder, networks.linear())
        path = folder / "manifest.json"
        if callable(change):
            said = json.loads(path.read_bytes())
            change(said)
            path.write_text(json.dumps(said))
        else:
            old, new = change
            text = path.read_text()
            assert old in text
            path.write_text(text.replace(old, new, 1))

    return make


def files(change):
    """A good bundle whose folder is changed afterwards."""

    def make(folder):
        saved(folder, networks.linear())
        change(folder)

    return make


def named(name):
    def change(said):
        said["files"][name] = hashlib.sha256(b"x").hexdigest()

    return manifest(change)


def link_out(folder):
    model = folder / "model.onnx"
    shutil.move(model, folder.parent.parent / f"{folder.name}.onnx")
    model.symlink_to(folder.parent.parent / f"{folder.name}.onnx")


def labels_twice(said):
    said["classes"][1]["label"] = said["classes"][0]["label"]


def empty(name):
    return files(lambda folder: (folder / name).write_bytes(b""))


def more_classes(folder):
    saved(folder, networks.linear(n_classes=3))


POISON = {
    "external": (external("weights.bin"), "model-external-data"),
    "external-upwards": (external("../weights.bin"), "model-external-data"),
    "external-absolute": (external("/etc/passwd"), "model-external-data"),
    "external-in-if": (in_a_branch("If"), "model-external-data"),
    "external-in-loop": (in_a_branch("Loop"), "model-external-data"),
    "path-upwards": (named("../secret.bin"), "bundle-path"),
    "path-absolute": (named("/etc/passwd"), "bundle-path"),
    "path-hidden": (named(".ssh"), "bundle-path"),
    "symlink": (files(link_out), "bundle-link"),
    "missing-model": (files(lambda folder: (folder / "model.onnx").unlink()), "bundle-incomplete"),
    "missing-manifest": (files(lambda folder: (folder / "manifest.json").unlink()), "bundle-incomplete"),
    "folder-as-model": (
        files(lambda folder: ((folder / "model.onnx").unlink(), (folder / "model.onnx").mkdir())),
        "bundle-incomplete",
    ),
    "pipe-as-model": (
        files(lambda folder: ((folder / "model.onnx").unlink(), os.mkfifo(folder / "model.onnx"))),
        "bundle-incomplete",
    ),
    "empty-model": (empty("model.onnx"), "bundle-checksum"),
    "empty-manifest": (empty("manifest.json"), "manifest-syntax"),
    "empty-model-that-is-named": (lambda folder: saved(folder, b""), "model-not-onnx"),
    "wrong-sha256": (files(lambda folder: (folder / "model.onnx").write_bytes(b"x")), "bundle-checksum"),
    "no-onnx": (lambda folder: saved(folder, b"\x89PNG\r\n\x1a\n" + bytes(99)), "model-not-onnx"),
    "text": (lambda folder: saved(folder, b"weights" * 1000), "model-not-onnx"),
    "half-a-model": (
        lambda folder: saved(folder, networks.linear().SerializeToString()[:-40]),
        "model-not-onnx",
    ),
    "nan": (weights(np.nan), "model-non-finite"),
    "infinite": (weights(-np.inf), "model-non-finite"),
    "classes": (more_classes, "model-classes"),
    "tensor-of-a-size-that-is-not-there": (weight(dims=[1 << 40, 1 << 20]), "model-not-onnx"),
    "tensor-of-a-negative-size": (weight(dims=[-3, 4]), "model-does-not-run"),
    "tensor-of-no-kind": (weight(data_type=99), "model-does-not-run"),
    "exabytes-of-zeros": (changed(huge_constant), "model-does-not-run"),
    "another-domain": (operator("Steal", "com.example"), "model-domain"),
    "an-operator-of-the-runtime": (operator("Inverse", "com.microsoft"), "model-domain"),
    "an-unknown-operator": (operator("Steal"), "model-does-not-run"),
    "three-dimensions": (rank_of_output(["n", 2, 2]), "model-output"),
    "one-dimension": (rank_of_output(["n"]), "model-output"),
    "three-dimensions-unsaid": (undeclared_logits([2]), "model-does-not-run"),
    "one-batch": (rank_of_output([1, N_CLASSES]), "model-batch"),
    "infinite-int8-scale": (scaled(np.inf), "model-non-finite"),
    "nan-int8-scale": (scaled(np.nan), "model-non-finite"),
    "infinite-fp16-scale": (scaled(np.inf, kind=TensorProto.FLOAT16), "model-non-finite"),
    "manifest-nan": (manifest(('"temperature": 1.25', '"temperature": NaN')), "manifest-invalid"),
    "manifest-infinite": (manifest(('"temperature": 1.25', '"temperature": 1e999')), "manifest-invalid"),
    "manifest-huge": (manifest(('"temperature": 1.25', '"temperature": 1e300')), "manifest-range"),
    "manifest-of-digits": (
        manifest(('"temperature": 1.25', f'"temperature": {"9" * 5000}')),
        "manifest-syntax",
    ),
    "huge-offset": (manifest(lambda said: said.update(logit_offset=[0, 1e300, 0, 0])), "manifest-range"),
    "tiny-std": (manifest(lambda said: said["input"].update(std=[1e-300] * 3)), "manifest-range"),
    "labels-twice": (manifest(labels_twice), "manifest-invalid"),
    "count-beyond-all": (
        manifest(lambda said: said["classes"][0].update(count=10**30)),
        "manifest-invalid",
    ),
}


@contextmanager
def loading(folder):
    models = load_all(folder, capacity=Capacity(workers=1, largest_batch=2))
    try:
        yield models
    finally:
        asyncio.run(models.stop())


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """All of them in one folder, between two good ones."""
    folder = tmp_path_factory.mktemp("poisoned") / "models"
    tiny.make(folder / "a-good-one")
    tiny.make(folder / "z-good-one")
    for name, (make, _) in POISON.items():
        make(folder / name)
    with loading(folder) as models:
        yield models, folder


@pytest.mark.parametrize("name", POISON)
def test_it_is_refused_by_its_code_and_a_reason_without_a_path(loaded, name):
    models, folder = loaded
    (entry,) = [one for one in models.refused if one.folder == name]
    assert entry.code == POISON[name][1], entry.detail
    assert entry.detail
    assert str(folder) not in entry.detail
    assert "\n" not in entry.detail


def test_the_good_ones_serve(loaded):
    models, _ = loaded
    assert [model.name for model in models.all()] == ["a-good-one", "z-good-one"]
    for model in models.all():
        asyncio.run(model.check())


def test_a_hard_link_is_a_file_like_others_for_its_bytes_are_checked(tmp_path):
    saved(tmp_path / "models" / "linked", networks.linear())
    model = tmp_path / "models" / "linked" / "model.onnx"
    os.link(model, tmp_path / "outside.onnx")
    with loading(tmp_path / "models") as models:
        assert [one.name for one in models.all()] == ["linked"]
    (tmp_path / "outside.onnx").write_bytes(b"another")
    with loading(tmp_path / "models") as models:
        assert [one.code for one in models.refused] == ["bundle-checksum"]


def inside(field, message):
    """A protobuf message as a field of another."""
    length, size = b"", len(message)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([field << 3 | 2]) + length + bytes([size]) + message


def test_a_model_nested_without_end_is_refused_and_no_crash(tmp_path):
    node = helper.make_node("Identity", ["x"], ["y"]).SerializeToString()
    for _ in range(5000):  # a node's attribute (5) holds a graph (6), and that a node (1)
        node = inside(5, inside(6, inside(1, node)))
    network = networks.linear().SerializeToString() + inside(7, inside(1, node))
    saved(tmp_path / "models" / "deep", network)
    with loading(tmp_path / "models") as models:
        assert [one.code for one in models.refused] == ["model-not-onnx"]


def test_a_function_of_the_models_own_is_no_foreign_operator(tmp_path):
    def change(network, defined):
        network.graph.node[-1].output[0] = "before"
        network.graph.node.append(helper.make_node("Twice", ["before"], ["scores"], domain="mine"))
        network.opset_import.append(helper.make_opsetid("mine", 1))
        add = helper.make_node("Add", ["x", "x"], ["y"])
        if defined:
            opsets = [helper.make_opsetid("", 18)]
            network.functions.append(helper.make_function("mine", "Twice", ["x"], ["y"], [add], opsets))

    for name, defined in (("own", True), ("foreign", False)):
        changed(lambda network, defined=defined: change(network, defined))(tmp_path / "models" / name)
    with loading(tmp_path / "models") as models:
        assert [one.name for one in models.all()] == ["own"]
        assert [one.code for one in models.refused] == ["model-domain"]
