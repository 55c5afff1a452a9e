"""Sequential sampling: images share batches, and an image leaves as soon as its test is settled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from certify.engine.monte_carlo import Job, Tally
from certify.smoothing.rng import block_size
from certify.smoothing.sequential_tests import SequentialTest

_OLDEST_FIRST = 4  # every fourth round begins with the image that has waited longest
_HARD_SHARE = 8  # an open image counts for at most this fraction of a batch when new ones are opened
_CANDIDATES = 2  # batches of pieces from which a round is filled
_FILL = 0.9  # minimum fill of a round's batches while there is work
_OPEN_BYTES = 2**30  # of open images, with a block of noise each

Label = Callable[[Iterable[Job]], Iterator[Tally]]


@dataclass(frozen=True, eq=False)
class Sampling:
    """One image to sample until its test is settled.

    Attributes:
        image: ``(C, H, W)``, on the device.
        key: the noise stream.
        test: requests the number of samples to label next.
        tag: returned with the result.
        once: as for :class:`~certify.engine.monte_carlo.Job`; the test then requests all samples at once.
    """

    image: Tensor
    key: bytes
    test: SequentialTest
    tag: Any = None
    once: bool = False


@dataclass(frozen=True, eq=False)
class Settled:
    """An image whose test is settled.

    Attributes:
        tag: of its :class:`Sampling`.
        test: with its result.
        clean: its label without noise; None if that was not requested.
        labels: its first labels: those of its first piece, at most ``keep``.
    """

    tag: Any
    test: SequentialTest
    clean: int | None
    labels: Tensor


@dataclass(eq=False)
class _Open:
    """An image being sampled."""

    index: int
    tag: Any
    job: Job
    test: SequentialTest
    clean: int | None = None
    first: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.job.image.nbytes * (1 + block_size(self.job.image.numel()))


def settle(
    label: Label,
    images: Iterable[Sampling | None],
    *,
    batch_size: int,
    keep: int = 0,
    clean: bool = True,
    in_order: bool = False,
) -> Iterator[Settled]:
    """Label samples of all images until each is settled, and yield images in the order in which they are settled.

    Work is done in rounds of one batch or a few: pieces of the open images, those with the fewest samples first. New
    images are opened while a round has room; hard ones, which need more than a batch, do not delay them. Every fourth
    round begins with the oldest image, so an endless supply of new ones does not delay hard ones either. The result for
    an image does not depend on the others.

    Args:
        label: :func:`certify.engine.monte_carlo.count_votes`, which lacks only its jobs.
        images: pulled as they are opened. None means that none is there now, but may be after the next round.
        batch_size: samples per round, approximately.
        keep: number of first labels to keep.
        clean: label images without noise too.
        in_order: finish the images in their order; another one is opened only if the open ones need less than a batch.
            For a limited budget, which unfinished images would waste.
    """
    queue = iter(images)
    opened_so_far = itertools.count()
    work: list[_Open] = []
    more, turn = True, 0
    while True:
        work.sort(key=lambda image: image.test.drawn)
        most, enough = (
            (batch_size, batch_size) if in_order else (max(1, batch_size // _HARD_SHARE), _CANDIDATES * batch_size)
        )
        planned = sum(min(most, image.test.pending) for image in work)
        held = sum(image.nbytes for image in work)
        while more and planned < enough and (held < _OPEN_BYTES or not work):
            try:
                new = next(queue)
            except StopIteration:
                more = False
                break
            if new is None:
                break
            job = Job(new.image, new.key, 1, drawn={}, once=new.once, tag=new.tag)
            opened = _Open(next(opened_so_far), new.tag, job, new.test)
            work.insert(0, opened)
            planned, held = planned + min(most, opened.test.pending), held + opened.nbytes
        if not work:
            if more:
                continue
            return
        turn += 1
        if in_order or turn % _OLDEST_FIRST == 0:
            work.sort(key=lambda image: image.index)
        chosen = _filling(work, batch_size, clean)
        _round(label, chosen, keep, clean)
        for image in [image for image in chosen if not image.test.pending]:
            work.remove(image)
            assert image.first is not None
            yield Settled(image.tag, image.test, image.clean, image.first)


def _filling(work: Sequence[_Open], batch_size: int, clean: bool) -> list[_Open]:
    """Return the first of the open images, and others until their next pieces nearly fill whole batches.

    A compiled classifier takes as long for a partly filled batch as for a full one. Pieces are not cut, since where one
    ends must depend on its image alone.
    """
    chosen: list[_Open] = []
    rest, total, room = list(work), 0, 0
    while rest and (not chosen or total < _FILL * room):
        left = []
        for image in rest:
            samples = image.test.pending + (clean and image.clean is None)
            if image is rest[0]:  # as many batches as it takes
                room = -(-(total + samples) // batch_size) * batch_size
            if total + samples <= room:
                chosen.append(image)
                total += samples
            else:
                left.append(image)
        rest = left
    return chosen


def _round(label: Label, chosen: Sequence[_Open], keep: int, clean: bool) -> None:
    """Label one piece of each of these images; new ones without noise too, if requested."""

    def jobs() -> Iterator[Job]:
        for image in chosen:
            if clean and image.clean is None:
                yield Job(image.job.image, None, 1, keep=1)
            trials = image.test.pending
            yield replace(image.job, trials=trials, keep=trials, start=image.test.drawn)

    tallies = label(jobs())
    for image in chosen:  # a job is pulled before its tally arrives, so it saw this state of the image
        if clean and image.clean is None:
            image.clean = int(next(tallies).labels[0])
        labels = next(tallies).labels
        image.first = labels[:keep] if image.first is None else image.first
        image.test.add(labels.numpy())
