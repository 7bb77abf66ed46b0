"""How the paper's pictures look here: one colour a method in all of them, and empty panels that say why."""

import io
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NOT_RUN = "not run here"

COLOURS = {
    "ERM": "tab:blue",
    "Adaptive": "tab:orange",
    "Equalised": "tab:green",
    "Logit adjusted": "tab:red",
    "Logit adjustment": "tab:red",
    "Weight normalisation": "tab:purple",
    "Bayes": "black",
    "Momentum": "tab:blue",
    "Adam": "tab:orange",
    "Balanced": "tab:blue",
    "Unequal margin": "tab:orange",
    "Balanced + margin": "tab:green",
    "Balanced + margin, $\\delta_{-1}=p$": "tab:gray",
}


def new_figure(
    n_panels: int, *, columns: int | None = None, width: float = 4.2, height: float = 3.6
) -> Figure:
    """Return a figure of panels, `columns` a row (all by default); its axes are in reading order."""
    columns = columns or n_panels
    rows = -(-n_panels // columns)
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place in range(n_panels):
        figure.add_subplot(rows, columns, place + 1).grid(alpha=0.3)
    return figure


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Name a panel and its axes."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def leave_empty(axes: Axes, reason: str = NOT_RUN) -> None:
    """Mark a panel whose data is not at hand; its axes keep the paper's ranges."""
    axes.text(
        0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color="tab:gray", fontsize=12
    )


def legend_below(figure: Figure, of: Sequence[Axes] | None = None) -> None:
    """Put one legend of the panels (all by default) under them; one left empty has nothing to add."""
    found: dict[str, Artist] = {}
    for axes in figure.axes if of is None else of:
        handles, names = axes.get_legend_handles_labels()
        for name, handle in zip(names, handles, strict=True):
            found.setdefault(str(name), handle)
    if found:
        figure.legend(
            handles=list(found.values()),
            labels=list(found),
            loc="outside lower center",
            ncols=max(2, int(figure.get_figwidth() / 2.3)),
            frameon=False,
        )


def png(figure: Figure) -> bytes:
    """Return the figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
