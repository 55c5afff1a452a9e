"""Certify, decide or predict the chosen images and append their rows to the run file.

Bookkeeping around :mod:`certify.engine.noisy_classifier`; the command line adds messages, a progress bar and figures.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from certify.engine.noisy_classifier import NoisyClassifier, Target, image_digest
from certify.errors import CertifyError, ImageError
from certify.images.dataset import ImageSet
from certify.models.labels import readable
from certify.runs.config import Settings
from certify.runs.records import ImageRow
from certify.runs.run_file import RunFile
from certify.smoothing.procedures import AnswerKeys, Sequential, draws_once, samples
from certify.smoothing.rng import bound_draw
from certify.types import Certificate

_LOG = logging.getLogger("certify")


@dataclass(frozen=True, eq=False)
class Task:
    """One image to do.

    Attributes:
        place: its number among the chosen images, from 0.
        id: key of its noise streams.
        label: its class, or None.
        load: returns the image as :meth:`NoisyClassifier.check` does; raises :class:`ImageError` if it cannot be used.
    """

    place: int
    id: str
    label: int | None
    load: Callable[[], Tensor]


class CheckedImages:
    """Chosen images as a smoothed classifier takes them; the first usable one is loaded and checked once.

    Args:
        smoothed: checks them.
        images: the chosen images.
    """

    def __init__(self, smoothed: NoisyClassifier, images: ImageSet) -> None:
        self._smoothed, self._images = smoothed, images
        self._place, self.first = -1, None
        for place in range(len(images)):
            with contextlib.suppress(CertifyError):
                image = images.load(place)
                break
        else:
            return
        self._place, self.first = place, smoothed.check(image)

    def load(self, place: int) -> Tensor:
        """Return an image as :meth:`NoisyClassifier.check` does.

        Raises:
            ImageError: it cannot be used.
        """
        if place == self._place and self.first is not None:
            return self.first
        return self._smoothed.check(self._images.load(place))


def process(
    smoothed: NoisyClassifier,
    images: ImageSet,
    settings: Settings,
    file: RunFile,
    *,
    places: Sequence[int] | None = None,
    strict: bool = False,
    progress: Callable[[int], object] | None = None,
    warn: Callable[[str], None] = _LOG.warning,
    load: Callable[[int], Tensor] | None = None,
) -> None:
    """Answer about every image that the file does not hold yet, and append its row.

    An image that cannot be used is reported, recorded with its ``error`` and counts as an abstention without trials;
    with ``strict`` it ends the run. ``progress`` is called with samples, or with images where they stop early.
    ``places`` are those of the images of the file, all of them by default; ``load`` is :meth:`CheckedImages.load`.

    Raises:
        ImageError: with ``strict``, the first unusable image.
        RunFault: the run file cannot be written.
    """
    load = load or CheckedImages(smoothed, images).load
    tasks = pending(images, file, load, places, strict=strict)
    for place, line in answered(smoothed, tasks, settings, strict=strict, progress=progress):
        store(file, place, line, warn)


def pending(
    images: ImageSet,
    file: RunFile,
    load: Callable[[int], Tensor],
    places: Sequence[int] | None = None,
    *,
    strict: bool = False,
) -> Iterator[Task]:
    """Yield the images that the file does not hold yet; with ``strict`` also those that it holds as unusable."""
    for place in range(len(images)) if places is None else places:
        item = images.items[place]
        known = file.done.get(item.id)
        if known is not None and not (strict and known.error is not None):
            continue
        read = functools.partial(load, place) if known is None else functools.partial(_unusable_again, known)
        yield Task(place, item.id, images.labels[place], read)


def _unusable_again(known: ImageRow) -> Tensor:
    raise ImageError(known.error or "")


def store(file: RunFile, place: int, row: ImageRow, warn: Callable[[str], None]) -> None:
    """Append one image's row, in a shard with its place among all chosen images."""
    if row.error is not None:
        warn(f"image {row.id} {row.error}; it is left out")
    file.append(row if file.header.shard is None else row.replace(place=place))


def refuse_unusable(task: Task, reason: object) -> ImageError:
    """Return the error of ``--strict`` about the first image that cannot be used."""
    return ImageError(f"image {task.id} {reason}; drop --strict to leave it out")


