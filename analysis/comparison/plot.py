"""Plot a comparison: a row per defence, a mark per condition; colours distinguish the groups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.comparison.results import GROUPS, Cell, Comparison, Condition
from analysis.comparison.tables import caption_of
from analysis.figures import COLOURS, add_legend, canvas, literal, tick_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_COLOUR = dict(zip(GROUPS, ("#555555", COLOURS[0], COLOURS[1], COLOURS[2]), strict=True))
_SHAPES = "os^Dv<>pP*X"


def draw_comparison(comparison: Comparison, path: str | Path | None = None) -> Figure:
    """Plot accuracies with their 95 % intervals; hollow marks are attacks that do not know the defence.

    Raises:
        UserError: an unknown format.
        RunFault: the file cannot be written.
    """
    conditions = comparison.columns
    height = 0.2 * len(conditions) * len(comparison.defences) + 1.6
    title = literal(caption_of(comparison)[0])
    with canvas(6.4, min(14.0, max(2.6, height)), path, grid="x", title=title) as (figure, axes):
        for row, defence in enumerate(comparison.defences):
            if row:
                axes.axhline(row - 0.5, color="#dddddd", linewidth=0.6)
            for place, condition in enumerate(conditions):
                y = row - 0.4 + 0.8 * (place + 0.5) / len(conditions)
                _mark(axes, comparison.cell(defence, condition), condition, place, y)
        axes.set_yticks(range(len(comparison.defences)), [tick_name(name) for name in comparison.defences])
        axes.set(
            xlim=(0, 1),
            ylim=(len(comparison.defences) - 0.5, -0.5),
            xlabel="accuracy (bars: 95 % interval over images)",
        )
        handles = [_handle(condition, place) for place, condition in enumerate(conditions)]
        add_legend(figure, axes, 3, handles=handles)
    return figure


def _label(condition: Condition) -> str:
    return literal(condition.name if condition.group == "plain" else f"{GROUPS[condition.group]}: {condition.short}")


def _style(condition: Condition, place: int) -> dict[str, Any]:
    colour = _COLOUR[condition.group]
    hollow = condition.group == "blind"  # the attack does not know the defence
    return {
        "marker": _SHAPES[place % len(_SHAPES)],
        "color": colour,
        "markerfacecolor": "white" if hollow else colour,
        "markersize": 5,
        "linestyle": "none",
        "clip_on": False,  # many marks lie at 0 and 1
    }


def _mark(axes: Axes, cell: Cell | None, condition: Condition, place: int, y: float) -> None:
    if cell is None:
        return
    style = _style(condition, place)
    if cell.failed or not cell.images:
        axes.text(0.005, y, f"{_label(condition)}: failed", va="center", fontsize="x-small", color=style["color"])
        return
    low, high = cell.interval
    axes.plot([low, high], [y, y], color=style["color"], linewidth=1)
    axes.plot([cell.accuracy], [y], **style)


def _handle(condition: Condition, place: int) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=_label(condition), **_style(condition, place))
