"""A grid of captioned pictures: the same images in each row, before and after a transformation."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.figures import check_format, save_figure
from certify.errors import UserError
from certify.text import printable_lines

RIGHT, WRONG = "✓", "✗"
"""Marks beside a label, so that it can be read without colour."""

_COLOURS = {True: "#1a7f37", False: "#c1121f", None: "#222222"}
_DPI = 200
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
        rows: from the top.
        columns: headings.
        path: .png, .svg or .pdf.
        title: above the grid.
        caption: below the grid.
        names: heading of the row names.

    Raises:
        UserError: an unknown format, no rows or columns, or images of neither one nor three channels.
        RunFault: the file cannot be written.
    """
    check_format(path)
    _check(rows, columns)
    from matplotlib.figure import Figure

    panels = [panel for row in rows for panel in row.panels]
    heights = [max(p.image.shape[1] / max(p.image.shape[1:]) for p in row.panels) for row in rows]
    side = float(np.clip(max(max(p.image.shape[1:]) for p in panels) / _DPI, _SMALLEST, _LARGEST))
    width = side * max(p.image.shape[2] / max(p.image.shape[1:]) for p in panels)
    width = max(width, _SMALLEST)
    under = _LINE * (any(p.label for p in panels) + any(p.note for p in panels)) + _GAP
    most = int((width + _GAP) / _CHARACTER)
    left = 0.15 + _CHARACTER * min(most, max(len(text) for text in (names, *(row.name for row in rows))))

    total = left + len(columns) * (width + _GAP) + 0.1
    above = textwrap.wrap(title, int(total / 0.082))
    below = textwrap.wrap(caption, int(total / 0.052))
    top = 0.12 + 0.2 * len(above) + _LINE * (1 + max(c.count("\n") for c in columns)) + 0.1
    height = top + sum(side * h + under for h in heights) + _LINE * len(below) + 0.12
    figure = Figure(figsize=(total, height), facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        """Write text at inches from the left and from the top."""
        figure.text(x / total, 1 - y / height, printable_lines(text), parse_math=False, **style)

    write(total / 2, 0.12, "\n".join(above), ha="center", va="top", fontsize=10, linespacing=1.25)
    write(0.08, top - 0.06, names, va="bottom", fontsize=8, color="#555555")
    centres = [left + column * (width + _GAP) + width / 2 for column in range(len(columns))]
    for centre, heading in zip(centres, columns, strict=True):
        write(centre, top - 0.06, heading, ha="center", va="bottom", fontsize=8.5)
    y = top
    for row, share in zip(rows, heights, strict=True):
        tall = side * share
        write(0.08, y + tall / 2, _shorten(row.name, most), va="center", fontsize=8)
        for centre, panel in zip(centres, row.panels, strict=True):
            box = (centre - width / 2) / total, 1 - (y + tall) / height, width / total, tall / height
            _show(figure.add_axes(box), panel, side)
            line = y + tall + 0.03
            if panel.label:
                mark = {True: f"{RIGHT} ", False: f"{WRONG} ", None: ""}[panel.right]
                text = mark + _shorten(panel.label, most - 2)
                write(centre, line, text, ha="center", va="top", fontsize=8, color=_COLOURS[panel.right])
                line += _LINE
            write(centre, line, panel.note, ha="center", va="top", fontsize=7, color="#555555")
        y += tall + under
    write(0.08, y + 0.02, "\n".join(below), va="top", fontsize=7, color="#555555", linespacing=1.3)
    save_figure(figure, Path(path), dpi=min(_DPI, 2**14 / max(total, height)))


def _check(rows: Sequence[Row], columns: Sequence[str]) -> None:
    if not rows or not columns:
        raise UserError(f"a picture of {len(rows)} rows and {len(columns)} columns; expected one or more of each")
    for row in rows:
        if len(row.panels) != len(columns):
            raise ValueError(f"row {row.name!r} has {len(row.panels)} pictures for {len(columns)} columns")
        for panel in row.panels:
            if panel.image.ndim != 3 or panel.image.shape[0] not in (1, 3):
                raise UserError(f"a picture of shape {panel.image.shape}; expected (1, H, W) or (3, H, W)")


def _show(axes: Any, panel: Panel, side: float) -> None:
    """Draw a picture in its frame; pixels stay squares unless there are more of them than dots."""
    image = np.clip(np.moveaxis(panel.image, 0, -1), 0.0, 1.0)
    dots = side * _DPI
    interpolation = "nearest" if max(image.shape[:2]) <= dots else "antialiased"
    axes.imshow(
        image[..., 0] if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=1, interpolation=interpolation
    )
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(linewidth=0.4, color="#999999")


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"
