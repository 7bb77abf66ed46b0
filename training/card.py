"""The model card, in Markdown: what a person should read before they use a bundle."""

from collections.abc import Sequence

from bundle.manifest import (
    Estimate,
    ImageInput,
    Manifest,
    Precision,
    TauPoint,
    TensorInput,
    WeightNormalisation,
)
from longtail.tau import TauRule
from training.precision import forced_words, percent

CARD = "README.md"


def model_card(manifest: Manifest, command: str | None = None, *, picture: str | None = None) -> str:
    """Return the model card: what it is, what it saw, how wrong it is, and what it is not for.

    `command`, of one line or more, makes it again; `picture` is the file of the bundle that shows the tau
    curve.
    """
    data, counts = manifest.dataset, manifest.class_counts
    few = next((len(group.indices) for group in manifest.groups if group.name == "few"), 0)
    lines = [
        f"# {manifest.name}",
        "",
        f"{manifest.network} for {len(manifest.classes)} classes, trained on {data.name}"
        f" with {_loss_words(manifest)}.",
        "",
        f"- **Images**: {_number(data.train_images)} trained on, {_number(data.holdout_images)} held out,"
        f" {_number(data.test_images)} to test; {counts.max():,} in the largest class, {counts.min():,}"
        f" in the smallest, {few} classes with few.",
        f"- **Input**: {_input_words(manifest.input)}.",
        f"- **Made** {manifest.created:%Y-%m-%d}{_origin_words(manifest)}.",
    ]
    if data.detail.get("note"):
        lines.append(f"- **Note**: {data.detail['note']}.")
    if command:
        lines += ["", "Trained by", "", *(f"    {line}" for line in command.splitlines())]
    if manifest.precision is not None:
        lines += ["", *_precision_words(manifest.precision)]
    lines += ["", "## How it decides", "", *_decision_words(manifest)]
    lines += ["", "## How wrong it is", ""]
    lines += [
        "Error in per cent, each class counting alike, under a uniform target prior; in brackets the 95 %"
        " interval. Held-out and test images were never trained on; tau was chosen on the held-out ones.",
        "",
    ]
    for title, points in (("Held out", manifest.metrics.holdout), ("Test", manifest.metrics.test)):
        lines += _error_table(title, points)
    if manifest.weight_normalisation is not None:
        measured = manifest.weight_normalisation.metrics
        lines += ["### By weight normalisation", "", *_normalisation_words(manifest.weight_normalisation)]
        for title, points in (("Held out", measured.holdout), ("Test", measured.test)):
            lines += _error_table(title, points)
    if picture is not None:
        lines += [f"![Error against tau]({picture})", ""]
    lines += ["## What it is not for", ""]
    lines += [
        "The errors hold for images like those of the data set. Probabilities are calibrated to the label mix"
        " of the training set at tau = 0, and to the target prior only at tau = T; classes with a handful of"
        " training images have wide intervals, and their probabilities are the least certain. An image of"
        " no listed class is given one all the same.",
        "",
    ]
    return "\n".join(lines)


def _input_words(spec: ImageInput | TensorInput) -> str:
    if isinstance(spec, TensorInput):
        bounds = "" if spec.low is None or spec.high is None else f", from {spec.low:g} to {spec.high:g}"
        return f"{spec.datatype} of shape {spec.shape}{bounds}"
    return (
        f"{spec.height} x {spec.width} {spec.colour}; a pixel p of 0 to 255 becomes"
        f" (p * {spec.scale:.6g} - mean) / std, mean {spec.mean}, std {spec.std}"
    )


def _precision_words(said: Precision) -> list[str]:
    """Return what was done to the network after training, and how its decisions changed."""
    how = f"In {said.name}: {said.method}"
    if said.float32_operators:
        how += f"; {' and '.join(said.float32_operators)} stay float32"
    if said.calibration_images:
        how += f" ({said.calibration_images} training images calibrated it)"
    lines = [f"{how}."]
    for where, check in (("held-out", said.holdout), ("test", said.test)):
        if check is not None:
            lines.append(
                f"On {check.images:,} {where} images it decides as the float32 network does"
                f" {percent(check.agreement)} of the time; balanced error"
                f" {100 * check.balanced_error_before:.2f} % before, {100 * check.balanced_error:.2f} % now."
            )
    if said.forced:
        lines.append(f"It was {forced_words(said)}.")
    return lines


