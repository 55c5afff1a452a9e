"""The report's verdict and warnings, as sentences."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass

from analysis.accuracy_bound import AccuracyBound, accuracy_bound
from analysis.report.audit_folder import AuditFolder
from certify.blackbox.client.credentials import public
from certify.blackbox.record import FINISHED, RUNNING, SPENT, STOPPED
from certify.runs.records import ImageRow
from certify.smoothing.norms import DECIMALS, IN_WORDS
from certify.smoothing.rounding import complement, exact, floor_to
from certify.types import NOT_CERTIFIABLE, UNDECIDED

KEEPS, OTHER, NOT, OPEN, NOTHING = "keeps its label", "another label", "not certifiable", "undecided", "no answer"
RIGHT, WRONG = "reference label", "other answer"
SOME_FAILURES, MANY_FAILURES = 0.01, 0.1
"""Shares of failed trials from which the report warns, and from which the warning is shown at the top."""


def outcome(row: ImageRow) -> str:
    """Return the outcome of an image of the run file, at the largest requested radius."""
    if row.error is not None:
        return NOTHING
    if row.radius is None:  # an accuracy statement has no radius per image
        return RIGHT if row.label is not None and row.estimation_votes.of(row.label) == row.trials else WRONG
    decided = [decision.outcome for decision in row.outcomes]
    if decided and decided[-1] in (NOT_CERTIFIABLE, UNDECIDED):
        return NOT if decided[-1] == NOT_CERTIFIABLE else OPEN
    if row.abstained:
        return OPEN
    return KEEPS if row.label is None or row.prediction == row.label else OTHER


def outcomes(audit: AuditFolder) -> dict[str, str]:
    """Describe each outcome, in the order of their colours."""
    label = "the service's label of the unmodified image" if _is_own(audit) else "the given label"
    if audit.header.without_radii:
        return {
            RIGHT: f"every noisy copy got {label}",
            WRONG: f"a noisy copy got another label than {label}, or none",
            NOTHING: "the unmodified image got no label, or the image cannot be read: it counts as wrong",
        }
    return {
        KEEPS: f"certified: the smoothed service returns {label}",
        OTHER: f"certified: the smoothed service returns another label than {label}",
        OPEN: "the votes do not decide it at this confidence; more queries may",
        NOT: f"no label has the share of trials that this radius requires{_against(audit)}, and more queries of this "
        "kind would not help; this does not mean that the image can be attacked",
        NOTHING: f"{'the unmodified image got no label' if _is_own(audit) else 'there is no label to certify'}, or the "
        "image cannot be read: nothing was certified",
    }


def _is_own(audit: AuditFolder) -> bool:
    """True if reference labels are the service's own answers."""
    return bool(audit.about.get("labels", "service") == "service")


def _against(audit: AuditFolder) -> str:
    """Count the failures of images that are not certifiable but might be without failures."""
    failed = sum(row.failures - (row.outside or 0) for row in audit.rows if outcome(row) == NOT)
    queries = "query as a vote" if failed == 1 else "queries as votes"
    return f", counting {failed:,} failed {queries} against" if failed else ""


@dataclass(frozen=True)
class Verdict:
    """The first lines of the report.

    Attributes:
        headline: one sentence with the numbers.
        counts: images of each outcome.
    """

    headline: str
    counts: Counter[str]


def verdict(audit: AuditFolder) -> Verdict | None:
    """Return the verdict; None if no image is finished."""
    if audit.run is None or not audit.rows:
        return None
    header, rows = audit.run.header, audit.rows
    counts = Counter(outcome(row) for row in rows)
    if header.without_radii:
        return Verdict(_together(accuracy_bound(audit.run)), counts)
    keeps = "keeps the service's own label" if _is_own(audit) else "returns the given label"
    if any(row.label is None for row in rows if row.error is None):
        keeps = "keeps one label"
    images = f"{len(rows):,} image{'s' * (len(rows) > 1)}" + " so far" * (len(rows) < audit.expected)
    parts = [
        f"Of {images}, the smoothed service {keeps} on {counts[KEEPS]:,} under every change of "
        f"{IN_WORDS[header.norm]} size below {_size(audit)}, at {complement(header.alpha, 100)} % "
        "confidence per image"
    ]
    be = {kind: "is" if count == 1 else "are" for kind, count in counts.items()}
    others = {
        OTHER: f"{be.get(OTHER)} certified with another label",
        OPEN: f"{be.get(OPEN)} undecided",
        NOT: f"cannot be certified{_against(audit)}",
        NOTHING: "gave nothing to certify",
    }
    parts += [f"{counts[kind]:,} {words}" for kind, words in others.items() if counts[kind]]
    return Verdict("; ".join(parts) + ".", counts)


def _together(bound: AccuracyBound) -> str:
    """Return the headline about all images together, with the first radius of the table."""
    result, norm = bound.result, IN_WORDS[bound.run.header.norm]
    what = "accuracy" if bound.labelled else "agreement with its own answers to the unmodified images"
    over = "the population of these images" if result.population else f"these {result.images:,} images"
    attacked = "".join(
        f", and {floor_to(bound.under_attack(r), 3)} if each image is changed by up to {exact(r)} in {norm} norm"
        for r in bound.radii()[1:2]
    )
    missing = f"; {bound.missing:,} images without a result count as wrong" if bound.missing else ""
    return (
        f"Answering from one noisy copy, the service has an expected {what} over {over} of at least "
        f"{floor_to(bound.lower, 3)}{attacked}, at {complement(result.alpha, 100)} % confidence: "
        f"{result.correct:,} of {result.images * result.draws:,} answers were right{missing}."
    )


