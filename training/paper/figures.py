"""Figures 1, 3, 4, 8 and 9: what trained networks do, by class, by group and against tau."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from scipy.stats import spearmanr

from longtail.metrics import group_members, groups_by_count
from longtail.tau import TauPoint
from training.paper import plotting, published
from training.paper.panels import Panel
from training.paper.plotting import COLOURS
from training.paper.reports import Measured, Report, Row, Table, Value, comparison
from training.paper.rows import ERM, ERM_ADAM, FOUR_LOSSES, Training
from training.paper.runs import Outcome
from training.paper.study import (
    Study,
    adjusted_curve,
    described,
    measured,
    normalised_curve,
    plain_errors,
)

N_BANDS = 10  # groups by frequency in figure 8

_NORMS = {"cifar10-lt": (8, 13), "cifar100-lt": (4, 7)}

# (tau to, error from, error to) of figures 3 and 9
_TAU_RANGES: dict[str, dict[str, tuple[float, float, float]]] = {
    "figure3": {
        "cifar10-lt": (4, 20, 28),
        "cifar100-lt": (2, 58, 70),
        "imagenet-lt": (2, 48, 58),
        "inaturalist2018": (2, 33, 40),
    },
    "figure9": {"cifar10-lt": (4, 20, 50), "cifar100-lt": (2, 55, 75)},
}
_HIGHEST: dict[str, dict[str, float]] = {
    "figure4": {"cifar10-lt": 0.6, "cifar100-lt": 0.8, "imagenet-lt": 0.6, "inaturalist2018": 0.4},
    "figure8": {"cifar10-lt": 0.6, "cifar100-lt": 0.8, "imagenet-lt": 0.8, "inaturalist2018": 0.6},
}


@dataclass(frozen=True)
class _Figure:
    """A figure's trainings and its way of drawing them."""

    title: str
    trainings: Sequence[Training]
    draw: Callable[[str, "_Figure", Study], Report]
    profile: str = "exp"
    large: bool = False

    def panels(self, study: Study) -> list[Panel]:
        return study.panels(self.profile, large=self.large)


def needs(name: str, study: Study) -> list[tuple[Panel, list[Training]]]:
    """Return the trainings that the figure shows, on each of its panels."""
    figure = FIGURES[name]
    return [(panel, list(figure.trainings)) for panel in figure.panels(study)]


def report(name: str, study: Study) -> Report:
    """Return the figure from the trainings that are finished; other panels are empty."""
    return FIGURES[name].draw(name, FIGURES[name], study)


def _weight_norms(name: str, figure: _Figure, study: Study) -> Report:
    """Figure 1: the norm of each class's weights under two optimisers."""
    panels = figure.panels(study)
    picture = plotting.new_figure(len(panels), width=5.0)
    rows: list[Row] = []
    values: list[Value] = []
    rhos: list[tuple[str, ...]] = []
    for axes, panel in zip(picture.axes, panels, strict=True):
        plotting.label(axes, panel.title, "class, most frequent first", r"$\|w_y\|_2$")
        if panel.key in _NORMS:
            axes.set_ylim(*_NORMS[panel.key])
        for optimiser, training in (("Momentum", ERM), ("Adam", ERM_ADAM)):
            outcomes = study.outcomes(panel, training)
            error = measured([plain_errors(outcome) for outcome in outcomes])
            values.append(Value(panel.title, f"balanced error, {optimiser}", None, error))
            if not outcomes:
                continue
            norms = np.array([outcome.norms[_by_frequency(outcome)] for outcome in outcomes])
            counts = np.sort(outcomes[0].class_counts)[::-1]
            mean, sd = norms.mean(axis=0), norms.std(axis=0, ddof=1 if len(norms) > 1 else 0)
            classes = np.arange(len(mean))
            axes.plot(classes, mean, color=COLOURS[optimiser], label=optimiser)
            axes.fill_between(classes, mean - sd, mean + sd, color=COLOURS[optimiser], alpha=0.2, lw=0)
            lower, upper = axes.get_ylim()
            axes.set_ylim(min(lower, (mean - sd).min() - 0.2), max(upper, (mean + sd).max() + 0.2))
            rho = [float(spearmanr(counts, of_seed).statistic) for of_seed in norms]
            rhos.append((panel.title, optimiser, ", ".join(f"{value:+.2f}" for value in rho)))
            rows += [
                {
                    "data": panel.title,
                    "optimiser": optimiser,
                    "class": int(place),
                    "training_images": int(counts[place]),
                    "norm": float(mean[place]),
                    "sd_over_seeds": float(sd[place]),
                    "seeds": len(norms),
                }
                for place in classes
            ]
        if not study.outcomes(panel, ERM) and not study.outcomes(panel, ERM_ADAM):
            axes.set(xlim=(0, 9 if panel.key == "cifar10-lt" else 99))
            plotting.leave_empty(axes)
    plotting.legend_below(picture)
    return Report(
        name,
        figure.title,
        picture,
        rows or _not_run(panels, "optimiser"),
        [
            comparison("Balanced error (%): are the two comparable?", values),
            Table("Spearman's rho of norm and count, by seed", ("data", "optimiser", "rho"), rhos),
        ],
        [
            *(described(study, panel, figure.trainings) for panel in panels),
            "The paper gives neither Adam's rate nor its decay: ours peaks at 1e-3 under the recipe's"
            " schedule and decay. Its claim: under momentum norms follow counts, under Adam they do not.",
            "The line is the mean over seeds, the band one standard deviation.",
        ],
    )


