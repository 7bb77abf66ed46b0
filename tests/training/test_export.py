"""The command as a person types it: a file from elsewhere becomes a bundle, or is refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from PIL import Image

from bundle.files import Bundle, read
from bundle.preprocessing import decode
from service.adapters.onnx_engine import OnnxEngine
from service.adapters.serving_graph import compose
from tests.training import graphs
from training.export import main
from training.import_inputs import NORMALISATIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


REPOSITORY = Path(__file__).parents[2]


def answers(bundle: Bundle, pixels: NDArray[np.uint8]) -> NDArray[Any]:
    """Run the bundle's graph by the manifest alone, written out anew."""
    spec = bundle.manifest.input
    images = pixels[..., ::-1] if spec.colour == "BGR" else pixels
    images = (images * spec.scale - np.array(spec.mean)) / np.array(spec.std)
    if spec.layout == "NCHW":
        images = images.transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(bundle.model_bytes(), providers=["CPUExecutionProvider"])
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
    graph = bundle.manifest.graph
    feed = {graph.input: images.astype(dtype[session.get_inputs()[0].type])}
    return np.asarray(session.run([graph.output], feed)[0])


def pixels(
    n: int = 7, channels: int = 3, size: tuple[int, int] = (graphs.HEIGHT, graphs.WIDTH)
) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (n, *size, channels), dtype=np.uint8)


def test_a_plain_classifier_becomes_a_bundle_that_answers_as_it_did(export: Callable[..., Bundle]) -> None:
    bundle = export(graphs.classifier(), "--normalisation", "imagenet")
    manifest = bundle.manifest
    assert manifest.labels == list(graphs.LABELS)
    assert manifest.class_counts.tolist() == list(graphs.COUNTS)
    assert manifest.source_prior == pytest.approx(np.array(graphs.COUNTS) / sum(graphs.COUNTS))
    assert (manifest.input.height, manifest.input.width, manifest.input.layout) == (6, 10, "NCHW")
    assert [(group.name, group.indices) for group in manifest.groups] == [
        ("many", [0, 1]),
        ("medium", [2]),
        ("few", [3, 4]),
    ]
    _, mean, std = NORMALISATIONS["imagenet"]
    normal = (pixels().transpose(0, 3, 1, 2) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert answers(bundle, pixels()) == pytest.approx(graphs.logits(normal), abs=1e-4)


def test_without_held_out_images_the_manifest_says_that_nothing_was_fitted(
    export: Callable[..., Bundle],
) -> None:
    manifest = export(graphs.classifier()).manifest
    assert (manifest.temperature, manifest.tau, manifest.tau_curve) == (1.0, None, [])
    assert manifest.calibration.temperature == "unfitted"
    assert manifest.calibration.logit_offset == "assumed"
    assert manifest.logit_offset == [0.0] * 5


@pytest.mark.parametrize(
    ("made", "options", "expected"),
    [
        ({"inside": (255.0, 0.5)}, ["--normalisation", "raw"], lambda p: p / 255 - 0.5),
        ({"inside": (1.0, 0.5)}, [], lambda p: p / 255 - 0.5),
        ({}, ["--normalisation", "symmetric"], lambda p: p / 127.5 - 1),
        ({}, ["--scale", "1", "--mean", "120,110,100", "--std", "50"], lambda p: (p - [120, 110, 100]) / 50),
        ({}, ["--colour", "BGR"], lambda p: p[..., ::-1] / 255),
        ({"layout": "NHWC"}, [], lambda p: p / 255),
        ({"dtype": TensorProto.UINT8, "inside": (255.0, 0.5)}, [], lambda p: p / 255 - 0.5),
        (
            {"dtype": TensorProto.UINT8, "inside": (255.0, 0.5), "layout": "NHWC"},
            [],
            lambda p: p / 255 - 0.5,
        ),
        ({"maps": True}, [], lambda p: p / 255),
        ({"batch": 1}, [], lambda p: p / 255),
        ({"batch": 4}, [], lambda p: p / 255),
        ({"opset": 26, "ir": 13}, [], lambda p: p / 255),
        ({"opset": 9, "ir": 4}, [], lambda p: p / 255),
        ({"size": ("height", "width")}, ["--input-size", "6x10"], lambda p: p / 255),
    ],
    ids=str,
)
def test_what_the_graph_cannot_tell_is_taken_from_the_options(
    export: Callable[..., Bundle], made: dict[str, Any], options: list[str], expected: Callable[..., Any]
) -> None:
    bundle = export(graphs.classifier(**made), *options)
    normal = expected(pixels().astype(np.float64)).transpose(0, 3, 1, 2)
    assert answers(bundle, pixels()) == pytest.approx(graphs.logits(normal), abs=1e-4)
    engine = OnnxEngine(compose(bundle), "cpu", largest_batch=2)  # as the service will run it
    served = engine.run(pixels()[:2], np.zeros((1, 5)), np.zeros(2, np.int64), 5)
    assert served.logits == pytest.approx(graphs.logits(normal)[:2], abs=1e-4)
    model = onnx.load_model_from_string(bundle.model_bytes())
    assert model.ir_version <= 10
    assert 11 <= model.opset_import[0].version <= 20
    shape = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape[0] == "batch"
    assert sorted(shape[1:]) == [3, 6, 10]


def test_a_grey_network_is_fed_grey(export: Callable[..., Bundle]) -> None:
    bundle = export(graphs.classifier(channels=1))
    assert bundle.manifest.input.colour == "L"
    grey = pixels(channels=1)
    assert answers(bundle, grey) == pytest.approx(graphs.logits(grey.transpose(0, 3, 1, 2) / 255), abs=1e-4)


def test_half_precision_stays_half_precision(export: Callable[..., Bundle]) -> None:
    bundle = export(graphs.classifier(dtype=TensorProto.FLOAT16))
    given = answers(bundle, pixels())
    assert given.dtype == np.float16
    assert given == pytest.approx(graphs.logits(pixels().transpose(0, 3, 1, 2) / 255), abs=2e-2)


def test_logits_are_taken_before_a_final_softmax_and_it_is_said(
    export: Callable[..., Bundle], capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = export(graphs.classifier(softmax=True))
    assert "Softmax" in capfd.readouterr().err
    assert answers(bundle, pixels()) == pytest.approx(
        graphs.logits(pixels().transpose(0, 3, 1, 2) / 255), abs=1e-4
    )


def test_weights_beside_the_file_are_taken_in(
    export: Callable[..., Bundle], tmp_path: Path, classes: Path
) -> None:
    onnx.save_model(
        graphs.classifier(),
        tmp_path / "apart.onnx",
        save_as_external_data=True,
        location="apart.data",
        size_threshold=0,
    )
    assert (tmp_path / "apart.data").stat().st_size > 0
    out = tmp_path / "models" / "apart"
    assert main(["--onnx", str(tmp_path / "apart.onnx"), "--classes", str(classes), "--out", str(out)]) == 0
    (tmp_path / "apart.data").unlink()
    assert answers(read(out), pixels()) == pytest.approx(
        graphs.logits(pixels().transpose(0, 3, 1, 2) / 255), abs=1e-4
    )


@pytest.mark.parametrize("n_classes", [1, 2, pytest.param(10_000, marks=pytest.mark.slow)])
def test_few_and_many_classes_are_imported(
    export: Callable[..., Bundle], classes: Path, tmp_path: Path, n_classes: int
) -> None:
    classes.write_text("".join(f"class {i},{i + 1}\n" for i in range(n_classes)))
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, n_classes)).astype(np.float32), rng.integers(0, n_classes, 60)
    logits[np.arange(60), labels] += 2
    np.savez(tmp_path / "held.npz", logits=logits, labels=labels)
    bundle = export(graphs.classifier(n_classes=n_classes), "--holdout", tmp_path / "held.npz")
    assert len(bundle.manifest.classes) == n_classes
    assert bundle.manifest.tau is not None


