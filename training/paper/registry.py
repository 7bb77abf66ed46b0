"""The names that the command knows: what each trains, and how it is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from training.paper import binary_figures, figures, synthetic_figures, tables
from training.paper.panels import Panel
from training.paper.reports import Report
from training.paper.rows import Training
from training.paper.study import Study


@dataclass(frozen=True)
class Entry:
    """A table or figure: the trainings it is made from, and what is made of those that are finished."""

    name: str
    needs: Callable[[Study], list[tuple[Panel, list[Training]]]]
    report: Callable[[Study], Report]


def _no_training(_study: Study) -> list[tuple[Panel, list[Training]]]:
    return []


def _entries() -> list[Entry]:
    drawn = [
        Entry("figure2", _no_training, lambda study: synthetic_figures.figure2(quick=study.quick)),
        Entry("figure5", _no_training, lambda _study: binary_figures.figure5()),
        Entry("figure6", _no_training, lambda _study: binary_figures.figure6()),
        Entry("figure7", _no_training, lambda _study: binary_figures.figure7()),
        Entry("figure10", _no_training, lambda study: synthetic_figures.figure10(quick=study.quick)),
        Entry("theorem2", _no_training, lambda study: binary_figures.theorem2(quick=study.quick)),
    ]
    trained = [
        Entry(name, partial(figures.needs, name), partial(figures.report, name)) for name in figures.FIGURES
    ]
    tabled = [
        Entry(name, partial(tables.needs, name), partial(tables.report, name)) for name in tables.TABLES
    ]
    return drawn + trained + tabled


_ORDER = (*(f"figure{number}" for number in range(1, 11)), "table2", "table3", "table4", "theorem2")
ENTRIES: dict[str, Entry] = {
    name: next(entry for entry in _entries() if entry.name == name) for name in _ORDER
}
