"""Check that a service is a fixed function, which a certificate requires, by comparing repeated answers.

Warnings, ``audit.json`` and the report all use these functions; ``answers`` are keyed by query name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from certify.blackbox.answers import DRIFT, PROBE, class_of, clean_answer, parts_of
from certify.blackbox.record import Drifted, Probed
from certify.blackbox.types import Answer
from certify.errors import ContractError, UserError

_ROUNDING = 0.01  # relative to the larger score: 16-bit arithmetic can break a tie by that much

NO_CLASS = "no class"
"""Class of an abstention, or of an answer with no label in the class map."""


def fixed(probed: Sequence[Probed], drifted: Sequence[Drifted]) -> bool | None:
    """Return True if all repeated answers agree; None if no picture was answered twice."""
    labelled = [probe for probe in probed if sum(probe.labels.values()) > 1]
    compared = [one for one in drifted if one.compared]
    if not labelled and not compared:
        return None
    return all(len(probe.labels) == 1 for probe in labelled) and not any(one.changed for one in compared)


def probes(answers: Mapping[str, Answer], class_map: Mapping[str, str] | None = None) -> list[Probed]:
    """Compare the clean answer of each probed image with its repetitions.

    Args:
        answers: answers by query name.
        class_map: maps labels to classes, or None.
    """
    outcomes = []
    for image, again in _of_stage(answers, PROBE).items():
        clean = clean_answer(answers, image)
        answered = [a for a in (clean, *again.values()) if a is not None and a.ranked]
        labels = Counter(filter(None, (_vote(a, class_map) for a in answered)))
        scores = [a.ranked[0].score for a in answered]
        known = [score for score in scores if score is not None]
        spread = max(known) - min(known) if known and len(known) == len(scores) and len(labels) == 1 else None
        tie = len(labels) > 1 and all(_tied(answer, labels, class_map) for answer in answered)
        failures = sum(not a.ranked for a in again.values())
        outcomes.append(Probed(id=image, labels=dict(labels.most_common()), failures=failures, spread=spread, tie=tie))
    return outcomes


def _tied(answer: Answer, classes: Collection[str], class_map: Mapping[str, str] | None) -> bool:
    """True if an answer gives these classes scores that are equal up to rounding."""
    scores = [one.score for one in answer.ranked if class_of((one,), class_map) in classes]
    known = [score for score in scores if score is not None]
    return len(known) == len(scores) >= len(classes) and max(known) - min(known) <= _ROUNDING * max(map(abs, known))


def require_deterministic(probed: Sequence[Probed]) -> None:
    """Check that repeated queries returned the same label; differences at a tie do not count.

    Raises:
        ContractError: labels differ.
    """
    for probe in probed:
        if len(probe.labels) > 1 and not probe.tie:
            raise ContractError(
                f"the service returned different labels for image {probe.id} when queried again ({_counted(probe)}): a "
                "certificate needs a fixed function of one image; nothing is certified, every answer is kept in the "
                "ledger"
            )


def probe_warnings(probed: Sequence[Probed]) -> Iterator[str]:
    """Yield a warning for each image with evidence that the service is not deterministic."""
    for probe in probed:
        if len(probe.labels) > 1:
            yield (
                f"NON-DETERMINISTIC: repeated queries of image {probe.id} returned different labels: {_counted(probe)}"
                ". Certificates presuppose a fixed function; they do not hold for this service"
            )
        elif probe.spread:
            yield f"the scores of one image vary by {probe.spread:.3g} between repeated queries; its label does not"


def drift_warnings(drifted: Sequence[Drifted]) -> Iterator[str]:
    """Yield a warning if the service changed during the audit."""
    compared = [one for one in drifted if one.compared]
    changed = [one.id for one in compared if one.changed]
    if changed:
        yield (
            f"DRIFT: at the end the service returned other labels for {len(changed)} of {len(compared)} clean "
            f"images ({', '.join(changed[:3])}); the certificates do not hold for any single function"
        )


def _counted(probe: Probed) -> str:
    return ", ".join(f"{label} {count} times" for label, count in probe.labels.items())


class OtherFunction(UserError):
    """Raised if a Python function is not the one with which the audit began."""


def require_same_function(before: Answer, now: Answer, image: str, class_map: Mapping[str, str] | None) -> None:
    """Check that a function still gives the recorded answer for a clean image.

    Args:
        before: the recorded answer, with a label.
        now: the answer of the function with which the audit is resumed.
        image: id of the image.
        class_map: maps labels to classes, or None.

    Raises:
        OtherFunction: another label, another score, or no answer.
    """
    then, here = _vote(before, class_map), _vote(now, class_map)
    scores = [answer.ranked[0].score for answer in (before, now) if answer.ranked]
    if then == here and len(scores) == 2:
        a, b = scores
        if a is None or b is None or abs(a - b) <= _ROUNDING * max(abs(a), abs(b)):
            return
        then, here = f"{then} with score {a:.4g}", f"{here} with {b:.4g}"
    raise OtherFunction(
        f"this is not the function that the audit began with: for image {image} it returns {here or now.failure}, the "
        f"ledger holds {then}; pass the earlier function to resume, or choose another folder"
    )


def _vote(answer: Answer, class_map: Mapping[str, str] | None) -> str | None:
    """Return the class of an answer, ``NO_CLASS`` if it has none, or None for a failure."""
    return (class_of(answer.ranked, class_map) or NO_CLASS) if answer.ranked else None


def drifts(answers: Mapping[str, Answer], class_map: Mapping[str, str] | None = None) -> list[Drifted]:
    """Compare the latest answers for clean images with the first."""
    outcomes = []
    for image, later in _of_stage(answers, DRIFT).items():
        clean, last = clean_answer(answers, image), list(later.values())[-1]
        before, after = (None if a is None else _vote(a, class_map) for a in (clean, last))
        outcomes.append(Drifted(id=image, before=before, after=after))
    return outcomes


def _of_stage(answers: Mapping[str, Answer], stage: str) -> dict[str, dict[int, Answer]]:
    """Return the answers of a stage by image and number, the numbers of an image in order."""
    by_image: dict[str, dict[int, Answer]] = {}
    for name, answer in answers.items():
        image, there, number = parts_of(name)
        if there == stage and number.isdecimal():
            by_image.setdefault(image, {})[int(number)] = answer
    return {image: dict(sorted(numbered.items())) for image, numbered in by_image.items()}
