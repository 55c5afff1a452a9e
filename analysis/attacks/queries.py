"""Query-based attacks from ART within a query budget: HopSkipJump on labels, Square on scores.

ART has no query budget (its Square sends three images per iteration) and loses its result when stopped. Therefore
every image goes through a :class:`QuerySearch`, which keeps the nearest misclassified image; for a random target, one
that is misclassified in most repeated queries.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from analysis.attacks import LABELS
from analysis.comparison.attacked import SLACK, Proposal, Task, distances
from certify.errors import BudgetSpent, UserError
from certify.models.classifier import labels_from_logits
from certify.models.query_access import QueryAccess

_TINY = 1e-30
_NEVER = 100.0
"""Exceeds the logarithm of any ratio of scores; added to the true class, it keeps ART from stopping by itself."""

CONFIRM = 5
"""Repeated queries for an image that a random target misclassified; most must be wrong for the attack to end."""

_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the budget after which the area of Square's squares is halved, as in the paper."""


class _Finished(Exception):
    """An image in the ball, or the clean image, is misclassified, so the attack can stop."""


class QuerySearch:
    """Query interface of an attack, which keeps the nearest misclassified image.

    A single wrong answer of a random target proves little, so the nearest misclassified image of a batch that
    lies in the ball (the clean image included) is queried ``CONFIRM`` times more, within the same budget and once per
    image; only mostly wrong answers count. If there are none, the image in the ball with the most wrong answers is
    kept, ties broken by the lowest margin if there are scores; the clean image only if there is no other. Without a
    ball, an image is queried again if it would be the nearest one.

    Args:
        access: query access to the target.
        image: the clean image, ``(C, H, W)``.
        label: the true class; any other answer is wrong, including ``FAILED``.
        task: norm and ball.
    """

    def __init__(self, access: QueryAccess, image: Tensor, label: int, task: Task) -> None:
        self.access, self.image, self.label, self.task = access, image, label, task
        self.before = access.spent
        self.best, self.answer, self.nearest = image, label, float("inf")
        self.rank = (0, False, -float("inf"))
        self.repeated: set[bytes] = set()

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Return ART's predictions ``(B, K)`` of images: scores, or one-hot labels.

        Raises:
            BudgetSpent: nothing was sent.
            _Finished: the attack can stop.
        """
        images = torch.from_numpy(np.ascontiguousarray(batch)).float()
        answers = self.access(images)
        labels = self._labels(answers)
        distance = distances(images, self.image[None], self.task.norm)
        far = distance.masked_fill(labels == self.label, float("inf"))
        if self.access.random:
            answers = self._confirm(images, answers, labels, distance)
            labels = labels.masked_fill(
                distance == 0, self.label
            )  # a chance error on the clean image is not a starting point
        elif far.min() < self.nearest:
            nearest = int(far.argmin())
            self._keep(images[nearest], int(labels[nearest]), float(far[nearest]))
        if self.access.answers == LABELS:
            return _one_hot(
                labels.masked_fill(labels < 0, self.label + 1), self.access
            )  # a failure counts as any wrong class
        return answers.float().numpy()

    def _labels(self, answers: Tensor) -> Tensor:
        return answers if self.access.answers == LABELS else labels_from_logits(answers)

    def _keep(self, image: Tensor, answer: int, far: float) -> None:
        """Keep a misclassified image; end the attack if it is within the ball."""
        self.best, self.answer, self.nearest = image.clone(), answer, far
        if far <= (self.task.eps + SLACK if self.task.eps is not None else 0.0):
            raise _Finished

    def _confirm(self, images: Tensor, answers: Tensor, labels: Tensor, far: Tensor) -> Tensor:
        """Repeat the query for the nearest misclassified image of a random target, and keep the best image.

        Returns:
            The answers. Scores that were selected for being wrong are replaced by the mean of the repeated ones;
            otherwise the search would hold on to a chance error.
        """
        ball = float("inf") if self.task.eps is None else self.task.eps + SLACK
        wrong = labels != self.label
        digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
        new = torch.tensor([digest not in self.repeated for digest in digests])
        doubtful = wrong & new & (far <= ball) & (far < self.nearest)
        chosen = int(far.masked_fill(~doubtful, float("inf")).argmin()) if bool(doubtful.any()) else -1
        counts = [0] * len(images)
        if chosen >= 0:
            self.repeated.add(digests[chosen])
            again = self._repeat(images[chosen])
            labels_again = self._labels(again) if len(again) else again
            others = labels_again[labels_again != self.label]
            counts[chosen] = len(others)
            if 2 * len(others) > CONFIRM:
                self._keep(images[chosen], int(others.mode().values), float(far[chosen]))
            if self.access.answers != LABELS and len(again):
                answers = answers.clone()
                answers[chosen] = again.mean(0)
        margins = far + float("inf") if self.access.answers == LABELS else self._margins(answers)
        for i, (image, counted) in enumerate(zip(images, counts, strict=True)):
            rank = counted, bool(wrong[i]), -float(margins[i])
            if self.task.eps is not None and 0 < far[i] <= ball and rank > self.rank:
                self.best, self.rank = image.clone(), rank
        return answers

    def _repeat(self, image: Tensor) -> Tensor:
        """Query an image repeatedly within the budget; the result may be empty."""
        assert self.access.budget is not None
        many = min(CONFIRM, self.access.budget - self.access.spent)
        return self.access(image.expand(many, *image.shape)) if many else torch.empty(0, dtype=torch.long)

    def _margins(self, scores: Tensor) -> Tensor:
        """Return the true class's score minus the highest other one, ``(B,)``."""
        others = scores.clone()
        others[:, self.label] = -float("inf")
        return scores[:, self.label] - others.amax(1)

    def proposal(self, attack: Callable[[], Any]) -> Proposal:
        """Run the attack until it ends or the budget is spent, and return the best image."""
        with suppress(_Finished, BudgetSpent):
            self(self.image[None].numpy())
            attack()
        note = "" if self.nearest < float("inf") else "no wrong answer found"
        if note and self.access.random:
            note = f"no image found that is mostly answered wrongly; this one: {self.rank[0]} of {CONFIRM} more answers"
        return Proposal(self.best, self.answer, self.access.spent - self.before, note)


