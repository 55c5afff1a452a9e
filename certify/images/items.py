"""Sources of images: lists of items with stable ids and class names, read on access."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from certify.errors import ImageError

_SHOWN = 5  # reasons listed by name


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        id: stable name, unique in the source.
        read: returns the file's bytes, or an array (H, W), (H, W, C) or (C, H, W).
        name: class name in the data, or None.
        checksum: checksum of the content if the source has one; otherwise :meth:`stamp` hashes what ``read`` returns.
    """

    id: str
    read: Callable[[], Any]
    name: str | None = None
    checksum: str = ""

    def stamp(self) -> str:
        """Return a checksum of the content; a resumed run must have the same."""
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
        name: source name in the run file.
        items: in a stable order.
        classes: all class names in index order, if the source defines an order.
        names: class names that occur, sorted; None if items have no class.
        wrapped: whether all items lie in one folder of an archive, which may be a class or only a wrapper.
        strays: error message if images lie outside the class folders; else empty.
        unread: content not read, as phrases such as ``"3 .heic files (a.heic, ...)"``.
        image_shape: shape of every image, if they are arrays of one shape.
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
        """Return the items with these ids; unknown ids are left out."""
        chosen = set(ids)
        return {item.id: item for item in self.items if item.id in chosen}

    def ids_with_comma(self) -> list[str]:
        """Return the ids that need quoting in a comma-separated list."""
        return [item.id for item in self.items if "," in item.id]


@dataclass
class Unread:
    """Content of a source that is not read, by reason."""

    reasons: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more file; ``reason`` is a noun such as ``"dangling link{s}"``."""
        self.reasons.setdefault(reason, []).append(name)

    def summary(self) -> tuple[str, ...]:
        """Return one phrase per reason, with the count and the first name: ``"3 .heic files (a.heic, ...)"``."""
        by_count = sorted(self.reasons.items(), key=lambda reason: -len(reason[1]))
        phrases = [
            f"{len(names):,} {reason.replace('{s}', 's' * (len(names) > 1))} ({names[0]}{', ...' * (len(names) > 1)})"
            for reason, names in by_count[:_SHOWN]
        ]
        rest = sum(len(names) for _, names in by_count[_SHOWN:])
        return (*phrases, f"{rest:,} more") if rest else tuple(phrases)
