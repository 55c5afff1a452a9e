"""A run: chosen images through the smoothed classifier into the run file.

Pure bookkeeping around :mod:`certify.engine.noisy_classifier`; the command line adds messages, a progress bar and
figures.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from certify.engine.adaptive import Deciding, Measuring, Watch
from certify.engine.monte_carlo import Tally
from certify.engine.noisy_classifier import NoisyClassifier, image_digest
from certify.errors import ImageError
from certify.images.dataset import ImageSet
from certify.models.labels import readable
from certify.runs.config import Settings
from certify.runs.image_rows import certified_row, decided_row, predicted_row, unusable_row
from certify.runs.run_file import RunFile
from certify.smoothing.certificates import certificate_from_votes, prediction_from_votes
from certify.smoothing.rng import bound_draw
from certify.types import Decision

_LOG = logging.getLogger("certify")


@dataclass(frozen=True, eq=False)
class Task:
    """One image that is owed.

    Attributes:
        place: its number among the chosen images, from 0.
        id: names its noise streams.
        label: its class, or None.
        load: gives the image ``(C, H, W)``, float32 in [0, 1]; raises :class:`ImageError` where it cannot be used.
    """

    place: int
    id: str
    label: int | None
    load: Callable[[], Tensor]


def process(
    smoothed: NoisyClassifier,
    images: ImageSet,
    settings: Settings,
    file: RunFile,
    *,
    places: Sequence[int] | None = None,
    strict: bool = False,
    progress: Callable[[int], None] | None = None,
    warn: Callable[[str], None] = _LOG.warning,
) -> None:
    """Certify (or predict, or decide) every image that the file does not hold yet, and append its line.

    An image that cannot be used is named, recorded with its ``error`` and counts as an abstention without trials; with
    ``strict`` it ends the run. ``progress`` is called with samples, or with images where they stop by themselves.
    ``places`` are those of the images that the file owes, all of them unless given.

    Raises:
        ImageError: with ``strict``, the first unusable image.
        RunFault: the run file cannot be written.
    """
    tasks = owed(images, file, places, strict=strict)
    for place, line in answered(smoothed, tasks, settings, strict=strict, progress=progress):
        store(file, place, line, warn)


def owed(
    images: ImageSet, file: RunFile, places: Sequence[int] | None = None, *, strict: bool = False
) -> Iterator[Task]:
    """The images that the file does not hold yet; with ``strict`` also those that it holds as unusable."""
    for place in range(len(images)) if places is None else places:
        item = images.items[place]
        known = file.done.get(item.id)
        if known is not None and not (strict and "error" in known):
            continue
        load = functools.partial(images.load, place) if known is None else functools.partial(_unusable_again, known)
        yield Task(place, item.id, images.labels[place], load)


def _unusable_again(known: Mapping[str, Any]) -> Tensor:
    raise ImageError(known["error"])


def store(file: RunFile, place: int, line: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Append one image's line; in a shard it says which place among all chosen images it has."""
    if "error" in line:
        warn(f"image {line['id']} {line['error']}; it is left out")
    file.append({**line, "place": place} if "shard" in file.header else line)


def refuse_unusable(task: Task, reason: object) -> ImageError:
    """What ``--strict`` says of the first image that cannot be used."""
    return ImageError(f"image {task.id} {reason}; drop --strict to go on without it")