def test_of_several_outputs_the_named_one_is_kept_alone(export: Callable[..., Bundle]) -> None:
    bundle = export(graphs.classifier(aux=True), "--output", "logits")
    model = onnx.load_model_from_string(bundle.model_bytes())
    assert [value.name for value in model.graph.output] == ["logits"]
    assert "aux_matrix" not in {tensor.name for tensor in model.graph.initializer}


def test_a_labelled_folder_is_decoded_by_the_rules_of_serving(
    export: Callable[..., Bundle], tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    expected = {}
    for label in graphs.LABELS:
        (tmp_path / "held" / label).mkdir(parents=True)
        for i in range(3):
            path = tmp_path / "held" / label / f"{i}.{('png', 'jpg', 'webp')[i]}"
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
            expected[path] = graphs.LABELS.index(label)
    (tmp_path / "held" / "ant" / ".hidden").write_text("not an image")
    options = ["--resize", "crop", "--shorter-side", "12", "--interpolation", "bicubic"]
    bundle = export(graphs.classifier(), "--images", tmp_path / "held", *options)
    held_out = bundle.holdout()
    assert held_out is not None
    assert held_out.labels.tolist() == [expected[path] for path in sorted(expected)]
    images = np.stack([decode(path.read_bytes(), bundle.manifest.input) for path in sorted(expected)])
    assert held_out.logits == pytest.approx(graphs.logits(images.transpose(0, 3, 1, 2) / 255), abs=1e-4)


def test_a_header_blank_lines_quotes_and_a_byte_order_mark_are_allowed(
    export: Callable[..., Bundle], classes: Path
) -> None:
    classes.write_text(
        '\ufeffLabel, Count\n\n"ant, red",5\nbee,6\r\n猫,7\n"a ""b""",8\n e , 9 \n', encoding="utf-8"
    )
    assert export(graphs.classifier()).manifest.labels == ["ant, red", "bee", "猫", 'a "b"', "e"]


def test_zero_counts_are_taken_where_smoothing_is_asked_for(
    export: Callable[..., Bundle], classes: Path
) -> None:
    classes.write_text("a,1\nb,2\nc,3\nd,0\ne,5\n")
    prior = export(graphs.classifier(), "--smoothing", "0.5").manifest.source_prior
    assert prior == pytest.approx(np.array([1.5, 2.5, 3.5, 0.5, 5.5]) / 13.5)


def test_an_existing_bundle_is_kept_unless_forced(
    export: Callable[..., Bundle], tmp_path: Path, classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = export(graphs.classifier())
    arguments = ["--onnx", tmp_path / "theirs.onnx", "--classes", classes, "--out", before.folder]
    assert main([str(part) for part in arguments]) == 2
    assert "--force" in capsys.readouterr().err
    assert read(before.folder).version == before.version
    classes.write_text("a,1\nb,2\nc,3\nd,4\ne,5\n")
    assert main([*(str(part) for part in arguments), "--force"]) == 0
    assert read(before.folder).manifest.labels == ["a", "b", "c", "d", "e"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["theirs"]


def test_the_name_can_differ_from_the_folder_and_json_tells_the_version(
    tmp_path: Path, classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(graphs.classifier(), tmp_path / "theirs.onnx")
    out = tmp_path / "models" / "theirs"
    arguments = ["--onnx", tmp_path / "theirs.onnx", "--classes", classes, "--out", out]
    assert main([*(str(part) for part in arguments), "--name", "mine", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    bundle = read(out)
    assert told["version"] == bundle.version
    assert bundle.manifest.name == "mine"


def test_a_guessing_network_is_pointed_at_the_order_of_classes_and_the_normalisation(
    export: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "held.npz",
        logits=rng.normal(size=(50, 5)) * [9, 0, 0, 0, 0] + [20, 0, 0, 0, 0],
        labels=np.arange(50) % 5,
    )
    export(graphs.classifier(), "--holdout", tmp_path / "held.npz")
    assert "order of the classes" in capsys.readouterr().err


def test_it_runs_where_torch_cannot_be_imported_and_writes_nothing_in_an_empty_home(
    tmp_path: Path, classes: Path
) -> None:
    onnx.save(graphs.classifier(batch=1), tmp_path / "theirs.onnx")
    (tmp_path / "home").mkdir()
    script = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'matplotlib'): sys.modules[name] = None\n"
        "from training.export import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["--onnx", tmp_path / "theirs.onnx", "--classes", classes, "--out", tmp_path / "models" / "m"]
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    ran = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**environment, "HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert read(tmp_path / "models" / "m").manifest.labels == list(graphs.LABELS)
    assert not list((tmp_path / "home").rglob("*"))


@pytest.mark.slow
def test_a_checkpoint_becomes_the_bundle_that_training_made_of_it(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = tiny_run / "runs" / "tiny", tmp_path / "models" / "tiny"
    assert main(["--checkpoint", str(run), "--out", str(out)]) == 0
    trained, exported = read(tiny_run / "models" / "tiny"), read(out)
    assert trained.manifest.model_dump(exclude={"created", "files"}) == exported.manifest.model_dump(
        exclude={"created", "files"}
    )
    assert trained.model_bytes() == exported.model_bytes()
    capfd.readouterr()
    more = str(tmp_path / "models" / "more")
    assert main(["--checkpoint", str(run / "nothing"), "--out", more]) == 2
    assert main(["--checkpoint", str(run), "--mean", "1", "--out", more]) == 2
    said = capfd.readouterr().err.splitlines()
    assert "there is no checkpoint" in said[0]
    assert "--mean does not go with --checkpoint" in said[1]
    assert not (tmp_path / "models" / "more").exists()


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4, "any"])
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # the exporter's own, and of the older exporter at all
def test_a_torchvision_network_is_imported_whichever_batch_it_was_exported_with(
    tmp_path: Path, classes: Path, batch: int | str, capfd: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    network = models.resnet18(num_classes=5).eval()
    example = torch.zeros(batch if isinstance(batch, int) else 2, 3, 64, 64)
    path = tmp_path / "resnet.onnx"
    if batch == 4:
        torch.onnx.export(network, (example,), str(path), dynamo=False)
    else:
        free = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)} if batch == "any" else {}
        torch.onnx.export(
            network, (example,), str(path), dynamo=True, verbose=False, external_data=True, **free
        )
    out = tmp_path / "models" / "resnet"
    arguments = ["--onnx", path, "--classes", classes, "--out", out, "--normalisation", "imagenet"]
    crop = ["--resize", "crop", "--shorter-side", "72"]
    assert main([*(str(part) for part in arguments), *crop]) == 0
    bundle = read(out)
    images = pixels(size=(64, 64))
    _, mean, std = NORMALISATIONS["imagenet"]
    normal = torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        expected = network(normal).numpy()
    assert answers(bundle, images) == pytest.approx(expected, abs=1e-4 * float(abs(expected).max()))
    assert ("batch" in capfd.readouterr().err) == (batch != "any")
