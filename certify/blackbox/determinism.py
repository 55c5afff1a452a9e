"""Check that a service is a fixed function, which a certificate requires: compare its answers about the same picture.

The warnings of the command, ``audit.json`` and the report all use these functions of the answers by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from certify.blackbox.answer_rows import clean_answer
from certify.blackbox.label_index import class_of
from certify.blackbox.query_votes import DRIFT, PROBE, parts_of
from certify.blackbox.types import Answer
from certify.errors import ContractError

_ROUNDING = 0.01  # of the larger score: 16-bit arithmetic may break a tie by that much

NO_LABEL = "no label of the class map"
"""The class of an answer whose labels are all outside the class map."""


@dataclass(frozen=True)
class Probed:
    """One image of the determinism probe, which was queried repeatedly at the start.

    Attributes:
        id: of the image.
        labels: number of answers for each class, the most frequent first; without answers that have no label.
        failures: repetitions without a label.
        spread: largest minus smallest score of the class; None unless all answers have the same class and a score.
        tie: True if the classes of the answers have equal scores, up to rounding, in every answer.
    """

    id: str
    labels: dict[str, int]
    failures: int
    spread: float | None
    tie: bool = False


@dataclass(frozen=True)
class Drifted:
    """One image of the drift check, which was queried at the start and at the end.

    Attributes:
        id: of the image.
        before: class of the first answer; None without a label.
        after: class of the latest answer at the end; None without a label.
    """

    id: str
    before: str | None
    after: str | None

    @property
    def compared(self) -> bool:
        """True if there is a label at both times."""
        return self.before is not None and self.after is not None

    @property
    def changed(self) -> bool:
        """True if the two labels differ."""
        return self.compared and self.before != self.after


def fixed(probed: Sequence[Probed], drifted: Sequence[Drifted]) -> bool | None:
    """Return True if the service answered like a fixed function; None if no picture was answered twice."""
    labelled = [probe for probe in probed if sum(probe.labels.values()) > 1]
    compared = [one for one in drifted if one.compared]
    if not labelled and not compared:
        return None
    return all(len(probe.labels) == 1 for probe in labelled) and not any(one.changed for one in compared)


def probes(answers: Mapping[str, Answer], class_map: Mapping[str, str] | None = None) -> list[Probed]:
    """Return the outcome of the determinism probe: the clean answer of each probed image against its repetitions.

    Args:
        answers: by name, in the order of their first requests.
        class_map: from labels to classes, or None.
    """
    outcomes = []
    for image, again in _of_stage(answers, PROBE).items():
        clean = clean_answer(answers, image)
        answered = [a for a in (clean, *again.values()) if a is not None and a.ranked]
        labels = Counter(class_of(a.ranked, class_map) or NO_LABEL for a in answered)
        scores = [a.ranked[0].score for a in answered]
        known = [score for score in scores if score is not None]
        spread = max(known) - min(known) if known and len(known) == len(scores) and len(labels) == 1 else None
        tie = len(labels) > 1 and all(_tied(answer, labels, class_map) for answer in answered)
        failures = sum(not a.ranked for a in again.values())
        outcomes.append(Probed(image, dict(labels.most_common()), failures, spread, tie))
    return outcomes


def _tied(answer: Answer, classes: Collection[str], class_map: Mapping[str, str] | None) -> bool:
    """True if an answer gives these classes scores that are equal up to rounding."""
    scores = [one.score for one in answer.ranked if class_of((one,), class_map) in classes]
    known = [score for score in scores if score is not None]
    return len(known) == len(scores) >= len(classes) and max(known) - min(known) <= _ROUNDING * max(map(abs, known))


def require_deterministic(probed: Sequence[Probed]) -> None:
    """Raise an error if repeated queries returned different labels; differences at a tie do not count.

    Raises:
        ContractError: names the image and the labels.
    """
    for probe in probed:
        if len(probe.labels) > 1 and not probe.tie:
            labels = ", ".join(f"{label} {count} times" for label, count in probe.labels.items())
            raise ContractError(
                f"the service answers differently when queried again about image {probe.id} ({labels}): a certificate "
                "needs a fixed function of one image; nothing is certified, every answer is kept in the ledger"
            )


def drifts(answers: Mapping[str, Answer], class_map: Mapping[str, str] | None = None) -> list[Drifted]:
    """Return the outcome of the drift check: the latest answers about clean images against their first."""
    outcomes = []
    for image, later in _of_stage(answers, DRIFT).items():
        clean, last = clean_answer(answers, image), later[max(later)]
        before, after = (
            class_of(a.ranked, class_map) or NO_LABEL if a is not None and a.ranked else None for a in (clean, last)
        )
        outcomes.append(Drifted(image, before, after))
    return outcomes


def _of_stage(answers: Mapping[str, Answer], stage: str) -> dict[str, dict[int, Answer]]:
    """Return the answers of a stage by image and number."""
    by_image: dict[str, dict[int, Answer]] = {}
    for name, answer in answers.items():
        image, there, number = parts_of(name)
        if there == stage and number.isdecimal():
            by_image.setdefault(image, {})[int(number)] = answer
    return by_image