def _one_hot(labels: Tensor, access: QueryAccess) -> np.ndarray:
    """Return one-hot vectors of labels ``(B,)`` modulo K, float32 ``(B, K)``."""
    assert access.num_classes is not None
    vectors: np.ndarray = one_hot(labels % access.num_classes, access.num_classes).float().numpy()
    return vectors


def _logarithms(scores: np.ndarray) -> np.ndarray:
    """Return the logarithms of probabilities ``(B, K)``.

    Raises:
        UserError: values outside [0, 1], such as logits.
    """
    if scores.min() < 0 or scores.max() > 1 + 1e-3:
        raise UserError("attack square: scores outside [0, 1]; expected probabilities, such as logits.softmax(1)")
    logarithms: np.ndarray = np.log(np.maximum(scores, _TINY))
    return logarithms


def hopskipjump(image: Tensor, label: int, task: Task, *, init: int = 100, directions: int = 100) -> Proposal:
    """HopSkipJump (Chen, Jordan and Wainwright 2020), untargeted: find the nearest misclassified image.

    It starts from one of at most ``init`` uniform random images. Its first gradient estimate takes ``directions``
    queries, later ones more, in proportion to the square root of the iteration. It ends with the budget, or with the
    first misclassified image within the ball, if there is a ball; for a random target, with the first confirmed one
    (:class:`QuerySearch`).
    """
    from art.attacks.evasion import HopSkipJump
    from art.estimators.classification import BlackBoxClassifier

    class Seeded(HopSkipJump):  # type: ignore[misc]
        """HopSkipJump with a start from the seeded generator; ART draws it from the system's entropy."""

        def _init_sample(self, x: np.ndarray, y: int, y_p: int, *rest: Any) -> tuple[np.ndarray, int] | None:
            for _ in range(self.init_size):
                start = np.random.uniform(0, 1, x.shape).astype(x.dtype)  # noqa: NPY002
                if np.argmax(self.estimator.predict(start[None])) != y_p:
                    near = self._binary_search(
                        current_sample=start,
                        original_sample=x,
                        target=y_p,
                        norm=2,
                        clip_min=0.0,
                        clip_max=1.0,
                        threshold=0.001,
                    )
                    return near, y_p
            return None

    assert task.access is not None
    assert task.access.budget is not None
    search = QuerySearch(task.access, image, label, task)
    model = BlackBoxClassifier(search, tuple(image.shape), task.access.num_classes, clip_values=(0.0, 1.0))
    library = Seeded(
        model,
        norm=2 if task.norm == "l2" else np.inf,
        max_iter=task.access.budget,  # more than the budget allows
        init_eval=directions,
        init_size=init,
        verbose=False,
    )
    right = _one_hot(torch.tensor([label]), task.access)
    return search.proposal(lambda: library.generate(image[None].numpy(), y=right))


