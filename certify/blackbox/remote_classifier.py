"""Present a service as a classifier to query-based attacks; every query is logged.

Attacks need a fixed set of classes: those known at the start, plus one for any other label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from certify.blackbox.answers import class_of, query_name
from certify.blackbox.encoding import to_pictures
from certify.blackbox.types import Answer, Client, Query, Ranked
from certify.errors import BudgetSpent, RunFault, UserError
from certify.models.classifier import InputSpec
from certify.types import FAILED

_ABSENT = 1e-12  # score of a class missing from an answer


class LedgerBudgetSpent(BaseException):
    """The audit's budget is spent. Not an ``Exception``, lest an attack mistake it for the end of its own budget."""


class ServiceSilent(BaseException):
    """The service does not answer or refuses the key; not an ``Exception`` for the same reason."""


class RemoteClassifier:
    """A service in place of the classifier of a :class:`certify.models.defence.Defence`.

    Args:
        client: answers queries within the budget.
        classes: class names by number; number ``len(classes)`` is any other label.
        size: (C, H, W) of the images.
        describe: function that returns the service's description.
        class_map: maps labels to classes; labels outside it count only if an answer has no others.
        scored: True if answers have scores.
    """

    one_by_one = True
    """Each image is a separate query; the audit's probe checks that the service is deterministic."""

    def __init__(
        self,
        client: Client,
        classes: Sequence[str],
        size: tuple[int, int, int],
        describe: Callable[[], dict[str, Any]],
        *,
        class_map: Mapping[str, str] | None = None,
        scored: bool = True,
    ) -> None:
        self._client, self._scored, self._class_map = client, scored, class_map
        self._numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
        self.describe = describe
        self.name = str(describe()["name"])
        self.num_classes = len(classes) + 1
        self.class_names = (*((name,) for name in classes), ("any other label",))
        self.input = InputSpec(size)
        self.probe_size = size
        self.stream: tuple[str, str] | None = None
        """Image and stage in the names of the next queries; None names queries by their pictures."""
        self._number = 0

    def begin(self, image: str, stage: str) -> None:
        """Name the following queries by image, stage, and a number from 0."""
        self.stream, self._number = (image, stage), 0

    def end(self) -> None:
        """Name queries by their pictures, so that each picture is paid for only once."""
        self.stream = None

    def identity(self) -> str:
        """Return a name that distinguishes the service from others."""
        return self.name

    def __call__(self, images: Tensor) -> Tensor:
        """Return labels ``(B,)`` of images ``(B, C, H, W)``."""
        labels = [self._label(answer.ranked) for answer in self._answers(images)]
        return torch.tensor(labels, dtype=torch.int64, device=images.device)

    def logits(self, images: Tensor) -> Tensor:
        """Return the logarithms of scores ``(B, K)``, NaN where a query failed.

        Raises:
            UserError: the service returns labels without scores.
        """
        if not self._scored:
            raise UserError(f"{self.name} returns labels without scores; expected an attack that needs only labels")
        rows = [self._weights(answer.ranked) for answer in self._answers(images)]
        return torch.tensor(rows, dtype=torch.float64, device=images.device).log()

    def _class(self, label: str) -> int:
        name = label if self._class_map is None else self._class_map.get(label)
        return self._numbers.get(name, len(self._numbers))

    def _label(self, ranked: Ranked) -> int:
        if not ranked:
            return FAILED
        return self._numbers.get(class_of(ranked, self._class_map), len(self._numbers))

    def _weights(self, ranked: Ranked) -> list[float]:
        if not ranked:
            return [float("nan")] * self.num_classes
        weights = [_ABSENT] * self.num_classes
        for one in ranked:
            c = self._class(one.label)
            weights[c] = max(weights[c], one.score or _ABSENT)
        if self._class_map is not None:
            weights[-1] = _ABSENT if self._label(ranked) < len(self._numbers) else 1.0
        return weights

    def _answers(self, images: Tensor) -> list[Answer]:
        queries = []
        for picture in to_pictures(images):
            if self.stream is None:
                name = query_name("any image", "judge", picture.sha256[:32])
            else:
                name = query_name(*self.stream, self._number)
                self._number += 1
            queries.append(Query(name, picture))
        try:
            answers = {
                answer.name: answer for answer in self._client({query.name: query for query in queries}.values())
            }
        except BudgetSpent as error:
            raise LedgerBudgetSpent(str(error)) from None
        except RunFault as error:
            raise ServiceSilent(str(error)) from None
        return [answers[query.name] for query in queries]
