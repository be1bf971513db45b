"""Pictures of a run for the tracking server: its curves over the rounds, and what the final model mistakes for what.

Only the tracking process imports this module; the plotting library is used by its objects alone, without its global state.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]
"""Pairs of step and value, by ascending step."""

DPI = 120
MAX_NUMBERED_CLASSES = 20
"""Above this many classes the cells are too small for numbers."""


def draw_curves(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Draw one panel a quantity, each with its labelled curves over the rounds, into a PNG file."""
    figure = Figure(figsize=(6 * max(1, len(panels)), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        for label, curve in curves.items():
            axes.plot([step for step, _ in curve], [value for _, value in curve], marker="o", markersize=3, label=label)
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def draw_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix (rows: true classes, columns: predicted) with its counts into a PNG file."""
    side = min(14.0, 3.0 + 0.6 * len(classes))
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(confusion, cmap="Blues")
    axes.set_xticks(range(len(classes)), labels=[_plain(name) for name in classes], rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), labels=[_plain(name) for name in classes])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= MAX_NUMBERED_CLASSES:
        _number_cells(axes, confusion)
    figure.savefig(path, dpi=DPI)


def _number_cells(axes: Any, confusion: Sequence[Sequence[int]]) -> None:
    darkest = max((cell for row in confusion for cell in row), default=0)
    for row, cells in enumerate(confusion):
        for column, cell in enumerate(cells):
            colour = "white" if cell > darkest / 2 else "black"
            axes.text(column, row, str(cell), ha="center", va="center", color=colour)


def _plain(name: str) -> str:
    """A class name with what the plotting library would read as a formula made plain."""
    return name.replace("$", r"\$")
