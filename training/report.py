"""The tau curve as a picture: what another tau would have given, and which was chosen."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bundle.manifest import Manifest, TauPoint

PNG = "tau-curve.png"

_COLOURS = {"many": "tab:green", "medium": "tab:orange", "few": "tab:red"}


def tau_curve_png(
    manifest: Manifest, test_curve: Sequence[TauPoint], normalised_test_curve: Sequence[TauPoint] = ()
) -> bytes:
    """Draw balanced error against tau with the groups, on held-out and on test images, tau* marked.

    The balanced error of weight normalisation, where there is such a method, goes beside it.
    """
    by_weights = manifest.weight_normalisation
    held_out = by_weights.tau_curve if by_weights else []
    panels = [
        (title, curve, other)
        for title, curve, other in (
            ("held-out images", manifest.tau_curve, held_out),
            ("test images", test_curve, normalised_test_curve),
        )
        if curve
    ]
    figure = Figure(figsize=(1 + 5.5 * max(1, len(panels)), 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for place, (title, curve, other) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        _draw_curve(axes, curve, manifest)
        if other:
            axes.plot(
                [point.tau for point in other],
                [_percent(point.balanced_error.error) for point in other],
                color="tab:purple",
                ls="--",
                label="weight normalisation",
            )
        axes.set_title(f"{title} ({curve[0].balanced_error.labels:,})")
        if place == 0:
            axes.set_ylabel("error, mean over classes (%)")
    handles, names = figure.axes[0].get_legend_handles_labels() if panels else ([], [])
    figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(manifest.name)
    buffer = io.BytesIO()
    canvas.print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


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


def _percent(error: float | None) -> float:
    return float("nan") if error is None else 100 * error
