"""Tables of certified accuracy: text, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.curves import Curve, number, proportion_interval
from analysis.envelope import Envelope, Line, runs_of
from analysis.families import CORRECTIONS, Family, accuracy_interval, family
from certify.errors import UserError
from certify.runs.records import RunHeader
from certify.smoothing.norms import DECIMALS, IN_WORDS
from certify.smoothing.rounding import ceil_to, exact, floor_to
from certify.text import printable, printable_lines

FORMATS = {"text": "simple", "markdown": "pipe", "latex": "latex_booktabs", "csv": ""}

OUT_OF_REACH = "-"
"""Cell of a radius that no image could have at this n and alpha."""

_FORMULA = ("=", "+", "-", "@")  # a spreadsheet evaluates a cell that starts with these, which can run programs

_IN_LATEX = {"σ": r"$\sigma$", "≥": r"$\geq$"}


def render(header: Sequence[str], rows: Sequence[Sequence[Any]], style: str, *, multiline: bool = False) -> str:
    """Render a table of formatted cells; text is made printable, line by line if ``multiline``."""
    if style not in FORMATS:
        raise UserError(f"table format {style!r}; expected one of {', '.join(FORMATS)}")
    clean = printable_lines if multiline else printable
    header = [clean(cell) for cell in header]
    rows = [[clean(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    if style == "csv":
        rows = [
            [f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in r] for r in rows
        ]
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([header, *rows])  # numbers at full precision
        return out.getvalue().rstrip("\n")
    from tabulate import tabulate

    if style == "markdown":  # a bar would start a new column
        header, *rows = [[c.replace("|", r"\|") if isinstance(c, str) else c for c in row] for row in (header, *rows)]
    align = ["left", *("right" for _ in header[1:])]
    table: str = tabulate(rows, headers=list(header), tablefmt=FORMATS[style], disable_numparse=True, colalign=align)
    for sign, command in _IN_LATEX.items() if style == "latex" else ():  # in the cells, tabulate would escape them
        table = table.replace(sign, command)
    return table


def captioned(lines: Sequence[str], table: str, style: str) -> str:
    """Return a table below lines of text, which are comments in LaTeX."""
    caption = "\n".join(map(printable, lines))
    return textwrap.indent(caption, "% ") + f"\n{table}" if style == "latex" else f"{caption}\n\n{table}"


@dataclass(frozen=True)
class TableLayout:
    """Layout of a table for a paper.

    Attributes:
        caption: caption of a LaTeX table; it and ``names`` may contain LaTeX, which is not escaped.
        label: label of a LaTeX table, for references.
        columns: headings to keep before those of the radii, such as ``("ACR",)``; None keeps all.
        bold: whether to print the largest accuracy at each radius in bold, in LaTeX and Markdown.
        names: names of the lines in LaTeX; if empty, the lines' own names, escaped.
    """

    caption: str | None = None
    label: str | None = None
    columns: Sequence[str] | None = None
    bold: bool = False
    names: Sequence[str] = ()


def compare(
    lines: Sequence[Line],
    radii: Sequence[float],
    style: str = "text",
    *,
    intervals: bool = False,
    relative_to: float | None = None,
    layout: TableLayout = TableLayout(),  # it is frozen
) -> str:
    """Render a table with a line per run or envelope: images, abstentions, certified accuracy at each radius.

    A cell of an envelope adds the accuracy at r = 0 and the sigma of the best run at this radius. CSV always has the
    95 % interval over images, in columns of its own; the other formats have it with ``intervals``.

    Args:
        lines: curves of runs, or envelopes.
        radii: radii, one column each.
        style: ``"text"``, ``"markdown"``, ``"latex"`` or ``"csv"``.
        intervals: whether to add the interval to each cell.
        relative_to: number in (0, 1] by which every accuracy is divided.
        layout: columns, bold figures, and the frame of a LaTeX table.

    Raises:
        UserError: ``relative_to`` for images without labels, or an unknown column.
    """
    if relative_to is not None and not lines[0].labelled:
        raise UserError("images without labels have no accuracy to divide; leave out --relative-to")
    if style == "csv":
        return render(*_csv(lines, radii, relative_to), style)
    header = ["method", "sigma", "images"] if isinstance(lines[0], Envelope) else ["run", "images", "abstained"]
    if not isinstance(lines[0], Envelope) and lines[0].labelled:
        header.append("ACR")
    rows = [[*_about(line), *_cells(line, radii, relative_to or 1.0, intervals=intervals)] for line in lines]
    kept = [0, *_chosen(header, layout.columns), *range(len(header), len(header) + len(radii))]
    if layout.bold and style in ("latex", "markdown"):
        _mark_best(rows, [line.accuracy(radii) for line in lines], len(header))
    if style == "latex" and layout.names:
        rows = [[f"{_NAME}{i}{_NAME}", *row[1:]] for i, row in enumerate(rows)]
    header += [f"r = {exact(r)}" for r in radii]
    text = render([header[k] for k in kept], [[row[k] for k in kept] for row in rows], style)
    for mark, closing in zip(_BOLD, (r"\textbf{", "}") if style == "latex" else ("**", "**"), strict=True):
        text = text.replace(mark, closing)
    caption = _caption(lines, relative_to, intervals=intervals) + out_of_reach(lines, radii)
    if style != "latex":
        return captioned(caption, text, style)
    for r in radii:  # tabulate would escape the dollars
        text = text.replace(f" r = {exact(r)} ", f" $r = {exact(r)}$ ", 1)
    for i, name in enumerate(layout.names):
        text = text.replace(f"{_NAME}{i}{_NAME}", " ".join(name.split()))
    return captioned(caption, _framed(text, layout), style)


_BOLD, _NAME = "⟪⟫", "NameOfLine"  # marks in cells, replaced once the table library has escaped the rest


def _about(line: Line) -> list[str]:
    """Return the cells before those of the radii."""
    name = line.name.translate(dict.fromkeys(map(ord, _BOLD)))
    if isinstance(line, Envelope):
        return [name, line.levels, line.summary(_images)]
    average = [_figure(line.average_radius, DECIMALS[line.norm] - 1, least=line.stopped)] if line.labelled else []
    return [name, _images(line), str(abstained(line)), *average]


def _chosen(header: Sequence[str], columns: Sequence[str] | None) -> list[int]:
    """Return the indices of the columns to keep, after the first."""
    known = {name.lower(): place for place, name in enumerate(header) if place}
    if columns is None:
        return list(known.values())
    if unknown := [name for name in columns if name.lower() not in known]:
        raise UserError(f"--columns {unknown[0]}: expected some of {', '.join(header[1:])}")
    return [known[name.lower()] for name in columns]


def _mark_best(rows: list[list[str]], accuracies: Sequence[np.ndarray], first: int) -> None:
    """Mark the largest accuracy of each column of a radius as bold; none where no image can be certified."""
    for place, best in enumerate(np.max(accuracies, axis=0)):
        for row, accuracy in zip(rows, accuracies, strict=True):
            if accuracy[place] == best > 0 and row[first + place] != OUT_OF_REACH:
                row[first + place] = row[first + place].join(_BOLD)


def _framed(text: str, layout: TableLayout) -> str:
    """Return a LaTeX tabular in a table with caption and label, if it has any."""
    if layout.caption is None and layout.label is None:
        return text
    ends = [f"\\caption{{{' '.join(layout.caption.split())}}}"] if layout.caption is not None else []
    ends += [f"\\label{{{layout.label}}}"] if layout.label is not None else []
    return "\n".join([r"\begin{table}", r"\centering", *ends, text, r"\end{table}"])


def out_of_reach(lines: Sequence[Line], radii: Sequence[float]) -> list[str]:
    """Explain the cells ``-``, one line per n and alpha; empty if there are no such cells."""
    runs = [c for line in lines for c in runs_of(line)]
    notes = {}
    for c in runs:
        if not all(map(c.reachable, radii)):
            header, limit = c.run.header, ceil_to(c.limit, DECIMALS[c.norm])
            settings = f"n = {header.n:,}, alpha = {exact(header.alpha)} and sigma = {exact(header.sigma)}"
            why = "no image can be settled as robust there" if c.decided else f"no radius can exceed {limit}"
            notes[settings] = f"{OUT_OF_REACH}: out of reach; with {settings} {why}"
    return list(notes.values())


def _figure(lower: float, digits: int = 3, *, least: bool) -> str:
    """Format a certified accuracy or average radius, rounded down."""
    return "≥ " * least + floor_to(lower, digits)


def _between(low: float, high: float) -> str:
    """Format an interval, rounded outward."""
    return f"{floor_to(low, 3)} - {ceil_to(high, 3)}"


def _cells(line: Line, radii: Sequence[float], divisor: float, *, intervals: bool) -> list[str]:
    cells = []
    low, high = line.interval(radii)
    for r, value, lo, hi in zip(radii, line.accuracy(radii), low, high, strict=True):
        if not line.reachable(r):
            cells.append(OUT_OF_REACH)
            continue
        cell = _figure(value / divisor, least=line.at_least(r))
        if intervals:
            cell += f" [{floor_to(lo / divisor, 3)}, {ceil_to(hi / divisor, 3)}]"
        if isinstance(line, Envelope):
            best = line.winner(r)
            clean = _figure(best.accuracy([0.0])[0] / divisor, least=best.at_least(0.0))
            cell += f" ({clean}; σ {best.run.header.sigma:g})"
        cells.append(cell)
    return cells


def _caption(lines: Sequence[Line], relative_to: float | None, *, intervals: bool) -> list[str]:
    """Explain the numbers."""
    where = f"{lines[0].quantity} at {IN_WORDS[lines[0].norm]} radius r (images in [0, 1] pixels)"
    caption = [where if relative_to is None else f"{where}, divided by {exact(relative_to)}"]
    caption += _procedure([c.run.header for line in lines for c in runs_of(line)])
    if not isinstance(lines[0], Envelope) and lines[0].labelled:
        caption.append("ACR: average certified radius, over all images")
    if isinstance(lines[0], Envelope):
        caption += [
            "upper envelope over sigma: the best run at each radius, chosen on these images",
            "(in brackets: accuracy at r = 0 and sigma of that run)",
        ]
        if intervals:
            caption.append(
                "[95 % interval over images for the best run, with Bonferroni's correction for their number]"
            )
    return caption


def _procedure(headers: Sequence[RunHeader]) -> list[str]:
    """Name the parameters that all runs share."""
    agreed = {key: headers[0].get(key) for key in ("n0", "n", "alpha", "bound")}
    shared = {k: v for k, v in agreed.items() if v not in (None, 0) and all(h.get(k) == v for h in headers)}
    most = " at most" * any(h.stopping is not None for h in headers)
    words = [v if k == "bound" else f"{k} = {number(v)}" + most * (k == "n") for k, v in shared.items()]
    return [", ".join(words)] if words else []


def _csv(
    lines: Sequence[Line], radii: Sequence[float], relative_to: float | None = None
) -> tuple[list[str], list[list[Any]]]:
    """Return a row per run and radius; an envelope has the row of its best run, with columns of its own."""
    keys = ("model", "denoiser", "noise", "norm", "sigma", "n", "alpha", "bound")
    header = ["run", *keys, "images", "expected", "abstained", "acr", "quantity", "radius", "value", "low95", "high95"]
    if isinstance(lines[0], Envelope):
        header += ["method", "sigmas", "clean"]
    if relative_to is not None:
        header.append("relative_to")
    header.append("reachable")
    divisor = relative_to or 1.0
    rows = []
    for line in lines:
        low, high = line.interval(radii)
        for r, *values in zip(radii, line.accuracy(radii), low, high, strict=True):
            c = line.winner(r) if isinstance(line, Envelope) else line
            row = [str(c.run.path), *(c.run.header.get(k) for k in keys)]
            row += [c.total, c.run.header.expected, abstained(c), c.average_radius if c.labelled else None]
            upper = " (upper envelope)" if c is not line else ""
            row += [c.quantity + upper + " (at least)" * line.at_least(r), r, *(float(v) / divisor for v in values)]
            if isinstance(line, Envelope):
                row += [line.name, line.levels, float(c.accuracy([0.0])[0]) / divisor]
            rows.append([*row, *([] if relative_to is None else [relative_to]), str(line.reachable(r)).lower()])
    return header, rows


def compare_families(
    curves: Sequence[Curve], radii: Sequence[float], style: str = "text", correction: str | None = None
) -> str:
    """Render a table with a line per run and radius: certified accuracy, its interval, and its simultaneous share.

    The interval is that of :func:`analysis.families.accuracy_interval`. The share counts the images (with correct
    predictions, if there are labels) that :func:`analysis.families.simultaneous` certifies jointly at the run's alpha.
    Notes below the table say what each number guarantees.

    Args:
        curves: curves of runs with votes.
        radii: radii, one line each.
        style: ``"text"``, ``"markdown"``, ``"latex"`` or ``"csv"`` (one number per column, no notes).
        correction: ``"holm"`` or ``"bonferroni"``; None: the sharpest that is valid for each run.

    Raises:
        UserError: a run without p-values, or a correction that is not valid for one.
    """
    families = [family(c.run) for c in curves]
    if style == "csv":
        return render(*_families_csv(curves, families, radii, correction), style)
    header = ["run", "images", "r", curves[0].quantity, "95 % interval", "all at once", "correction"]
    rows = []
    for c, f in zip(curves, families, strict=True):
        low, high = _joint_interval(c, radii)
        name = [c.name, _images(c)]
        for i, (r, a) in enumerate(zip(radii, c.accuracy(radii), strict=True)):
            cells = [exact(r), *[OUT_OF_REACH] * 3]
            if c.reachable(r):
                figures = _figure(a, least=c.at_least(r)), _between(low[i], high[i])
                cells = [exact(r), *figures, floor_to(_at_once(c, f, r, correction), 3)]
            rows.append([*(name if i == 0 else ["", ""]), *cells, CORRECTIONS[f.correction(correction)]])
    title, notes = _guarantees(curves, {f.correction(correction) for f in families})
    notes = [*out_of_reach(curves, radii), *notes]
    table, filled = render(header, rows, style), [textwrap.fill(note, 110) for note in notes]
    if style == "latex":
        return captioned("\n".join([title, *filled]).split("\n"), table, style)
    between = "\n\n" if style == "markdown" else "\n"
    return f"{captioned([title], table, style)}\n\n{between.join(filled)}"


def _joint_interval(c: Curve, radii: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval over images and noise; its upper end is 1 where the images were not decided."""
    low, _ = accuracy_interval(c.successes(radii), c.total, c.run.header.alpha)
    return low, c.interval(radii)[1]


