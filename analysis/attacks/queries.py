"""Attacks that only ask: HopSkipJump by labels, Square by scores, both of ART, both ended by the budget.

The libraries keep no budget (ART's Square sends three images an iteration) and lose what they had found when they are
stopped. So every image goes through :class:`Chase`, which keeps the nearest image that was answered wrongly; of a
random target, one that is mostly answered wrongly when it is asked about again.
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
from certify.errors import UserError
from certify.models.classifier import labels_from_logits
from certify.models.query_access import BudgetSpent, QueryAccess

_TINY = 1e-30
_NEVER = 100.0
"""Above the logarithm of any ratio of scores: added to the right class it keeps the library from stopping by itself."""

CONFIRM = 5
"""Further answers about an image that a random target got wrong; most of them must be wrong for the attack to end."""

_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Parts of the budget after which Square's squares shrink to half their area, as in the paper."""


class _Found(Exception):
    """The attack has what it came for: a wrong answer inside of the ball, or about the clean image itself."""


class Chase:
    """What an attack by queries is given to ask: it counts on, and keeps the nearest image that got a wrong answer.

    One answer of a random target says little. There, an image in the ball that got a wrong answer (the nearest one of a
    batch, and the clean image like any other) is asked about ``CONFIRM`` times more, out of the same budget, and each
    image once; only mostly wrong answers count. If none is found, the image in the ball with the most wrong answers is
    kept, of several the one with the lowest margin, where there are scores; the clean one only if there is no such
    image. Without a ball, an image is asked about again if it would be the nearest one.

    Args:
        access: to the target.
        image: clean, ``(C, H, W)``.
        label: the right one; any other answer is a wrong one, ``FAILED`` among them.
        task: norm, and the ball at whose edge the attack ends.
    """

    def __init__(self, access: QueryAccess, image: Tensor, label: int, task: Task) -> None:
        self.access, self.image, self.label, self.task = access, image, label, task
        self.before = access.spent
        self.best, self.answer, self.nearest = image, label, float("inf")
        self.rank = (0, False, -float("inf"))
        self.weighed: set[bytes] = set()

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        """Images to scores, or to 1 at the label: what ART calls predictions ``(B, K)``.

        Raises:
            BudgetSpent: nothing was sent.
            _Found: the attack may end.
        """
        images = torch.from_numpy(np.ascontiguousarray(batch)).float()
        answers = self.access(images)
        labels = self._labels(answers)
        all_far = distances(images, self.image[None], self.task.norm)
        far = all_far.masked_fill(labels == self.label, float("inf"))
        if self.access.random:
            answers = self._weigh(images, answers, labels, all_far)
            labels = labels.masked_fill(all_far == 0, self.label)  # the library must not take chance for its start
        elif far.min() < self.nearest:
            nearest = int(far.argmin())
            self._take(images[nearest], int(labels[nearest]), float(far[nearest]))
        if self.access.answers == LABELS:
            return _one_hot(labels.masked_fill(labels < 0, self.label + 1), self.access)  # no class: any wrong one
        return answers.float().numpy()

    def _labels(self, answers: Tensor) -> Tensor:
        return answers if self.access.answers == LABELS else labels_from_logits(answers)

    def _take(self, image: Tensor, answer: int, far: float) -> None:
        """Keep a wrong image; the attack ends where it is near enough."""
        self.best, self.answer, self.nearest = image.clone(), answer, far
        if far <= (self.task.eps + SLACK if self.task.eps is not None else 0.0):
            raise _Found

    def _weigh(self, images: Tensor, answers: Tensor, labels: Tensor, far: Tensor) -> Tensor:
        """Answers of a random target: ask again about the nearest wrong image, and keep what comes nearest to one.

        Returns the answers, with the mean of the further scores in place of those that were chosen for being wrong: a
        search that held on to them would be stuck at a chance.
        """
        ball = float("inf") if self.task.eps is None else self.task.eps + SLACK
        wrong = labels != self.label
        digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
        new = torch.tensor([digest not in self.weighed for digest in digests])
        doubtful = wrong & new & (far <= ball) & (far < self.nearest)
        asked = int(far.masked_fill(~doubtful, float("inf")).argmin()) if bool(doubtful.any()) else -1
        counts = [0] * len(images)
        if asked >= 0:
            self.weighed.add(digests[asked])
            again = self._again(images[asked])
            found = self._labels(again) if len(again) else again
            others = found[found != self.label]
            counts[asked] = len(others)
            if 2 * len(others) > CONFIRM:
                self._take(images[asked], int(others.mode().values), float(far[asked]))
            if self.access.answers != LABELS and len(again):
                answers = answers.clone()
                answers[asked] = again.mean(0)
        margins = far + float("inf") if self.access.answers == LABELS else self._margins(answers)
        for i, (image, counted) in enumerate(zip(images, counts, strict=True)):
            rank = counted, bool(wrong[i]), -float(margins[i])
            if self.task.eps is not None and 0 < far[i] <= ball and rank > self.rank:
                self.best, self.rank = image.clone(), rank
        return answers

    def _again(self, image: Tensor) -> Tensor:
        """Further answers about an image, as many as the budget has left: perhaps none."""
        assert self.access.budget is not None
        many = min(CONFIRM, self.access.budget - self.access.spent)
        return self.access(image.expand(many, *image.shape)) if many else torch.empty(0, dtype=torch.long)

    def _margins(self, scores: Tensor) -> Tensor:
        """Of the right class over the best other ``(B,)``, of scores ``(B, K)``."""
        others = scores.clone()
        others[:, self.label] = -float("inf")
        return scores[:, self.label] - others.amax(1)

    def proposal(self, attack: Callable[[], Any]) -> Proposal:
        """What was found when the attack had ended, by itself or not."""
        with suppress(_Found, BudgetSpent):
            self(self.image[None].numpy())
            attack()
        note = "" if self.nearest < float("inf") else "no wrong answer found"
        if note and self.access.random:
            note = f"no image found that is mostly answered wrongly; this one: {self.rank[0]} of {CONFIRM} more answers"
        return Proposal(self.best, self.answer, self.access.spent - self.before, note)


