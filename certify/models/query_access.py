"""Query-only access to a model: images in, labels or scores out, every image counted, no path to the model.

A black-box attack receives a :class:`QueryAccess` instead of the classifier. It guards against mistakes (a library that
takes a gradient, exceeds its budget, or reads scores in a label-only setting), not against malice: Python code in the
same process can reach anything.
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

from certify.errors import BudgetSpent, RunFault, UserError
from certify.models.classifier import Classifier, labels_from_logits
from certify.models.defence import Defence

Answers = Literal["labels", "scores"]
Target = Defence | Classifier | Callable[[Tensor], Tensor]


@dataclass
class _State:
    """State of one access, reachable only through this module's table."""

    answer: Callable[[Tensor, list[bytes]], Tensor]
    budget: int | None
    spent: int
    key: bytes


_TABLE: dict[bytes, _State] = {}
_TOKENS = iter(range(1 << 62))


class QueryAccess:
    """Access to a target by queries: images ``(B, C, H, W)`` in; labels ``(B,)`` or scores ``(B, K)`` out, on the CPU.

    Outputs have no autograd history, and the object has no reference to the target: it holds a token for a table of
    this module. A batch that exceeds the rest of the budget raises :class:`BudgetSpent`, and none of its images is
    computed. An image counts when it is sent, whether or not it gets an output.

    For a random defence, query n uses random numbers from ``sha256(key, n)``: repeating an image gives another draw,
    and the same queries in the same order give the same outputs for any split into batches. The object cannot be
    copied, because that would copy the budget.

    Args:
        target: a defence, a classifier, or any function from images to scores ``(B, K)`` or labels ``(B,)``.
        answers: ``labels`` (int64, ``FAILED`` where the target has none), or ``scores``: probabilities of a defence or
            a classifier, the output of a function, in float32 or better.
        budget: maximum number of images sent, or None for no limit.
        key: of :func:`certify.smoothing.rng.stream_key`, for the random numbers of a random defence.
        spent: images sent before, when work is resumed.
        num_classes: K of a function; defences and classifiers have their own.
        bounded: reject images that are not finite or leave [0, 1], as a service would.

    Raises:
        UserError: an unknown kind of answers, or a negative budget.
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
        _TABLE[self._token] = _State(_query_function(target, answers), budget, spent, key)
        weakref.finalize(self, _TABLE.pop, self._token, None)

    @property
    def answers(self) -> Answers:
        """Kind of answers: ``labels`` or ``scores``."""
        return self._answers

    @property
    def num_classes(self) -> int | None:
        """Number of classes K, or None if unknown."""
        return self._classes

    @property
    def random(self) -> bool:
        """True if two answers about the same image may differ."""
        return self._random

    @property
    def budget(self) -> int | None:
        """Maximum number of images, or None."""
        return _TABLE[self._token].budget

    @property
    def spent(self) -> int:
        """Images sent so far."""
        return _TABLE[self._token].spent

    def __call__(self, images: Tensor) -> Tensor:
        """Return labels, int64 ``(B,)``, or scores, float ``(B, K)``.

        Raises:
            BudgetSpent: the budget does not cover these images; none is sent.
            UserError: images of another shape or range, or a target that cannot give this kind of answers.
            RunFault: scores that are not finite.
        """
        if images.ndim != 4:
            raise UserError(f"images of shape {tuple(images.shape)}: expected (B, C, H, W)")
        images = images.detach()
        if self._bounded and not bool(((images >= 0) & (images <= 1)).all()):  # rejects NaN, too
            raise UserError("images outside [0, 1], or not finite; clip them first")
        keys = _charge(self._token, len(images))
        output = _TABLE[self._token].answer(images, keys)
        return _labels(output, len(images)) if self._answers == "labels" else _scores(output, len(images))

    def __reduce_ex__(self, protocol: SupportsIndex) -> str:
        raise TypeError("query access cannot be copied or saved: its budget would be copied with it")


def _charge(token: bytes, count: int) -> list[bytes]:
    """Charge images to the budget, and return a key for each."""
    state = _TABLE[token]
    if state.budget is not None and state.spent + count > state.budget:
        raise BudgetSpent(state.spent, state.budget, count)
    first, state.spent = state.spent, state.spent + count
    return [hashlib.sha256(state.key + n.to_bytes(8, "little")).digest() for n in range(first, first + count)]


@contextmanager
def forward_only(device: torch.device) -> Iterator[None]:
    """Disable autograd and autocast: half precision would hide differences between small steps."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _query_function(target: Target, answers: Answers) -> Callable[[Tensor, list[bytes]], Tensor]:
    """Return a function from images and keys to the target's output; the only reference to the target."""

    def answer(images: Tensor, keys: list[bytes]) -> Tensor:
        with forward_only(images.device):
            if isinstance(target, Defence):
                return target(images, keys) if answers == "labels" else target.scores(images, keys)
            if isinstance(target, Classifier):
                return target(images) if answers == "labels" else target.logits(images).softmax(1)
            return target(images)

    return answer


def _labels(output: Tensor, count: int) -> Tensor:
    """Return the labels of a target's output, int64 on the CPU."""
    if output.shape[:1] != (count,) or output.ndim not in (1, 2) or (output.ndim == 1 and output.is_floating_point()):
        raise UserError(
            f"the target returned {tuple(output.shape)} {output.dtype} for {count} images; expected whole-number "
            "labels (B,), or scores (B, K)"
        )
    labels = labels_from_logits(output) if output.ndim == 2 else output
    return labels.detach().cpu().long()


def _scores(output: Tensor, count: int) -> Tensor:
    """Return the scores of a target's output, in float32 or better, on the CPU."""
    if output.ndim != 2 or len(output) != count or not output.is_floating_point():
        raise UserError(
            f"the target returned {tuple(output.shape)} {output.dtype} for {count} images; expected scores (B, K); "
            "it returns labels only"
        )
    if not output.isfinite().all():
        raise RunFault("the target returned scores that are not finite; results so far are kept")
    return output.detach().cpu().to(torch.promote_types(output.dtype, torch.float32))
