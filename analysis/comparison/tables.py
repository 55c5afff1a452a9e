"""Tables of a comparison: text, Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import textwrap
from typing import TypedDict

from analysis.comparison.results import GROUPS, Cell, Comparison, Condition
from analysis.tables import render
from certify.smoothing.rounding import ceil_to, exact, floor_to
from certify.text import printable


def tabulate_comparison(comparison: Comparison, style: str = "text") -> str:
    """Render defences by conditions, with intervals, costs, explanations, and pairs against the bare classifier."""
    if style == "csv":
        return render(*_csv(comparison), style)
    caption = "\n".join(map(printable, caption_of(comparison)))
    caption = textwrap.indent(caption, "% ") + "\n" if style == "latex" else f"{caption}\n\n"
    tables = [_accuracies(comparison, style), _costs(comparison, style), _pairs(comparison, style)]
    parts = [render(*table, style, multiline=True) for table in tables if table is not None]
    return caption + "\n\n".join([*parts, *_failures(comparison, style)])


def caption_of(comparison: Comparison) -> list[str]:
    """Explain the comparison and its numbers, a line each."""
    h = comparison.run.header
    random = any(len(row.answers) > 1 for row in comparison.run.images)
    images = h.images.get("chosen", h.expected)
    lines = [
        f"{h.model} on {images} images of {h.data}; {h.norm} distance up to {h.eps_text} in [0, 1] pixels",
        "accuracy [Wilson's 95 % interval over images]"
        + (f"; for a random defence, the mean of {h.repeats} new answers" if random else ""),
    ]
    groups = {c.group for c in comparison.conditions}
    if "blind" in groups:
        lines.append("blind: crafted on the bare classifier or on surrogates; the attacker does not know the purifier")
    if "adaptive" in groups:
        lines.append("adaptive: crafted on the whole defended classifier; stronger attacks may leave less accuracy")
    if "certified" in groups:
        radius, alpha = floor_to(h.l2_radius), exact(h.alpha)
        where = f"l2 radius {radius} (alpha {alpha}, at most {h.certify_n:,} samples)"
        lines.append(
            f"certified: share of correct and provably robust images at {where}; undecided counts as not robust"
        )
    if any(not d.frozen for d in h.defences):
        lines.append("*: fine-tunes its classifiers; the other defences leave the classifier frozen")
    if comparison.run.partial:
        done = f"{len(comparison.run.images)} of {h.expected} outcomes"
        lines.append(f"unfinished: {done}; run the same command again to resume")
    return lines


def title(condition: Condition, style: str = "text") -> str:
    """Return a column's heading, always with its group."""
    if condition.group == "plain":
        return printable(condition.name)
    between = "\n" if style == "text" else ": "
    return f"{condition.group}{between}{printable(condition.short)}"


def _name(comparison: Comparison, defence: str) -> str:
    frozen = next(d.frozen for d in comparison.run.header.defences if d.named == defence)
    return printable(defence) + " *" * (not frozen)


def _accuracies(comparison: Comparison, style: str) -> tuple[list[str], list[list[str]]]:
    header = ["defence", *(title(c, style) for c in comparison.columns)]
    rows = [
        [_name(comparison, d), *(_cell(comparison.cell(d, c), c, style) for c in comparison.columns)]
        for d in comparison.defences
    ]
    return header, rows


def _cell(cell: Cell | None, condition: Condition, style: str) -> str:
    if cell is None:
        return "-"
    if cell.failed:
        return "failed"
    low, high = cell.interval
    between = "\n" if style == "text" else " "  # a terminal is narrower than a page
    shown = ceil_to if condition.attacked else floor_to  # a stronger attack may leave less
    return f"{shown(cell.accuracy, 3)}{between}[{floor_to(low, 2)}, {ceil_to(high, 2)}]"


def _costs(comparison: Comparison, style: str) -> tuple[list[str], list[list[str]]]:
    """Return milliseconds, network passes, and images that each attack sent through its target, per image."""
    attacks = [c for c in comparison.conditions if c.group in ("blind", "adaptive")]
    spent = {c: [comparison.cell(d, c) for d in comparison.defences] for c in attacks}
    counted = [c for c in attacks if any(cell and cell.queries for cell in spent[c])]
    between = "\n" if style == "text" else " "
    header = ["cost", f"ms{between}per image", f"network{between}passes"]
    header += [f"images sent{between}{title(c, style)}" for c in counted]
    rows = []
    for d in comparison.defences:
        about = next(a for a in comparison.run.header.defences if a.named == d)
        clean = comparison.cell(d, comparison.conditions[0])
        ms = f"{1000 * clean.seconds:.2g}" if clean and clean.images else "-"
        cells = [comparison.cell(d, c) for c in counted]
        queries = [f"{cell.queries:.0f}" if cell and cell.images else "-" for cell in cells]
        rows.append([_name(comparison, d), ms, "-" if about.passes is None else str(about.passes), *queries])
    return header, rows


def _pairs(comparison: Comparison, style: str) -> tuple[list[str], list[list[str]]] | None:
    """Compare each defence with the bare classifier on the same images."""
    if "none" not in comparison.defences or len(comparison.defences) < 2:
        return None
    columns = [c for c in comparison.conditions if c.group != "certified"]
    between = "\n" if style == "text" else " "
    header = [f"same images,{between}against none", *(title(c, style) for c in columns)]
    rows = []
    for d in comparison.defences:
        if d == "none":
            continue
        cells = []
        for c in columns:
            pair = comparison.pair(d, "none", c)
            cells.append("-" if pair is None else f"+{pair.better} -{pair.worse}{between}p {_p(pair.p_value)}")
        rows.append([_name(comparison, d), *cells])
    return header, rows


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else ceil_to(value, 3)


def _failures(comparison: Comparison, style: str) -> list[str]:
    """List failures and notes, in LaTeX as comments, because they are messages of programs."""
    lines = []
    for d in comparison.defences:
        for c in comparison.columns:
            cell = comparison.cell(d, c)
            if cell is not None and cell.failed:
                lines.append(f"failed: {d}, {c.key}: {cell.failed}")
            if cell is not None:
                lines += [f"note: {d}, {c.key}: {n} images: {text}" for text, n in comparison.notes(d, c).items()]
    start = "% " if style == "latex" else ""
    return ["\n".join(start + printable(line) for line in lines)] if lines else []


class Record(TypedDict):
    """One cell of the table as JSON; null where a cell has no figures, because it failed or is unfinished."""

    defence: str
    group: str
    condition: str
    images: int
    accuracy: float | None
    low95: float | None
    high95: float | None
    worst_of_repeats: float | None
    repeats: int
    queries: float
    seconds: float
    failed: str


def records(comparison: Comparison) -> list[Record]:
    """Return a record per cell, with all numbers."""
    rows: list[Record] = []
    for d in comparison.defences:
        for c in comparison.columns:
            cell = comparison.cell(d, c)
            if cell is None:
                continue
            whole = cell.images > 0 and not cell.failed  # no figures for part of a column
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


def _csv(comparison: Comparison) -> tuple[list[str], list[list[object]]]:
    return list(Record.__annotations__), [list(row.values()) for row in records(comparison)]
