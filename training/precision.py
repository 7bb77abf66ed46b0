"""A faster variant of a network, int8 or fp16, and the gate that holds its decisions to the original's.

No torch here: the variant is made and judged as ONNX Runtime runs it, from pixels prepared as serving does.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import onnx

from bundle.manifest import Precision, PrecisionCheck
from longtail.metrics import balanced_error
from training.exceptions import RunError, first_line
from training.onnx_graph import GraphError
from training.onnx_runner import Runner, check_batches, network_input, probes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bundle.manifest import ImageInput, Manifest
    from training.data import Part

Name = Literal["int8", "fp16"]

NAMES: Final[tuple[Name, ...]] = get_args(Name)
LEAST_AGREEMENT: Final[dict[Name, float]] = {"int8": 0.93, "fp16": 0.995}

_SAMPLE: Final = 256  # of the images trained on: a random choice, always the same
_PIXELS: Final = 2**20  # in one batch
# What int8 leaves in float32: the head of every network of ours, a thousandth of the work and the layer
# nearest to the decision.
_HEAD: Final = ("Gemm", "MatMul")
_METHODS: Final[dict[Name, str]] = {
    "int8": "static, QDQ: activations uint8 by their least and largest value on the calibration images,"
    " weights int8 for each output channel",
    "fp16": "weights and activations float16, input and logits float32",
}


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for. `force` writes a variant that the gate would refuse.

    `run` is what the run is called, for people.
    """

    name: Name
    force: bool = False
    run: str = "NAME"


@dataclass(frozen=True, eq=False)
class Answers:
    """Logits f (n, L) of both networks for the same images, with their labels (n,)."""

    original: NDArray[np.floating]
    variant: NDArray[np.floating]
    labels: NDArray[np.integer]


