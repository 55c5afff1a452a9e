"""Write the report of an audit, one self-contained HTML file, from the audit's folder.

The template (``report.html``) escapes all text and makes it printable, whoever wrote it. The page runs no script and
loads nothing.
"""

from __future__ import annotations

import datetime
import functools
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.accuracy_bound import accuracy_bound
from analysis.curves import Curve, curve, default_radii, proportion_interval
from analysis.report import verdict as verdicts
from analysis.report.audit_folder import AuditFolder, read_audit
from analysis.report.pictures import STAGES, Thumbnails, bound_svg, curve_svg, latency_svg
from certify.blackbox.answers import CLEAN, DRIFT, ESTIMATION, PROBE, RESUMED, SELECTION, stage_of
from certify.blackbox.client.credentials import public
from certify.blackbox.ledger_contents import LedgerContents
from certify.errors import RunFault, UserError, first_line, warn
from certify.runs.files import replacing
from certify.runs.identity import identity
from certify.runs.records import ImageRow
from certify.smoothing.norms import DECIMALS, IN_WORDS
from certify.smoothing.rounding import ceil_to, complement, exact, floor_to, times
from certify.text import printable

if TYPE_CHECKING:
    from jinja2 import Environment

NAME = "report.html"
THUMBNAIL_BYTES, MAX_ROWS, MAX_KINDS = 14 * 2**20, 4000, 20
"""Limits on thumbnails, images in the table and kinds of failures: the file stays below about 20 MB."""

_TOP = 3  # labels per image with a bar of their own

_STAGES = {
    CLEAN: "the unmodified image, for its reference label",
    PROBE: "the same image again at once: is the service deterministic?",
    SELECTION: "noisy copies that choose a label",
    ESTIMATION: "noisy copies whose votes count",
    RESUMED: "clean images when the audit was resumed: is it the same function?",
    DRIFT: "the same image at the end: has the service changed?",
}


def write_report(folder: str | Path, *, ledger: LedgerContents | None = None) -> Path:
    """Write ``report.html`` into an audit's folder, atomically; the audit may be unfinished.

    Args:
        folder: the audit's folder.
        ledger: the ledger's contents; None reads them.

    Raises:
        UserError: no such folder, or it contains no part of an audit.
        RunFault: the file cannot be written.
    """
    audit = read_audit(folder, ledger)
    path = audit.folder / NAME
    try:
        with replacing(path) as temporary:
            temporary.write_text(render(audit), encoding="utf-8")
    except OSError as error:
        raise RunFault(f"could not write {path}: {error.strerror}; the audit's records are untouched") from None
    return path


def try_report(folder: Path, ledger: LedgerContents) -> None:
    """Write the report at the end of an audit; an error only warns, so that the audit's results are kept."""
    try:
        write_report(folder, ledger=ledger)
    except Exception as error:
        warn(f"no report: {type(error).__name__}: {first_line(error)}; `certify report {folder}` tries again")


def render(audit: AuditFolder) -> str:
    """Return the page.

    Raises:
        UserError: jinja2 is not installed.
    """
    return _environment().get_template(NAME).render(page(audit))


