"""Plot certified accuracy over radius as a step function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.curves import Curve, proportion_interval
from analysis.envelope import Envelope, Line, runs_of
from analysis.figures import add_legend, canvas, current_style, literal, wrapped
from certify.smoothing.norms import IN_TEX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OFFSET = 3.0  # points between marks at the same radius
_TICKS = 12  # maximum number of labelled ticks


def steps(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of the step function, for ``where="pre"``: radii, and the number of images certified there."""
    radii = np.concatenate([[0.0], curve.radii, curve.radii[-1:]])
    count = len(curve.radii)
    certified = np.concatenate([[count], np.arange(count, 0, -1), [0] if count else []])
    return radii, certified


def outline(line: Line) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the corners of a line and its band, for ``where="pre"``: radii, accuracy, lower and upper ends."""
    if isinstance(line, Envelope):
        radii = np.concatenate([[0.0], line.radii, np.nextafter(line.radii[-1:], np.inf)])
        return radii, line.accuracy(radii), *line.interval(radii)
    radii, certified = steps(line)
    return radii, certified / line.total, *proportion_interval(certified, line.total)


def plot_curves(
    lines: Sequence[Line], path: str | Path | None = None, *, title: str | None = None, band: bool = True
) -> Figure:
    """Plot a line per run or envelope, with a shaded 95 % band over images.

    The single runs of an envelope are faint lines of its colour.

    Args:
        lines: curves of runs, or envelopes.
        path: file to write (.png, .svg or .pdf); None writes none.
        title: title above the axes.
        band: whether to shade the interval.

    Raises:
        UserError: an unknown format.
        RunFault: the file cannot be written.
    """
    texts, legend_title = _legend_texts(lines)
    labels, extra = wrapped(texts)
    decided = sum(bool(line.decided) for line in lines)
    offsets = iter([_OFFSET * (i - (decided - 1) / 2) for i in range(decided)])
    style = current_style()
    with canvas(4.8, 3.3 + extra, path, title=title) as (figure, axes):
        for i, (line, label) in enumerate(zip(lines, labels, strict=True)):
            colour, dashes = style.line(i)
            if isinstance(line, Envelope):
                _single_runs(axes, line, colour)
            if line.decided:
                _points(axes, line, colour, label, band, next(offsets))
                continue
            radii, share, low, high = outline(line)
            axes.step(radii, share, where="pre", color=colour, ls=dashes, lw=1.6, label=label)
            if band:
                axes.fill_between(radii, low, high, step="pre", color=colour, alpha=0.15, lw=0)
            for curve in runs_of(line):
                if curve.capped:  # the cliff is the number of samples, not the classifier
                    end = f"n = {curve.run.header.n:,} ends here"
                    axes.text(curve.limit, 0.98, end, color=colour, fontsize="small", rotation=90, ha="left", va="top")
        largest = max((r for line in lines for r in (*line.radii[-1:], *line.decided)), default=0.0) or 1.0
        capped = any(c.capped for line in lines for c in runs_of(line))
        margin = (1.07 if capped else 1.04) + _OFFSET * decided / 2 / 280  # the axes are about 280 points wide
        axes.set(xlim=(0, style.xmax or margin * largest), ylim=(0, 1.0))
        if decided == len(lines):
            axes.set_xticks(sorted({r for line in lines for r in line.decided})[:_TICKS])
        axes.set_xlabel(f"{IN_TEX[lines[0].norm]} radius (images in [0, 1] pixels)")
        axes.set_ylabel(f"{lines[0].quantity}\n(95 % interval over images)" if band else lines[0].quantity)
        if any(labels):
            add_legend(figure, axes, 3, title=legend_title, alignment="left")
    return figure


def _points(axes: Axes, line: Line, colour: str, name: str, band: bool, offset: float) -> None:
    """Plot the accuracy at decided radii, moved sideways by ``offset`` points so that no mark hides another."""
    from matplotlib.transforms import ScaledTranslation

    share, (low, high) = line.accuracy(line.decided), line.interval(line.decided)
    errors = (
        [(share - low).tolist(), (high - share).tolist()] if band else None
    )  # lists, because matplotlib fails on arrays of length 1
    moved = axes.transData + ScaledTranslation(offset / 72, 0, axes.figure.dpi_scale_trans)
    axes.errorbar(
        *(line.decided, share, errors), fmt="o", ms=4, lw=1.2, capsize=2, color=colour, label=name, transform=moved
    )


def _single_runs(axes: Axes, envelope: Envelope, colour: str) -> None:
    """Plot the single runs of an envelope faintly."""
    faint: dict[str, Any] = {"color": colour, "lw": 0.7, "alpha": 0.6}
    for curve in envelope.runs:
        if curve.decided:
            axes.plot(curve.decided, curve.accuracy(curve.decided), ls="", marker="o", ms=2.5, mew=0, **faint)
        else:
            radii, certified = steps(curve)
            axes.step(radii, certified / curve.total, where="pre", **faint)


def _legend_texts(lines: Sequence[Line]) -> tuple[list[str], str | None]:
    """Return a label per line, and a title that explains envelopes and gives their sigmas if all are equal."""
    names = [line.name for line in lines]
    levels = [line.levels for line in lines if isinstance(line, Envelope)]
    over = "σ"
    if len(set(levels)) == 1:
        over = f"σ = {levels[0]}"
    elif levels:
        names = [f"{name}, σ = {sigmas}" for name, sigmas in zip(names, levels, strict=True)]
    labels = [literal(name + (f" ({line.note})" if line.note else "")) for name, line in zip(names, lines, strict=True)]
    title = f"upper envelope over {over} (faint: single runs):\nthe best run at each radius, chosen on these images"
    return labels, title if levels else None