def _not_run(panels: Sequence[Panel], column: str) -> list[Row]:
    """Return a row for each panel that says so in this column, where there is nothing else to say."""
    return [{"data": panel.title, column: plotting.NOT_RUN} for panel in panels]


def _against_tau(name: str, figure: _Figure, study: Study) -> Report:
    """Figures 3 and 9: ERM corrected after training, at each tau."""
    panels = figure.panels(study)
    picture = plotting.new_figure(len(panels), columns=min(4, len(panels)))
    rows: list[Row] = []
    values: list[Value] = []
    for axes, panel in zip(picture.axes, panels, strict=True):
        to, low, high = _TAU_RANGES[name].get(panel.key, (4, 0, 0))
        taus = [step / 10 for step in range(round(10 * to) + 1)]
        plotting.label(axes, panel.title, r"$\tau$", "balanced error (%)")
        axes.set_xlim(0, to)
        if high:
            axes.set_ylim(low, high)
        outcomes = study.outcomes(panel, ERM)
        for method, curve in (
            ("Logit adjustment", adjusted_curve),
            ("Weight normalisation", normalised_curve),
        ):
            points = _mean_curve([curve(outcome, taus) for outcome in outcomes])
            values += _known(name, panel, method, dict(zip(taus, points, strict=False)))
            if not points:
                continue
            means = np.array([point.mean for point in points])
            axes.plot(taus, means, color=COLOURS[method], label=method)
            if points[0].sd is not None:
                sds = np.array([point.sd or 0.0 for point in points])
                axes.fill_between(taus, means - sds, means + sds, color=COLOURS[method], alpha=0.2, lw=0)
            if high:  # widen the paper's range where it would cut off the curve's start or lowest point
                lower, upper = axes.get_ylim()
                axes.set_ylim(min(lower, means.min() - 0.5), max(upper, means[0] + 0.5))
            rows += [
                {"data": panel.title, "method": method, "tau": tau, **_numbers(point)}
                for tau, point in zip(taus, points, strict=True)
            ]
        if not outcomes:
            plotting.leave_empty(axes)
    plotting.legend_below(picture)
    return Report(
        name,
        figure.title,
        picture,
        rows or _not_run(panels, "method"),
        [comparison("Balanced error (%) where the paper prints it", values)],
        [
            *(described(study, panel, figure.trainings) for panel in panels),
            "Weight normalisation divides each logit, bias included, by the norm of its class's weights to"
            " the power tau. The lowest point of a test curve is a look at the test images, not a result.",
        ],
    )


def _known(name: str, panel: Panel, method: str, points: Mapping[float, Measured]) -> list[Value]:
    """Return the points of a curve that the paper's tables print, beside ours."""
    table = published.TABLE2 if name == "figure3" else published.TABLE4
    key = "post-hoc" if method == "Logit adjustment" else "weight-normalisation"
    lowest = min(points.items(), key=lambda item: item[1].mean, default=None)
    best = table.get(f"{key}-best", {}).get(panel.key)
    known = [
        ("tau = 0", table["erm"].get(panel.key), points.get(0.0), ""),
        ("tau = 1", table[key].get(panel.key), points.get(1.0), ""),
        (
            "lowest",
            best,
            None if lowest is None else lowest[1],
            "" if lowest is None else f"at tau = {lowest[0]:.1f}",
        ),
    ]
    return [
        Value(
            panel.title,
            f"{method}, {what}",
            None if printed is None else printed.error,
            ours,
            copied="" if printed is None else printed.copied,
            note=note,
        )
        for what, printed, ours, note in known
    ]


def _by_group(name: str, figure: _Figure, study: Study) -> Report:
    """Figure 4: bars of the mean class error in many, medium and few."""

    def groups(counts: np.ndarray, _panel: Panel) -> dict[str, list[int]]:
        members = group_members(groups_by_count(counts))
        return {group: members[group].tolist() for group in ("many", "medium", "few") if group in members}

    return _bars(name, figure, study, groups=groups, x="group by training images (>= 100, between, <= 20)")