def _size(audit: AuditFolder) -> str:
    """Return the requested radius, or describe those of the images."""
    if radii := audit.header.radii:
        return exact(radii[-1])
    kept = sorted(row.radius or 0.0 for row in audit.rows if outcome(row) == KEEPS)
    digits = DECIMALS[audit.header.norm]
    if not kept:
        return "an image-specific radius"
    return (
        f"an image-specific radius (median {floor_to(statistics.median_low(kept), digits)}, largest "
        f"{floor_to(kept[-1], digits)})"
    )


@dataclass(frozen=True)
class Notice:
    """A reason for caution.

    Attributes:
        loud: True if it can invalidate the certificates; it is then shown above the verdict.
        title: a few words.
        text: one or two sentences.
    """

    loud: bool
    title: str
    text: str


def warnings(audit: AuditFolder) -> list[Notice]:
    """Return all warnings, those that can invalidate the certificates first."""
    function = [*_determinism(audit), *_drift(audit)] if not audit.header.without_radii else []
    every = [*_unfinished(audit), *function, *_failures(audit)]
    every += [Notice(False, "Incomplete records", fault) for fault in audit.faults]
    return sorted(every, key=lambda notice: not notice.loud)


def _unfinished(audit: AuditFolder) -> list[Notice]:
    done, status = len(audit.rows), str(audit.about.get("status") or "")
    if audit.expected and done == audit.expected and status in ("", FINISHED):
        return []
    known = {
        RUNNING: "was stopped or is still running",
        STOPPED: "was stopped",
        SPENT: "ended when its budget was spent",
    }
    how = known.get(status, f"ended with status {status}" if status else "was stopped")
    reason = f" ({public(str(audit.about['reason']))})" if audit.about.get("reason") else ""
    count = f"{done:,} of {audit.expected:,} images are done" if audit.expected else f"{done:,} images are done"
    biased = ""
    if done and audit.header.stopping is not None and done < audit.expected and not audit.header.in_order:
        biased = " Images that are decided with few queries come first, so shares among them would flatter the service."
    text = f"It {how}{reason}; {count}.{biased} Run the same command again to resume."
    return [Notice(True, "The audit is not finished", text)]


def _determinism(audit: AuditFolder) -> list[Notice]:
    repeated = [probe for probe in audit.probes if sum(probe.labels.values()) > 1]
    if not repeated:
        why = "No image sent repeatedly was answered repeatedly" if audit.probes else "No image was sent repeatedly"
        return [Notice(False, "Determinism is unknown", f"{why}; a certificate presupposes a fixed function.")]
    changed = [probe for probe in repeated if len(probe.labels) > 1]
    if changed:
        text = (
            f"{len(changed):,} of {len(repeated):,} images that were sent repeatedly, byte for byte the same, got "
            "different labels. A certificate presupposes a fixed function: those below hold at most if the service "
            "draws its answers independently each time and from the same distribution."
        )
        return [Notice(True, "The service is not deterministic", text)]
    if any(probe.spread for probe in repeated):
        text = (
            "Repeated images got the same label with different scores. Only labels are votes, but near a tie the label "
            "may change from one query to the next."
        )
        return [Notice(False, "Scores are not deterministic", text)]
    return []


def _drift(audit: AuditFolder) -> list[Notice]:
    compared = [drift for drift in audit.drifts if drift.compared]
    changed = [drift for drift in compared if drift.changed]
    if changed:
        text = (
            f"{len(changed):,} of {len(compared):,} images got another label at the end than at the start. Votes from "
            "before and after a change are about different functions, and the certificates may be void: audit again."
        )
        return [Notice(True, "The service changed during the audit", text)]
    if audit.rows and not compared:
        return [Notice(False, "Drift was not checked", "No image was sent again at the end.")]
    return []


def _failures(audit: AuditFolder) -> list[Notice]:
    trials, failures = sum(row.trials for row in audit.rows), sum(row.failures for row in audit.rows)
    if audit.noisy:
        trials, failures = len(audit.noisy), sum(query.label is None for query in audit.noisy)
    if not failures or failures < SOME_FAILURES * trials:
        return []
    if failures == trials:
        text = f"None of {trials:,} noisy images was answered with a label. There is nothing to certify."
        return [Notice(True, "Every query failed", text)]
    effect = "a trial without a vote, so the certificates hold, but radii are smaller than without failures"
    if audit.header.without_radii:
        effect = "counted as wrong, so the bound holds, but it is lower than without failures"
    count = f"{failures:,} of {trials:,} noisy images ({failures / trials:.1%})"
    text = f"{count} got no label that counts. Each is {effect}."
    many = failures >= MANY_FAILURES * trials
    return [Notice(many, "Many queries failed" if many else "Some queries failed", text)]