def square(image: Tensor, label: int, task: Task, *, fraction: float = 0.8) -> Proposal:
    """Square (Andriushchenko, Croce, Flammarion and Hein 2020): random squares that reduce the true class's margin.

    The first squares cover ``fraction`` of the pixels, or less if such a square would not fit. The margin is that of
    log-scores, so that it also moves for a confident classifier. Each iteration queries one new
    image, as in the paper; ART's repeated queries for its current image are answered from a cache, for random defences
    too. In l-infinity the search is ART's. In l2 it is ours, after the paper: ART 1.20 divides by the desired norm of a
    new window, which destroys earlier progress and produces NaN images.

    Raises:
        UserError: a fraction out of range, or images that are too small.
    """
    assert task.access is not None
    assert task.access.budget is not None
    assert task.eps is not None
    height, width = image.shape[1:]
    if not 0 < fraction <= 1 or min(height, width) < 3:
        raise UserError(f"attack square: fraction {fraction}, {height}x{width} pixels; expected 0 to 1, 3x3 or more")
    search = QuerySearch(task.access, image, label, task)
    if task.norm == "l2":
        return search.proposal(lambda: _square_l2(search, fraction))
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification.blackbox import BlackBoxClassifierNeuralNetwork

    cache: dict[bytes, np.ndarray] = {}

    def cached(batch: np.ndarray) -> np.ndarray:
        key = hashlib.sha256(batch.tobytes()).digest()
        scores = cache.pop(key, None)
        if scores is None:
            scores = _logarithms(search(batch))
            if search.access.random:  # one wrong answer must not stop ART
                scores[:, label] += _NEVER
        cache[key] = scores  # moved to the end
        while len(cache) > 2:  # the current image and the candidate
            del cache[next(iter(cache))]
        return scores

    model = BlackBoxClassifierNeuralNetwork(cached, tuple(image.shape), task.access.num_classes, clip_values=(0.0, 1.0))
    library = SquareAttack(
        model,
        norm=np.inf,
        max_iter=max(1, task.access.budget - 2),
        eps=task.eps,
        p_init=min(fraction, (min(height, width) - 1.5) ** 2 / (height * width)),
        verbose=False,
    )
    right = _one_hot(torch.tensor([label]), task.access)
    return search.proposal(lambda: library.generate(image[None].numpy(), y=right))


def _square_l2(search: QuerySearch, fraction: float) -> None:
    """Run the l2 version (algorithms 1 and 3 of the paper): move mass between windows at a constant norm eps."""
    clean, label, task = search.image.numpy(), search.label, search.task
    assert task.access is not None
    assert task.access.budget is not None
    assert task.eps is not None
    eps, (channels, height, width) = task.eps, clean.shape
    rng = np.random.default_rng(np.frombuffer(task.key, dtype=np.uint32))

    def place(size: int) -> tuple[slice, slice, slice]:
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        return slice(None), slice(top, top + size), slice(left, left + size)

    def bump(size: int) -> np.ndarray:
        """Return a positive and a negative hill with a random sign per channel, of l2 norm 1."""
        flat = _hills(size).T if rng.random() < 0.5 else _hills(size)
        signed: np.ndarray = flat * rng.choice([-1.0, 1.0], size=(channels, 1, 1))
        return signed

    def moved(delta: np.ndarray) -> np.ndarray:
        image: np.ndarray = np.clip(clean + eps * delta / np.linalg.norm(delta), 0, 1).astype(np.float32)
        return image

    def margin(image: np.ndarray) -> float:
        scores = _logarithms(search(image[None]))[0]
        return float(scores[label] - np.delete(scores, label).max())

    tile = max(3, min(height, width) // 5)
    delta = np.zeros(clean.shape)
    for top in range(0, height - tile + 1, tile):
        for left in range(0, width - tile + 1, tile):
            delta[:, top : top + tile, left : left + tile] += bump(tile)
    held = moved(delta)
    lowest = margin(held)
    for iteration in range(task.access.budget):
        covered = fraction / 2 ** bisect.bisect_left(_HALVINGS, iteration / task.access.budget)
        size = max(3, 2 * (round((covered * height * width) ** 0.5) // 2) + 1)
        size = min(size, height, width)
        delta = (held - clean).astype(np.float64)
        to, emptied = place(size), place(size)
        there = delta[to]
        either = np.zeros(clean.shape, dtype=bool)
        either[to] = either[emptied] = True
        free = max(0.0, eps**2 - float((delta**2).sum())) / channels  # lost by clipping
        mass = np.sqrt(free + (delta**2 * either).sum((1, 2), keepdims=True))
        new = bump(size) + there / np.maximum(1e-10, np.sqrt((there**2).sum((1, 2), keepdims=True)))
        new *= mass / np.maximum(1e-10, np.sqrt((new**2).sum((1, 2), keepdims=True)))
        delta[emptied] = 0.0
        delta[to] = new
        if not delta.any():
            continue
        tried = moved(delta)
        tried_margin = margin(tried)
        if tried_margin < lowest:
            held, lowest = tried, tried_margin


def _hills(size: int) -> np.ndarray:
    """Return the paper's eta ``(size, size)``: concentric rectangles, falling outward, lower half negative."""

    def half(rows: int) -> np.ndarray:
        hill: np.ndarray = np.zeros((rows, size))
        for ring in range(1, size // 2 + 2):
            top, left = rows // 2 + 1 - ring, size // 2 + 1 - ring
            hill[max(top, 0) : top + 2 * ring - 1, max(left, 0) : left + 2 * ring - 1] += 1 / ring**2
        hill /= np.linalg.norm(hill)
        return hill

    both = np.concatenate([half(size // 2), -half(size - size // 2)])
    both /= np.linalg.norm(both)
    return both
