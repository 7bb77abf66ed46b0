"""From a finished checkpoint to the bundle that serving loads: export, parity, calibration, report."""

import shlex
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from bundle import files
from bundle.manifest import (
    ClassEntry,
    Graph,
    ImageInput,
    Loss,
    Manifest,
    Metrics,
)
from bundle.manifest import Dataset as DatasetEntry
from longtail.adjustment import adjustment
from longtail.priors import prior_from_counts, uniform_prior
from longtail.tau import GRID
from training import checkpoint as checkpoints
from training.augment import normalise
from training.calibrate import Calibrated, calibrate, errors_at, groups_of, offset_of, prior_weights
from training.card import CARD, model_card
from training.checkpoint import Checkpoint, Plan
from training.data import Dataset, Part, Split, split
from training.evaluate import evaluate
from training.exceptions import BundleError, RunError
from training.losses import make_loss
from training.networks import linear_layer
from training.onnx_runner import BATCHES, Runner
from training.post_hoc import USUAL, Head, Labelled, PostHoc, normalised
from training.precision import Answers, Variant, Wanted, judged
from training.report import PNG, tau_curve_png
from training.second_stage import OFFSET_STATUS, logit_offset, plain_network
from training.sources import IN_FILES, read

GRAPH = Graph(input="input", output="logits")
_OPSET = 18
_PARITY_TOLERANCE = 1e-4  # of the largest logit, or of 1


def bundle_from_checkpoint(
    path: Path,
    out: Path,
    *,
    data_dir: Path | None = None,
    choices: PostHoc = USUAL,
    precision: Wanted | None = None,
    force: bool = False,
) -> files.Bundle:
    """Write the bundle of a finished run; its images are read again, from `data_dir` if they moved.

    Raises TrainingError for a checkpoint that is damaged or unfinished, for images other than those trained
    on, for a network that ONNX Runtime does not answer for as torch does, and for a variant of less precision
    that decides too much otherwise.
    """
    checkpoint = checkpoints.load(path)
    source = checkpoint.plan.source
    if data_dir is not None:
        source = checkpoints.Source(**{**asdict(source), "data_dir": str(data_dir.absolute())})
    dataset = read(source, checkpoint.plan.seed)
    if dataset.fingerprint() != checkpoint.data_fingerprint:
        raise RunError(f"{path} was trained on other images or labels than those found now")
    cut = split(dataset, checkpoint.plan.holdout, checkpoint.plan.seed)
    return write_bundle(
        checkpoint,
        dataset,
        cut,
        out,
        torch.device("cpu"),
        choices=choices,
        precision=precision,
        force=force,
    )


