"""Query-only access: images in, labels or scores out, every image counted, nothing behind it to take hold of.

An attack that may only ask is handed a :class:`QueryAccess` and not the classifier. It guards against mistakes (a
library that takes a gradient, keeps no budget, or reads scores where labels were promised), not against malice: Python
code in the same process can find anything.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from torch import Tensor

from certify.errors import RunFault, UserError
from certify.models.classifier import Classifier, labels_from_logits
from certify.models.defence import Defence

Answers = Literal["labels", "scores"]
Target = Defence | Classifier | Callable[[Tensor], Tensor]


class BudgetSpent(RunFault):
    """More queries were asked for than the budget has left; none of them was sent."""

    def __init__(self, spent: int, budget: int, asked: int) -> None:
        super().__init__(
            f"query budget: {spent} of {budget} queries are spent and {asked} more were asked for; none of them was "
            "sent, what was found or saved before is kept: give a larger budget to go on"
        )
        self.spent, self.budget, self.asked = spent, budget, asked


@dataclass
class _Held:
    """What belongs to one access; only this module's table knows it."""

    answer: Callable[[Tensor, list[bytes]], Tensor]
    budget: int | None
    spent: int
    key: bytes


_TABLE: dict[bytes, _Held] = {}
_TOKENS = iter(range(1 << 62))


class QueryAccess:
    """A target as queries see it: images ``(B, C, H, W)`` in; labels ``(B,)`` or scores ``(B, K)`` out, on the CPU.

    Answers carry no autograd history and the object no path to the target: it holds a token, and a table of this
    module the rest. A batch is answered whole or refused whole: one that exceeds the rest of the budget raises
    :class:`BudgetSpent`, and no image of it is computed. An image counts when it is sent, answered or not.

    Each query to a defence is a new one: query n of this access draws from ``sha256(key, n)``, so that asking about the
    same image again gives another draw, and the same access in the same order gives the same answers however its
    queries are cut into batches. It cannot be copied, which would copy the budget.

    Args:
        target: a defence, a classifier, or any function from images to scores ``(B, K)`` or labels ``(B,)``.
        answers: ``labels`` (int64, ``FAILED`` where the target has none), or ``scores``: probabilities of a defence and
            of a classifier, whatever a function returns, in float32 or better.
        budget: images that may be sent in all, or None for no limit.
        key: of :func:`certify.smoothing.rng.stream_key`; names the random numbers of a random defence.
        spent: images sent before, where something goes on.
        num_classes: K of a function; others say it themselves.
        bounded: refuse images that are not finite or leave [0, 1], as a service would.

    Raises:
        UserError: another kind of answers, a negative budget.
    """

    __slots__ = ("__weakref__", "_answers", "_bounded", "_classes", "_random", "_token")

    def __init__(
        self,
        target: Target,
        answers: Answers,
        *,
        budget: int | None = None,
        key: bytes = b"",
        spent: int = 0,
        num_classes: int | None = None,
        bounded: bool = True,
    ) -> None:
        if answers not in ("labels", "scores"):
            raise UserError(f"answers {answers!r}: expected 'labels' or 'scores'")
        if spent < 0 or (budget is not None and budget < 0):
            raise UserError(f"query budget {budget}, spent {spent}: expected whole numbers from 0")
        self._answers, self._bounded = answers, bounded
        self._classes = num_classes or getattr(target, "num_classes", None)
        self._random = getattr(target, "random", False) is True
        self._token = next(_TOKENS).to_bytes(8, "little")
        _TABLE[self._token] = _Held(_asking(target, answers), budget, spent, key)
        weakref.finalize(self, _TABLE.pop, self._token, None)

    @property
    def answers(self) -> Answers:
        """``labels`` or ``scores``."""
        return self._answers

    @property
    def num_classes(self) -> int | None:
        """K, or None where nobody said."""
        return self._classes

    @property
    def random(self) -> bool:
        """Whether the target says that two answers about the same image may differ."""
        return self._random

    @property
    def budget(self) -> int | None:
        """Images that may be sent in all, or None."""
        return _TABLE[self._token].budget

    @property
    def spent(self) -> int:
        """Images that were sent."""
        return _TABLE[self._token].spent

    def __call__(self, images: Tensor) -> Tensor:
        """Labels, int64 ``(B,)``, or scores, float ``(B, K)``.

        Raises:
            BudgetSpent: the budget does not cover these images; none is sent.
            UserError: no images, or not in [0, 1]; a target that does not answer so.
            RunFault: scores that are not finite.
        """
        if images.ndim != 4:
            raise UserError(f"images of shape {tuple(images.shape)}: expected (B, C, H, W)")
        images = images.detach()
        if self._bounded and not bool(((images >= 0) & (images <= 1)).all()):  # written so that NaN is refused
            raise UserError("images outside of [0, 1], or not finite: no target takes such; clip them first")
        keys = _charge(self._token, len(images))
        found = _TABLE[self._token].answer(images, keys)
        return _labels(found, len(images)) if self._answers == "labels" else _scores(found, len(images))

    def __reduce_ex__(self, protocol: SupportsIndex) -> str:
        raise TypeError("query access cannot be copied or saved: its budget would be copied with it")


def _charge(token: bytes, count: int) -> list[bytes]:
    """Take the images off the budget; a key for each."""
    held = _TABLE[token]
    if held.budget is not None and held.spent + count > held.budget:
        raise BudgetSpent(held.spent, held.budget, count)
    first, held.spent = held.spent, held.spent + count
    return [hashlib.sha256(held.key + n.to_bytes(8, "little")).digest() for n in range(first, first + count)]


@contextmanager
def forward_only(device: torch.device) -> Iterator[None]:
    """No autograd, and no autocast: half precision would drown differences over small steps."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _asking(target: Target, answers: Answers) -> Callable[[Tensor, list[bytes]], Tensor]:
    """The one closure that knows the target."""

    def answer(images: Tensor, keys: list[bytes]) -> Tensor:
        with forward_only(images.device):
            if isinstance(target, Defence):
                return target(images, keys) if answers == "labels" else target.scores(images, keys)
            if isinstance(target, Classifier):
                return target(images) if answers == "labels" else target.logits(images).softmax(1)
            return target(images)

    return answer


def _labels(found: Tensor, count: int) -> Tensor:
    """Labels of what a target returned, int64 on the CPU."""
    if found.shape[:1] != (count,) or found.ndim not in (1, 2) or (found.ndim == 1 and found.is_floating_point()):
        raise UserError(
            f"the target returned {tuple(found.shape)} {found.dtype} for {count} images; expected whole-number labels "
            "(B,), or scores (B, K)"
        )
    labels = labels_from_logits(found) if found.ndim == 2 else found
    return labels.detach().cpu().long()


def _scores(found: Tensor, count: int) -> Tensor:
    """Scores of what a target returned, in float32 or better, on the CPU."""
    if found.ndim != 2 or len(found) != count or not found.is_floating_point():
        raise UserError(
            f"the target returned {tuple(found.shape)} {found.dtype} for {count} images; expected (B, K) scores: "
            "this one gives labels alone"
        )
    if not found.isfinite().all():
        raise RunFault("the target returned scores that are not finite; what was found or saved before is kept")
    return found.detach().cpu().to(torch.promote_types(found.dtype, torch.float32))
