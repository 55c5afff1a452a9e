"""Certified accuracy over radius as the step function it is, in the form of a figure for a paper."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.curves import Curve, proportion_interval
from analysis.envelope import Envelope, Line
from analysis.figures import COLOURS, canvas, check_format, literal, save_figure, wrapped
from certify.smoothing.norms import IN_TEX


def steps(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the step function, for ``where="pre"``: radii, and how many images reach them."""
    radii = np.concatenate([[0.0], curve.radii, curve.radii[-1:]])
    count = len(curve.radii)
    reached = np.concatenate([[count], np.arange(count, 0, -1), [0] if count else []])
    return radii, reached


def outline(line: Line) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Corners of the line and of its band, for ``where="pre"``: radii, accuracy, lower and upper ends."""
    if isinstance(line, Envelope):
        radii = np.concatenate([[0.0], line.radii, np.nextafter(line.radii[-1:], np.inf)])
        return radii, line.accuracy(radii), *line.interval(radii)
    radii, reached = steps(line)
    return radii, reached / line.total, *proportion_interval(reached, line.total)


_ASIDE = 3.0  # points between what was decided at one radius
_TICKS = 12  # that have room for their numbers


def plot_curves(lines: Sequence[Line], path: str | Path, *, title: str | None = None, band: bool = True) -> None:
    """Write the figure: one line a run or envelope, a shaded 95 % band over images, axes with units.

    Raises:
        UserError: a format that is not written.
        RunFault: the file cannot be written.
    """
    check_format(path)
    with drawn_curves(lines, title=title, band=band) as figure:
        save_figure(figure, Path(path))


@contextlib.contextmanager
def drawn_curves(lines: Sequence[Line], *, title: str | None = None, band: bool = True) -> Iterator[Any]:
    """The figure itself, in its style until it is closed: whoever draws it may still change and save it.

    The single runs of an envelope are faint lines of its colour.
    """
    texts, legend_title = _legend_texts(lines)
    labels, more = wrapped(texts)
    asked = sum(bool(line.decided) for line in lines)
    asides = iter([_ASIDE * (i - (asked - 1) / 2) for i in range(asked)])
    with canvas(4.8, 3.3 + more) as (figure, axes):
        for i, (line, label) in enumerate(zip(lines, labels, strict=True)):
            colour, dashes = COLOURS[i % len(COLOURS)], ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
            if isinstance(line, Envelope):
                _single_runs(axes, line, colour)
            if line.decided:
                _points(axes, line, colour, label, band, next(asides))
                continue
            radii, share, low, high = outline(line)
            axes.step(radii, share, where="pre", color=colour, ls=dashes, lw=1.6, label=label)
            if band:
                axes.fill_between(radii, low, high, step="pre", color=colour, alpha=0.15, lw=0)
        largest = max((r for line in lines for r in (*line.radii[-1:], *line.decided)), default=0.0) or 1.0
        room = 1.04 + _ASIDE * asked / 2 / 280  # the axes are about 280 points wide
        axes.set(xlim=(0, room * largest), ylim=(0, 1.0))
        if asked == len(lines):
            axes.set_xticks(sorted({r for line in lines for r in line.decided})[:_TICKS])
        axes.set_xlabel(f"{IN_TEX[lines[0].norm]} radius (images in [0, 1] pixels)")
        axes.set_ylabel(f"{lines[0].quantity}\n(95 % interval over images)" if band else lines[0].quantity)
        if title:
            axes.set_title(title, fontsize=9)
        _legend(axes, labels, legend_title)
        yield figure


def _points(axes: Any, line: Line, colour: str, name: str, band: bool, aside: float) -> None:
    """Accuracy where it was asked for, and nowhere else; moved aside by so many points, so that none hides another."""
    from matplotlib.transforms import ScaledTranslation

    share, (low, high) = line.accuracy(line.decided), line.interval(line.decided)
    reach = [(share - low).tolist(), (high - share).tolist()] if band else None  # arrays of one upset matplotlib
    moved = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    axes.errorbar(
        *(line.decided, share, reach), fmt="o", ms=4, lw=1.2, capsize=2, color=colour, label=name, transform=moved
    )


def _single_runs(axes: Any, envelope: Envelope, colour: str) -> None:
    """The runs that an envelope is the maximum of, faintly."""
    faint = {"color": colour, "lw": 0.7, "alpha": 0.6}
    for curve in envelope.runs:
        if curve.decided:
            axes.plot(curve.decided, curve.accuracy(curve.decided), ls="", marker="o", ms=2.5, mew=0, **faint)
        else:
            radii, reached = steps(curve)
            axes.step(radii, reached / curve.total, where="pre", **faint)


def _legend_texts(lines: Sequence[Line]) -> tuple[list[str], str | None]:
    """A label for each line; above them, once, what an envelope is and over which sigmas (or these by the names)."""
    names = [line.name for line in lines]
    levels = [line.levels for line in lines if isinstance(line, Envelope)]
    over = "σ"
    if len(set(levels)) == 1:
        over = f"σ = {levels[0]}"
    elif levels:
        names = [f"{name}, σ = {found}" for name, found in zip(names, levels, strict=True)]
    labels = [literal(name + (f" ({line.note})" if line.note else "")) for name, line in zip(names, lines, strict=True)]
    title = f"upper envelope over {over} (faint: single runs):\nat each radius the best, chosen on these images"
    return labels, title if levels else None


def _legend(axes: Any, labels: Sequence[str], title: str | None) -> None:
    """Inside when there is room above the curves' falling ends, below the axes otherwise."""
    longest = max(len(label) for label in labels)
    if len(labels) <= 5 and longest <= 44 and title is None:
        axes.legend(loc="upper right")
    else:
        columns = 1 if longest > 40 else 2
        axes.figure.legend(loc="outside lower center", ncols=columns, title=title, alignment="left")
