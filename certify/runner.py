"""A run: chosen images through the smoothed classifier into the run file.

Pure bookkeeping around :mod:`certify.sampling`; the command line adds words, a progress bar and pictures.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from certify.adaptive import Deciding, Measuring, Watch
from certify.certificates import certificate_from_votes, prediction_from_votes
from certify.errors import ImageError
from certify.images import ImageSet
from certify.labels import readable
from certify.records import RunFile
from certify.rows import certified_row, decided_row, predicted_row, unusable_row
from certify.sampling import NoisyClassifier, image_digest
from certify.settings import Settings
from certify.streams import bound_draw
from certify.types import Decision
from certify.votes import Tally

_LOG = logging.getLogger("certify")


def process(
    smoothed: NoisyClassifier,
    images: ImageSet,
    settings: Settings,
    file: RunFile,
    *,
    strict: bool = False,
    progress: Callable[[int], None] | None = None,
    warn: Callable[[str], None] = _LOG.warning,
) -> None:
    """Certify (or predict, or decide) every image that the file does not hold yet, and append its line.

    An image that cannot be used is named, recorded with its ``error`` and counts as an abstention without trials; with
    ``strict`` it ends the run. ``progress`` is called with samples, or with images where they stop by themselves.

    Raises:
        ImageError: with ``strict``, the first unusable image.
        RunFault: the run file cannot be written.
    """
    tell = progress or (lambda done: None)
    pulled: list[tuple[int, Tensor | None]] = []  # the k-th image that was handed on: its index, and itself until done
    unusable: list[tuple[int, ImageError]] = []

    def usable() -> Iterator[tuple[Tensor, str]]:
        for index, item in enumerate(images.items):
            known = file.done.get(item.id)
            if known is not None and not (strict and "error" in known):
                continue
            try:
                if known is not None:
                    raise ImageError(known["error"])
                image = smoothed.check(images.load(index))
            except ImageError as error:
                unusable.append((index, error))
                if strict:
                    return  # raised when the images before it are written
                continue
            pulled.append((index, image))
            yield image, item.id

    start = time.perf_counter()

    def write(index: int, row: Mapping[str, Any]) -> None:
        nonlocal start
        now = time.perf_counter()
        line = {"id": images.items[index].id, "label": images.labels[index], **row, "seconds": round(now - start, 6)}
        start = now
        file.append(line)

    def write_unusable(before: float) -> None:
        while unusable and unusable[0][0] < before:
            index, error = unusable.pop(0)
            if strict:
                raise ImageError(f"image {images.items[index].id} {error}; drop --strict to go on without it") from None
            warn(f"image {images.items[index].id} {error}; it is left out")
            write(index, unusable_row(settings.procedure, str(error)))
            tell(1 if settings.adaptive else settings.samples)

    answers = _adaptive if settings.adaptive else _fixed
    for place, clean, row, labels in answers(smoothed, usable(), settings, tell):
        index, image = pulled[place]
        assert image is not None
        pulled[place] = index, None
        write_unusable(index)
        line = row | _about(smoothed, image, clean, row["prediction"])
        if settings.compared(index) and smoothed.execution is not None and not smoothed.execution.plain:
            stage, name = next(iter(settings.stages)), images.items[index].id
            same = smoothed.agreement(image, labels, stage=stage, seed=settings.seed, image_id=name)
            line["agreement"] = [same, len(labels)]  # with plain float32, of the first stage's first labels
        write(index, line)
    write_unusable(len(images))


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
    smoothed: NoisyClassifier, images: Iterable[tuple[Tensor, str]], settings: Settings, tell: Callable[[int], None]
) -> Iterator[Answer]:
    """Answers from as many samples for every image, in their order."""
    handed: list[tuple[str, int]] = []

    def noted() -> Iterator[tuple[Tensor, str]]:
        for image, name in images:
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
    smoothed: NoisyClassifier, images: Iterable[tuple[Tensor, str]], settings: Settings, tell: Callable[[int], None]
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
