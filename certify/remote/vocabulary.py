"""What a service calls things -> class numbers: by first appearance, or through a class map.

Nobody says beforehand which labels a service knows. Votes are counted over whatever comes back: every label is a class,
and certificates that hold for any number of classes hold for a number that grows. With a class map several labels may
mean one class, and an answer without any of them is an outcome of its own: a trial that is nobody's vote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from certify.errors import UserError
from certify.labels import read_rows
from certify.remote.types import Ranked
from certify.types import FAILED

OUTSIDE = -2
"""The outcome of an answer in which no label is in the class map; negative, so that it is no class."""


class Vocabulary:
    """Names of classes and their numbers.

    Args:
        names: of the classes that are known already, in the order of their numbers.
        class_map: from the service's labels to classes; None: every label is a class of its own.
    """

    def __init__(self, names: Iterable[str] = (), class_map: Mapping[str, str] | None = None) -> None:
        self.class_map = class_map
        self._numbers: dict[str, int] = {}
        for name in [*names, *(class_map or {}).values()]:
            self.number(name)

    @property
    def names(self) -> list[str]:
        """All classes so far, by number."""
        return list(self._numbers)

    def number(self, name: str) -> int:
        """The number of a class; a new one for a name that was not seen before."""
        return self._numbers.setdefault(name, len(self._numbers))

    def vote(self, ranked: Ranked) -> int:
        """The class that an answer votes for: its best label, or the best that is in the class map.

        Returns:
            A class number, ``OUTSIDE`` where the class map knows none of the labels, ``FAILED`` without labels.
        """
        if not ranked:
            return FAILED
        if self.class_map is None:
            return self.number(ranked[0].label)
        known = (self.class_map[one.label] for one in ranked if one.label in self.class_map)
        name = next(known, None)
        return OUTSIDE if name is None else self.number(name)


def read_class_map(path: str | Path) -> dict[str, str]:
    """A class map: JSON ``{"label": "class"}``, or lines ``label,class``.

    Raises:
        UserError: unreadable, or not of that form.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        return dict(read_rows(path, "--class-map"))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--class-map {path}: not readable as JSON ({error})") from None
    if not isinstance(found, dict) or not found or not all(isinstance(v, str | int) for v in found.values()):
        raise UserError(f'--class-map {path}: expected an object {{"label of the service": "class"}}')
    return {label: str(name) for label, name in found.items()}
