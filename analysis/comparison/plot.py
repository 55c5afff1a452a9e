"""Plot a comparison: a row per defence, a mark per condition; colours distinguish the groups."""

from __future__ import annotations

from pathlib import Path

from analysis.comparison.results import GROUPS, Cell, Comparison, Condition
from analysis.comparison.tables import caption_of
from analysis.figures import COLOURS, LABEL, canvas, check_format, literal, save_figure

_COLOUR = dict(zip(GROUPS, ("#555555", COLOURS[0], COLOURS[1], COLOURS[2]), strict=True))
_SHAPES = "os^Dv<>pP*X"


def draw_comparison(comparison: Comparison, path: str | Path) -> None:
    """Plot accuracies with their 95 % intervals; hollow marks are attacks that do not know the defence.

    Raises:
        UserError: an unknown format.
        RunFault: the file cannot be written.
    """
    check_format(path)
    conditions = comparison.columns
    height = 0.2 * len(conditions) * len(comparison.defences) + 1.6
    with canvas(6.4, min(14.0, max(2.6, height))) as (figure, axes):
        for row, defence in enumerate(comparison.defences):
            if row:
                axes.axhline(row - 0.5, color="#dddddd", linewidth=0.6)
            for place, condition in enumerate(conditions):
                y = row - 0.4 + 0.8 * (place + 0.5) / len(conditions)
                _mark(axes, comparison.cell(defence, condition), condition, place, y)
        axes.set_yticks(range(len(comparison.defences)), [literal(name, LABEL) for name in comparison.defences])
        axes.grid(axis="y", visible=False)
        axes.set(
            xlim=(0, 1),
            ylim=(len(comparison.defences) - 0.5, -0.5),
            xlabel="accuracy (bars: 95 % interval over images)",
        )
        handles = [_handle(condition, place) for place, condition in enumerate(conditions)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        axes.set_title(literal(caption_of(comparison)[0]), fontsize=8, loc="left", wrap=True)
        save_figure(figure, Path(path))


def _label(condition: Condition) -> str:
    return literal(condition.name if condition.group == "plain" else f"{GROUPS[condition.group]}: {condition.short}")


def _style(condition: Condition, place: int) -> dict[str, object]:
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


def _mark(axes: object, cell: Cell | None, condition: Condition, place: int, y: float) -> None:
    if cell is None:
        return
    style = _style(condition, place)
    if cell.failed or not cell.images:
        axes.text(0.005, y, f"{_label(condition)}: failed", va="center", fontsize=6, color=style["color"])  # type: ignore[attr-defined]
        return
    low, high = cell.interval
    axes.plot([low, high], [y, y], color=style["color"], linewidth=1)  # type: ignore[attr-defined]
    axes.plot([cell.accuracy], [y], **style)  # type: ignore[attr-defined]


def _handle(condition: Condition, place: int) -> object:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=_label(condition), **_style(condition, place))  # type: ignore[arg-type]
