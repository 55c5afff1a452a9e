"""What an audit found, in plain words: the verdict, what it means, what stands against it, how it came about."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from analysis.report.audit_folder import AuditFolder
from certify.blackbox.client.credentials import public
from certify.blackbox.results import FINISHED, RUNNING, SPENT, STOPPED
from certify.smoothing.norms import DECIMALS, IN_WORDS
from certify.smoothing.rounding import complement, exact, floor_to, times
from certify.types import NOT_CERTIFIABLE, UNDECIDED

KEEPS, OTHER, NOT, OPEN, NOTHING = "keeps its label", "another label", "not certifiable", "undecided", "no answer"
SOME_FAILURES, MANY_FAILURES = 0.01, 0.1
"""Shares of failed trials that are worth a warning, and a loud one."""


def outcome(row: dict[str, Any]) -> str:
    """Which outcome a line of the run file is, at the largest radius that was asked for."""
    if "error" in row:
        return NOTHING
    decided = [decision["outcome"] for decision in row.get("decisions", ())]
    if decided and decided[-1] in (NOT_CERTIFIABLE, UNDECIDED):
        return NOT if decided[-1] == NOT_CERTIFIABLE else OPEN
    if row["prediction"] < 0:
        return OPEN
    return KEEPS if row["label"] is None or row["prediction"] == row["label"] else OTHER


def outcomes(audit: AuditFolder) -> dict[str, str]:
    """What each outcome means, in the order of their colours."""
    own = _is_own(audit)
    label = "label that the service gives the image itself" if own else "label that was given"
    another = "than the one of the image itself" if own else "than the given one"
    without = "for the image itself" if own else "to certify"
    return {
        KEEPS: f"certified: the smoothed service gives the {label}",
        OTHER: f"certified: the smoothed service gives another label {another}",
        OPEN: "the votes do not settle it at this confidence; more queries may",
        NOT: f"no label has the share of trials that this radius needs{_against(audit)}, and more queries of this kind "
        "would not help; that does not make the image attackable",
        NOTHING: f"without a label {without}, or unreadable: nothing was certified",
    }


def _is_own(audit: AuditFolder) -> bool:
    """Whether reference labels are the service's own answers."""
    return bool(audit.about.get("labels", "service") == "service")


def _against(audit: AuditFolder) -> str:
    """How many failures speak against the images that are not certifiable: without them, they might be."""
    rows = [row for row in audit.rows if outcome(row) == NOT]
    failed = sum(row["failures"] - row.get("outside", 0) for row in rows)
    queries = "query as a vote" if failed == 1 else "queries as votes"
    return f", counting {failed:,} failed {queries} against" if failed else ""


@dataclass(frozen=True)
class Verdict:
    """The first lines of the report.

    Attributes:
        headline: one sentence with the numbers.
        means: what that says.
        means_not: what it does not say.
        scale: how large a change is meant.
        counts: images of each outcome.
    """

    headline: str
    means: str
    means_not: str
    scale: str
    counts: Counter[str]


def verdict(audit: AuditFolder) -> Verdict | None:
    """The audit in plain words; None where no image is finished."""
    if audit.run is None or not audit.rows:
        return None
    header, rows = audit.run.header, audit.rows
    counts = Counter(outcome(row) for row in rows)
    norm, confidence = IN_WORDS[header.get("norm", "l2")], f"{complement(header['alpha'], 100)} %"
    own = "keeps the service's own label" if _is_own(audit) else "gives the given label"
    if any(row["label"] is None for row in rows if "error" not in row):
        own = "keeps one label"
    radii = (header.get("stopping") or {}).get("radii") or ()
    if radii:
        under = f"under every change of {norm} size below {exact(radii[-1])}"
    else:
        kept = sorted(row["radius"] for row in rows if outcome(row) == KEEPS)
        digits = DECIMALS[header.get("norm", "l2")]
        under = f"under every change of {norm} size below a radius of their own"
        if kept:
            median, largest = (floor_to(r, digits) for r in (statistics.median_low(kept), kept[-1]))
            under += f" (median {median}, largest {largest})"
    others = {
        OTHER: "are certified with another label",
        OPEN: "are undecided",
        NOT: f"cannot be certified{_against(audit)}",
        NOTHING: "gave nothing to certify",
    }
    rest = [
        f"{counts[key]:,} {words if counts[key] != 1 else _one(words)}" for key, words in others.items() if counts[key]
    ]
    many = f"Of {len(rows):,} images" if len(rows) > 1 else "Of 1 image"
    many += " so far" if len(rows) < audit.owed else ""
    headline = f"{many}, the smoothed service {own} on {counts[KEEPS]:,} {under}, at {confidence} confidence an image"
    return Verdict("; ".join([headline, *rest]) + ".", _means(audit), _MEANS_NOT, _scale(audit), counts)


def _one(words: str) -> str:
    return words.replace("are ", "is ", 1)


def denoiser_of(audit: AuditFolder) -> str:
    """The denoiser before the service by name, also where it was chosen automatically; empty without one."""
    asked = str(audit.about.get("denoiser") or audit.header.get("denoiser") or "none")
    steps = audit.header.get("pipeline") or ()
    found = next((str(step.get("name", asked)) for step in steps if step.get("step") == "denoiser"), asked)
    return "" if asked == "none" else found


