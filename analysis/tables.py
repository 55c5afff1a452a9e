"""Tables of certified accuracy: text, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from analysis.curves import Curve, proportion_interval
from certify.errors import UserError

FORMATS = {"text": "simple", "markdown": "pipe", "latex": "latex_booktabs", "csv": ""}


def render(header: Sequence[str], rows: Sequence[Sequence[Any]], style: str) -> str:
    """A table of ready-made cells."""
    if style not in FORMATS:
        raise UserError(f"table format {style!r}; expected one of {', '.join(FORMATS)}")
    if style == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([header, *rows])
        return out.getvalue().rstrip("\n")
    from tabulate import tabulate

    align = ["left", *("right" for _ in header[1:])]
    table: str = tabulate(rows, headers=list(header), tablefmt=FORMATS[style], disable_numparse=True, colalign=align)
    return table


def compare(curves: Sequence[Curve], radii: Sequence[float], style: str = "text", *, intervals: bool = False) -> str:
    """One line a run: images, abstentions, certified accuracy at each radius.

    CSV always carries the 95 % interval over images, in columns of its own; the other formats with ``intervals``.
    """
    if style == "csv":
        return render(*_csv(curves, radii), style)
    sigma = "σ" if style != "latex" else "sigma"
    header = ["run", "images", "abstained", *(f"r = {r:g}" for r in radii)]
    rows = []
    for c in curves:
        low, high = c.interval(radii)
        cells = [
            f"{a:.3f} [{lo:.3f}, {hi:.3f}]" if intervals else f"{a:.3f}"
            for a, lo, hi in zip(c.accuracy(radii), low, high, strict=True)
        ]
        rows.append([c.name.replace("σ", sigma), _images(c), str(abstained(c)), *cells])
    quantity = curves[0].quantity
    caption = f"{quantity} at {curves[0].run.header.get('norm', 'l2')} radius r (images in [0, 1] pixels)"
    comment = f"% {caption}\n" if style == "latex" else f"{caption}\n\n"
    return comment + render(header, rows, style)


def _csv(curves: Sequence[Curve], radii: Sequence[float]) -> tuple[list[str], list[list[Any]]]:
    keys = ("model", "denoiser", "sigma", "n", "alpha")
    header = ["run", *keys, "images", "expected", "abstained", "quantity", "radius", "value", "low95", "high95"]
    rows = []
    for c in curves:
        low, high = c.interval(radii)
        about = [str(c.run.path), *(c.run.header.get(k) for k in keys)]
        about += [c.total, c.run.header["expected"], abstained(c), c.quantity]
        for r, a, lo, hi in zip(radii, c.accuracy(radii), low, high, strict=True):
            rows.append([*about, r, float(a), float(lo), float(hi)])
    return header, rows


def _images(c: Curve) -> str:
    if not c.run.partial:
        return f"{c.total}" + (f" ({c.note})" if c.note else "")
    return f"{c.total} of {c.run.header['expected']} (partial)"


def abstained(c: Curve) -> int:
    """How many images got no prediction."""
    return sum(1 for row in c.run.usable if row["prediction"] < 0)


def one_run(c: Curve, radii: Sequence[float]) -> str:
    """The table at the end of a run: certified accuracy at a few radii, with its interval."""
    low, high = c.interval(radii)
    rows = [
        [f"{r:g}", f"{a:.3f}", f"{lo:.3f} - {hi:.3f}"]
        for r, a, lo, hi in zip(radii, c.accuracy(radii), low, high, strict=True)
    ]
    return render(["l2 radius >=", c.quantity, "95 % interval"], rows, "text")


def share(successes: int, total: int) -> str:
    """A proportion of images with its 95 % interval, in words."""
    import numpy as np

    low, high = proportion_interval(np.asarray([successes]), total)
    return f"{successes / total:.3f} ({successes} of {total}; 95 %: {low[0]:.3f} - {high[0]:.3f})"
