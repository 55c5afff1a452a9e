"""Certified accuracy over radius as the step function it is, in the form of a figure for a paper."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.curves import Curve, proportion_interval
from certify.errors import RunFault, UserError
from certify.norms import IN_TEX

FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, told apart by colour-blind readers and in grey; black stays for text.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "certify",  # the same run gives the same file
    "pdf.fonttype": 42,
}


def check_format(path: str | Path) -> None:
    """Refuse a picture format that is not written, before any work is done."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"cannot write a picture as {str(path)!r}; expected a name that ends in {', '.join(FORMATS)}")


def steps(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the step function, for ``where="pre"``: radii, and how many images reach them."""
    radii = np.concatenate([[0.0], curve.radii, curve.radii[-1:]])
    count = len(curve.radii)
    reached = np.concatenate([[count], np.arange(count, 0, -1), [0] if count else []])
    return radii, reached


def plot_curves(curves: Sequence[Curve], path: str | Path, *, title: str | None = None, band: bool = True) -> None:
    """Write the figure: one line a run, a shaded 95 % band over images, axes with units.

    Raises:
        UserError: a format that is not written.
        RunFault: the file cannot be written.
    """
    check_format(path)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.8, 3.3), layout="constrained")
        for i, curve in enumerate(curves):
            colour, dashes = COLOURS[i % len(COLOURS)], ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
            name = curve.name + (f" ({curve.note})" if curve.note else "")
            if curve.decided:
                _points(axes, curve, colour, name, band)
                continue
            radii, reached = steps(curve)
            axes.step(radii, reached / curve.total, where="pre", color=colour, ls=dashes, lw=1.6, label=name)
            if band:
                low, high = proportion_interval(reached, curve.total)
                axes.fill_between(radii, low, high, step="pre", color=colour, alpha=0.15, lw=0)
        largest = max((r for c in curves for r in (*c.radii[-1:], *c.decided)), default=0.0) or 1.0
        axes.set(xlim=(0, 1.04 * largest), ylim=(0, 1.0))
        axes.set_xlabel(f"{IN_TEX[curves[0].norm]} radius (images in [0, 1] pixels)")
        axes.set_ylabel(f"{curves[0].quantity}\n(95 % interval over images)" if band else curves[0].quantity)
        if title:
            axes.set_title(title, fontsize=9)
        _legend(axes, curves)
        _save(figure, Path(path))
        plt.close(figure)


def _points(axes: Any, curve: Curve, colour: str, name: str, band: bool) -> None:
    """Accuracy where it was asked for, and nowhere else."""
    share, (low, high) = curve.accuracy(curve.decided), curve.interval(curve.decided)
    reach = [share - low, high - share] if band else None
    axes.errorbar(curve.decided, share, yerr=reach, fmt="o", ms=5, lw=1.4, capsize=3, color=colour, label=name)


def _legend(axes: Any, curves: Sequence[Curve]) -> None:
    """Inside when there is room above the curves' falling ends, below the axes otherwise."""
    longest = max(len(c.name) + len(c.note) for c in curves)
    if len(curves) <= 5 and longest <= 44:
        axes.legend(loc="upper right")
    else:
        axes.figure.legend(loc="outside lower center", ncols=1 if longest > 40 else 2)


def _save(figure: Any, path: Path) -> None:
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    beside = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(beside, dpi=200, metadata=metadata)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise RunFault(f"could not write {path}: {error.strerror}; the run files are untouched") from None