def answered(
    smoothed: NoisyClassifier,
    tasks: Iterable[Task],
    settings: Settings,
    *,
    strict: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, ImageRow]]:
    """Yield the rows of these images with their places: in order at a fixed n, else as images are settled.

    Except for its ``seconds``, a row depends on its image alone, not on the others, their order or the process.

    Args:
        smoothed: the smoothed classifier, prepared.
        tasks: pulled a few blocks of noise ahead.
        settings: of the run.
        strict: as for :func:`process`.
        progress: as for :func:`process`.
    """
    tell = progress or (lambda done: None)
    procedure = settings.procedure
    unusable: deque[tuple[int, Task, ImageError]] = deque()  # each with the number of tasks pulled before it

    def usable() -> Iterator[Target]:
        for order, task in enumerate(tasks):
            try:
                image = task.load()
            except ImageError as error:
                unusable.append((order, task, error))
                if strict:
                    return  # raised once the images before it are written
                continue
            yield Target(image, task.id, _Pulled(order, task))

    start = time.perf_counter()

    def since_last() -> float:
        nonlocal start
        before, start = start, time.perf_counter()
        return round(start - before, 6)

    def unusable_before(order: float) -> Iterator[tuple[int, ImageRow]]:
        while unusable and unusable[0][0] <= order:
            _, task, error = unusable.popleft()
            if strict:
                raise refuse_unusable(task, error) from None
            yield task.place, ImageRow.unusable(procedure, task.id, task.label, str(error), since_last())
            tell(1 if procedure.sequential else samples(procedure))

    answers = _sequential if isinstance(procedure, Sequential) else _fixed
    for target, clean, keys, labels in answers(smoothed, usable(), settings, tell):
        task, image = target.tag.task, target.image
        yield from unusable_before(target.tag.order)
        row = _with_provenance(ImageRow.of(task.id, task.label, keys), smoothed, image, clean)
        if settings.compared(task.place) and smoothed.execution is not None and not smoothed.execution.plain:
            stage = next(iter(procedure.stages))
            once = procedure.stages[stage] if draws_once(procedure) else None
            same = smoothed.agreement(image, labels, stage=stage, seed=settings.seed, image_id=task.id, once=once)
            row = row.replace(agreement=[same, len(labels)])  # with plain float32, of the first stage's first labels
        yield task.place, row.replace(seconds=since_last())
    yield from unusable_before(math.inf)


@dataclass(frozen=True, eq=False)
class _Pulled:
    """A task and its number among those pulled."""

    order: int
    task: Task


def _with_provenance(row: ImageRow, smoothed: NoisyClassifier, image: Tensor, clean: int) -> ImageRow:
    """Add the fields that identify the image and name its classes."""
    names = getattr(smoothed.classifier, "class_names", None)
    if smoothed.base.denoiser is not None:
        row = row.replace(alone=int(smoothed.classifier(image[None].to(smoothed.device))[0]))
    return row.replace(
        base=clean,
        class_name=None if row.abstained else readable(names, row.prediction),
        base_class=readable(names, clean),
        image=image_digest(image),
        size=image.numel(),
    )


Answered = tuple[Target, int, AnswerKeys, Tensor]
"""An image, its label without noise, the keys of its answer, and its first labels."""


def _fixed(
    smoothed: NoisyClassifier, images: Iterable[Target], settings: Settings, tell: Callable[[int], object]
) -> Iterator[Answered]:
    """Answer from the same number of samples for every image, in their order."""
    procedure, seed = settings.procedure, settings.seed
    sampled = smoothed.sample(
        images, procedure.stages, seed=seed, clean=True, once=draws_once(procedure), progress=tell
    )
    for target, tallies in sampled:
        uniform = bound_draw(seed, target.noise_name)
        votes = {stage: tallies[stage].votes for stage in procedure.stages}
        answer = procedure.answer(votes, smoothed.stated(target.image.numel()), uniform)
        keys = procedure.record(answer)
        if isinstance(answer, Certificate):
            keys |= AnswerKeys(uniform=uniform)
        yield target, int(tallies["clean"].labels[0]), keys, tallies[next(iter(procedure.stages))].labels


def _sequential(
    smoothed: NoisyClassifier, images: Iterable[Target], settings: Settings, tell: Callable[[int], object]
) -> Iterator[Answered]:
    """Answer from as many samples as each image needs, in the order in which they are settled."""
    procedure = settings.procedure
    assert isinstance(procedure, Sequential)
    test = functools.partial(procedure.test, smoothed.num_classes)
    for settled in smoothed.sample_until_settled(images, test, seed=settings.seed):
        target = settled.tag
        assert settled.clean is not None
        keys = procedure.record(settled.test.result()) | AnswerKeys(drawn=settled.test.drawn)
        yield target, settled.clean, keys, settled.labels
        tell(1)


def near_chance(correct: int, total: int, num_classes: int) -> bool:
    """Return True if so few correct answers fit guessing, but not a classifier that is right half the time."""
    from scipy.special import bdtr, bdtrc

    guessing = float(bdtrc(correct - 1, total, 1.0 / num_classes)) if correct else 1.0
    half_right = float(bdtr(correct, total, 0.5))
    return guessing > 0.01 and half_right < 0.01
