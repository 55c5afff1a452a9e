"""The answers of a service by query name, and the classes that they vote for.

The labels of a service are not known in advance. Votes are counted over the labels it returns: every label is a class,
and a certificate that holds for any number of classes stays valid as the number grows. With a class map several labels
may belong to one class, and an answer without any of them is a separate outcome: a trial that votes for no class. So is
the abstention of a service that is itself a smoothed classifier.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from certify.blackbox.types import Answer, Ranked
from certify.errors import UserError
from certify.models import labels
from certify.types import FAILED

CLEAN, PROBE, RESUMED, DRIFT, SELECTION, ESTIMATION = "clean", "probe", "resumed", "drift", "selection", "estimation"
"""Stages: the clean image, its repetitions (at the start, on resuming, at the end), and two of noisy copies."""

OUTSIDE = -2
"""Outcome of an abstention, or of an answer without a label in the class map; negative, hence not a class number."""

ABSTENTION = "(abstention)"
"""Label that a protocol returns if the service abstains; votes for no class."""


def query_name(image: str, stage: str, number: int | str) -> str:
    """Return the name of a query, unique within an audit."""
    return f"{image} | {stage} | {number}"


def parts_of(name: str) -> tuple[str, str, str]:
    """Split a query's name into image, stage and number, each empty if missing."""
    image, stage, number = [*name.rsplit(" | ", 2), "", ""][:3]
    return image, stage, number


def stage_of(name: str) -> str:
    """Return the stage of a query's name."""
    return parts_of(name)[1]


def numbered(answers: Mapping[str, Answer], image: str, stage: str) -> Iterator[Answer]:
    """Yield the answers of one image and stage, from number 0 up to the first that is missing."""
    for number in itertools.count():
        answer = answers.get(query_name(image, stage, number))
        if answer is None:
            return
        yield answer


def clean_answer(answers: Mapping[str, Answer], image: str) -> Answer | None:
    """Return the service's answer to the clean image: the first with a label, else the last; None without any.

    It is not a vote, so a failed one may be queried again when an audit is resumed.
    """
    last = None
    for last in numbered(answers, image, CLEAN):
        if last.ranked:
            break
    return last


def class_of(ranked: Ranked, class_map: Mapping[str, str] | None = None) -> str | None:
    """Return the class that an answer votes for: its best label, or the best in the class map; None for no vote."""
    given = (one.label for one in ranked if one.label != ABSTENTION)
    names = (label if class_map is None else class_map.get(label) for label in given)
    return next((name for name in names if name is not None), None)


class LabelIndex:
    """Number the classes of a service in order of first appearance.

    Args:
        class_map: maps the service's labels to classes; None if every label is a class.
    """

    def __init__(self, class_map: Mapping[str, str] | None = None) -> None:
        self.class_map = class_map
        self._numbers: dict[str, int] = {}
        for name in (class_map or {}).values():
            self.number(name)

    @property
    def names(self) -> list[str]:
        """All classes so far, by number."""
        return list(self._numbers)

    def number(self, name: str) -> int:
        """Return the number of a class; a new name gets the next number."""
        return self._numbers.setdefault(name, len(self._numbers))

    def vote(self, ranked: Ranked) -> int:
        """Return the number of :func:`class_of`; ``OUTSIDE`` if it is None, ``FAILED`` for an answer without labels."""
        name = class_of(ranked, self.class_map)
        if name is None:
            return OUTSIDE if ranked else FAILED
        return self.number(name)


def read_class_map(path: str | Path) -> dict[str, str]:
    """Read a class map: JSON ``{"label": "class"}``, or lines ``label,class``.

    Raises:
        UserError: unreadable, or of another form.
    """
    class_map = labels.read_class_map(path)
    if not class_map or not all(isinstance(v, str | int) for v in class_map.values()):
        raise UserError(f'class map {path}: expected an object {{"label of the service": "class"}}')
    return {label: str(name) for label, name in class_map.items()}
