"""Tables of a comparison: text, Markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

from typing import TypedDict

from analysis.comparison.results import GROUPS, Cell, Comparison, Condition
from analysis.tables import captioned, render
from certify.smoothing.rounding import ceil_to, exact, floor_to
from certify.text import printable


def tabulate_comparison(comparison: Comparison, style: str = "text") -> str:
    """Render defences by conditions, with intervals, costs, explanations, and pairs against the bare classifier."""
    if style == "csv":
        cells = [list(row.values()) for row in records(comparison)]
        return render(list(Record.__annotations__), cells, style)
    between = "\n" if style == "text" else " "  # a terminal is narrower than a page
    tables = [table(comparison, between) for table in (_accuracies, _costs, _pairs)]
    parts = [render(*table, style, multiline=True) for table in tables if table is not None]
    return captioned(caption_of(comparison), "\n\n".join([*parts, *_failures(comparison, style)]), style)


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


Table = tuple[list[str], list[list[str]]]
"""Heading and rows."""


def _title(condition: Condition, between: str) -> str:
    """Return a column's heading, always with its group."""
    if condition.group == "plain":
        return printable(condition.name)
    return f"{condition.group}{':' * (between == ' ')}{between}{printable(condition.short)}"


def _name(comparison: Comparison, defence: str) -> str:
    return printable(defence) + " *" * (not comparison.about(defence).frozen)


def _accuracies(comparison: Comparison, between: str) -> Table:
    columns = comparison.columns
    rows = [
        [_name(comparison, d), *(_cell(comparison.cell(d, c), c, between) for c in columns)]
        for d in comparison.defences
    ]
    return ["defence", *(_title(c, between) for c in columns)], rows


def _cell(cell: Cell | None, condition: Condition, between: str) -> str:
    if cell is None:
        return "-"
    if cell.failed:
        return "failed"
    low, high = cell.interval
    shown = ceil_to if condition.attacked else floor_to  # a stronger attack may leave less
    return f"{shown(cell.accuracy, 3)}{between}[{floor_to(low, 2)}, {ceil_to(high, 2)}]"


def _costs(comparison: Comparison, between: str) -> Table:
    """Return milliseconds, network passes, and images that each attack sent through its target, per image."""
    cells = {d: {c: comparison.cell(d, c) for c in comparison.conditions} for d in comparison.defences}
    counted = [
        c
        for c in comparison.conditions
        if c.attacked and any(cell and cell.queries for cell in (row[c] for row in cells.values()))
    ]
    header = ["cost", f"ms{between}per image", f"network{between}passes"]
    header += [f"images sent{between}{_title(c, between)}" for c in counted]
    rows = []
    for d, row in cells.items():
        clean, passes = row[comparison.conditions[0]], comparison.about(d).passes
        ms = f"{1000 * clean.seconds:.2g}" if clean and clean.images else "-"
        queries = [f"{cell.queries:.0f}" if cell and cell.images else "-" for cell in (row[c] for c in counted)]
        rows.append([_name(comparison, d), ms, "-" if passes is None else str(passes), *queries])
    return header, rows


def _pairs(comparison: Comparison, between: str) -> Table | None:
    """Compare each defence with the bare classifier on the same images."""
    others = [d for d in comparison.defences if d != "none"]
    if not others or len(others) == len(comparison.defences):
        return None
    columns = [c for c in comparison.conditions if c.group != "certified"]

    def text(defence: str, condition: Condition) -> str:
        pair = comparison.pair(defence, "none", condition)
        return "-" if pair is None else f"+{pair.better} -{pair.worse}{between}p {_p(pair.p_value)}"

    header = [f"same images,{between}against none", *(_title(c, between) for c in columns)]
    return header, [[_name(comparison, d), *(text(d, c) for c in columns)] for d in others]


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
            if cell is not None and cell.undecided:
                lines.append(f"note: {d}, {c.key}: {cell.undecided} of {cell.images} images undecided")
            if cell is not None:
                lines += [f"note: {d}, {c.key}: {n} images: {text}" for text, n in comparison.notes(d, c).items()]
    start = "% " if style == "latex" else ""
    return ["\n".join(start + printable(line) for line in lines)] if lines else []


class Record(TypedDict):
    """One cell of the table as JSON; values are null if it failed or is unfinished."""

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