@functools.cache
def _environment() -> Environment:
    """Return the environment of the templates, which compiles each of them once per process."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise UserError("a report needs jinja2: pip install 'certify-toolkit[audit]'") from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters |= {"floor_to": floor_to, "ceil_to": ceil_to, "exact": exact, "complement": complement}
    environment.filters |= {"times": times, "public": public, "time": _time}
    return environment


def page(audit: AuditFolder) -> dict[str, Any]:
    """Return the variables of the template."""
    thumbnails = Thumbnails(audit.folder / "pictures", len(audit.rows), THUMBNAIL_BYTES)
    plot: Curve | None = None
    bound = None
    why_none = "There is no run file to plot."
    if audit.run is not None:
        try:
            if audit.run.header.without_radii:
                bound = accuracy_bound(audit.run)
            else:
                plot = curve(audit.run, "pictures")
        except UserError as error:
            why_none = f"{error}."
    endpoint = audit.about.get("endpoint") or (audit.ledger and audit.ledger.header.get("endpoint"))
    folder = shlex.quote(str(audit.folder))
    return {
        "audit": audit,
        "title": public(str(endpoint or audit.folder.name)),
        "now": datetime.datetime.now(datetime.UTC).isoformat(),
        "verdict": verdicts.verdict(audit),
        "notices": verdicts.warnings(audit),
        "tiles": _tiles(audit),
        "outcomes": verdicts.outcomes(audit),
        "decided": _decided(audit),
        "plot": plot,
        "bound": bound,
        "curve": bound_svg(bound) if bound else curve_svg(plot) if plot else None,
        "no_curve": why_none,
        "curve_rows": _curve_rows(plot) if plot else [],
        "norm": IN_WORDS[audit.header.norm],
        "groups": _groups(audit, thumbnails),
        "rows_left_out": max(0, len(audit.rows) - MAX_ROWS),
        "thumbnails": thumbnails,
        "picture_stages": STAGES,
        "failures": Counter(query.answer.failure for query in audit.failed).most_common(MAX_KINDS),
        "stages": _stage_rows(audit),
        "latency": latency_svg(audit.seconds) if len(audit.seconds) > 1 else None,
        "quantiles": _quantiles(audit.seconds),
        "settings": _settings(audit),
        "versions": audit.about.get("versions") or audit.header.versions,
        "command": public(str(audit.about.get("command") or audit.header.command)),
        "replay": public(str(audit.about.get("replay") or f"certify replay {folder}")),
        "rewrite": f"certify report {folder}",
    }


def _time(text: str) -> str:
    """Format an ISO 8601 time; return any other text as it is."""
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{time.astimezone(datetime.UTC) if time.tzinfo else time:%Y-%m-%d %H:%M}" + " UTC" * bool(time.tzinfo)


def _curve_rows(plot: Curve) -> list[tuple[str, str, int, float, float, float]]:
    """Return radius, "at least" or nothing, images certified there, their share and its interval."""
    largest = float(plot.radii[-1]) if len(plot.radii) else 0.0
    radii = plot.decided or default_radii(largest)
    low, high = plot.interval(radii)
    return [
        (exact(r), "≥ " if plot.at_least(r) else "", int(k), float(s), float(a), float(b))
        for r, k, s, a, b in zip(radii, plot.successes(radii), plot.accuracy(radii), low, high, strict=True)
    ]


def _decided(audit: AuditFolder) -> list[tuple[str, Counter[str]]]:
    """Count the outcomes at each requested radius."""
    counts: dict[float, Counter[str]] = {}
    for row in audit.rows:
        for decision in row.outcomes:
            counts.setdefault(decision.radius, Counter())[decision.outcome] += 1
    return [(exact(radius), outcomes) for radius, outcomes in sorted(counts.items())]


def _tiles(audit: AuditFolder) -> list[tuple[str, str, str]]:
    """Return the key figures: name, number, and explanation."""
    tiles, plan = [], audit.plan
    if audit.rows and not audit.header.without_radii:
        kept = sum(verdicts.outcome(row) == verdicts.KEEPS for row in audit.rows)
        low, high = proportion_interval(kept, len(audit.rows))
        about = f"95 % interval over images: {floor_to(float(low), 3)} to {ceil_to(float(high), 3)}"
        nothing = sum(row.error is not None for row in audit.rows)
        about += f"; {nothing:,} of them with nothing to certify, which the curve leaves out" if nothing else ""
        tiles.append(("keep their label", f"{kept:,} of {len(audit.rows):,}", about))
    radii = sorted(row.radius or 0.0 for row in audit.rows if verdicts.outcome(row) == verdicts.KEEPS)
    if radii and not audit.header.radii and not audit.header.without_radii:
        digits = DECIMALS[audit.header.norm]
        median, largest = (floor_to(r, digits) for r in (radii[(len(radii) - 1) // 2], radii[-1]))
        cap = plan.get("radius_cap")
        possible = f"; at most {ceil_to(cap, digits)} with this many samples" if cap else ""
        tiles.append(("median radius", median, f"largest {largest}{possible}"))
    if audit.queries:
        budget = f"of a budget of {plan['budget']:,}" if plan.get("budget") is not None else "no budget was set"
        tiles.append(("requests sent", f"{audit.spent:,}", f"{budget}; {audit.retries:,} of them retries"))
        if audit.price:
            tiles.append(("cost", audit.price, f"at {plan['price_per_1000']:g} per 1,000 requests"))
        failed, total = len(audit.failed), len(audit.queries)
        tiles.append(("failed queries", f"{failed:,}", f"of {total:,}, {failed / total:.1%}"))
    if audit.seconds:
        median_time, slow = np.quantile(audit.seconds, [0.5, 0.99])
        tiles.append(("median time", clock(median_time), f"99 % within {clock(slow)}"))
    return tiles


def clock(seconds: float) -> str:
    """Format a duration with three digits, in milliseconds if it is below a second."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


@dataclass(frozen=True)
class StageRow:
    """Queries of one stage: their number, requests and results."""

    stage: str
    about: str
    queries: int
    requests: int
    answered: int
    failed: int
    lost: int
    open: int


