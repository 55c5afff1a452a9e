"""The report of an audit: one HTML file that needs nothing but itself, from the folder as it was left.

Whatever a service or a user wrote is made printable and escaped where the template inserts it; the page runs no script
and loads nothing.
"""

from __future__ import annotations

import datetime
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.curves import Curve, curve, default_radii, proportion_interval
from analysis.report import verdict as words
from analysis.report.audit_folder import AuditFolder, read_audit
from analysis.report.method import method
from analysis.report.pictures import STAGES, Thumbnails, curve_svg, latency_svg
from certify.blackbox.client.credentials import public
from certify.blackbox.query_votes import CLEAN, DRIFT, ESTIMATION, PROBE, SELECTION, stage_of
from certify.errors import RunFault, UserError
from certify.runs.files import replacing
from certify.runs.identity import identity
from certify.smoothing.norms import DECIMALS, IN_WORDS
from certify.smoothing.rounding import ceil_to, exact, floor_to
from certify.text import printable

NAME = "report.html"
ROOM, MOST_ROWS, MOST_KINDS = 14 * 2**20, 4000, 20
"""Bytes of thumbnails, rows of the table of images and kinds of failure at most: the file stays below about 20 MB."""

_TOP = 3  # labels of one image that are shown with their votes

_ABOUT_STAGES = {
    CLEAN: "the image itself: its reference label",
    PROBE: "the same again at once: is the service deterministic?",
    SELECTION: "noisy copies that choose a label",
    ESTIMATION: "noisy copies whose votes count",
    DRIFT: "the image itself at the end: has the service changed?",
}


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into an audit's folder, whole or not at all; an audit that stopped half-way has one too.

    Raises:
        UserError: no such folder, or nothing of an audit in it.
        RunFault: the file cannot be written.
    """
    audit = read_audit(folder)
    path = audit.folder / NAME
    try:
        with replacing(path) as beside:
            beside.write_text(render(audit), encoding="utf-8")
    except OSError as error:
        raise RunFault(f"could not write {path}: {error.strerror}; the audit's records are untouched") from None
    return path


def render(audit: AuditFolder) -> str:
    """The page.

    Raises:
        UserError: the template engine is not installed.
    """
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
    environment.filters |= {"floor_to": floor_to, "ceil_to": ceil_to, "exact": exact}
    return environment.get_template("report.html").render(page(audit))


def page(audit: AuditFolder) -> dict[str, Any]:
    """What the template shows."""
    thumbnails = Thumbnails(audit.folder / "pictures", len(audit.rows), ROOM)
    found = _curve(audit)
    groups = _groups(audit, thumbnails)
    seconds = audit.seconds
    return {
        "title": public(
            str(audit.about.get("endpoint") or (audit.kept and audit.kept.header.get("endpoint")) or audit.folder.name)
        ),
        "dates": [_when(str(audit.about[key])) for key in ("created", "finished") if audit.about.get(key)],
        "written": _when(datetime.datetime.now(datetime.UTC).isoformat()),
        "verdict": words.verdict(audit),
        "warnings": words.warnings(audit),
        "figures": _figures(audit, found if isinstance(found, Curve) else None),
        "outcomes": words.outcomes(audit),
        "decided": _decided(audit),
        "curve": curve_svg(found) if isinstance(found, Curve) else None,
        "no_curve": "" if isinstance(found, Curve) else found,
        "curve_rows": _curve_rows(found) if isinstance(found, Curve) else [],
        "quantity": found.quantity if isinstance(found, Curve) else "",
        "norm": IN_WORDS[audit.header.get("norm", "l2")],
        "groups": groups,
        "rows_left_out": max(0, len(audit.rows) - MOST_ROWS),
        "thumbnails": thumbnails,
        "stages": STAGES,
        "probes": audit.probes,
        "drifts": audit.drifts,
        "failures": Counter(query.answer.failure for query in audit.failed).most_common(MOST_KINDS),
        "outside": len(audit.outside),
        "cost": _cost(audit),
        "stage_rows": _stage_rows(audit),
        "latency": latency_svg(seconds) if len(seconds) > 1 else None,
        "quantiles": _quantiles(seconds),
        "answers": len(seconds),
        "method": method(audit),
        "settings": _settings(audit),
        "versions": audit.about.get("versions") or audit.header.get("versions") or {},
        "command": public(str(audit.about.get("command") or audit.header.get("command") or "")),
        "replay": public(str(audit.about.get("replay") or f"certify replay {shlex.quote(str(audit.folder))}")),
        "rewrite": f"certify report {shlex.quote(str(audit.folder))}",
    }


def _when(text: str) -> str:
    """A time as people write it; what is no time stays as it is."""
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{time.astimezone(datetime.UTC) if time.tzinfo else time:%Y-%m-%d %H:%M}" + " UTC" * bool(time.tzinfo)


def _curve(audit: AuditFolder) -> Curve | str:
    """The curve, or why there is none."""
    if audit.run is None:
        return "There is no run file to draw one from."
    try:
        return curve(audit.run, "pictures")
    except UserError as error:
        return f"{error}."


def _curve_rows(found: Curve) -> list[tuple[str, str, int, float, float, float]]:
    """Radius, images that reach it, their share and its interval."""
    largest = float(found.radii[-1]) if len(found.radii) else 0.0
    radii = found.decided or default_radii(largest)
    low, high = found.interval(radii)
    reached, share = found.successes(radii), found.accuracy(radii)
    return [
        (exact(r), "≥ " if found.at_least(r) else "", int(k), float(s), float(a), float(b))
        for r, k, s, a, b in zip(radii, reached, share, low, high, strict=True)
    ]


def _decided(audit: AuditFolder) -> list[dict[str, Any]]:
    """How many images are robust, not certifiable and undecided at each radius that was asked for."""
    found: dict[float, Counter[str]] = {}
    for row in audit.rows:
        for decision in row.get("decisions", ()):
            found.setdefault(decision["radius"], Counter())[decision["outcome"]] += 1
    return [{"radius": exact(radius), "counts": counts} for radius, counts in sorted(found.items())]


def _figures(audit: AuditFolder, found: Curve | None) -> list[dict[str, str]]:
    """Key figures: a name, a number, and what it is of."""
    tiles = []
    if audit.rows:
        kept = sum(words.outcome(row) == words.KEEPS for row in audit.rows)
        low, high = proportion_interval(kept, len(audit.rows))
        about = f"95 % interval over images: {floor_to(float(low), 3)} to {ceil_to(float(high), 3)}"
        nothing = sum("error" in row for row in audit.rows)
        about += f"; {nothing:,} without anything to certify among them, which the curve leaves out" if nothing else ""
        tiles.append(_tile("keep their label", f"{kept:,} of {len(audit.rows):,}", about))
    radii = sorted(row["radius"] for row in audit.rows if words.outcome(row) == words.KEEPS)
    if radii and not (audit.header.get("stopping") or {}).get("radii"):
        digits = DECIMALS[audit.header.get("norm", "l2")]
        middle, largest = (floor_to(r, digits) for r in (radii[(len(radii) - 1) // 2], radii[-1]))
        cap = (audit.about.get("plan") or {}).get("radius_cap")
        possible = f"; at this n at most {ceil_to(cap, digits)}" if cap else ""
        tiles.append(_tile("median radius", middle, f"largest {largest}{possible}"))
    plan = audit.about.get("plan") or {}
    if audit.asked:
        budget = f"of a budget of {plan['budget']:,}" if plan.get("budget") is not None else "no budget was set"
        tiles.append(_tile("requests sent", f"{audit.spent:,}", f"{budget}; {audit.retries:,} of them retries"))
        price = _price(audit)
        if price:
            tiles.append(_tile("cost", price, f"at {plan['price_per_1000']:g} for 1,000 requests"))
        failed = len(audit.failed)
        tiles.append(
            _tile("failed queries", f"{failed:,}", f"of {len(audit.asked):,}, {failed / len(audit.asked):.1%}")
        )
    if audit.seconds:
        at = np.quantile(audit.seconds, [0.5, 0.99])
        tiles.append(_tile("median time", clock(at[0]), f"99 % within {clock(at[1])}"))
    return tiles


def _tile(name: str, number: str, about: str) -> dict[str, str]:
    return {"name": name, "number": number, "about": about}


def clock(seconds: float) -> str:
    """Milliseconds below a second, else seconds; three digits."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _price(audit: AuditFolder) -> str:
    plan = audit.about.get("plan") or {}
    if not plan.get("price_per_1000"):
        return ""
    return f"{audit.spent * plan['price_per_1000'] / 1000:,.2f} {plan.get('currency') or ''}".strip()


