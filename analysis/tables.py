"""Tables of certified accuracy: text, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from typing import Any

from analysis.curves import Curve, proportion_interval
from analysis.families import CORRECTIONS, Family, accuracy_interval, family
from certify.errors import UserError
from certify.norms import IN_WORDS

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
        least = r"$\geq$ " if style == "latex" else "≥ "
        cells = [
            least * c.at_least(r) + (f"{a:.3f} [{lo:.3f}, {hi:.3f}]" if intervals else f"{a:.3f}")
            for r, a, lo, hi in zip(radii, c.accuracy(radii), low, high, strict=True)
        ]
        rows.append([c.name.replace("σ", sigma), _images(c), str(abstained(c)), *cells])
    quantity = curves[0].quantity
    caption = f"{quantity} at {IN_WORDS[curves[0].norm]} radius r (images in [0, 1] pixels)"
    comment = f"% {caption}\n" if style == "latex" else f"{caption}\n\n"
    return comment + render(header, rows, style)


def _csv(curves: Sequence[Curve], radii: Sequence[float]) -> tuple[list[str], list[list[Any]]]:
    keys = ("model", "denoiser", "noise", "norm", "sigma", "n", "alpha", "bound")
    header = ["run", *keys, "images", "expected", "abstained", "quantity", "radius", "value", "low95", "high95"]
    rows = []
    for c in curves:
        low, high = c.interval(radii)
        about = [str(c.run.path), *(c.run.header.get(k) for k in keys)]
        about += [c.total, c.run.header["expected"], abstained(c)]
        for r, a, lo, hi in zip(radii, c.accuracy(radii), low, high, strict=True):
            quantity = c.quantity + " (at least)" * c.at_least(r)
            rows.append([*about, quantity, r, float(a), float(lo), float(hi)])
    return header, rows


def compare_families(
    curves: Sequence[Curve], radii: Sequence[float], style: str = "text", correction: str | None = None
) -> str:
    """One line a run and radius: certified accuracy, its interval, and the share that holds for all images at once.

    The interval is that of :func:`analysis.families.accuracy_interval`, the share counts the images (right, if they
    have labels) that :func:`analysis.families.simultaneous` marks at the run's alpha. Notes say what is guaranteed.

    Args:
        curves: of runs with votes.
        radii: of the lines.
        style: ``"text"``, ``"markdown"``, ``"latex"`` or ``"csv"`` (each number in a column of its own, no notes).
        correction: ``"holm"`` or ``"bonferroni"``; None: for each run the sharpest that is valid.

    Raises:
        UserError: a run without p-values, or a correction that is not valid for one.
    """
    found = [family(c.run) for c in curves]
    if style == "csv":
        return render(*_families_csv(curves, found, radii, correction), style)
    header = ["run", "images", "r", curves[0].quantity, "95 % interval", "all at once", "correction"]
    rows = []
    for c, f in zip(curves, found, strict=True):
        low, high = accuracy_interval(c.successes(radii), c.total, c.run.header["alpha"])
        name = [c.name.replace("σ", "sigma" if style == "latex" else "σ"), _images(c)]
        for i, (r, a) in enumerate(zip(radii, c.accuracy(radii), strict=True)):
            least = "≥ " if c.at_least(r) and style != "latex" else ""
            cells = [
                f"{r:g}",
                f"{least}{a:.3f}",
                f"{low[i]:.3f} - {high[i]:.3f}",
                f"{_at_once(c, f, r, correction):.3f}",
            ]
            rows.append([*(name if i == 0 else ["", ""]), *cells, CORRECTIONS[f.correction(correction)]])
    title, notes = _guarantees(curves, {f.correction(correction) for f in found})
    if style == "latex":
        lines = [title, *(line for note in notes for line in textwrap.wrap(note, 110))]
        return "".join(f"% {line}\n" for line in lines) + render(header, rows, style)
    between = "\n\n" if style == "markdown" else "\n"
    return f"{title}\n\n{render(header, rows, style)}\n\n" + between.join(textwrap.fill(note, 110) for note in notes)


def _at_once(c: Curve, f: Family, radius: float, correction: str | None) -> float:
    marked = f.certified(radius, method=correction)
    return float((marked & f.right if c.labelled else marked).mean())


def _guarantees(curves: Sequence[Curve], methods: set[str]) -> tuple[str, list[str]]:
    """A title, and what each number guarantees."""
    alphas = sorted({c.run.header["alpha"] for c in curves})
    alpha = f"alpha = {alphas[0]:g}" if len(alphas) == 1 else "alpha (that of its run)"
    quantity, norm = curves[0].quantity, IN_WORDS[curves[0].norm]
    true = "truly right and robust" if curves[0].labelled else "truly robust"
    where = {
        "holm": "Holm: at one radius r of a run, chosen without looking; not at several together.",
        "bonferroni": "Bonferroni: at all radii of a run together.",
    }
    notes = [
        f"{quantity}: each certificate for itself is wrong with probability at most {alpha} over the noise.",
        f"95 % interval: over images and noise. From below it bounds the share that is {true}, wrong certificates "
        f"allowed for; from above the {quantity} that the procedure reaches on average, not that share.",
        f"all at once: except with probability at most {alpha} over the noise, every image that is counted here is "
        f"robust at {norm} radius r with its class. " + " ".join(where[m] for m in CORRECTIONS if m in methods),
    ]
    if any(c.run.header.get("procedure") == "decide" for c in curves):
        notes.append(
            "Images that were decided stopped once settled at alpha each; to have all m of them at once, decide at "
            "alpha/m with --rule betting, then `certify recompute --alpha`."
        )
    title = f"{quantity} at {norm} radius r (images in [0, 1] pixels), for each image and for all of them at once"
    return title, notes


def _families_csv(
    curves: Sequence[Curve], families: Sequence[Family], radii: Sequence[float], correction: str | None
) -> tuple[list[str], list[list[Any]]]:
    """The columns of :func:`compare`, the interval's lower end without wrong certificates, and all at once."""
    header, rows = _csv(curves, radii)
    lines = iter(rows)
    for c, f in zip(curves, families, strict=True):
        low, _ = accuracy_interval(c.successes(radii), c.total, c.run.header["alpha"])
        for r, end in zip(radii, low, strict=True):
            next(lines).extend([float(end), _at_once(c, f, r, correction), f.correction(correction)])
    return [*header, "true_low95", "all_at_once", "correction"], rows


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
        [f"{r:g}", "≥ " * c.at_least(r) + f"{a:.3f}", f"{lo:.3f} - {hi:.3f}"]
        for r, a, lo, hi in zip(radii, c.accuracy(radii), low, high, strict=True)
    ]
    return render([f"{IN_WORDS[c.norm]} radius >=", c.quantity, "95 % interval"], rows, "text")


def share(successes: int, total: int) -> str:
    """A proportion of images with its 95 % interval, in words."""
    import numpy as np

    low, high = proportion_interval(np.asarray([successes]), total)
    return f"{successes / total:.3f} ({successes} of {total}; 95 %: {low[0]:.3f} - {high[0]:.3f})"
