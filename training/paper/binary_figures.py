"""Figures 5, 6 and 7 and theorem 2: what binary losses do to probabilities, by formula."""

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from longtail import binary
from longtail.binary import Choice
from training.paper import plotting, synthetic
from training.paper.plotting import COLOURS
from training.paper.reports import Report, Row, Table

Floats = NDArray[np.float64]

P = 0.2  # P(y = +1) of the three figures
TEMPERATURES = (1.0, 8.0)  # left and right
CURVES: dict[str, Choice] = {
    "Balanced": binary.BALANCED,
    "Unequal margin": binary.LOGIT_ADJUSTED,
    "Balanced + margin": binary.BALANCED_AND_MARGIN,
}
SMALL_MARGIN = r"Balanced + margin, $\delta_{-1}=p$"  # in the caption of figure 7 alone

THEOREM_P = 0.05


def figure5() -> Report:
    """The link function: the best score for each P(y = +1 | x)."""
    return _curves(
        "figure5",
        "Figure 5: link functions $\\Psi$ of binary losses, P(y = +1) = 0.2",
        CURVES,
        np.linspace(0, 1, 1001)[1:-1],
        curve=binary.link,
        axis_names=("$u$ = P(y = +1 | x)", r"$\Psi(u)$"),
        limits=((-4, 4), (-1.5, 1.5)),
    )


def figure6() -> Report:
    """The inverse link: at score 0 it gives the threshold, which is p for a consistent loss."""
    report = _curves(
        "figure6",
        "Figure 6: inverse link functions of binary losses, P(y = +1) = 0.2",
        CURVES,
        np.linspace(-4, 4, 801),
        curve=binary.inverse_link,
        axis_names=("score $v$", r"$\Psi^{-1}(v)$"),
        limits=((0, 1), (0, 1)),
    )
    for axes in report.figure.axes:
        axes.plot(0, P, "o", color="black", ms=5, zorder=3, label="score 0, probability p")
    plotting.legend_below(report.figure)
    return report


def figure7() -> Report:
    """The least risk, as a share of its maximum, and the tent that it tends to as the temperature grows."""

    def scaled(loss: binary.BinaryLoss, u: Floats) -> Floats:
        risk = binary.least_risk(loss, u)
        share: Floats = risk / risk.max()
        return share

    report = _curves(
        "figure7",
        "Figure 7: least risk of binary losses over its maximum, P(y = +1) = 0.2",
        {**CURVES, SMALL_MARGIN: binary.BALANCED_AND_SMALL_MARGIN},
        np.linspace(0, 1, 1001),
        curve=scaled,
        axis_names=("$u$ = P(y = +1 | x)", "$L(u)$ / max $L$"),
        limits=((0, 1.05), (0, 1.05)),
    )
    u = np.linspace(0, 1, 1001)
    tent = np.minimum((1 - P) * u, P * (1 - u)) / (P * (1 - P))
    for axes in report.figure.axes:
        axes.plot(u, tent, "--", color="black", lw=1, label=r"limit, $\gamma\to\infty$")
    plotting.legend_below(report.figure)
    highest: list[tuple[str, ...]] = []
    for name, choice in {**CURVES, SMALL_MARGIN: binary.BALANCED_AND_SMALL_MARGIN}.items():
        peaks = [u[binary.least_risk(choice.loss(P, g), u).argmax()] for g in TEMPERATURES]
        highest.append((_plain(name), *(f"{peak:.2f}" for peak in peaks)))
    rows = [
        *report.rows,
        *({"g": None, "curve": "limit", "x": x, "y": y} for x, y in zip(u, tent, strict=True)),
    ]
    return Report(
        report.name,
        report.title,
        report.figure,
        rows,
        [Table("Where each risk is highest", ("loss", "g = 1", "g = 8"), highest)],
        [
            "Unequal margin is the binary entropy at every temperature.",
            "The dashed tent is min((1 - p) u, p (1 - u)) / (p (1 - p)); the one that the paper prints jumps"
            " at p, a misprint.",
        ],
    )


