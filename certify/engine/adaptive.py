"""As few samples as it takes: images share batches, undecided ones go on, each stops as soon as it is settled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from certify.engine.monte_carlo import Job, Tally
from certify.errors import UserError
from certify.smoothing.certificates import (
    certificate_from_votes,
    check_counts,
    decision_from_counts,
    largest_radius,
    needed,
)
from certify.smoothing.numeric import as_float, as_int
from certify.smoothing.rng import block_size
from certify.smoothing.stopping_rules import MEASURING_BOUND, betting_upper, thresholds
from certify.types import ABSTAIN, Certificate, Decision, Radii, Votes

LEAST = 16  # samples of an image's first piece
_TURN = 4  # rounds of which one begins with the image that has waited longest
_HARD = 8  # images with as much work as this share of a batch that may keep new ones waiting
_CHOICE = 2  # batches of pieces to fill one from
_FULL = 0.9  # of a round's batches, at least, while there is work to fill them with
_OPEN_BYTES = 2**30  # of images that wait for more samples, with a block of noise each

Label = Callable[[Iterable[Job]], Iterator[Tally]]


class Watch(Protocol):
    """The votes of one image so far, and when they are enough. What it does depends on these votes alone."""

    drawn: int
    """Samples that were labelled."""
    want: int
    """Samples to label next; 0 when the image is settled."""

    def add(self, labels: np.ndarray) -> None:
        """Take the labels of the next samples, int64, failures below 0."""
        ...

    def result(self) -> Any:
        """What the votes so far say."""
        ...


@dataclass(eq=False)
class _Counts:
    """Votes for each class so far; room for further classes is made when a label first names one."""

    num_classes: int
    by_class: np.ndarray = field(init=False)
    seen: int = 0

    def __post_init__(self) -> None:
        self.by_class = np.zeros(self.num_classes, dtype=np.int64)

    def leading(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """After each of these labels the largest count so far, and the class that has it."""
        self._make_room(labels)
        classes = np.union1d(np.flatnonzero(self.by_class), labels[labels >= 0])
        if not len(classes):
            return np.zeros(len(labels), dtype=np.int64), np.full(len(labels), ABSTAIN)
        counts = self.by_class[classes, None] + np.cumsum(labels[None, :] == classes[:, None], axis=1)
        return counts.max(axis=0), classes[counts.argmax(axis=0)]

    def add(self, labels: np.ndarray) -> None:
        self._make_room(labels)
        self.by_class += np.bincount(labels[labels >= 0], minlength=len(self.by_class))
        self.seen += len(labels)

    def _make_room(self, labels: np.ndarray) -> None:
        more = int(labels.max(initial=-1)) + 1 - len(self.by_class)
        if more > 0:
            self.by_class = np.pad(self.by_class, (0, more))

    def votes(self) -> Votes:
        return Votes(tuple(self.by_class.tolist()), self.seen - int(self.by_class.sum()))


class Deciding:
    """Stops when every radius is settled: robust, or not certifiable (:mod:`certify.smoothing.stopping_rules`).

    Args:
        num_classes: K; of an open vocabulary, the classes that are known at first (1 at least).
        n: the most samples.
        radii: ascending, in the noise's norm.
        noise: the smoothing distribution.
        alpha: probability that anything that is settled is wrong, at most.
        rule: name of the stopping rule.
    """

    def __init__(
        self, num_classes: int, *, n: int, radii: Sequence[float], noise: Radii, alpha: float, rule: str
    ) -> None:
        n, _, alpha = check_counts(n, 1, alpha)
        self._p0s, level = needed(radii, noise, alpha, rule)
        self._tables = [thresholds(rule, p0, level, n) for p0 in self._p0s]
        self._n, self._radii, self._noise, self._alpha, self._rule = n, tuple(radii), noise, alpha, rule
        self._counts = _Counts(num_classes)
        self._looks: list[tuple[int, int, int] | None] = [None] * len(self._p0s)
        self.drawn = 0
        self.want = self._next()

    def _next(self) -> int:
        """What settles the open radii if the votes go on as they began, in pieces of a sixteenth to a quarter."""
        seen, most = self._counts.seen, int(self._counts.by_class.max())
        left = self._n - seen
        if None not in self._looks or not left:
            return 0
        if not seen:
            return min(left, LEAST)
        least, reach = max(LEAST // 2, seen // 16), max(2 * LEAST, seen // 4)
        ahead = slice(seen + 1, seen + reach + 1)
        soonest = reach
        for p0, table, look in zip(self._p0s, self._tables, self._looks, strict=True):
            if look is None:
                there, agreeing = table.until(seen + reach), most + np.arange(1, reach + 1)
                settled = agreeing >= there.up[ahead] if most >= p0 * seen else most <= there.low[ahead]
                soonest = min(soonest, int(settled.argmax()) + 1) if settled.any() else soonest
        return min(left, max(least, soonest))

    def add(self, labels: np.ndarray) -> None:
        """Look after every sample; what comes after the last look is ignored."""
        self.drawn += len(labels)
        counts, seen = self._counts, self._counts.seen
        largest, leaders = counts.leading(labels)
        for j, table in enumerate(self._tables):
            if self._looks[j] is not None:
                continue
            there = table.until(seen + len(labels))
            span = slice(seen + 1, seen + len(labels) + 1)
            hits = np.flatnonzero((largest >= there.up[span]) | (largest <= there.low[span]))
            if len(hits):
                at = int(hits[0])
                self._looks[j] = int(leaders[at]), int(largest[at]), seen + at + 1
        looks = [look for look in self._looks if look is not None]
        used = max(trials for *_, trials in looks) - seen if len(looks) == len(self._looks) else len(labels)
        counts.add(labels[:used])
        self.want = self._next()

    def result(self) -> Decision:
        """What is settled."""
        votes = self._counts.votes()
        (leader,) = votes.leading()
        last = leader, votes.counts[leader], votes.trials
        return decision_from_counts(
            [look or last for look in self._looks],
            votes,
            radii=self._radii,
            noise=self._noise,
            alpha=self._alpha,
            rule=self._rule,
            drawn=self.drawn,
        )


class Measuring:
    """Stops when the radius is known to a relative tolerance, or the image certainly has none.

    The radius comes from the betting rule's lower bound, the largest it can still be from its upper bound and from n.

    Args:
        num_classes: as of :class:`Deciding`.
        n: the most samples.
        tolerance: in (0, 1): the radius is at least 1 - tolerance of what it can still be.
        noise: the smoothing distribution.
        alpha: probability that the radius is wrong, at most.
    """

    def __init__(self, num_classes: int, *, n: int, tolerance: float, noise: Radii, alpha: float) -> None:
        n, _, alpha = check_counts(n, 1, alpha)
        tolerance = as_float(tolerance, "tolerance", "a share between 0 and 1, such as 0.1")
        if not 0 < tolerance < 1:  # NaN is refused too
            raise UserError(f"tolerance {tolerance:g}: expected a share between 0 and 1, such as 0.1")
        self._n, self._tolerance, self._noise, self._alpha = n, tolerance, noise, alpha
        self._cap = largest_radius(noise, n, alpha, MEASURING_BOUND, selected=False)
        self._counts = _Counts(num_classes)
        self.drawn = 0
        self.want = min(n, 4 * LEAST)

    def add(self, labels: np.ndarray) -> None:
        """All labels count; then look."""
        self.drawn += len(labels)
        self._counts.add(labels)
        more = max(4 * LEAST, self._counts.seen // 8)  # looked at after each piece
        self.want = 0 if self._known() else min(self._n - self._counts.seen, more)

    def _known(self) -> bool:
        upper = betting_upper(int(self._counts.by_class.max()), self._counts.seen, self._alpha / 2)
        if upper <= 0.5:
            return True
        certificate, possible = self.result(), min(self._noise.radius(min(upper, 1 - 1e-15)), self._cap)
        return not certificate.abstained and certificate.radius >= (1.0 - self._tolerance) * possible

    def result(self) -> Certificate:
        """The radius that the votes so far prove."""
        votes = self._counts.votes()
        return certificate_from_votes(Votes(()), votes, noise=self._noise, alpha=self._alpha, bound=MEASURING_BOUND)


class Counting:
    """Stops after n samples: for a bound at a fixed n, where images come and go.

    Args:
        num_classes: K.
        n: samples, at least 1.
        piece: samples to label at a time, at most.
    """

    def __init__(self, num_classes: int, *, n: int, piece: int) -> None:
        self._counts, self._n, self._piece = _Counts(num_classes), as_int(n, "n"), as_int(piece, "piece")
        self.drawn = 0
        self.want = min(self._n, self._piece)

    def add(self, labels: np.ndarray) -> None:
        """All labels count."""
        self.drawn += len(labels)
        self._counts.add(labels)
        self.want = min(self._n - self.drawn, self._piece)

    def result(self) -> Votes:
        """The votes so far."""
        return self._counts.votes()


@dataclass(eq=False)
class _Open:
    """An image in work."""

    index: int
    job: Job
    watch: Watch
    clean: int | None = None
    first: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.job.image.nbytes * (1 + block_size(self.job.image.numel()))


@dataclass(frozen=True, eq=False)
class Settled:
    """An image that is done.

    Attributes:
        index: its place among the images.
        watch: with its result.
        clean: its label without noise; None where that was not wanted.
        labels: its first labels: those of its first piece, ``keep`` at most.
    """

    index: int
    watch: Watch
    clean: int | None
    labels: Tensor


def settle(
    label: Label,
    images: Iterable[tuple[Tensor, bytes] | None],
    watch: Callable[[Tensor], Watch],
    *,
    batch_size: int,
    keep: int = 0,
    clean: bool = True,
    in_order: bool = False,
) -> Iterator[Settled]:
    """Label samples of all images until each is settled; as they are settled, not in their order.

    Work goes in rounds of one batch or a few: pieces of the images in work, those with the fewest samples first. New
    images are opened while a round has room; a few hard ones, which want more than a batch, do not keep them waiting.
    Every fourth round begins with the oldest image, so that new ones without end do not keep hard ones waiting either.
    What is settled about an image does not depend on the others.

    Args:
        label: :func:`certify.engine.monte_carlo.count_votes` with everything but its jobs.
        images: on the device, with their noise streams; pulled as they are opened. None: there is none now, but there
            may be after the next round.
        watch: makes the watch of an image, right after that image was pulled.
        batch_size: samples of a round, about.
        keep: how many first labels to keep.
        clean: whether to label images without noise too.
        in_order: finish images one after another: the first always come first, and another is opened only where those
            in work want less than a batch. For labels that may run out: what is begun and not finished was for little.
    """
    queue = iter(images)
    opened_so_far = itertools.count()
    work: list[_Open] = []
    more, turn = True, 0
    while True:
        work.sort(key=lambda image: image.watch.drawn)
        most, enough = (batch_size, batch_size) if in_order else (max(1, batch_size // _HARD), _CHOICE * batch_size)
        planned = sum(min(most, image.watch.want) for image in work)
        held = sum(image.nbytes for image in work)
        while more and planned < enough and (held < _OPEN_BYTES or not work):
            try:
                found = next(queue)
            except StopIteration:
                more = False
                break
            if found is None:
                break
            opened = _Open(next(opened_so_far), Job(found[0], found[1], 1, drawn={}), watch(found[0]))
            work.insert(0, opened)
            planned, held = planned + min(most, opened.watch.want), held + opened.nbytes
        if not work:
            if more:
                continue
            return
        turn += 1
        if in_order or turn % _TURN == 0:
            work.sort(key=lambda image: image.index)
        chosen = _filling(work, batch_size, clean)
        _round(label, chosen, keep, clean)
        for image in [image for image in chosen if not image.watch.want]:
            work.remove(image)
            assert image.first is not None
            yield Settled(image.index, image.watch, image.clean, image.first)


def _filling(work: Sequence[_Open], batch_size: int, clean: bool) -> list[_Open]:
    """The first of the images in work, and others until their next pieces fill whole batches, nearly.

    A batch costs a compiled classifier the same whether it is full or not, and pieces are not cut: where one ends
    depends on its image alone.
    """
    chosen: list[_Open] = []
    rest, total, room = list(work), 0, 0
    while rest and (not chosen or total < _FULL * room):
        left = []
        for image in rest:
            samples = image.watch.want + (clean and image.clean is None)
            if image is rest[0]:  # whatever it takes
                room = -(-(total + samples) // batch_size) * batch_size
            if total + samples <= room:
                chosen.append(image)
                total += samples
            else:
                left.append(image)
        rest = left
    return chosen


def _round(label: Label, chosen: Sequence[_Open], keep: int, clean: bool) -> None:
    """One piece of each of these images; of a new one its label without noise too, if wanted."""

    def jobs() -> Iterator[Job]:
        for image in chosen:
            if clean and image.clean is None:
                yield Job(image.job.image, None, 1, keep=1)
            want = image.watch.want
            yield replace(image.job, trials=want, keep=want, start=image.watch.drawn)

    tallies = label(jobs())
    for image in chosen:  # a job is pulled before its tally is there, so it saw the image as it is here
        if clean and image.clean is None:
            image.clean = int(next(tallies).labels[0])
        labels = next(tallies).labels
        image.first = labels[:keep] if image.first is None else image.first
        image.watch.add(labels.numpy())