def _stage_rows(audit: AuditFolder) -> list[StageRow]:
    """Return a row for each stage that has queries."""
    rows = []
    pending = [(stage_of(name), attempts) for name, attempts in (audit.ledger.open if audit.ledger else {}).items()]
    for stage in dict.fromkeys([*_STAGES, *(query.stage for query in audit.queries), *(s for s, _ in pending)]):
        queries = [query for query in audit.queries if query.stage == stage]
        attempts = [attempts for pending_stage, attempts in pending if pending_stage == stage]
        if queries or attempts:
            row = StageRow(
                stage,
                about=_STAGES.get(stage, ""),
                queries=len(queries) + len(attempts),
                requests=sum(query.answer.attempts for query in queries) + sum(attempts),
                answered=sum(query.answered for query in queries),
                failed=sum(not query.answered and not query.lost for query in queries),
                lost=sum(query.lost for query in queries),
                open=len(attempts),
            )
            rows.append(row)
    return rows


def _quantiles(seconds: Sequence[float]) -> list[tuple[str, str]]:
    if not seconds:
        return []
    shares = {"fastest": 0.0, "half within": 0.5, "90 % within": 0.9, "99 % within": 0.99, "slowest": 1.0}
    return [(name, clock(float(t))) for name, t in zip(shares, np.quantile(seconds, [*shares.values()]), strict=True)]


@dataclass(frozen=True)
class ImageEntry:
    """One image in the table of images.

    Attributes:
        row: its line in the run file.
        pictures: data URIs by stage.
        own: the service's label of the unmodified image; None without one.
        score: score of that label, with three digits.
        reference: the reference label, or None.
        label: the certified label, or None.
        radius: certified radius, rounded down; None without one.
        p_lower: lower bound of the label's probability, rounded down; None without one.
        votes: label and number of votes of the most frequent labels.
        others: number of the other labels, and of their votes.
    """

    row: ImageRow
    pictures: Mapping[str, str]
    own: str | None
    score: str | None
    reference: str | None
    label: str | None
    radius: str | None
    p_lower: str | None
    votes: list[tuple[str, int]]
    others: tuple[int, int]


def _groups(audit: AuditFolder, thumbnails: Thumbnails) -> dict[str, list[ImageEntry]]:
    """Group the images by outcome, those that need attention first."""
    entries: dict[Any, tuple[int | None, Mapping[str, Any]]] = {
        entry.get("id"): (i, entry) for i, entry in enumerate(audit.about.get("images") or ())
    }
    order = [
        verdicts.OTHER,
        verdicts.WRONG,
        verdicts.NOT,
        verdicts.OPEN,
        verdicts.NOTHING,
        verdicts.KEEPS,
        verdicts.RIGHT,
    ]
    groups: dict[str, list[ImageEntry]] = {}
    for row in sorted(audit.rows, key=lambda row: order.index(verdicts.outcome(row)))[:MAX_ROWS]:
        index, entry = entries.get(row.id, (None, {}))
        prefix = str(entry.get("pictures") or ("" if index is None else f"{index:03d}"))
        groups.setdefault(verdicts.outcome(row), []).append(_image(audit, row, thumbnails.of(prefix)))
    return groups


def _image(audit: AuditFolder, row: ImageRow, pictures: Mapping[str, str]) -> ImageEntry:
    clean = audit.clean_answers.get(row.id)
    score = clean.answer.ranked[0].score if clean else None
    votes = sorted(((_named(audit, row, c), int(k)) for c, k in row.votes.items()), key=lambda v: (-v[1], v[0]))
    rest, certified = votes[_TOP:], not row.abstained
    digits = DECIMALS[audit.header.norm]
    return ImageEntry(
        row,
        pictures,
        own=clean.label if clean else None,
        score=None if score is None else f"{score:.3g}",
        reference=None if row.label is None else _named(audit, row, row.label),
        label=(row.class_name or _named(audit, row, row.prediction)) if certified else None,
        radius=floor_to(row.radius, digits) if certified and row.radius else None,
        p_lower=floor_to(row.p_lower) if certified and row.p_lower is not None else None,
        votes=votes[:_TOP],
        others=(len(rest), sum(k for _, k in rest)),
    )


def _named(audit: AuditFolder, row: ImageRow, number: int | str) -> str:
    """Return the service's name of a class."""
    known = row.classes or {}
    vocabulary: Sequence[str] = audit.about.get("vocabulary") or ()
    if str(number) in known:
        return str(known[str(number)])
    return str(vocabulary[int(number)]) if 0 <= int(number) < len(vocabulary) else f"class {number}"


def _settings(audit: AuditFolder) -> list[tuple[str, str]]:
    """Return everything that determines the result, from ``audit.json`` and the run file's header."""
    about = audit.about
    keys = ("protocol", "format", "encoding", "size", "denoiser", "labels", "plan", "settings")
    both = identity({key: about[key] for key in keys if key in about}) | identity(audit.header)
    return [(key, public(_text(value))) for key, value in both.items() if value not in (None, "", [], {})]


def _text(value: object) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return ", ".join(map(_text, value))
    return exact(value) if isinstance(value, float) else str(value)
