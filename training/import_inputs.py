"""What reaches an imported network, from its graph and from what the command line says of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from bundle.manifest import ImageInput, Resize, TensorInput
from training.exceptions import RunError

if TYPE_CHECKING:
    from training.importing import Request
    from training.onnx_graph import Signature, TensorSignature

# (scale, mean, std) of (p * scale - mean) / std, by the name of what reaches the network
NORMALISATIONS: Final = {
    "unit": (1 / 255, [0.0], [1.0]),
    "symmetric": (1 / 255, [0.5], [0.5]),
    "imagenet": (1 / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "raw": (1.0, [0.0], [1.0]),
}


def check_input_options(request: Request) -> None:
    """Refuse options that go with another kind of input."""
    of_images = ("images", "input_size", "layout", "colour", "normalisation", "scale", "mean", "std")
    of_tensors = ("input_shape", "input_range")
    for name in of_images if request.input == "tensor" else of_tensors:
        if getattr(request, name) is not None:
            other = "image" if request.input == "tensor" else "tensor"
            raise RunError(f"--{name.replace('_', '-')} goes with --input {other}")
    resize = (request.resize, request.shorter_side, request.interpolation)
    if request.input == "tensor" and resize != ("stretch", None, "bilinear"):
        raise RunError("--resize, --shorter-side and --interpolation go with --input image")


def tensor_input(request: Request, signature: TensorSignature) -> TensorInput:
    """Return how rows that are no images come to the network."""
    low, high = request.input_range or (None, None)
    try:
        return TensorInput(
            kind="tensor", datatype=signature.datatype, shape=list(signature.row_shape), low=low, high=high
        )
    except ValidationError as failure:
        message = failure.errors()[0]["msg"].removeprefix("Value error, ")
        raise RunError(f"the input, with --input-range LOW:HIGH: {message}") from failure


def image_input(request: Request, signature: Signature) -> ImageInput:
    """Return how images come to the network, from the graph and the options."""
    colour = request.colour or ("L" if signature.channels == 1 else "RGB")
    if (colour == "L") != (signature.channels == 1):
        raise RunError(f"--colour {colour} does not go with the graph's {signature.channels} channels")
    if request.normalisation is not None and any((request.scale, request.mean, request.std)):
        raise RunError("--normalisation stands for --scale, --mean and --std: give one or the others")
    default = "raw" if signature.dtype == "uint8" else "unit"
    scale, mean, std = NORMALISATIONS[request.normalisation or default]
    scale = scale if request.scale is None else request.scale
    mean = _per_channel("--mean", request.mean or mean, signature.channels)
    std = _per_channel("--std", request.std or std, signature.channels)
    if signature.dtype == "uint8" and (scale != 1 or any(mean) or set(std) != {1.0}):
        raise RunError("the graph takes uint8 pixels as they are; it normalises them itself")
    try:
        return ImageInput(
            height=signature.height,
            width=signature.width,
            colour=colour,
            resize=Resize(
                rule=request.resize, interpolation=request.interpolation, shorter_side=request.shorter_side
            ),
            scale=scale,
            mean=mean,
            std=std,
            layout=signature.layout,
        )
    except ValidationError as failure:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"input {where}: {first['msg']}".replace(" : ", ": ")) from failure


def input_notes(request: Request, signature: Signature) -> list[str]:
    """Return what the owner should know: which normalisation was assumed, where none was named."""
    if signature.dtype == "uint8" or request.normalisation or request.scale or request.mean or request.std:
        return []
    return ["pixels reach the network as p / 255; if it was trained otherwise, say so with --normalisation"]


def _per_channel(option: str, values: list[float], channels: int) -> list[float]:
    if len(values) not in (1, channels):
        raise RunError(
            f"{option} has {len(values)} numbers, the graph {channels} channels; give 1 or {channels}"
        )
    return values * channels if len(values) == 1 else values
