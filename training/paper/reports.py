"""What a name of the paper leaves on disk: NAME.png to lay beside the paper's, NAME.csv and NAME.md."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from training.exceptions import RunError
from training.paper.plotting import NOT_RUN, png

Row = Mapping[str, str | float | int | bool | None]


@dataclass(frozen=True)
class Measured:
    """One of our figures: the value of each seed, and the 95 % interval of the test sample about their mean.

    The seeds share their test images, so the interval does not shrink with more of them.
    """

    values: tuple[float, ...]
    low: float | None = None
    high: float | None = None

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        """The standard deviation over seeds, None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Value:
    """One cell of a comparison: the paper's value where it prints one, ours where it was run here."""

    panel: str
    name: str
    paper: float | None
    ours: Measured | None
    copied: str = ""  # whom the paper took its value from: shown, not counted
    note: str = ""

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.paper is None or self.ours is None else self.ours.mean - self.paper


@dataclass(frozen=True)
class Table:
    """A table for people: cells as they are to be read."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """A finished table or figure."""

    name: str
    title: str
    figure: Figure
    rows: Sequence[Row]  # of the CSV, each with the same columns
    tables: Sequence[Table]
    notes: Sequence[str] = field(default_factory=tuple)


def write(report: Report, out: Path, command: str) -> None:
    """Write the three files into the folder `out`, each whole. Raises RunError where it cannot."""
    content = {
        f"{report.name}.png": png(report.figure),
        f"{report.name}.csv": csv_text(report.rows).encode(),
        f"{report.name}.md": page(report, command).encode(),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            scratch = out / f".{name}.tmp"
            scratch.write_bytes(data)
            scratch.replace(out / name)
    except OSError as failure:
        raise RunError(f"--out: {out} cannot be written: {failure.strerror or failure}") from failure


def page(report: Report, command: str) -> str:
    """Return the report's page: picture, tables, notes and the command that makes it."""
    parts = [f"# {report.title}", f"![{report.title}]({report.name}.png)"]
    for table in report.tables:
        parts.append(f"**{table.title}**")
        lines = [_line(table.header), _line(["---"] * len(table.header))]
        parts.append("\n".join(lines + [_line(row) for row in table.rows]))
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    parts.append(
        f"Made by `{command}`; the numbers behind the picture: [{report.name}.csv]({report.name}.csv)."
    )
    return "\n\n".join(parts) + "\n"


def comparison(title: str, values: Sequence[Value], digits: int = 2) -> Table:
    """Return the paper's values beside ours."""
    rows = []
    for value in values:
        ours = value.ours
        rows.append(
            (
                value.panel,
                value.name,
                ""
                if value.paper is None
                else f"{value.paper:.{digits}f}" + (" copied" if value.copied else ""),
                NOT_RUN if ours is None else f"{ours.mean:.{digits}f}",
                "" if ours is None or ours.sd is None else f"{ours.sd:.{digits}f} ({len(ours.values)})",
                ""
                if ours is None or ours.low is None
                else f"{ours.low:.{digits}f} to {ours.high:.{digits}f}",
                "" if value.difference is None else f"{value.difference:+.{digits}f}",
                "; ".join(filter(None, (value.note, _not_counted(value)))),
            )
        )
    header = ("data", "what", "paper", "ours", "sd (seeds)", "95 % of the test sample", "difference", "")
    return Table(title, header, rows)


def value_rows(values: Sequence[Value]) -> list[Row]:
    """Return the CSV's rows of a comparison."""
    return [
        {
            "data": value.panel,
            "what": value.name,
            "paper": value.paper,
            "copied_from": value.copied,
            "ours": None if value.ours is None else value.ours.mean,
            "sd_over_seeds": None if value.ours is None else value.ours.sd,
            "seeds": 0 if value.ours is None else len(value.ours.values),
            "low": None if value.ours is None else value.ours.low,
            "high": None if value.ours is None else value.ours.high,
            "difference": value.difference,
            "counted": value.difference is not None and not value.copied,
            "note": NOT_RUN if value.ours is None else value.note,
        }
        for value in values
    ]


def csv_text(rows: Sequence[Row]) -> str:
    """Return rows as CSV; a number has six significant digits, an absent one is empty."""
    buffer = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, fieldnames=columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def _cell(value: str | float | int | bool | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _not_counted(value: Value) -> str:
    return f"the paper's is {value.copied}'s: not counted" if value.copied else ""
