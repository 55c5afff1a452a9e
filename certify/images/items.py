"""What every source of images is: a list of items with stable ids and class names, each read when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from certify.errors import ImageError

_SHOWN = 5  # reasons that are named


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        id: stable name, unique in the source.
        read: gives the file's bytes, or an array (H, W), (H, W, C) or (C, H, W).
        name: the class as the data names it, or None.
        checksum: of the content, where the source knows one; else :meth:`stamp` hashes what ``read`` gives.
    """

    id: str
    read: Callable[[], Any]
    name: str | None = None
    checksum: str = ""

    def stamp(self) -> str:
        """What changes when the content changes: a resumed run must find the same."""
        if self.checksum:
            return self.checksum
        try:
            raw = self.read()
        except ImageError as error:
            return str(error)
        content = raw if isinstance(raw, bytes) else repr(np.shape(raw)).encode() + np.ascontiguousarray(raw).tobytes()
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Source:
    """A list of items.

    Attributes:
        name: what it is called in the record.
        items: in a stable order.
        classes: the order of its classes, where it has one of its own.
        names: of the classes of its items, sorted; None where items have no class.
        wrapped: all items lie in one folder of an archive, which may be a class or only a wrapper.
        strays: why class folders cannot be used: images lie beside them. Empty when nothing is wrong.
        unread: what the source holds besides its items, as phrases such as ``"3 .heic files (a.heic, ...)"``.
        image_shape: of every image, where they are arrays of one shape.
    """

    name: str
    items: Sequence[Item]
    classes: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None
    wrapped: bool = False
    strays: str = ""
    unread: tuple[str, ...] = ()
    image_shape: tuple[int, ...] | None = None

    def by_id(self, ids: Sequence[str]) -> dict[str, Item]:
        """The items of these ids, those that exist."""
        wanted = set(ids)
        return {item.id: item for item in self.items if item.id in wanted}

    def ids_with_comma(self) -> list[str]:
        """Ids that have to be quoted in a list."""
        return [item.id for item in self.items if "," in item.id]


@dataclass
class Unread:
    """What a source holds but does not give, by reason."""

    reasons: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more; ``reason`` is a noun such as ``"dangling link{s}"``."""
        self.reasons.setdefault(reason, []).append(name)

    def summary(self) -> tuple[str, ...]:
        """One phrase for each reason: how many and the first, as in ``"3 .heic files (a.heic, ...)"``."""
        by_count = sorted(self.reasons.items(), key=lambda reason: -len(reason[1]))
        phrases = [
            f"{len(names):,} {reason.replace('{s}', 's' * (len(names) > 1))} ({names[0]}{', ...' * (len(names) > 1)})"
            for reason, names in by_count[:_SHOWN]
        ]
        rest = sum(len(names) for _, names in by_count[_SHOWN:])
        return (*phrases, f"{rest:,} more") if rest else tuple(phrases)