class Variant:
    """The network in fewer bits, loaded. `model` is its ONNX file."""

    def __init__(self, original: bytes, name: Name, spec: ImageInput, trained: Part) -> None:
        """Make it of a float32 network with one input as `spec` says; int8 is calibrated on trained images.

        Raises TrainingError where the conversion fails, or the result depends on what shares its batch.
        """
        self.name, self._spec = name, spec
        self.calibration_images = min(len(trained), _SAMPLE) if name == "int8" else 0
        network = onnx.load_model_from_string(original)
        chosen = np.sort(np.random.default_rng(0).permutation(len(trained))[:_SAMPLE])
        sample = trained.take(chosen)
        if name == "int8":
            changed = _in_int8(network, self._batches(sample))
        else:
            _check_range(network, self._batches(sample, 1))
            changed = _in_float16(network)
        _forget_other_domains(changed)
        try:
            onnx.checker.check_model(changed)
        except onnx.checker.ValidationError as failure:
            raise GraphError(
                f"--precision {name}: the variant is not sound: {first_line(failure)}"
            ) from failure
        self.model: bytes = changed.SerializeToString()
        self._runner = Runner(changed, [changed.graph.output[0].name])
        rows = probes(spec, "float32")
        check_batches(self._runner, rows, self._finite(self._runner.one_by_one(rows)[0]))

    def logits(self, part: Part, n_classes: int) -> NDArray[np.float32]:
        """Return f (n, L) of the images. Raises GraphError for one that is not finite."""
        answers = [np.empty((0, n_classes), np.float32)]
        if len(part):
            answers += [self._runner.run(pixels)[0] for pixels in self._batches(part)]
        return self._finite(np.concatenate(answers))

    def _finite(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if not np.isfinite(logits).all():
            raise GraphError(f"--precision {self.name}: the variant answers with NaN or infinity")
        return logits

    def _batches(self, part: Part, most: int = 64) -> Iterator[NDArray[Any]]:
        """Yield the images as the network takes them, few at a time where they are large."""
        size = max(1, min(most, _PIXELS // part.image_size**2))
        return (network_input(images, self._spec, "float32") for images in part.blocks(size))


def judged(
    variant: Variant,
    wanted: Wanted,
    *,
    tau: float | None,
    adjustment: NDArray[np.float64],
    holdout: Answers,
    test: Answers,
) -> Precision:
    """Return what the manifest says of the variant, or raise RunError where it decides too much otherwise.

    Both networks decide by argmax(f + adjustment), adjustment (L,): the decision that the original's bundle
    serves when nothing else is asked for, with its own logit offset and tau*.
    """
    least = LEAST_AGREEMENT[wanted.name]
    held = _check(holdout, adjustment)
    if not wanted.force:
        if held is None:
            raise RunError(
                f"--precision {wanted.name}: nothing was held out to judge it by; --force-precision writes it"
                " unjudged"
            )
        if held.agreement < least:
            raise RunError(
                f"--precision {wanted.name}: the variant decides as the network does on"
                f" {percent(held.agreement)} of {held.images:,} held-out images, under {100 * least:g} %;"
                " --force-precision writes it all the same"
            )
    return Precision(
        name=wanted.name,
        method=_METHODS[wanted.name],
        float32_operators=list(_HEAD) if wanted.name == "int8" else [],
        calibration_images=variant.calibration_images,
        tau=tau,
        least_agreement=least,
        forced=held is None or held.agreement < least,
        holdout=held,
        test=_check(test, adjustment),
    )


def percent(share: float) -> str:
    """Return a share in per cent, cut and not rounded: 92.996 % is not 93 %."""
    return f"{np.floor(1e4 * share + 1e-6) / 100:.2f} %"


def forced_words(said: Precision) -> str:
    """Return why a variant had to be forced."""
    if said.holdout is None:
        return "written by force, for nothing was held out to judge it by"
    return f"written by force, for {100 * said.least_agreement:g} % of held-out images are asked for"


def notes_of(manifest: Manifest) -> list[str]:
    """Return what the owner of a variant should know: how much it agrees, and what that cost."""
    said = manifest.precision
    if said is None:
        return []
    notes = [
        f"{said.name}: decides as the network does on {percent(check.agreement)} of {check.images:,}"
        f" {where} images; balanced error {100 * check.balanced_error_before:.2f} ->"
        f" {100 * check.balanced_error:.2f} %"
        for where, check in (("held-out", said.holdout), ("test", said.test))
        if check is not None
    ]
    if said.forced:
        notes.append(f"{said.name}: {forced_words(said)}")
    return notes


def _check(answers: Answers, adjustment: NDArray[np.float64]) -> PrecisionCheck | None:
    if not len(answers.labels):
        return None
    before, after = (
        (logits.astype(np.float64) + adjustment).argmax(axis=1)
        for logits in (answers.original, answers.variant)
    )
    n_classes = len(adjustment)
    return PrecisionCheck(
        images=len(answers.labels),
        agreement=float(np.mean(before == after)),
        balanced_error_before=balanced_error(answers.labels, before, n_classes),
        balanced_error=balanced_error(answers.labels, after, n_classes),
    )


def _in_int8(network: onnx.ModelProto, batches: Iterator[NDArray[Any]]) -> onnx.ModelProto:
    """Return the network quantised, but for its head, with scales from batches of what it is fed.

    uint8 activations with int8 weights are what x86 has instructions for.
    """
    from onnxruntime import quantization  # noqa: PLC0415  (an extra that need not be there)

    entry = network.graph.input[0].name

    class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, NDArray[Any]] | None:
            """Return the next batch to feed, None after the last."""
            pixels = next(batches, None)
            return None if pixels is None else {entry: pixels}

    with tempfile.TemporaryDirectory(prefix="tare-int8-") as folder:
        plain, prepared, quantised = (Path(folder, name) for name in ("plain", "prepared", "quantised"))
        onnx.save(network, plain)
        # Its symbolic inference of shapes wants sympy, and finds nothing here that onnx's own does not.
        quantization.quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        kept = [node.name for node in onnx.load(prepared).graph.node if node.op_type in _HEAD]
        quantization.quantize_static(
            prepared,
            quantised,
            Calibration(),
            quant_format=quantization.QuantFormat.QDQ,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=kept,
        )
        return onnx.load(quantised)


def _check_range(network: onnx.ModelProto, batches: Iterator[NDArray[Any]]) -> None:
    """Refuse a network with numbers inside that become infinite in float16.

    On a CPU the variant would not show them: ONNX Runtime keeps float32 from one operator to the next there.
    """
    limit = float(np.finfo(np.float16).max)
    runner = Runner(network, [name for node in network.graph.node for name in node.output if name])
    for pixels in batches:
        answers = (answer for answer in runner.run(pixels) if answer.dtype.kind == "f" and answer.size)
        largest = max(float(np.abs(answer).max()) for answer in answers)
        if not largest <= limit:
            raise GraphError(
                f"--precision fp16: numbers inside the network reach {largest:,.0f}, float16 ends at"
                f" {limit:,.0f}"
            )


def _in_float16(network: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network in float16, but for its input and its logits."""
    from onnxruntime.transformers import float16  # noqa: PLC0415  (an extra that need not be there)
    from onnxruntime.transformers.onnx_model import OnnxModel  # noqa: PLC0415

    changed: onnx.ModelProto = float16.convert_float_to_float16(network, keep_io_types=True)
    OnnxModel.graph_topological_sort(changed.graph)  # the conversion adds its casts at the end
    return changed


def _forget_other_domains(model: onnx.ModelProto) -> None:
    """Drop the operator sets that no node is of: ONNX Runtime lists all it knows, others know other sets."""
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
