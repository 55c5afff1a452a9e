"""Use a black-box API as the server's base classifier: one query per noisy copy; nothing is stored."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from certify.blackbox.answers import class_of
from certify.blackbox.encoding import to_pictures
from certify.blackbox.types import Answer, Client, Query
from certify.models.classifier import square_input
from certify.types import FAILED

BATCH = 64
"""Queries per forward pass."""


class Endpoint:
    """A base classifier whose labels come from an API: tensor -> clip -> 8 bits -> query -> label.

    Certificates presuppose that the API is a fixed function of the picture. Classes are numbered in order of first
    appearance while the server runs. A new label after ``num_classes`` others counts as a trial without a label, like a
    failed query.

    Args:
        client: answers queries.
        size: (C, H, W) of the images.
        num_classes: maximum number of distinct labels.
        about: description of the API, without credentials.

    Attributes:
        beyond: number of answers with a label beyond ``num_classes``.
    """

    class_names = None
    one_by_one = True
    """Each image is a separate query, independent of the batch, so batches are not padded."""

    def __init__(self, client: Client, size: tuple[int, int, int], num_classes: int, about: Mapping[str, Any]) -> None:
        self.num_classes, self.input = num_classes, square_input(size)
        self._client, self._about = client, dict(about)
        self._classes: dict[str, int] = {}
        self._names: list[str] = []
        self._queries = itertools.count()
        self.beyond = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Return labels ``(B,)`` of images ``(B, C, H, W)``; ``FAILED`` for images without one."""
        queries = [Query(f"served | {next(self._queries)}", picture) for picture in to_pictures(images)]
        labels = [self._label(answer) for answer in self._client(queries)]
        return torch.tensor(labels, dtype=torch.int64, device=images.device)

    def _label(self, answer: Answer) -> int:
        name = class_of(answer.ranked)
        if name is None:
            return FAILED
        if name not in self._classes:
            if len(self._classes) >= self.num_classes:
                self.beyond += 1
                return FAILED
            self._classes[name] = len(self._classes)
            self._names.append(name)
        return self._classes[name]

    def name_of(self, label: int) -> str:
        """Return the API's name of a class."""
        return self._names[label]

    def describe(self) -> dict[str, Any]:
        """Return the description of the API and of how it is queried."""
        return {"step": "service", "num_classes": self.num_classes, "picture": {"bits": 8}, **self._about}
