"""What the servers serve: bundles, the same networks without our part of the graph, and images to post."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import onnx
import onnx.utils
from PIL import Image

from bench.servers import ROOT, Model
from bundle.files import Bundle, BundleError, read
from bundle.manifest import ImageInput
from service.adapters.serving_graph import compose

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESNET32: Final = ROOT / "models" / "cifar100-lt-erm"
N_IMAGES: Final = 64
_SMALL: Final = 64  # pixels of a side up to which images are posted as PNG, beyond as JPEG
_CALIBRATION_BATCHES: Final = 4
_QUANTISED: Final = {"QuantizeLinear", "QLinearConv", "DynamicQuantizeLinear"}


class ModelError(Exception):
    """A model that cannot be measured, and why."""


def cache_folder() -> Path:
    """Return where the benchmark keeps what it makes and installs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tare" / "bench"


def prepared(folder: Path, cache: Path) -> Model:
    """Return a bundle of images made ready for every server. Raises ModelError."""
    try:
        bundle = read(folder)
        spec = bundle.manifest.input
        if not isinstance(spec, ImageInput) or spec.colour == "L":
            raise ModelError(f"{folder} is no bundle for colour images")
        network = _plain_network(bundle)
    except BundleError as failure:
        raise ModelError(f"{folder}: {failure.detail}") from failure
    content = network.SerializeToString()
    path = cache / "networks" / f"{hashlib.sha256(content).hexdigest()[:16]}.onnx"
    if not path.exists():
        _write(path, content)
    kind: Literal["small", "large", "int8"] = "small" if max(spec.height, spec.width) <= _SMALL else "large"
    if any(node.op_type in _QUANTISED for node in network.graph.node):
        kind = "int8"
    return Model(bundle.manifest.name, folder, path, _images(spec.height, spec.width, cache), kind)


def resnet50(cache: Path) -> Path:
    """Return a bundle of torchvision's ResNet-50 with weights drawn at random, made on first use.

    Its batch normalisation has seen a few images, so that the logits tell images apart.
    """
    folder = cache / "resnet50"
    if folder.exists():
        return folder
    import torch  # noqa: PLC0415  (only who makes the bundle needs it)

    from training.bundling import export_onnx  # noqa: PLC0415
    from training.importing import Request, import_onnx  # noqa: PLC0415
    from training.networks import make_network  # noqa: PLC0415

    torch.manual_seed(0)
    network = make_network("resnet50", 1000)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _ in range(_CALIBRATION_BATCHES):
            pixels = torch.from_numpy(np.stack([_scenery(rng, 224, 224) for _ in range(16)]))
            network((pixels.permute(0, 3, 1, 2) / 255 - 0.45) / 0.225)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        model, classes = Path(scratch, "model.onnx"), Path(scratch, "classes.csv")
        model.write_bytes(export_onnx(network, 224))
        classes.write_text("".join(f"class {index},{1000 - index}\n" for index in range(1000)))
        request = Request(
            onnx=model, classes=classes, out=folder, name="resnet50", layout="NCHW", normalisation="imagenet"
        )
        import_onnx(request)
    return folder


def _plain_network(bundle: Bundle) -> onnx.ModelProto:
    """Cut what the service composes between its pixels and f: everybody runs the same graph."""
    graph = compose(bundle)
    whole = onnx.utils.Extractor(onnx.load_from_string(graph.model))
    return whole.extract_model([graph.inputs.pixels], [graph.outputs.logits])


def _images(height: int, width: int, cache: Path) -> Path:
    """Return a folder of images of a size: CIFAR's test images where they are at hand, else drawn ones."""
    data = os.environ.get("TARE_DATA_DIR")
    from_cifar = data is not None and height == width == 32 and Path(data, "cifar-100-python").is_dir()
    folder = cache / "images" / f"{'cifar' if from_cifar else 'drawn'}-{height}x{width}"
    if folder.exists() and len(list(folder.iterdir())) == N_IMAGES:
        return folder
    if from_cifar:
        pixels = _cifar(Path(str(data)))
    elif height == width == 32:
        from training.shapes import CLASS_LABELS, draw  # noqa: PLC0415  (training's, which serving lacks)

        rng = np.random.default_rng(0)
        pixels = [draw(place % len(CLASS_LABELS), rng) for place in range(N_IMAGES)]
    else:
        rng = np.random.default_rng(1)
        pixels = [_scenery(rng, height, width) for _ in range(N_IMAGES)]
    for place, image in enumerate(pixels):
        buffer = io.BytesIO()
        if max(height, width) <= _SMALL:
            Image.fromarray(image).save(buffer, "PNG")
        else:
            Image.fromarray(image).save(buffer, "JPEG", quality=75)
        _write(folder / f"{place:02}", buffer.getvalue())
    return folder


def _cifar(data: Path) -> list[NDArray[np.uint8]]:
    from training.cifar import read_cifar  # noqa: PLC0415  (torchvision's reader)

    dataset = read_cifar("cifar100-lt", data, "exp", 100)
    test: NDArray[np.uint8] = next(iter(dataset.test.take(np.arange(N_IMAGES)).blocks(N_IMAGES)))
    return list(test)


def _scenery(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Return an image whose amplitudes fall as 1 / frequency, as photographs' do, (height, width, 3)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1
    shape = (3, *frequency.shape)
    noise = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    noise[1:] = 0.8 * noise[:1] + 0.35 * noise[1:]  # channels of a photograph go together
    waves = np.fft.irfft2(noise / frequency**1.15, s=(height, width))
    waves /= waves.std(axis=(1, 2), keepdims=True)
    image = np.clip(128 + 55 * (waves + rng.normal(0, 0.5, (3, 1, 1))), 0, 255)
    return np.ascontiguousarray(image.transpose(1, 2, 0).astype(np.uint8))


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    scratch.write_bytes(content)
    scratch.rename(path)
