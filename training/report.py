"""What a person reads about a bundle: the tau curve as a PNG, and the model card."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bundle.manifest import Estimate, Manifest, TauPoint

PNG = "tau-curve.png"
CARD = "README.md"

_COLOURS = {"many": "tab:green", "medium": "tab:orange", "few": "tab:red"}


def tau_curve_png(manifest: Manifest, test_curve: Sequence[TauPoint]) -> bytes:
    """Draw balanced error against tau with the groups, on held-out and on test images, tau* marked."""
    panels = [
        (title, curve)
        for title, curve in (("held-out images", manifest.tau_curve), ("test images", test_curve))
        if curve
    ]
    figure = Figure(figsize=(1 + 5.5 * max(1, len(panels)), 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for place, (title, curve) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        _draw_curve(axes, curve, manifest)
        axes.set_title(f"{title} ({curve[0].balanced_error.labels:,})")
        if place == 0:
            axes.set_ylabel("error, mean over classes (%)")
    handles, names = figure.axes[0].get_legend_handles_labels() if panels else ([], [])
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(manifest.name)
    buffer = io.BytesIO()
    canvas.print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def model_card(manifest: Manifest, command: str | None = None) -> str:
    """Return the model card: what it is, what it saw, how wrong it is, and what it is not for."""
    data, counts = manifest.dataset, manifest.class_counts
    few = next((len(group.indices) for group in manifest.groups if group.name == "few"), 0)
    lines = [
        f"# {manifest.name}",
        "",
        f"{manifest.network} for {len(manifest.classes)} classes, trained on {data.name}"
        f" with the {_loss_words(manifest)} loss.",
        "",
        f"- **Images**: {_number(data.train_images)} trained on, {_number(data.holdout_images)} held out,"
        f" {_number(data.test_images)} to test; {counts.max():,} in the largest class, {counts.min():,}"
        f" in the smallest, {few} classes with few.",
        f"- **Input**: {manifest.input.height} x {manifest.input.width} {manifest.input.colour}, mean"
        f" {manifest.input.mean}, deviation {manifest.input.std} (of pixels from 0 to 1).",
        f"- **Seed** {manifest.seed}, commit {manifest.git_commit or 'unknown'}, made"
        f" {manifest.created:%Y-%m-%d}.",
    ]
    if data.detail.get("note"):
        lines.append(f"- **Note**: {data.detail['note']}.")
    if command:
        lines += ["", "Trained by", "", f"    {command}"]
    lines += ["", "## How it decides", "", *_decision_words(manifest)]
    lines += ["", "## How wrong it is", ""]
    lines += [
        "Error in per cent, each class counting alike, under a uniform target prior; in brackets the 95 %"
        " interval. Held-out and test images were never trained on; tau was chosen on the held-out ones.",
        "",
    ]
    for title, points in (("Held out", manifest.metrics.holdout), ("Test", manifest.metrics.test)):
        lines += _error_table(title, points)
    lines += [f"![Error against tau]({PNG})", "", "## What it is not for", ""]
    lines += [
        "The errors hold for images like those of the data set. Probabilities are calibrated to the label mix"
        " of the training set at tau = 0, and to the target prior only at tau = T; classes with a handful of"
        " training images have wide intervals, and their probabilities are the least certain. An image of"
        " no listed class is given one all the same.",
        "",
    ]
    return "\n".join(lines)


def _draw_curve(axes: Axes, curve: Sequence[TauPoint], manifest: Manifest) -> None:
    taus = [point.tau for point in curve]
    balanced = [point.balanced_error for point in curve]
    axes.plot(taus, [_percent(mean.error) for mean in balanced], color="black", label="balanced error")
    axes.fill_between(
        taus,
        [100 * mean.low for mean in balanced],
        [100 * mean.high for mean in balanced],
        color="black",
        alpha=0.12,
        linewidth=0,
        label="95 % interval",
    )
    for name in [group.name for group in manifest.groups]:
        errors = [next(mean.error for mean in point.groups if mean.group == name) for point in curve]
        axes.plot(taus, [_percent(error) for error in errors], color=_COLOURS.get(name), lw=1, label=name)
    if manifest.tau is not None:
        axes.axvline(manifest.tau, color="tab:blue", label=f"tau* = {manifest.tau:g}")
    if manifest.calibration.tau_by_error is not None:
        by_error = manifest.calibration.tau_by_error
        axes.axvline(by_error, color="tab:blue", ls=":", label=f"least held-out error, {by_error:g}")
    axes.set_xlabel("tau")
    axes.set_xlim(min(taus), max(taus))
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)


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
            f" the least class-mean log loss, come from {over}; the least error there is at tau ="
            f" {fit.tau_by_error:g}."
        )
    else:
        lines.append("Nothing was held out: the temperature is 1 and there is no tau*.")
    return lines


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


def _percent(error: float | None) -> float:
    return float("nan") if error is None else 100 * error


def _number(count: int | None) -> str:
    return "an unknown number" if count is None else f"{count:,}"


def _loss_words(manifest: Manifest) -> str:
    loss = manifest.loss
    return loss.name if loss.tau is None else f"{loss.name} (tau {loss.tau:g})"