def _decision_words(manifest: Manifest) -> list[str]:
    origin = {
        "known": "known from the loss",
        "fitted": "fitted on held-out images",
        "assumed": "assumed to be right",
    }[manifest.calibration.logit_offset]
    lines = [
        "score = logits + logit_offset + tau (log target prior - log source prior); the offset is"
        f" {'zero' if not any(manifest.logit_offset) else 'not zero'}, {origin}.",
        "",
    ]
    fit = manifest.calibration
    if fit.images:
        over = f"{fit.images:,} held-out images of {fit.classes} of the {len(manifest.classes)} classes"
        edge = " (the end of the grid: the best may lie beyond)" if fit.tau_at_edge else ""
        lines.append(
            f"Temperature {manifest.temperature:.3f} ({fit.temperature}) and tau* = {manifest.tau:g}{edge},"
            f" {_rule_words(fit.tau_rule)}, come from {over}; the least error there is at tau ="
            f" {fit.tau_by_error:g}."
        )
    else:
        lines.append("Nothing was held out: the temperature is 1 and there is no tau*.")
    return lines


def _rule_words(rule: TauRule | None) -> str:
    return {
        "class-mean-log-loss": "the least class-mean log loss",
        "balanced-error": "the least balanced error",
        "calibration-log-loss": "the temperature of least log loss",
        "calibration-squared-error": "the temperature of least squared error",
        "calibration-ece": "the temperature of least calibration error",
        None: "by no rule that is known",
    }[rule]


def _normalisation_words(normalised: WeightNormalisation) -> list[str]:
    divisor = "the norm of its class's weights" if normalised.nu == "norm" else "its class's prior"
    bias = {"divide": "divided with it", "keep": "kept as it is", "drop": "dropped"}[normalised.bias]
    if normalised.tau is None:
        best = "nothing was held out, so it has no tau*."
    else:
        edge = " (the end of the grid: the best may lie beyond)" if normalised.tau_at_edge else ""
        best = f"tau* = {normalised.tau:g}{edge}, {_rule_words(normalised.tau_rule)}."
    return [
        f"`method=weight-normalisation` ranks by each logit over {divisor} to the power tau, the bias {bias}"
        f" (eq. 3; it is not consistent, knows no target prior and gives no probabilities): {best}",
        "",
    ]


def _error_table(title: str, points: Sequence[TauPoint]) -> list[str]:
    if not points:
        return [f"{title}: no images.", ""]
    means = points[0].balanced_error
    groups = [(mean.group, mean) for mean in points[0].groups]
    heads = [f"all ({_coverage(means)})", *(f"{name} ({_coverage(mean)})" for name, mean in groups)]
    lines = [
        f"| {title}, {means.labels:,} images: tau | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    lines += [
        f"| {point.tau:g} | " + " | ".join(_cell(m) for m in (point.balanced_error, *point.groups)) + " |"
        for point in points
    ]
    return [*lines, ""]


def _coverage(mean: Estimate) -> str:
    if mean.classes_with_labels == mean.classes:
        return f"{mean.classes} classes"
    return f"{mean.classes_with_labels} of {mean.classes} classes"


def _cell(mean: Estimate) -> str:
    if mean.error is None:
        return "unknown"
    return f"{100 * mean.error:.1f} ({100 * mean.low:.1f} to {100 * mean.high:.1f})"


def _number(count: int | None) -> str:
    return "an unknown number" if count is None else f"{count:,}"


def _loss_words(manifest: Manifest) -> str:
    name, tau, head = manifest.loss.name, manifest.loss.tau, manifest.loss.head
    if name in ("unknown", "other"):
        return f"an {name} loss" if name == "unknown" else "a loss of another kind"
    details = [] if tau is None else [f"tau {tau:g}"]
    for option, value in manifest.loss.options.items():
        words = option.replace("_", " ")
        details.append(words if value is True else f"{words} {value:g}")
    if head != "linear":
        details.append(f"{head} head")
    words = f"the {name} loss" + (f" ({', '.join(details)})" if details else "")
    classifier = manifest.recipe.get("classifier")
    if classifier is None:
        return words
    how = {"crt": "a new linear head (cRT)", "lws": "a scale for each class (LWS)"}[str(classifier)]
    run = manifest.recipe["backbone_run"]
    return f"{words} in a second stage: {how} on class-balanced batches, over the frozen backbone of {run}"


def _origin_words(manifest: Manifest) -> str:
    source = manifest.recipe.get("imported_from")
    if source is not None:
        return f" from {source}, trained elsewhere"
    return f" with seed {manifest.seed}, commit {manifest.git_commit or 'unknown'}"
