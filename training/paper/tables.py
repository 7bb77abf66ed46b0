"""Tables 2, 3 and 4: the paper's balanced errors beside ours, as a page and as a plot of dots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longtail.tau import GRID
from training.paper import plotting, published
from training.paper.panels import Panel
from training.paper.published import Printed
from training.paper.reports import Measured, Report, Value, comparison, value_rows
from training.paper.rows import ERM, TABLE2, TABLE3, TABLE4, Row, Training
from training.paper.study import (
    Study,
    adjusted_curve,
    chosen_tau,
    described,
    measured,
    normalised_curve,
    plain_errors,
)

Needs = list[tuple[Panel, list[Training]]]


@dataclass(frozen=True)
class _Layout:
    """What distinguishes the three tables."""

    name: str
    title: str
    rows: tuple[str, ...]
    printed: Mapping[str, Mapping[str, Printed]]

    def panels(self, study: Study) -> list[Panel]:
        if self.name == "table3":
            return study.deep_panels()
        return study.panels("step" if self.name == "table4" else "exp", large=self.name == "table2")


TABLES = {
    layout.name: layout
    for layout in (
        _Layout("table2", "Table 2: balanced error of every method", TABLE2, published.TABLE2),
        _Layout("table3", "Table 3: deeper networks and longer training", TABLE3, published.TABLE3),
        _Layout("table4", "Table 4: the Step profile, ratio 100", TABLE4, published.TABLE4),
    )
}


def needs(name: str, study: Study) -> Needs:
    """Return the trainings of the rows that were asked for, each once, on each panel."""
    layout = TABLES[name]
    wanted = [training for row in study.rows(layout.rows) if study.trains(row) for training in row.needs]
    return [(panel, list(dict.fromkeys(wanted))) for panel in layout.panels(study)]


def report(name: str, study: Study) -> Report:
    """Return the table from the trainings that are finished; the others' cells are empty."""
    layout = TABLES[name]
    panels = layout.panels(study)
    values = {panel: _column(layout, panel, study) for panel in panels}
    flat = [value for column in values.values() for value in column]
    return Report(
        name,
        layout.title,
        _dots(values),
        value_rows(flat),
        [comparison("Balanced error of the last epoch, %", flat)],
        [
            *(described(study, panel, [t for _, ts in needs(name, study) for t in ts]) for panel in panels),
            "tau* has the least class-mean log loss on a tenth of the training images, held out from a second"
            " fit; the row's error is that of the fit on all images.",
            "LDAM is the adaptive margin as its authors train it, and the paper's CIFAR cells of 'Adaptive'"
            " are theirs; 'Adaptive' here is the paper's eq. 5 on raw logits.",
            "The interval is of the test images, which all seeds share; the sd is of training.",
        ],
    )


def _column(layout: _Layout, panel: Panel, study: Study) -> list[Value]:
    values = []
    for row in study.rows(layout.rows):
        printed = layout.printed.get(row.key, {}).get(panel.key)
        ours, note = _measure(row, panel, study)
        values.append(
            Value(
                panel.title,
                row.name,
                None if printed is None else printed.error,
                ours,
                copied="" if printed is None else printed.copied,
                note=note,
            )
        )
        if row.key == "post-hoc-best":
            values.append(_lowest(layout, panel, study))
    return values


def _measure(row: Row, panel: Panel, study: Study) -> tuple[Measured | None, str]:
    if row.after == "nothing":
        return measured([plain_errors(outcome) for outcome in study.outcomes(panel, row.training)]), ""
    curve = normalised_curve if row.after == "weight normalisation" else adjusted_curve
    if row.tau is not None:
        found = [curve(outcome, (row.tau,))[0] for outcome in study.outcomes(panel, row.training)]
        return measured([point.by_class for point in found]), ""
    pairs = study.pairs(panel)
    picked = [chosen_tau(row, held_out) for _, held_out in pairs]
    found = [curve(whole, (tau,))[0] for (whole, _), tau in zip(pairs, picked, strict=True)]
    note = "tau* = " + ", ".join(f"{tau:.1f}" for tau in picked) if picked else ""
    return measured([point.by_class for point in found]), note


def _lowest(layout: _Layout, panel: Panel, study: Study) -> Value:
    """Return the lowest point of the mean test curve: what no choice of tau could have beaten."""
    curves = [adjusted_curve(outcome, GRID) for outcome in study.outcomes(panel, ERM)]
    by_tau = [measured([point.by_class for point in points]) for points in zip(*curves, strict=True)]
    lowest = min((point for point in by_tau if point is not None), key=lambda point: point.mean, default=None)
    note = "" if lowest is None else f"at tau = {GRID[by_tau.index(lowest)]:.1f}, chosen on the test images"
    printed = published.LOWEST_POST_HOC.get(panel.key) if layout.name == "table2" else None
    return Value(panel.title, "Post-hoc, lowest point of the test curve", printed, lowest, note=note)


def _dots(values: Mapping[Panel, Sequence[Value]]) -> Figure:
    """Draw the paper's errors beside ours, one row a method, one panel a data set."""
    n_rows = max(len(column) for column in values.values())
    figure = plotting.new_figure(len(values), width=3.9, height=1.2 + 0.33 * n_rows)
    for place, (axes, (panel, column)) in enumerate(zip(figure.axes, values.items(), strict=True)):
        _draw_column(axes, column)
        plotting.label(axes, panel.title, "balanced error (%)", "")
        axes.set_yticks(range(len(column)), [value.name for value in column] if place == 0 else [])
        if all(value.ours is None for value in column):
            plotting.leave_empty(axes)
    plotting.legend_below(figure)
    return figure


def _draw_column(axes: Axes, column: Sequence[Value]) -> None:
    for place, value in enumerate(column):
        if value.paper is not None:
            filled = "none" if value.copied else "black"
            axes.plot(value.paper, place - 0.15, "D", color="black", mfc=filled, ms=5)
        if value.ours is not None and value.ours.low is not None and value.ours.high is not None:
            mean = value.ours.mean
            spread = [[mean - value.ours.low], [value.ours.high - mean]]
            axes.errorbar(mean, place + 0.15, xerr=spread, fmt="o", color="tab:red", capsize=2, ms=5)
    axes.plot([], [], "D", color="black", label="paper")
    axes.plot([], [], "D", color="black", mfc="none", label="paper, copied from others")
    axes.plot([], [], "o", color="tab:red", label="ours, 95 % of the test sample")
    axes.set_ylim(len(column) - 0.5, -0.5)