def _cost(audit: AuditFolder) -> list[tuple[str, str]]:
    """What was paid for, in words and numbers."""
    plan = audit.about.get("plan") or {}
    found = [("requests sent", f"{audit.spent:,}"), ("of them retries", f"{audit.retries:,}")]
    if plan.get("budget") is not None:
        found.append(("budget", f"{plan['budget']:,}"))
        found.append(("left of it", f"{plan['budget'] - audit.spent:,}"))
    if _price(audit):
        found.append(("cost of the requests", _price(audit)))
    header = audit.header
    if header.get("stopping") and audit.noisy:
        fixed = header["n"] * len([row for row in audit.rows if "error" not in row])
        found.append(("noisy copies asked about", f"{len(audit.noisy):,}"))
        found.append((f"at a fixed n = {header['n']:,} they would be", f"{fixed:,}"))
    return found


def _stage_rows(audit: AuditFolder) -> list[dict[str, Any]]:
    """Queries, requests and what became of them, for each stage."""
    found = []
    waiting = [(stage_of(name), attempts) for name, attempts in (audit.kept.open if audit.kept else {}).items()]
    for stage in dict.fromkeys([*_ABOUT_STAGES, *(query.stage for query in audit.asked), *(s for s, _ in waiting)]):
        asked = [query for query in audit.asked if query.stage == stage]
        still_open = [attempts for there, attempts in waiting if there == stage]
        if asked or still_open:
            numbers = {
                "queries": len(asked) + len(still_open),
                "requests": sum(query.answer.attempts for query in asked) + sum(still_open),
                "answered": sum(query.ranked for query in asked),
                "failed": sum(not query.ranked and not query.lost for query in asked),
                "lost": sum(query.lost for query in asked),
                "open": len(still_open),
            }
            found.append({"stage": stage, "about": _ABOUT_STAGES.get(stage, ""), **numbers})
    return found