def _at_once(c: Curve, f: Family, radius: float, correction: str | None) -> float:
    marked = f.certified(radius, method=correction)
    return float((marked & f.right if c.labelled else marked).mean())


def _guarantees(curves: Sequence[Curve], methods: set[str]) -> tuple[str, list[str]]:
    """Return a title, and a note on the guarantee of each number."""
    alphas = sorted({c.run.header.alpha for c in curves})
    alpha = f"alpha = {exact(alphas[0])}" if len(alphas) == 1 else "the alpha of its run"
    quantity, norm = curves[0].quantity, IN_WORDS[curves[0].norm]
    true = "truly correct and robust" if curves[0].labelled else "truly robust"
    where = {
        "holm": "Holm: at one radius r of a run, chosen without seeing the votes; not at several radii together.",
        "bonferroni": "Bonferroni: at all radii of a run together.",
    }
    notes = [
        f"{quantity}: each single certificate is wrong with probability at most {alpha} over the noise.",
        f"95 % interval: over images and noise. The lower end bounds the share that is {true}, "
        f"allowing for wrong certificates; the upper end bounds the {quantity} that the procedure reaches on average.",
        f"all at once: except with probability at most {alpha} over the noise, every image counted here is "
        f"robust at {norm} radius r with its class. " + " ".join(where[m] for m in CORRECTIONS if m in methods),
    ]
    if any(c.decided for c in curves):
        notes.append(
            "Sampling stopped as soon as an image was decided at alpha; to certify all m images jointly, decide at "
            "alpha/m with --rule betting, then run `certify recompute --alpha`."
        )
    title = f"{quantity} at {norm} radius r (images in [0, 1] pixels), for each image and for all of them at once"
    return title, notes