def _one_hot(labels: Tensor, access: QueryAccess) -> np.ndarray:
    """1 at each label ``(B,)``, taken modulo K, float32 ``(B, K)``."""
    assert access.num_classes is not None
    found: np.ndarray = one_hot(labels % access.num_classes, access.num_classes).float().numpy()
    return found


def _logarithms(scores: np.ndarray) -> np.ndarray:
    """Of probabilities ``(B, K)``.

    Raises:
        UserError: they are none; logits would all count as 0, and the search would see nothing.
    """
    if scores.min() < 0 or scores.max() > 1 + 1e-3:
        raise UserError("attack square: scores outside of 0 to 1; expected probabilities, such as logits.softmax(1)")
    found: np.ndarray = np.log(np.maximum(scores, _TINY))
    return found


def hopskipjump(image: Tensor, label: int, task: Task, *, init: int = 100, directions: int = 100) -> Proposal:
    """HopSkipJump (Chen, Jordan and Wainwright 2020), untargeted: along the boundary to the nearest wrong label.

    It ends with the budget, or with the first wrong label inside of the ball where there is one; of a random target,
    with the first that is confirmed (:class:`Chase`).

    Args:
        image: clean, ``(C, H, W)``.
        label: the right one.
        task: with an access that has a budget.
        init: uniform random images that are tried as a start.
        directions: of the first gradient estimate; their number grows with the root of the iteration.
    """
    from art.attacks.evasion import HopSkipJump
    from art.estimators.classification import BlackBoxClassifier

    class Seeded(HopSkipJump):  # type: ignore[misc]
        """With the start from the seeded generator; the library's own comes from the system's entropy."""

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
    chase = Chase(task.access, image, label, task)
    model = BlackBoxClassifier(chase, tuple(image.shape), task.access.num_classes, clip_values=(0.0, 1.0))
    library = Seeded(
        model,
        norm=2 if task.norm == "l2" else np.inf,
        max_iter=task.access.budget,  # more than it can afford
        init_eval=directions,
        init_size=init,
        verbose=False,
    )
    right = _one_hot(torch.tensor([label]), task.access)
    return chase.proposal(lambda: library.generate(image[None].numpy(), y=right))