def _quantiles(seconds: Sequence[float]) -> list[tuple[str, str]]:
    if not seconds:
        return []
    shares = {"fastest": 0.0, "half within": 0.5, "90 % within": 0.9, "99 % within": 0.99, "slowest": 1.0}
    return [(name, clock(float(at))) for name, at in zip(shares, np.quantile(seconds, [*shares.values()]), strict=True)]


def _groups(audit: AuditFolder, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """The images by outcome: those that need a look come first."""
    entries: dict[Any, tuple[int | None, Mapping[str, Any]]] = {
        entry.get("id"): (i, entry) for i, entry in enumerate(audit.about.get("images") or ())
    }
    order = [words.OTHER, words.NOT, words.OPEN, words.NOTHING, words.KEEPS]
    rows = sorted(audit.rows, key=lambda row: order.index(words.outcome(row)))[:MOST_ROWS]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        index, entry = entries.get(row["id"], (None, {}))
        prefix = str(entry.get("pictures") or ("" if index is None else f"{index:03d}"))
        found.setdefault(words.outcome(row), []).append(_image(audit, row, thumbnails.of(prefix)))
    return [{"outcome": name, "id": name.replace(" ", "-"), "images": images} for name, images in found.items()]


def _image(audit: AuditFolder, row: Mapping[str, Any], pictures: Mapping[str, str]) -> dict[str, Any]:
    """One line of the table of images."""
    answer = next((query for query in audit.of(row["id"], CLEAN) if query.ranked), None)
    votes = sorted(
        ((int(k), _named(audit, row, c)) for c, k in row["votes"].items()), key=lambda vote: (-vote[0], vote[1])
    )
    trials, digits = row["trials"], DECIMALS[audit.header.get("norm", "l2")]
    shown = [{"label": label, "votes": k, "share": k / trials} for k, label in votes[:_TOP]]
    rest = sum(k for k, _ in votes[_TOP:])
    nobody = {"outside": row.get("outside", 0), "failures": row["failures"] - row.get("outside", 0)}
    return {
        "id": row["id"],
        "pictures": pictures,
        "own": answer.label if answer else None,
        "score": None if answer is None or answer.score is None else f"{answer.score:.3g}",
        "reference": None if row["label"] is None else _named(audit, row, row["label"]),
        "label": None if row["prediction"] < 0 else row.get("class") or _named(audit, row, row["prediction"]),
        "radius": None if row["prediction"] < 0 or not row["radius"] else floor_to(row["radius"], digits),
        "decisions": row.get("decisions", ()),
        "p_lower": None if row["p_lower"] is None or row["prediction"] < 0 else floor_to(row["p_lower"]),
        "votes": shown,
        "others": {"labels": len(votes) - len(shown), "votes": rest, "share": rest / trials if trials else 0.0},
        **nobody,
        "trials": trials,
        "unfinished": bool(row.get("unfinished")),
        "error": row.get("error"),
    }


def _named(audit: AuditFolder, row: Mapping[str, Any], number: int | str) -> str:
    """What the service calls a class."""
    known = row.get("classes") or {}
    vocabulary: Sequence[str] = audit.about.get("vocabulary") or ()
    if str(number) in known:
        return str(known[str(number)])
    return str(vocabulary[int(number)]) if 0 <= int(number) < len(vocabulary) else f"class {number}"


def _settings(audit: AuditFolder) -> list[tuple[str, str]]:
    """Everything that shaped the run, from ``audit.json`` and the run file's header."""
    about = audit.about
    keys = ("protocol", "format", "encoding", "size", "denoiser", "labels", "plan", "settings")
    both = identity({key: about[key] for key in keys if key in about}) | identity(audit.header)
    return [(key, public(_text(value))) for key, value in both.items() if value not in (None, "", [], {})]


def _text(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return ", ".join(map(_text, value))
    return exact(value) if isinstance(value, float) else str(value)