def answered(
    smoothed: NoisyClassifier,
    tasks: Iterable[Task | None],
    settings: Settings,
    *,
    strict: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of these images, each with its place: in their order at a fixed n, else as images are settled.

    What a line says depends on its image alone, its ``seconds`` apart: not on the others, their order or the process.

    Args:
        smoothed: the smoothed classifier, prepared.
        tasks: pulled a few blocks of noise ahead. None, only where images stop by themselves: there is none now, but
            there may be after the next round.
        settings: of the run.
        strict: as for :func:`process`.
        progress: as for :func:`process`.
    """
    tell = progress or (lambda done: None)
    pulled: list[tuple[Task, Tensor | None]] = []  # the k-th image that was handed on, and its pixels until it is done
    unusable: deque[tuple[int, Task, ImageError]] = deque()  # and how many were handed on before it

    def usable() -> Iterator[tuple[Tensor, str] | None]:
        for task in tasks:
            if task is None:
                yield None
                continue
            try:
                image = smoothed.check(task.load())
            except ImageError as error:
                unusable.append((len(pulled), task, error))
                if strict:
                    return  # raised when the images before it are written
                continue
            pulled.append((task, image))
            yield image, task.id

    start = time.perf_counter()

    def line(task: Task, row: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        nonlocal start
        now = time.perf_counter()
        seconds = round(now - start, 6)
        start = now
        return task.place, {"id": task.id, "label": task.label, **row, "seconds": seconds}

    def unusable_before(handed: float) -> Iterator[tuple[int, dict[str, Any]]]:
        while unusable and unusable[0][0] <= handed:
            _, task, error = unusable.popleft()
            if strict:
                raise refuse_unusable(task, error) from None
            yield line(task, unusable_row(settings.procedure, str(error)))
            tell(1 if settings.adaptive else settings.samples)

    answers = _adaptive if settings.adaptive else _fixed
    for handed, clean, row, labels in answers(smoothed, usable(), settings, tell):
        task, image = pulled[handed]
        assert image is not None
        pulled[handed] = task, None
        yield from unusable_before(handed)
        found = row | _about(smoothed, image, clean, row["prediction"])
        if settings.compared(task.place) and smoothed.execution is not None and not smoothed.execution.plain:
            stage = next(iter(settings.stages))
            same = smoothed.agreement(image, labels, stage=stage, seed=settings.seed, image_id=task.id)
            found["agreement"] = [same, len(labels)]  # with plain float32, of the first stage's first labels
        yield line(task, found)
    yield from unusable_before(math.inf)


def _about(smoothed: NoisyClassifier, image: Tensor, clean: int, prediction: int) -> dict[str, Any]:
    """The keys that say which image it was, and what its classes are called."""
    names = getattr(smoothed.classifier, "class_names", None)
    return {
        "base": clean,
        "class": None if prediction < 0 else readable(names, prediction),
        "base_class": readable(names, clean),
        "image": image_digest(image),
        "values": image.numel(),
    }


Answer = tuple[int, int, dict[str, Any], Tensor]
"""An image's place among those handed on, its label without noise, its keys, its first labels."""


def _fixed(
    smoothed: NoisyClassifier,
    images: Iterable[tuple[Tensor, str] | None],
    settings: Settings,
    tell: Callable[[int], None],
) -> Iterator[Answer]:
    """Answers from as many samples for every image, in their order."""
    handed: list[tuple[str, int]] = []

    def noted() -> Iterator[tuple[Tensor, str]]:
        for found in images:
            assert found is not None  # a batch is filled from the next image, so there is no waiting for one
            image, name = found
            handed.append((name, image.numel()))
            yield image, name

    found = smoothed.tallies(noted(), settings.stages, seed=settings.seed, clean=True, progress=tell)
    for place, tallies in enumerate(found):
        row = _row(smoothed, tallies, settings, *handed[place])
        yield place, int(tallies["clean"].labels[0]), row, tallies[next(iter(settings.stages))].labels


def _row(
    smoothed: NoisyClassifier, tallies: Mapping[str, Tally], settings: Settings, image_id: str, values: int
) -> dict[str, Any]:
    if settings.procedure == "predict":
        return predicted_row(prediction_from_votes(tallies["prediction"].votes, alpha=settings.alpha))
    uniform = bound_draw(settings.seed, image_id)
    certificate = certificate_from_votes(
        tallies["selection"].votes,
        tallies["estimation"].votes,
        noise=smoothed.stated(values),
        alpha=settings.alpha,
        bound=settings.bound,
        uniform=uniform,
    )
    return certified_row(certificate) | {"uniform": uniform}


def _adaptive(
    smoothed: NoisyClassifier,
    images: Iterable[tuple[Tensor, str] | None],
    settings: Settings,
    tell: Callable[[int], None],
) -> Iterator[Answer]:
    """Answers from as many samples as each image takes, as they come."""

    def watch(image: Tensor) -> Watch:
        noise, classes = smoothed.stated(image.numel()), smoothed.num_classes
        n, alpha = settings.n, settings.alpha
        if settings.tolerance is not None:
            return Measuring(classes, n=n, tolerance=settings.tolerance, noise=noise, alpha=alpha)
        return Deciding(classes, n=n, radii=settings.radii, noise=noise, alpha=alpha, rule=settings.rule)

    found = smoothed.settled(images, watch, seed=settings.seed)
    for settled in found:
        result = settled.watch.result()
        row = decided_row(result) if isinstance(result, Decision) else certified_row(result)
        assert settled.clean is not None
        yield settled.index, settled.clean, row | {"drawn": settled.watch.drawn}, settled.labels
        tell(1)


def near_chance(correct: int, total: int, num_classes: int) -> bool:
    """Whether guessing explains this many right answers, while a classifier that is right half the time does not."""
    from scipy.special import bdtr, bdtrc

    guessing = float(bdtrc(correct - 1, total, 1.0 / num_classes)) if correct else 1.0
    half_right = float(bdtr(correct, total, 0.5))
    return guessing > 0.01 and half_right < 0.01
