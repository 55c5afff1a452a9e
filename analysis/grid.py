"""A grid of captioned pictures: each row shows one image, before and after transformations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.figures import DPI, canvas, literal
from certify.errors import UserError
from certify.text import printable, printable_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIGHT, WRONG = "✓", "✗"
"""Marks beside a label, so that it can be read without colour."""

_COLOURS = {True: "#1a7f37", False: "#c1121f", None: "#222222"}
_MARKS = {True: f"{RIGHT} ", False: f"{WRONG} ", None: ""}
_GREY = "#555555"
_SMALLEST, _LARGEST = 1.15, 3.0  # longer side of a picture in inches
_GAP, _LINE, _CHARACTER = 0.09, 0.15, 0.064  # inches: between pictures, a line of text, a character of it


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture.

    Attributes:
        image: ``(C, H, W)``, one channel or three; clipped to [0, 1] for display.
        label: the classifier's label, or empty.
        right: True if the label is correct; None if unknown.
        note: a small line under the label.
    """

    image: np.ndarray
    label: str = ""
    right: bool | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Row:
    """A name on the left, and a picture per column."""

    name: str
    panels: Sequence[Panel]


def draw_grid(
    rows: Sequence[Row], columns: Sequence[str], path: str | Path, *, title: str, caption: str = "", names: str = ""
) -> None:
    """Plot the grid.

    Args:
        rows: rows from the top.
        columns: column headings.
        path: .png, .svg or .pdf.
        title: title above the grid.
        caption: caption below the grid.
        names: heading of the row names.

    Raises:
        UserError: an unknown format, no rows or columns, or images of neither one nor three channels.
        RunFault: the file cannot be written.
    """
    _check(rows, columns)
    panels = [panel for row in rows for panel in row.panels]
    heights = [max(p.image.shape[1] / max(p.image.shape[1:]) for p in row.panels) for row in rows]
    side = float(np.clip(max(max(p.image.shape[1:]) for p in panels) / DPI, _SMALLEST, _LARGEST))
    width = max(side * max(p.image.shape[2] / max(p.image.shape[1:]) for p in panels), _SMALLEST) + _GAP
    most = int(width / _CHARACTER)
    left = _CHARACTER * min(most, max(len(row.name) for row in rows)) + 0.2
    under = _LINE * (any(p.label for p in panels) + any(p.note for p in panels)) + _GAP
    text = 0.4 + _LINE * (1 + max(c.count("\n") for c in columns)) + 0.13 * (len(caption) // 80 + 1)
    total, height = left + len(columns) * width, text + sum(side * h + under for h in heights)
    caption = printable_lines(f"On the left the {names}. {caption}" if names else caption)
    with canvas(total, height, path, columns=len(columns), rows=heights, grid="neither", title=literal(title)) as (
        figure,
        grid,
    ):
        figure.supxlabel(literal(caption), fontsize=7, color=_GREY, x=0.01, ha="left", wrap=True)
        lines = np.atleast_2d(grid)
        for axes, heading in zip(lines[0], columns, strict=True):
            axes.set_title(printable_lines(heading), fontsize=8.5, parse_math=False)
        for line, row in zip(lines, rows, strict=True):
            name = _shorten(row.name, most)
            line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center", parse_math=False)
            for axes, panel in zip(line, row.panels, strict=True):
                _show(axes, panel, side, most)


def _check(rows: Sequence[Row], columns: Sequence[str]) -> None:
    if not rows or not columns:
        raise UserError(f"a picture of {len(rows)} rows and {len(columns)} columns; expected one or more of each")
    for row in rows:
        if len(row.panels) != len(columns):
            raise ValueError(f"row {row.name!r} has {len(row.panels)} pictures for {len(columns)} columns")
        for panel in row.panels:
            if panel.image.ndim != 3 or panel.image.shape[0] not in (1, 3):
                raise UserError(f"a picture of shape {panel.image.shape}; expected (1, H, W) or (3, H, W)")


def _show(axes: Axes, panel: Panel, side: float, most: int) -> None:
    """Draw a picture with its label; pixels stay square unless they outnumber the dots."""
    image = np.clip(np.moveaxis(panel.image, 0, -1), 0.0, 1.0)
    interpolation = "nearest" if max(image.shape[:2]) <= side * DPI else "antialiased"
    picture = image[..., 0] if image.shape[2] == 1 else image
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation=interpolation)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, linewidth=0.4, color="#999999")
    label = _MARKS[panel.right] + _shorten(panel.label, most - 2) if panel.label else ""
    axes.set_xlabel(label, fontsize=8, color=_COLOURS[panel.right], labelpad=2, parse_math=False)
    if panel.note:
        down = 12 if panel.label else 3  # points, below the label
        style = {"ha": "center", "va": "top", "fontsize": 7, "color": _GREY, "parse_math": False}
        axes.annotate(panel.note, (0.5, 0), (0, -down), "axes fraction", "offset points", **style)  # type: ignore[arg-type]


def _shorten(text: str, most: int) -> str:
    text = printable(text)
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"
