"""Sequential tests of one image: when the votes so far settle a question. Pure; the sampling is the engine's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from certify.smoothing.numeric import as_int
from certify.types import ABSTAIN, Votes

LEAST = 16  # samples of an image's first piece


class SequentialTest(Protocol):
    """The sequential test of one image. It depends on the votes of that image alone."""

    drawn: int
    """Samples labelled so far."""
    pending: int
    """Samples to label next; 0 once the image is settled."""

    def add(self, labels: np.ndarray) -> None:
        """Add the labels of the next samples: int64, failures below 0."""
        ...

    def result(self) -> Any:
        """Return what the votes so far prove."""
        ...


@dataclass(eq=False)
class VoteCounts:
    """Votes for each class so far; the array grows when a label names a new class."""

    num_classes: int
    by_class: np.ndarray = field(init=False)
    seen: int = 0

    def __post_init__(self) -> None:
        self.by_class = np.zeros(self.num_classes, dtype=np.int64)

    def leading(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, after each of these labels, the largest count so far and its class."""
        self._make_room(labels)
        classes = np.union1d(np.flatnonzero(self.by_class), labels[labels >= 0])
        if not len(classes):
            return np.zeros(len(labels), dtype=np.int64), np.full(len(labels), ABSTAIN)
        counts = self.by_class[classes, None] + np.cumsum(labels[None, :] == classes[:, None], axis=1)
        return counts.max(axis=0), classes[counts.argmax(axis=0)]

    def add(self, labels: np.ndarray) -> None:
        """Count these labels, failures below 0."""
        self._make_room(labels)
        self.by_class += np.bincount(labels[labels >= 0], minlength=len(self.by_class))
        self.seen += len(labels)

    def _make_room(self, labels: np.ndarray) -> None:
        more = int(labels.max(initial=-1)) + 1 - len(self.by_class)
        if more > 0:
            self.by_class = np.pad(self.by_class, (0, more))

    def votes(self) -> Votes:
        """Return the votes so far."""
        return Votes(tuple(self.by_class.tolist()), self.seen - int(self.by_class.sum()))


class FixedSample:
    """Sample a fixed number of times: for a bound at fixed n among images that come and go.

    Args:
        num_classes: K.
        n: samples, at least 1.
        piece: maximum number of samples to label at a time.
    """

    def __init__(self, num_classes: int, *, n: int, piece: int) -> None:
        self._counts, self._n, self._piece = VoteCounts(num_classes), as_int(n, "n"), as_int(piece, "piece")
        self.drawn = 0
        self.pending = min(self._n, self._piece)

    def add(self, labels: np.ndarray) -> None:
        """Count all labels."""
        self.drawn += len(labels)
        self._counts.add(labels)
        self.pending = min(self._n - self.drawn, self._piece)

    def result(self) -> Votes:
        """Return the votes so far."""
        return self._counts.votes()