def system(audit: AuditFolder) -> str:
    """What the certificates are about."""
    denoiser = denoiser_of(audit)
    between = (
        f"the denoiser {denoiser} cleans each copy, the service names it" if denoiser else "the service names each"
    )
    return f"noise is added to copies of the image, {between}, and the most frequent label wins"


def _means(audit: AuditFolder) -> str:
    alpha, total = audit.header["alpha"], len(audit.rows)
    return (
        "No change of the image below that size, whoever chooses it, alters what the smoothed service answers "
        f"({system(audit)}); each such statement is wrong with probability at most {exact(alpha)}, one or more of "
        f"the {total:,} with at most {exact(min(1.0, times(alpha, total)))}."
    )


_MEANS_NOT = (
    "It says nothing about the service asked once, without noise and vote; about larger changes, other images or other "
    "kinds of change, such as rotations; about the service after its makers change it; or about whether its labels "
    "are true."
)


def _scale(audit: AuditFolder) -> str:
    """The largest radius, as changes that a reader can imagine; empty where there is none."""
    values = next((row["values"] for row in audit.rows if row.get("values")), None)
    radius = max(row["radius"] or 0.0 for row in audit.rows)
    if not values or not radius or audit.header.get("norm", "l2") != "l2":
        return ""
    return (
        f"For scale: a change of l2 size {floor_to(radius)} may move one value of the image by "
        f"{floor_to(100 * radius, 0)}% of its range, or all {values:,} values by "
        f"{floor_to(255 * radius / math.sqrt(values), 2)} of 255 steps each."
    )


@dataclass(frozen=True)
class Warned:
    """Something that a reader must know first.

    Attributes:
        loud: whether it can void the certificates.
        title: in a few words.
        text: one or two sentences.
    """

    loud: bool
    title: str
    text: str


def warnings(audit: AuditFolder) -> list[Warned]:
    """What stands against the verdict, what can void it first."""
    found = [*_unfinished(audit), *_determinism(audit), *_drift(audit), *_failures(audit)]
    found += [Warned(False, "Incomplete records", fault) for fault in audit.faults]
    return sorted(found, key=lambda warned: not warned.loud)


def _unfinished(audit: AuditFolder) -> list[Warned]:
    done, status = len(audit.rows), str(audit.about.get("status") or "")
    reason = f" ({public(str(audit.about['reason']))})" if audit.about.get("reason") else ""
    if audit.owed and done == audit.owed and status in ("", FINISHED):
        return []
    known = {
        RUNNING: "was stopped, or is running still",
        STOPPED: "was stopped",
        SPENT: "ended when its budget was spent",
    }
    how = known.get(status, f"ended with: {status}" if status else "was stopped")
    owed = f"{done:,} of {audit.owed:,} images are done" if audit.owed else f"{done:,} images are done"
    easy = ""
    if done and audit.header.get("stopping") and done < audit.owed and not audit.header.get("in_order"):
        easy = " Images that are settled soon come first, so that shares of these would flatter the service."
    return [Warned(True, "The audit is not finished", f"It {how}{reason}; {owed}.{easy} The same command goes on.")]


def _determinism(audit: AuditFolder) -> list[Warned]:
    probed = audit.probes
    answered = [p for p in probed if sum(p.labels.values()) > 1]
    if not answered:
        why = "No image was sent twice" if not probed else "No image sent twice was answered twice"
        return [Warned(False, "Not known to be deterministic", f"{why}: a certificate presupposes a fixed function.")]
    changed = [p for p in answered if len(p.labels) > 1]
    if changed:
        text = (
            f"{len(changed):,} of {len(answered):,} images that were sent repeatedly, byte for byte the same, got "
            "different labels. A certificate presupposes a fixed function: those below hold at most if the service "
            "draws its answers independently each time and in the same way."
        )
        return [Warned(True, "The service is not deterministic", text)]
    if any(p.spread for p in answered):
        text = (
            "Repeated images got the same label with different scores. Labels alone are votes, but a label near a "
            "tie may change from one time to the next."
        )
        return [Warned(False, "Scores are not deterministic", text)]
    return []


def _drift(audit: AuditFolder) -> list[Warned]:
    compared = audit.drifts
    both = [one for one in compared if one.compared]
    changed = [one for one in both if one.changed]
    if changed:
        text = (
            f"{len(changed):,} of {len(both):,} images got another label at the end than at the start. Votes from "
            "before and after a change are about different functions, and the certificates may be void: audit again."
        )
        return [Warned(True, "The service changed during the audit", text)]
    if audit.rows and not both:
        return [Warned(False, "Drift was not checked", "No image was asked about again at the end.")]
    return []


def _failures(audit: AuditFolder) -> list[Warned]:
    trials = sum(row["trials"] for row in audit.rows)
    failures = sum(row["failures"] for row in audit.rows)
    failed = [query for query in audit.noisy if query.label is None]
    if audit.noisy:
        trials, failures = len(audit.noisy), len(failed)
    if not failures or failures < SOME_FAILURES * trials:
        return []
    if failures == trials:
        text = f"None of {trials:,} noisy images was answered with a label. There is nothing to certify."
        return [Warned(True, "Every query failed", text)]
    text = (
        f"{failures:,} of {trials:,} noisy images ({failures / trials:.1%}) got no label that counts. Each is a vote "
        "for nobody, so the certificates hold, but radii are smaller than they would be."
    )
    many = failures >= MANY_FAILURES * trials
    return [Warned(many, "Many queries failed" if many else "Some queries failed", text)]