def _by_band(name: str, figure: _Figure, study: Study) -> Report:
    """Figure 8: bars of each class of CIFAR-10, of ten groups by frequency elsewhere."""

    def bands(counts: np.ndarray, _panel: Panel) -> dict[str, list[int]]:
        order = np.argsort(-counts, kind="stable")
        return {
            str(place): band.tolist()
            for place, band in enumerate(np.array_split(order, min(N_BANDS, len(counts))))
        }

    return _bars(name, figure, study, groups=bands, x="class or group, most frequent first")


def _bars(
    name: str,
    figure: _Figure,
    study: Study,
    *,
    groups: Callable[[np.ndarray, Panel], dict[str, list[int]]],
    x: str,
) -> Report:
    panels = figure.panels(study)
    picture = plotting.new_figure(len(panels), columns=min(2, len(panels)), width=5.4, height=3.2)
    rows: list[Row] = []
    values: list[Value] = []
    for axes, panel in zip(picture.axes, panels, strict=True):
        plotting.label(axes, panel.title, x, "mean class error")
        if panel.key in _HIGHEST[name]:
            axes.set_ylim(0, _HIGHEST[name][panel.key])
        shown: dict[str, list[int]] = {}
        for place, training in enumerate(figure.trainings):
            outcomes = study.outcomes(panel, training)
            if not outcomes:
                continue
            shown = groups(outcomes[0].class_counts, panel)
            by_seed = [plain_errors(outcome) for outcome in outcomes]
            found = {group: measured(by_seed, classes) for group, classes in shown.items()}
            _draw_bars(axes, training.name, place, len(figure.trainings), found)
            values += [
                Value(panel.title, f"{training.name}, {group} ({len(shown[group])})", None, ours)
                for group, ours in found.items()
            ]
            rows += [
                {
                    "data": panel.title,
                    "method": training.name,
                    "group": group,
                    "classes": len(shown[group]),
                    **_numbers(ours),
                }
                for group, ours in found.items()
                if ours is not None
            ]
        axes.set_xticks(range(len(shown)), list(shown))
        if not shown:
            plotting.leave_empty(axes)
    plotting.legend_below(picture)
    return Report(
        name,
        figure.title,
        picture,
        rows or _not_run(panels, "method"),
        [comparison("Mean class error, %", values)],
        [
            *(described(study, panel, figure.trainings) for panel in panels),
            "Bars are means over seeds; whiskers are the 95 % interval of the test sample.",
        ],
    )


def _draw_bars(
    axes: Axes, method: str, place: int, n_methods: int, found: Mapping[str, Measured | None]
) -> None:
    width = 0.8 / n_methods
    x = np.arange(len(found)) + (place - (n_methods - 1) / 2) * width
    known = [ours for ours in found.values() if ours is not None]
    means = np.array([ours.mean / 100 for ours in known])
    spread = np.abs(np.array([[(ours.low or 0) / 100, (ours.high or 0) / 100] for ours in known]).T - means)
    axes.bar(x, means, width, color=COLOURS[method], label=method)
    axes.errorbar(x, means, yerr=spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
    axes.set_ylim(0, max(axes.get_ylim()[1], float((means + spread[1]).max()) + 0.02))


def _mean_curve(curves: Sequence[Sequence[TauPoint]]) -> list[Measured]:
    """Return the mean over seeds at each tau, nothing without a seed."""
    points = [measured([point.by_class for point in at_tau]) for at_tau in zip(*curves, strict=True)]
    return [point for point in points if point is not None]


def _numbers(ours: Measured) -> dict[str, float | int | None]:
    return {
        "error": ours.mean,
        "sd_over_seeds": ours.sd,
        "low": ours.low,
        "high": ours.high,
        "seeds": len(ours.values),
    }


def _by_frequency(outcome: Outcome) -> np.ndarray:
    return np.argsort(-outcome.class_counts, kind="stable")


FIGURES: dict[str, _Figure] = {
    "figure1": _Figure(
        "Figure 1: norms of the last layer's weights under ERM", (ERM, ERM_ADAM), _weight_norms
    ),
    "figure3": _Figure("Figure 3: ERM corrected after training", (ERM,), _against_tau, large=True),
    "figure4": _Figure("Figure 4: error by group of classes", FOUR_LOSSES, _by_group, large=True),
    "figure8": _Figure("Figure 8: error by frequency", FOUR_LOSSES, _by_band, large=True),
    "figure9": _Figure(
        "Figure 9: ERM corrected after training, Step profile", (ERM,), _against_tau, profile="step"
    ),
}
