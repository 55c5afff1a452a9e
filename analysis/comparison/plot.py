"""A comparison as a picture: one line a defence, one mark a condition; groups told apart by shape and colour."""

from __future__ import annotations

from pathlib import Path

from analysis.comparison.results import GROUPS, Cell, Comparison, Condition
from analysis.comparison.tables import caption_of
from analysis.figures import COLOURS, LABEL, canvas, check_format, literal, save_figure

_COLOUR = dict(zip(GROUPS, ("#555555", COLOURS[0], COLOURS[1], COLOURS[2]), strict=True))
_SHAPES = "os^Dv<>pP*X"


def draw_comparison(found: Comparison, path: str | Path) -> None:
    """Write the figure: accuracy with its 95 % interval, filled marks for what is not an attack or a guarantee.

    Raises:
        UserError: a format that is not written.
        RunFault: the file cannot be written.
    """
    check_format(path)
    conditions = found.columns
    height = 0.2 * len(conditions) * len(found.defences) + 1.6
    with canvas(6.4, min(14.0, max(2.6, height))) as (figure, axes):
        for row, defence in enumerate(found.defences):
            if row:
                axes.axhline(row - 0.5, color="#dddddd", linewidth=0.6)
            for place, condition in enumerate(conditions):
                y = row - 0.4 + 0.8 * (place + 0.5) / len(conditions)
                _mark(axes, found.cell(defence, condition), condition, place, y)
        axes.set_yticks(range(len(found.defences)), [literal(name, LABEL) for name in found.defences])
        axes.grid(axis="y", visible=False)
        axes.set(
            xlim=(0, 1), ylim=(len(found.defences) - 0.5, -0.5), xlabel="accuracy (bars: 95 % interval over images)"
        )
        handles = [_handle(condition, place) for place, condition in enumerate(conditions)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        axes.set_title(literal(caption_of(found)[0]), fontsize=8, loc="left", wrap=True)
        save_figure(figure, Path(path))


def _label(condition: Condition) -> str:
    return literal(condition.name if condition.group == "plain" else f"{GROUPS[condition.group]}: {condition.short}")


def _style(condition: Condition, place: int) -> dict[str, object]:
    colour = _COLOUR[condition.group]
    hollow = condition.group == "blind"  # an attack that never saw what it is shown beside
    return {
        "marker": _SHAPES[place % len(_SHAPES)],
        "color": colour,
        "markerfacecolor": "white" if hollow else colour,
        "markersize": 5,
        "linestyle": "none",
        "clip_on": False,  # 0 and 1 are where many marks are
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
