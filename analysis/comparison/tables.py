"""A comparison in words: text, Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import textwrap
from typing import Any

from analysis.comparison.results import GROUPS, Cell, Comparison, Condition
from analysis.tables import render
from certify.smoothing.rounding import ceil_to, exact, floor_to
from certify.text import printable


def tabulate_comparison(found: Comparison, style: str = "text") -> str:
    """Defences by conditions, with intervals, costs, what the columns mean, and pairs against the bare classifier."""
    if style == "csv":
        return render(*_csv(found), style)
    caption = "\n".join(map(printable, caption_of(found)))
    caption = textwrap.indent(caption, "% ") + "\n" if style == "latex" else f"{caption}\n\n"
    parts = [render(*made, style, multiline=True) for made in (_accuracies(found, style), _costs(found, style))]
    paired = _pairs(found, style)
    if paired is not None:
        parts.append(render(*paired, style, multiline=True))
    parts += _failures(found, style)
    return caption + "\n\n".join(parts)


def caption_of(found: Comparison) -> list[str]:
    """What was compared, and how the figures are to be read."""
    h = found.run.header
    drawn = any(len(row.answers) > 1 for row in found.run.images)
    images = h.images.get("chosen", h.expected)
    lines = [
        f"{h.model} on {images} images of {h.data}; {h.norm} distance up to {h.eps_text} in [0, 1] pixels",
        "accuracy [Wilson's 95 % interval over images]"
        + (f"; of a defence that draws random numbers the mean of {h.repeats} fresh answers" if drawn else ""),
    ]
    groups = {c.group for c in found.conditions}
    if "blind" in groups:
        lines.append("blind: crafted on the bare classifier or on surrogates; the attacker does not know the purifier")
    if "adaptive" in groups:
        lines.append(
            "adaptive: crafted on the whole defended classifier: what these attacks left; others may leave less"
        )
    if "certified" in groups:
        radius, alpha = floor_to(h.l2_radius), exact(h.alpha)
        where = f"l2 radius {radius} (alpha {alpha}, at most {h.certify_n:,} samples)"
        lines.append(f"certified: share that is right and provably robust at {where}; undecided counts as not")
    if any(not d.frozen for d in h.defences):
        lines.append("*: fine-tunes its classifiers; the others leave the classifier frozen")
    if found.run.partial:
        lines.append(f"unfinished: {len(found.run.images)} of {h.expected} outcomes; run its command again")
    return lines


def title(condition: Condition, style: str = "text") -> str:
    """A column's heading; the group stands in every one, so that no column can be taken for another's."""
    if condition.group == "plain":
        return printable(condition.name)
    between = "\n" if style == "text" else ": "
    return f"{condition.group}{between}{printable(condition.short)}"


def _name(found: Comparison, defence: str) -> str:
    frozen = next(d.frozen for d in found.run.header.defences if d.named == defence)
    return printable(defence) + " *" * (not frozen)


def _accuracies(found: Comparison, style: str) -> tuple[list[str], list[list[str]]]:
    header = ["defence", *(title(c, style) for c in found.columns)]
    rows = [[_name(found, d), *(_cell(found.cell(d, c), c, style) for c in found.columns)] for d in found.defences]
    return header, rows


def _cell(cell: Cell | None, condition: Condition, style: str) -> str:
    if cell is None:
        return "-"
    if cell.failed:
        return "failed"
    low, high = cell.interval
    between = "\n" if style == "text" else " "  # a terminal is narrower than a page
    shown = ceil_to if condition.attacked else floor_to  # another attack may leave less
    return f"{shown(cell.accuracy, 3)}{between}[{floor_to(low, 2)}, {ceil_to(high, 2)}]"


def _costs(found: Comparison, style: str) -> tuple[list[str], list[list[str]]]:
    """Milliseconds and network passes an image, and how many images each attack sent through what it attacked."""
    attacks = [c for c in found.conditions if c.group in ("blind", "adaptive")]
    spent = {c: [found.cell(d, c) for d in found.defences] for c in attacks}
    asked = [c for c in attacks if any(cell and cell.queries for cell in spent[c])]
    between = "\n" if style == "text" else " "
    header = ["cost", f"ms{between}an image", f"network{between}passes"]
    header += [f"images sent{between}{title(c, style)}" for c in asked]
    rows = []
    for d in found.defences:
        about = next(a for a in found.run.header.defences if a.named == d)
        clean = found.cell(d, found.conditions[0])
        ms = f"{1000 * clean.seconds:.2g}" if clean and clean.images else "-"
        cells = [found.cell(d, c) for c in asked]
        queries = [f"{cell.queries:.0f}" if cell and cell.images else "-" for cell in cells]
        rows.append([_name(found, d), ms, "-" if about.passes is None else str(about.passes), *queries])
    return header, rows


def _pairs(found: Comparison, style: str) -> tuple[list[str], list[list[str]]] | None:
    """Each defence against the bare classifier on the same images."""
    if "none" not in found.defences or len(found.defences) < 2:
        return None
    columns = [c for c in found.conditions if c.group != "certified"]
    between = "\n" if style == "text" else " "
    header = [f"same images,{between}against none", *(title(c, style) for c in columns)]
    rows = []
    for d in found.defences:
        if d == "none":
            continue
        cells = []
        for c in columns:
            pair = found.pair(d, "none", c)
            cells.append("-" if pair is None else f"+{pair.better} -{pair.worse}{between}p {_p(pair.p_value)}")
        rows.append([_name(found, d), *cells])
    return header, rows


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else ceil_to(value, 3)


def _failures(found: Comparison, style: str) -> list[str]:
    """Failures and notes as lines of text, comments in LaTeX: they hold messages of programs."""
    lines = []
    for d in found.defences:
        for c in found.columns:
            cell = found.cell(d, c)
            if cell is not None and cell.failed:
                lines.append(f"failed: {d}, {c.key}: {cell.failed}")
            if cell is not None:
                lines += [f"note: {d}, {c.key}: {n} images: {text}" for text, n in found.notes(d, c).items()]
    start = "% " if style == "latex" else ""
    return ["\n".join(start + printable(line) for line in lines)] if lines else []


def records(found: Comparison) -> list[dict[str, Any]]:
    """One object for each cell, every number in it."""
    rows = []
    for d in found.defences:
        for c in found.columns:
            cell = found.cell(d, c)
            if cell is None:
                continue
            whole = cell.images > 0 and not cell.failed  # half a column is no figure
            low, high = cell.interval if whole else (None, None)
            rows.append(
                {
                    "defence": d,
                    "group": GROUPS[c.group],
                    "condition": c.name,
                    "images": cell.images,
                    "accuracy": cell.accuracy if whole else None,
                    "low95": low,
                    "high95": high,
                    "worst_of_repeats": cell.worst / cell.images if whole else None,
                    "repeats": cell.repeats,
                    "queries": cell.queries,
                    "seconds": cell.seconds,
                    "failed": cell.failed,
                }
            )
    return rows


def _csv(found: Comparison) -> tuple[list[str], list[list[Any]]]:
    rows = records(found)
    header = list(rows[0]) if rows else ["defence"]
    return header, [list(row.values()) for row in rows]