def _families_csv(
    curves: Sequence[Curve], families: Sequence[Family], radii: Sequence[float], correction: str | None
) -> tuple[list[str], list[list[Any]]]:
    """Return the columns of :func:`compare`, the lower end that allows for wrong certificates, and the joint share."""
    header, rows = _csv(curves, radii)
    lines = iter(rows)
    for c, f in zip(curves, families, strict=True):
        low, _ = _joint_interval(c, radii)
        for r, end in zip(radii, low, strict=True):
            next(lines).extend([float(end), _at_once(c, f, r, correction), f.correction(correction)])
    return [*header, "true_low95", "all_at_once", "correction"], rows


def _images(c: Curve) -> str:
    if not c.run.partial:
        return f"{c.total}" + (f" ({c.note})" if c.note else "")
    return f"{c.total} of {c.run.header.expected} (partial)"


def abstained(c: Curve) -> int:
    """Count the images without a prediction."""
    return sum(1 for row in c.run.usable if row.abstained)


def one_run(c: Curve, radii: Sequence[float]) -> str:
    """Render the table at the end of a run: certified accuracy at a few radii, with its interval."""
    low, high = c.interval(radii)
    rows = [
        [exact(r), *((_figure(a, least=c.at_least(r)), _between(lo, hi)) if c.reachable(r) else [OUT_OF_REACH] * 2)]
        for r, a, lo, hi in zip(radii, c.accuracy(radii), low, high, strict=True)
    ]
    table = render([f"{IN_WORDS[c.norm]} radius >=", c.quantity, "95 % interval"], rows, "text")
    return "\n".join([table, *out_of_reach([c], radii)])


def share(successes: int, total: int) -> str:
    """Describe a proportion of images with its counts and its 95 % interval."""
    low, high = proportion_interval(successes, total)
    return f"{floor_to(successes / total, 3)} ({successes} of {total}; 95 %: {_between(float(low), float(high))})"
