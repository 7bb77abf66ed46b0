"""A bundle made of an ONNX classifier that this project did not train.

Nothing here needs torch: a person who only serves may import a model too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from bundle import files as bundle_files
from bundle.manifest import (
    ClassEntry,
    Dataset,
    Graph,
    ImageInput,
    Loss,
    Manifest,
    Metrics,
    TensorInput,
)
from longtail.adjustment import probabilities
from longtail.metrics import balanced_error
from longtail.priors import PriorError, checked_source_prior, prior_from_counts
from longtail.tau import TauRule
from training.calibrate import calibrate, groups_of, offset_of, prior_weights
from training.card import CARD, model_card
from training.commands import check_out
from training.exceptions import DataError, RunError
from training.import_files import (
    Classes,
    HeldOut,
    decoded,
    image_files,
    read_classes,
    read_holdout,
    sums_to_one,
)
from training.import_inputs import check_input_options, image_input, input_notes, tensor_input
from training.onnx_graph import (
    GraphError,
    Signature,
    TensorSignature,
    output_name,
    read_graph,
    read_signature,
    read_tensor_signature,
    standardised,
    without_softmax,
)
from training.onnx_runner import BATCHES, Runner, check_batches, network_input, probes

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto

_LOSSES: Final = {None: "unknown", "none": "cross-entropy", "log-prior": "logit-adjusted", "fitted": "other"}


@dataclass(frozen=True)
class Request:
    """What the command line asks for: everything that the graph itself cannot tell."""

    onnx: Path
    classes: Path
    out: Path
    name: str
    holdout: Path | None = None
    images: Path | None = None
    input: Literal["image", "tensor"] = "image"
    input_shape: tuple[int, ...] | None = None
    input_range: tuple[float, float] | None = None
    input_size: tuple[int, int] | None = None
    layout: Literal["NCHW", "NHWC"] | None = None
    colour: Literal["RGB", "BGR", "L"] | None = None
    normalisation: str | None = None
    scale: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    resize: Literal["stretch", "crop"] = "stretch"
    shorter_side: int | None = None
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] = "bilinear"
    output: str | None = None
    loss_offset: Literal["none", "log-prior", "fitted"] | None = None
    loss_tau: float | None = None
    smoothing: float = 0.0
    tau_rule: TauRule = "class-mean-log-loss"
    force: bool = False


@dataclass(frozen=True)
class Imported:
    """The bundle as written, and what its owner should know about it."""

    bundle: bundle_files.Bundle
    notes: list[str]


@dataclass(frozen=True)
class _Network:
    """A graph in the form that bundles hold, tried, and how images, or rows of another kind, come to it."""

    model: ModelProto
    spec: ImageInput | TensorInput
    dtype: str
    runner: Runner
    notes: list[str]


def import_onnx(request: Request) -> Imported:
    """Make a bundle of an ONNX classifier and write it, whole or not at all. Raises TrainingError."""
    check_out(request.out, force=request.force)
    _check_options(request)
    classes = read_classes(request.classes)
    source_prior = _source_prior(classes, request.smoothing)
    network = _network(request, len(classes.labels))
    held_out = _held_out(request, network, classes)
    manifest = _manifest(request, network, classes, source_prior, held_out)
    notes = network.notes + _calibration_notes(manifest)
    if len(held_out.labels):
        notes += _doubts(held_out, len(classes.labels))
    contents = {
        bundle_files.MODEL: network.model.SerializeToString(),
        CARD: model_card(manifest).encode(),
    }
    if len(held_out.labels):
        contents[bundle_files.HOLDOUT] = bundle_files.encode_holdout(held_out.logits, held_out.labels)
    try:
        bundle = bundle_files.write(request.out, manifest, contents, force=request.force)
    except bundle_files.BundleError as failure:
        raise RunError(failure.detail) from failure
    except OSError as failure:
        raise RunError(f"{request.out} cannot be written: {failure.strerror}") from failure
    return Imported(bundle, notes)


def _check_options(request: Request) -> None:
    """Refuse options that contradict each other."""
    try:
        bundle_files.check_name(request.name)
    except bundle_files.BundleError as failure:
        raise RunError(f"--name: {failure.detail}") from failure
    check_input_options(request)
    if request.holdout is not None and request.images is not None:
        raise RunError("--holdout and --images exclude each other")
    if request.loss_offset == "fitted" and request.holdout is None and request.images is None:
        raise RunError("--loss-offset fitted needs --holdout or --images to fit on")
    if request.loss_tau is not None and request.loss_offset in (None, "none"):
        raise RunError("--loss-tau goes with --loss-offset log-prior or fitted")
    if request.loss_tau is not None and not 0 <= request.loss_tau <= 100:
        raise RunError(f"--loss-tau must lie between 0 and 100, not {request.loss_tau}")


def _source_prior(classes: Classes, smoothing: float) -> NDArray[np.float64]:
    try:
        return checked_source_prior(prior_from_counts(classes.counts, smoothing))
    except PriorError as failure:
        if failure.index is None:
            raise DataError(f"the class counts: {failure}") from failure
        raise DataError(
            f"class '{classes.labels[failure.index]}' has no training image: leave it out, or add to every"
            " count with --smoothing"
        ) from failure


def _network(request: Request, n_classes: int) -> _Network:
    """Read the graph, find its logits, bring it to the form of bundles and hold it to the original."""
    original = read_graph(request.onnx)
    signature: Signature | TensorSignature
    spec: ImageInput | TensorInput
    if request.input == "tensor":
        signature = read_tensor_signature(original, request.input_shape)
        spec, notes = tensor_input(request, signature), []
    else:
        signature = read_signature(original, size=request.input_size, layout=request.layout)
        spec, notes = image_input(request, signature), input_notes(request, signature)
    output = output_name(original, request.output)
    before_softmax = without_softmax(original, output)
    wanted = [output] if before_softmax is None else [before_softmax, output]
    rows = probes(spec, signature.dtype)
    answers = Runner(original, wanted, signature.batch).one_by_one(rows)
    answer = answers[0]
    if (
        answer.dtype.kind != "f"
        or answer.ndim < 2
        or answer.shape[1:] != (n_classes, *[1] * (answer.ndim - 2))
    ):
        raise GraphError(
            f"the output '{output}' is {answer.dtype} of shape {['batch', *answer.shape[1:]]};"
            f" {request.classes} names {n_classes} classes, which need float logits [batch, {n_classes}]"
        )
    logits = answer.reshape(len(rows), n_classes)
    if not np.isfinite(logits).all():
        raise GraphError("the network answers with NaN or infinity; is the normalisation the right one?")
    if before_softmax is not None:
        given = answers[1].reshape(logits.shape)
        if not np.allclose(probabilities(logits.astype(np.float64), 1.0), given, atol=1e-2):
            raise GraphError(
                "the Softmax at the graph's end does not run over the classes; export the logits"
            )
        notes.append(f"the graph ends in a Softmax; its logits are taken before it, at '{before_softmax}'")
    elif sums_to_one(logits):
        raise GraphError(
            "the output is probabilities, with no Softmax node to go back behind; export the logits"
        )
    model = standardised(original, signature, before_softmax or output, answer)
    runner = Runner(model, [model.graph.output[0].name])
    check_batches(runner, rows, logits)
    if signature.batch is not None:
        notes.append(f"the batch of {signature.batch} was made one of any size, tried at 1, 3 and 32")
    return _Network(model, spec, signature.dtype, runner, notes)


def _held_out(request: Request, network: _Network, classes: Classes) -> HeldOut:
    """Return the held-out logits and labels; none of either where none were given."""
    if request.holdout is not None:
        return read_holdout(request.holdout, len(classes.labels))
    spec = network.spec
    if request.images is None or isinstance(spec, TensorInput):
        return HeldOut(np.zeros((0, len(classes.labels)), np.float32), np.zeros(0, np.int64))
    files = image_files(request.images, classes.labels)
    rows = [
        network.runner.run(network_input(images, spec, network.dtype))[0]
        for images in decoded(files, spec, max(BATCHES))
    ]
    logits = np.concatenate(rows).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise GraphError(f"the network answers {files[bad[0]][0]} with NaN or infinity")
    return HeldOut(logits, np.array([label for _, label in files], dtype=np.int64))


def _offset(
    request: Request, held_out: HeldOut, source_prior: NDArray[np.float64]
) -> tuple[NDArray[np.float64], Literal["known", "fitted", "assumed"]]:
    """Return the logit offset b (L,) and where it comes from."""
    loss_tau = _loss_tau(request)
    offset = loss_tau * np.log(source_prior) if loss_tau else np.zeros_like(source_prior)
    if request.loss_offset is None:
        return offset, "assumed"
    if request.loss_offset != "fitted":
        return offset, "known"
    weights = prior_weights(held_out.labels, source_prior)
    return offset_of(offset, "fitted", held_out.logits, held_out.labels, weights)


def _calibration_notes(manifest: Manifest) -> list[str]:
    fit, n_classes = manifest.calibration, len(manifest.classes)
    if not fit.images:
        return ["no held-out images: the temperature is 1 and there is no tau*"]
    notes = []
    if fit.temperature == "unfitted":
        notes.append("no finite temperature is the best on the held-out images; it is 1")
    if fit.classes < n_classes:
        notes.append(f"{n_classes - fit.classes} of {n_classes} classes have no held-out image")
    if fit.tau_at_edge:
        notes.append(f"tau* = {manifest.tau:g} is at the end of the grid: the best may lie beyond")
    return notes


def _doubts(held_out: HeldOut, n_classes: int) -> list[str]:
    """Say so where the network is no better than chance: most likely classes or normalisation are wrong."""
    error = balanced_error(held_out.labels, held_out.logits.argmax(axis=1), n_classes)
    chance = 1 - 1 / len(np.unique(held_out.labels))
    if error < chance or not chance:
        return []
    return [
        f"the network's balanced error on the held-out images is {error:.0%}, by chance it would be"
        f" {chance:.0%}: check the order of the classes and the normalisation"
    ]


def _manifest(
    request: Request,
    network: _Network,
    classes: Classes,
    source_prior: NDArray[np.float64],
    held_out: HeldOut,
) -> Manifest:
    groups = groups_of(classes.counts)
    offset, origin = _offset(request, held_out, source_prior)
    fitted = calibrate(
        held_out.logits,
        held_out.labels,
        logit_offset=offset,
        source_prior=source_prior,
        groups=groups,
        offset_origin=origin,
        weights=prior_weights(held_out.labels, source_prior),
        tau_rule=request.tau_rule,
    )
    shown = {0.0, 1.0, fitted.tau, fitted.calibration.tau_by_error}
    graph = network.model.graph
    return Manifest(
        name=request.name,
        created=datetime.now(UTC).replace(microsecond=0),
        classes=[
            ClassEntry(label=label, count=count, trained=count)
            for label, count in zip(classes.labels, classes.counts.tolist(), strict=True)
        ],
        source_prior=source_prior.tolist(),
        logit_offset=offset.tolist(),
        temperature=fitted.temperature,
        tau=fitted.tau,
        tau_curve=fitted.tau_curve,
        groups=groups,
        input=network.spec,
        graph=Graph(input=graph.input[0].name, output=graph.output[0].name),
        network=request.onnx.stem,
        loss=Loss(name=_LOSSES[request.loss_offset], tau=_loss_tau(request)),
        recipe={
            "imported_from": request.onnx.name,
            "imported_sha256": hashlib.sha256(request.onnx.read_bytes()).hexdigest(),
            "smoothing": request.smoothing,
        },
        dataset=Dataset(
            name="images of its owner",
            train_images=int(classes.counts.sum()),
            holdout_images=len(held_out.labels),
        ),
        calibration=fitted.calibration,
        metrics=Metrics(holdout=[point for point in fitted.tau_curve if point.tau in shown]),
    )


def _loss_tau(request: Request) -> float | None:
    return 1.0 if request.loss_offset == "log-prior" and request.loss_tau is None else request.loss_tau
