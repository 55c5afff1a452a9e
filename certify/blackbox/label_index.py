"""What a service calls things -> class numbers: by first appearance, or through a class map.

Nobody says beforehand which labels a service knows. Votes are counted over whatever comes back: every label is a class,
and certificates that hold for any number of classes hold for a number that grows. With a class map several labels may
mean one class, and an answer without any of them is an outcome of its own: a trial that is nobody's vote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from certify.blackbox.types import Ranked
from certify.errors import UserError
from certify.models import labels
from certify.types import FAILED

OUTSIDE = -2
"""The outcome of an answer in which no label is in the class map; negative, so that it is no class."""


def class_of(ranked: Ranked, class_map: Mapping[str, str] | None = None) -> str | None:
    """The class that an answer votes for: its best label, or the best that is in the class map; None: nobody's vote."""
    names = (one.label if class_map is None else class_map.get(one.label) for one in ranked)
    return next((name for name in names if name is not None), None)


class Vocabulary:
    """Names of classes and their numbers.

    Args:
        class_map: from the service's labels to classes; None: every label is a class of its own.
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
        """The number of a class; a new one for a name that was not seen before."""
        return self._numbers.setdefault(name, len(self._numbers))

    def vote(self, ranked: Ranked) -> int:
        """The number of :func:`class_of`: ``OUTSIDE`` where the class map knows no label, ``FAILED`` without labels."""
        name = class_of(ranked, self.class_map)
        if name is None:
            return OUTSIDE if ranked else FAILED
        return self.number(name)


def read_class_map(path: str | Path) -> dict[str, str]:
    """A class map: JSON ``{"label": "class"}``, or lines ``label,class``.

    Raises:
        UserError: unreadable, or not of that form.
    """
    found = labels.read_class_map(path)
    if not found or not all(isinstance(v, str | int) for v in found.values()):
        raise UserError(f'--class-map {path}: expected an object {{"label of the service": "class"}}')
    return {label: str(name) for label, name in found.items()}
