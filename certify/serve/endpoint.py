"""A service behind the server: a base classifier that asks it, one query a noisy copy, and keeps nothing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from certify.blackbox.encoding import to_pictures
from certify.blackbox.types import Answer, Client, Query
from certify.models.classifier import square_input
from certify.types import FAILED

TOGETHER = 64
"""Queries that are handed over at a time."""


class Endpoint:
    """A base classifier whose labels come from a service: tensor -> clip -> 8 bits -> query -> label.

    Certificates presuppose that the service is a fixed function of the picture. Classes are numbered as they appear,
    and keep their numbers while the server runs; a label that appears when all numbers are taken is a trial without a
    label, as a failed query is.

    Args:
        asking: asks the service.
        size: (C, H, W) of the images.
        num_classes: labels that are told apart, at most.
        about: what fixes the function, without credentials.

    Attributes:
        beyond: answers whose label came when all numbers were taken.
    """

    class_names = None
    one_by_one = True
    """Each image is a query of its own, whose answer does not depend on the batch: batches are not filled up."""

    def __init__(self, asking: Client, size: tuple[int, int, int], num_classes: int, about: Mapping[str, Any]) -> None:
        self.num_classes, self.input = num_classes, square_input(size)
        self._asking, self._about = asking, dict(about)
        self._classes: dict[str, int] = {}
        self._queries = itertools.count()
        self.beyond = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Labels ``(B,)`` of images ``(B, C, H, W)``; ``FAILED`` where the service gave none."""
        queries = [Query(f"served | {next(self._queries)}", picture) for picture in to_pictures(images)]
        labels = [self._vote(answer) for answer in self._asking(queries)]
        return torch.tensor(labels, dtype=torch.int64, device=images.device)

    def _vote(self, answer: Answer) -> int:
        if not answer.ranked:
            return FAILED
        label = answer.ranked[0].label
        if label not in self._classes:
            if len(self._classes) >= self.num_classes:
                self.beyond += 1
                return FAILED
            self._classes[label] = len(self._classes)
        return self._classes[label]

    def name_of(self, label: int) -> str:
        """What the service calls this class."""
        return list(self._classes)[label]

    def describe(self) -> dict[str, Any]:
        """Which service, and how it is asked."""
        return {"step": "service", "num_classes": self.num_classes, "picture": {"bits": 8}, **self._about}