def write_bundle(
    checkpoint: Checkpoint,
    dataset: Dataset,
    cut: Split,
    out: Path,
    device: torch.device,
    *,
    choices: PostHoc = USUAL,
    precision: Wanted | None = None,
    force: bool = False,
) -> files.Bundle:
    """Write the bundle of a finished run on the images at hand; `out` appears whole or not at all.

    With a precision it is that of the variant: all that is fitted, chosen and measured rests on its logits.
    """
    if not checkpoint.finished:
        raise RunError(
            f"the run has taken {checkpoint.step} of {checkpoint.total_steps} steps: resume it first"
        )
    plan, n_classes = checkpoint.plan, len(dataset.class_labels)
    seen = np.bincount(cut.trained.labels, minlength=n_classes)
    loss = make_loss(plan.loss, seen, plan.tau, device, options=plan.loss_options, head=plan.head)
    network = plain_network(plan, n_classes, loss.head, checkpoint.weights)
    size = dataset.train.image_size
    model = export_onnx(network, size)
    check_parity(network, model, dataset.test if len(dataset.test) else cut.trained, checkpoint)

    network.to(device)
    source_prior = prior_from_counts(seen)
    groups = groups_of(dataset.class_counts)
    held, test = (
        evaluate(network, part, mean=checkpoint.mean, std=checkpoint.std, device=device)
        for part in (cut.holdout, dataset.test)
    )
    # Held-out images cut from the training set have its mix; a data set's own may be balanced.
    weights = None if dataset.holdout is None else prior_weights(cut.holdout.labels, source_prior)
    start, status = loss.logit_offset, loss.offset_status
    if plan.second_stage is not None:
        start, status = logit_offset(source_prior), OFFSET_STATUS[plan.second_stage.classifier]

    def fit(logits: NDArray[np.floating]) -> tuple[NDArray[np.float64], Calibrated]:
        """Return the offset b and what else held-out logits decide."""
        offset, origin = offset_of(start, status, logits, cut.holdout.labels, weights)
        return offset, calibrate(
            logits,
            cut.holdout.labels,
            logit_offset=offset,
            source_prior=source_prior,
            groups=groups,
            offset_origin=origin,
            weights=weights,
            tau_rule=choices.tau_rule,
        )

    spec = ImageInput(
        height=size,
        width=size,
        resize=dataset.resize,
        mean=list(checkpoint.mean),
        std=list(checkpoint.std),
    )
    offset, fitted = fit(held)
    said = None
    if precision is not None:
        variant = Variant(model, precision.name, spec, cut.trained)
        faster = [variant.logits(part, n_classes) for part in (cut.holdout, dataset.test)]
        said = judged(
            variant,
            precision,
            tau=fitted.tau,
            adjustment=offset + adjustment(source_prior, uniform_prior(n_classes), fitted.tau or 0),
            holdout=Answers(held, faster[0], cut.holdout.labels),
            test=Answers(test, faster[1], dataset.test.labels),
        )
        model, (held, test) = variant.model, faster
        offset, fitted = fit(held)
    test_curve = errors_at(
        GRID,
        test,
        dataset.test.labels,
        logit_offset=offset,
        source_prior=source_prior,
        groups=groups,
    )
    head = linear_head(network)
    by_weights = (
        None
        if head is None
        else normalised(
            head,
            choices,
            holdout=Labelled(held, cut.holdout.labels),
            test=Labelled(test, dataset.test.labels),
            source_prior=source_prior,
            groups=groups,
        )
    )
    shown = {0.0, 1.0, fitted.tau, fitted.calibration.tau_by_error}
    manifest = Manifest(
        name=out.name,
        created=datetime.now(UTC).replace(microsecond=0),
        classes=[
            ClassEntry(label=label, count=int(count), trained=int(trained))
            for label, count, trained in zip(dataset.class_labels, dataset.class_counts, seen, strict=True)
        ],
        source_prior=source_prior.tolist(),
        logit_offset=offset.tolist(),
        temperature=fitted.temperature,
        tau=fitted.tau,
        tau_curve=fitted.tau_curve,
        weight_normalisation=None if by_weights is None else by_weights.part,
        groups=groups,
        input=spec,
        graph=GRAPH,
        network=plan.network,
        precision=said,
        loss=Loss(name=loss.name, tau=loss.tau, options=loss.options, head=loss.head),
        recipe=_recipe(checkpoint),
        dataset=_dataset_entry(plan, dataset, cut),
        calibration=fitted.calibration,
        seed=plan.seed,
        git_commit=checkpoint.git_commit,
        metrics=Metrics(
            holdout=[point for point in fitted.tau_curve if point.tau in shown],
            test=[point for point in test_curve if point.tau in shown],
        ),
    )
    command = training_command(plan, out, choices)
    if precision is not None:
        command = training_command(plan, out.with_name(precision.run))
        command += "\n" + export_command(out, choices, precision)
    content = {
        files.MODEL: model,
        PNG: tau_curve_png(manifest, test_curve, [] if by_weights is None else by_weights.test_curve),
        CARD: model_card(manifest, command, picture=PNG).encode(),
    }
    if len(cut.holdout):
        content[files.HOLDOUT] = files.encode_holdout(held, cut.holdout.labels)
    try:
        return files.write(out, manifest, content, force=force)
    except (files.BundleError, OSError) as failure:
        raise BundleError(f"{out} could not be written: {failure}") from failure


def linear_head(network: nn.Module) -> Head | None:
    """Return what weight normalisation needs of the network; None where it does not end in a linear layer."""
    layer = linear_layer(network)
    if layer is None:
        return None
    weights = layer.weight.detach().cpu().double()
    norms = weights.norm(dim=1)
    if not (norms > 0).all():  # a class that nothing speaks for cannot be divided by it
        return None
    biases = torch.zeros_like(norms) if layer.bias is None else layer.bias.detach().cpu().double()
    return Head(norms.numpy(), biases.numpy())