def square(image: Tensor, label: int, task: Task, *, fraction: float = 0.8) -> Proposal:
    """Square (Andriushchenko, Croce, Flammarion and Hein 2020): random squares that lower the right class's margin.

    The margin is that of logarithms of the scores, so that a confident classifier's still moves. Each iteration asks
    about one new image, as in the paper; what ART asks again about the image it holds is answered from notes, for
    random defences too. In l-infinity the search is ART's. In l2 it is ours, after the paper: ART 1.20 divides by the
    norm that a new window shall have, which ruins what was found before and makes images of NaN.

    Args:
        image: clean, ``(C, H, W)``.
        label: the right one.
        task: with an access to probabilities that has a budget, and a ball.
        fraction: of the pixels that the first squares cover; less where squares must fit.

    Raises:
        UserError: a fraction out of range, or images that are too small.
    """
    assert task.access is not None
    assert task.access.budget is not None
    assert task.eps is not None
    height, width = image.shape[1:]
    if not 0 < fraction <= 1 or min(height, width) < 3:
        raise UserError(f"attack square: fraction {fraction}, {height}x{width} pixels; expected 0 to 1, 3x3 or more")
    chase = Chase(task.access, image, label, task)
    if task.norm == "l2":
        return chase.proposal(lambda: _square_l2(chase, fraction))
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification.blackbox import BlackBoxClassifierNeuralNetwork

    notes: dict[bytes, np.ndarray] = {}

    def noted(batch: np.ndarray) -> np.ndarray:
        about = hashlib.sha256(batch.tobytes()).digest()
        found = notes.pop(about, None)
        if found is None:
            found = _logarithms(chase(batch))
            if chase.access.random:  # the library would stop at one wrong answer; that is for the chase to say
                found[:, label] += _NEVER
        notes[about] = found  # the latest last
        while len(notes) > 2:  # the image it holds, and the one it tries
            del notes[next(iter(notes))]
        return found

    model = BlackBoxClassifierNeuralNetwork(noted, tuple(image.shape), task.access.num_classes, clip_values=(0.0, 1.0))
    library = SquareAttack(
        model,
        norm=np.inf,
        max_iter=max(1, task.access.budget - 2),
        eps=task.eps,
        p_init=min(fraction, (min(height, width) - 1.5) ** 2 / (height * width)),
        verbose=False,
    )
    right = _one_hot(torch.tensor([label]), task.access)
    return chase.proposal(lambda: library.generate(image[None].numpy(), y=right))


def _square_l2(chase: Chase, fraction: float) -> None:
    """The l2 version (algorithms 1 and 3 of the paper): mass moves from one window to another, the norm stays eps."""
    clean, label, task = chase.image.numpy(), chase.label, chase.task
    assert task.access is not None
    assert task.access.budget is not None
    assert task.eps is not None
    eps, (channels, height, width) = task.eps, clean.shape
    rng = np.random.default_rng(np.frombuffer(task.key, dtype=np.uint32))

    def place(size: int) -> tuple[slice, slice, slice]:
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        return slice(None), slice(top, top + size), slice(left, left + size)

    def bump(size: int) -> np.ndarray:
        """A positive and a negative hill, for each channel with a sign of its own, of l2 norm 1."""
        flat = _hills(size).T if rng.random() < 0.5 else _hills(size)
        signed: np.ndarray = flat * rng.choice([-1.0, 1.0], size=(channels, 1, 1))
        return signed

    def moved(delta: np.ndarray) -> np.ndarray:
        image: np.ndarray = np.clip(clean + eps * delta / np.linalg.norm(delta), 0, 1).astype(np.float32)
        return image

    def margin(image: np.ndarray) -> float:
        scores = _logarithms(chase(image[None]))[0]
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
        free = max(0.0, eps**2 - float((delta**2).sum())) / channels  # what clipping left unused
        mass = np.sqrt(free + (delta**2 * either).sum((1, 2), keepdims=True))
        new = bump(size) + there / np.maximum(1e-10, np.sqrt((there**2).sum((1, 2), keepdims=True)))
        new *= mass / np.maximum(1e-10, np.sqrt((new**2).sum((1, 2), keepdims=True)))
        delta[emptied] = 0.0
        delta[to] = new
        if not delta.any():
            continue
        tried = moved(delta)
        found = margin(tried)
        if found < lowest:
            held, lowest = tried, found


def _hills(size: int) -> np.ndarray:
    """The paper's eta ``(size, size)``: concentric rectangles of falling height, the lower half negative, norm 1."""

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