def theorem2(*, quick: bool) -> Report:
    """Which binary losses are consistent at p = 0.05, where the others cut, and how a fitted line errs."""
    n_trials = 20 if quick else 100
    rng = np.random.default_rng(0)
    train, test = (synthetic.draw(rng, n_trials, synthetic.N_TRAIN, THEOREM_P) for _ in range(2))
    bayes = synthetic.balanced_errors(synthetic.bayes_scores(test.inputs), test.labels)
    rows: list[Row] = []
    for choice in binary.CHOICES:
        at_one, at_eight = (choice.loss(THEOREM_P, g) for g in TEMPERATURES)
        lines = synthetic.fit(choice, train)
        errors = synthetic.balanced_errors(lines.scores(test.inputs), test.labels)
        rows.append(
            {
                "loss": choice.name,
                "weights": choice.weights,
                "margins": choice.margins,
                "ratio": binary.threshold_ratio(at_one),
                "threshold": binary.threshold(at_one),
                "consistent": binary.is_consistent(at_one, THEOREM_P),
                "ratio_at_g_8": binary.threshold_ratio(at_eight),
                "threshold_at_g_8": binary.threshold(at_eight),
                "consistent_at_g_8": binary.is_consistent(at_eight, THEOREM_P),
                "balanced_error": 100 * float(errors.mean()),
                "sd_over_trials": 100 * float(errors.std(ddof=1)),
                "above_bayes": 100 * float((errors - bayes).mean()),
                "fits_converged": int(lines.converged.sum()),
                "trials": n_trials,
            }
        )
    return Report(
        "theorem2",
        "Theorem 2: which binary losses are consistent for the balanced error, P(y = +1) = 0.05",
        _dot_plot(rows, 100 * float(bayes.mean())),
        rows,
        [
            Table(
                "Wanted: ratio 19, threshold 0.05",
                (
                    *("loss", "weights", "margins", "ratio", "threshold", "consistent"),
                    *("ratio at g = 8", "consistent", "error of a line, % (sd)", "above Bayes"),
                ),
                [
                    (
                        f"{row['loss']}",
                        f"{row['weights']}",
                        f"{row['margins']}",
                        f"{row['ratio']:.3g}",
                        f"{row['threshold']:.3f}",
                        _yes(row["consistent"]),
                        f"{row['ratio_at_g_8']:.3g}",
                        _yes(row["consistent_at_g_8"]),
                        f"{row['balanced_error']:.2f} ({row['sd_over_trials']:.2f})",
                        f"{row['above_bayes']:+.2f}",
                    )
                    for row in rows
                ],
            )
        ],
        [
            f"Error of a line fitted by the loss to {synthetic.N_TRAIN:,} draws, tested on as many others:"
            f" mean and standard deviation over {n_trials} trials; Bayes on the same draws"
            f" {100 * bayes.mean():.2f} %, in truth {100 * synthetic.BAYES:.3f} %. Fits that did not reach"
            f" their minimum: {sum(n_trials - int(row['fits_converged'] or 0) for row in rows)}.",
            "pi is the class's own prior: p for +1, 1 - p for -1. Balanced weights with the margins 1 and"
            " p/(1-p) are consistent only as g grows without bound.",
            "Consistency speaks of the minimiser over all functions, a line is fitted within one class of"
            " them: an error near Bayes's does not make a loss consistent. The line is fitted at g = 1.",
        ],
    )


def _curves(
    name: str,
    title: str,
    choices: dict[str, Choice],
    x: Floats,
    *,
    curve: Callable[[binary.BinaryLoss, Floats], Floats],
    axis_names: tuple[str, str],
    limits: tuple[tuple[float, float], tuple[float, float]],
) -> Report:
    """Draw one curve for each loss in a panel for each temperature."""
    figure = plotting.new_figure(2)
    rows: list[Row] = []
    for axes, g, limit in zip(figure.axes, TEMPERATURES, limits, strict=True):
        for label, choice in choices.items():
            y = curve(choice.loss(P, g), x)
            dashes = ":" if label == SMALL_MARGIN else "-"
            axes.plot(x, y, dashes, color=COLOURS[label], label=label)
            rows += [
                {"g": g, "curve": _plain(label), "x": float(a), "y": float(b)}
                for a, b in zip(x, y, strict=True)
            ]
        plotting.label(axes, rf"$\gamma$ = {g:g}", *axis_names)
        axes.set_xlim(float(x.min().round(1)), float(x.max().round(1)))
        axes.set_ylim(*limit)
    if name == "figure5":
        plotting.legend_below(figure)
    cuts = [
        (label, *(f"{binary.threshold(choice.loss(P, g)):.3f}" for g in TEMPERATURES))
        for label, choice in choices.items()
    ]
    table = Table(
        "Threshold: the probability at score 0 (p = 0.2 if consistent)", ("loss", "g = 1", "g = 8"), cuts
    )
    return Report(name, title.replace("$\\Psi$ ", ""), figure, rows, [table])


def _dot_plot(rows: list[Row], bayes: float) -> Figure:
    """Draw each loss's threshold beside p, and the error of its line beside Bayes's."""
    figure = plotting.new_figure(2, width=5.2, height=4.6)
    cuts, errors = figure.axes
    for place, row in enumerate(rows):
        colour, at_eight = (
            "tab:blue" if row[key] else "tab:red" for key in ("consistent", "consistent_at_g_8")
        )
        cuts.plot(_number(row["threshold"]), place, "o", color=colour)
        cuts.plot(_number(row["threshold_at_g_8"]), place, "o", color=at_eight, mfc="none", ms=9)
        errors.errorbar(
            _number(row["balanced_error"]),
            place,
            xerr=_number(row["sd_over_trials"]),
            fmt="o",
            color=colour,
            capsize=2,
        )
    cuts.axvline(THEOREM_P, color="black", lw=1, ls="--", label="wanted: p, Bayes's error")
    errors.axvline(bayes, color="black", lw=1, ls="--")
    cuts.set_xscale("log")
    for name, colour in (("consistent", "tab:blue"), ("not consistent", "tab:red")):
        cuts.plot([], [], "o", color=colour, label=name)
    cuts.plot([], [], "o", color="tab:gray", mfc="none", ms=9, label=r"$\gamma$ = 8 (filled: 1)")
    cuts.set_yticks(range(len(rows)), [str(row["loss"]) for row in rows])
    errors.set_yticks(range(len(rows)), [""] * len(rows))
    for axes in (cuts, errors):
        axes.invert_yaxis()
    plotting.label(cuts, "Where the minimiser cuts", "P(y = +1 | x)", "")
    plotting.label(errors, "A line fitted by the loss", "balanced error (%), sd over trials", "")
    plotting.legend_below(figure)
    return figure


def _number(value: str | float | int | bool | None) -> float:
    return float(value or 0)


def _yes(value: str | float | int | bool | None) -> str:
    return "yes" if value else "no"


def _plain(label: str) -> str:
    return label.replace(r", $\delta_{-1}=p$", " p")