def export_onnx(network: nn.Module, size: int) -> bytes:
    """Return the network as one ONNX file: normalised float32 `input` (batch, 3, size, size) to `logits`."""
    network.eval()
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, size, size),),
        input_names=[GRAPH.input],
        output_names=[GRAPH.output],
        opset_version=_OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    if program is None:
        raise BundleError("torch exported nothing")
    model = program.model_proto
    _forget_origins(model)
    model.ir_version = min(model.ir_version, files.NEWEST_IR)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def _forget_origins(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: traces with the paths of the machine that trained."""
    graph = model.graph
    for part in (
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def check_parity(network: nn.Module, model: bytes, part: Part, checkpoint: Checkpoint) -> None:
    """Hold ONNX Runtime to torch on real images at several batch sizes; raises BundleError if they part."""
    n_sampled = min(max(BATCHES), len(part))
    (images,) = part.take(np.linspace(0, len(part) - 1, num=n_sampled, dtype=int)).blocks(n_sampled)
    runner = Runner(onnx.load_model_from_string(model), [GRAPH.output])
    network.eval()
    mean, std = torch.tensor(checkpoint.mean), torch.tensor(checkpoint.std)
    for n in BATCHES:
        chosen = np.resize(np.linspace(0, len(images) - 1, num=min(n, len(images)), dtype=int), n)
        pixels = normalise(torch.from_numpy(images[chosen]), mean, std).contiguous()
        with torch.inference_mode():
            expected = network(pixels).numpy()
        (answered,) = runner.run(pixels.numpy())
        gap = float(np.abs(answered - expected).max())
        allowed = _PARITY_TOLERANCE * max(1.0, float(np.abs(expected).max()))
        if answered.shape != expected.shape or not gap <= allowed:
            raise BundleError(
                f"at batch {n} ONNX Runtime's logits differ from torch's by {gap:.2g}, over {allowed:.2g}"
            )


def training_command(plan: Plan, out: Path, choices: PostHoc = USUAL) -> str:
    """Return the command that trains this again; folders are written as a reader's own."""
    words = ["python", "-m", "training.fit"]
    if plan.second_stage is not None:
        stage = plan.second_stage
        words += ["--backbone", f"runs/{stage.backbone_run}", "--classifier", stage.classifier]
    else:
        words += _first_stage_words(plan)
    words += ["--recipe", plan.recipe.name]
    words += ["--steps", str(plan.steps)] if plan.steps is not None else ["--epochs", str(plan.epochs)]
    if plan.second_stage is None:
        words += ["--holdout", f"{plan.holdout:g}", "--seed", str(plan.seed)]
    words += [*_choice_words(choices), "--out", f"models/{out.name}"]
    return shlex.join(words)


def export_command(out: Path, choices: PostHoc, precision: Wanted) -> str:
    """Return the command that makes the variant of a trained run."""
    words = ["python", "-m", "training.export", "--checkpoint", f"runs/{precision.run}"]
    words += ["--precision", precision.name, *(["--force-precision"] if precision.force else [])]
    words += [*_choice_words(choices), "--out", f"models/{out.name}"]
    return shlex.join(words)


def _choice_words(choices: PostHoc) -> list[str]:
    words = []
    for name, value in asdict(choices).items():
        if value != getattr(USUAL, name):
            words += [f"--{name.replace('_', '-')}", value]
    return words


def _first_stage_words(plan: Plan) -> list[str]:
    """Return what says data set, network and loss."""
    source = plan.source
    words = ["--dataset", source.dataset]
    if source.dataset == "npz":
        words += ["--train-file", Path(source.train_file or "").name]
        words += ["--test-file", Path(source.test_file or "").name]
    elif source.dataset in IN_FILES:
        words += ["--data-dir", Path(source.data_dir or "").name, "--image-size", str(source.image_size)]
    else:
        words += ["--profile", source.profile, "--imbalance-ratio", f"{source.imbalance_ratio:g}"]
    words += ["--network", plan.network, "--loss", plan.loss]
    if plan.tau is not None:
        words += ["--tau", f"{plan.tau:g}"]
    for name, value in asdict(plan.loss_options).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words += [option]
        elif value is not None and value is not False:
            words += [option, f"{value:g}"]
    if plan.head is not None:
        words += ["--head", plan.head]
    return words


def _recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    plan, machine = checkpoint.plan, checkpoint.machine
    return {
        **{
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(plan.recipe).items()
        },
        "epochs": plan.epochs,
        "steps": checkpoint.total_steps,
        "seconds": round(checkpoint.seconds, 1),
        **asdict(machine),
        **({} if plan.second_stage is None else asdict(plan.second_stage)),
    }


def _dataset_entry(plan: Plan, dataset: Dataset, cut: Split) -> DatasetEntry:
    source = plan.source
    detail: dict[str, str | int | float | bool | None] = {"holdout": plan.holdout}
    if source.dataset in {"cifar10-lt", "cifar100-lt", "shapes-lt"}:
        detail |= {"profile": source.profile, "imbalance_ratio": source.imbalance_ratio}
    if dataset.note:
        detail["note"] = dataset.note
    return DatasetEntry(
        name=dataset.name,
        detail=detail,
        train_images=len(cut.trained),
        holdout_images=len(cut.holdout),
        test_images=len(dataset.test),
    )
