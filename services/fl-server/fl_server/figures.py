"""Pictures of a run for the tracking server: its curves over the rounds, and what the final model mistakes for what.

The plotting library is used by its objects alone, without its global state, and imported by the first picture: that takes
a second, and who draws has mostly been started long before.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]
"""Pairs of step and value, by ascending step."""

DPI = 120
PANEL_INCHES = (6.0, 4.2)
LINES = ("-", "--", "-.", ":")
"""One after the other, so that a curve shows below another one, and without colours too."""
ABOVE = 1.05
"""How far a panel from zero reaches beyond its highest value, so that a level curve is not taken for its frame."""
MAX_NUMBERED_CLASSES = 20
"""Above this many classes the cells are too small for numbers."""
SHARES = ("accuracy", "f1", "recall")
"""A panel with one of these words shows shares of 1, and is drawn from 0 to 1 so that two runs can be compared by eye."""


def draw_curves(panels: Mapping[str, Mapping[str, Curve]], path: Path | BinaryIO, title: str = "") -> None:
    """Draw one panel a quantity, each with its labelled curves over the rounds, into a PNG file."""
    width, height = PANEL_INCHES
    figure = _figure(width * max(1, len(panels)), height, title)
    for place, (name, curves) in enumerate(panels.items(), 1):
        _draw_panel(figure.add_subplot(1, len(panels), place), name, curves)
    figure.savefig(path, dpi=DPI, format="png")


def _figure(width: float, height: float, title: str) -> "Figure":
    """An empty picture, so many inches wide and high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(_plain(title))
    return figure


def _draw_panel(axes: Any, name: str, curves: Mapping[str, Curve]) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    for place, (label, curve) in enumerate(curves.items()):
        steps, values = zip(*curve, strict=True)
        style = LINES[place % len(LINES)]
        axes.plot(steps, values, linestyle=style, marker="o", markersize=3, label=_plain(label))
    axes.set_title(_plain(name))
    axes.set_xlabel("after round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if any(word in name.lower() for word in SHARES):
        axes.set_ylim(-0.02, 1.02)
    else:
        highest = max(value for curve in curves.values() for _, value in curve)
        axes.set_ylim(0, highest * ABOVE if highest > 0 else 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path, title: str = "") -> None:
    """Draw a confusion matrix into a PNG file: rows are true classes, columns predicted ones.

    The colour is the share of the true class, so that a rare class is as visible as a frequent one; the cells hold the
    counts and, below, that share.
    """
    side = min(14.0, 3.5 + 0.75 * len(classes))
    figure = _figure(side + 1, side, title)
    axes = figure.add_subplot()
    shares = [[cell / max(1, sum(row)) for cell in row] for row in confusion]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    labels = [_plain(name) for name in classes]
    axes.set_xticks(range(len(classes)), labels=labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), labels=labels)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= MAX_NUMBERED_CLASSES:
        _number_cells(axes, confusion, shares)
    figure.savefig(path, dpi=DPI)


def _number_cells(axes: Any, confusion: Sequence[Sequence[int]], shares: Sequence[Sequence[float]]) -> None:
    for row, cells in enumerate(confusion):
        for column, cell in enumerate(cells):
            share = shares[row][column]
            text = f"{cell}\n{share:.0%}" if cell else "0"
            axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.5 else "black")


def _plain(name: str) -> str:
    """A name with what the plotting library would read as a formula made plain."""
    return name.replace("$", r"\$")
