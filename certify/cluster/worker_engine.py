"""A smoothed classifier on a worker: the same pure functions and the same record as on a single machine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from certify.errors import ImageError
from certify.images.preprocess import preprocess
from certify.runs.config import circumstances
from certify.runs.runner import Task, answered

if TYPE_CHECKING:
    from torch import Tensor

    from certify.cluster.worker import Line, Sent
    from certify.engine.execution import Execution
    from certify.engine.noisy_classifier import NoisyClassifier
    from certify.runs.config import Settings


class SmoothedStation:
    """Answers images with a smoothed classifier (:class:`certify.cluster.worker.Station`).

    Args:
        load: makes the smoothed classifier, from weights that this machine can read.
    """

    def __init__(self, load: Callable[[], NoisyClassifier]) -> None:
        self._smoothed = load()

    def describe(self) -> list[dict[str, Any]]:
        """The pipeline's steps, with hashes of what was loaded here."""
        return self._smoothed.base.record()

    def facts(self) -> dict[str, Any]:
        """Device, versions and machine."""
        return vars(circumstances(self._smoothed.device))

    def prepare(self, image: np.ndarray, samples: int, execution: Execution | None) -> Execution:
        """As :meth:`certify.engine.noisy_classifier.NoisyClassifier.prepare`."""
        return self._smoothed.prepare(np.array(image), samples, execution)

    def measure_rate(self, image: np.ndarray) -> float:
        """Samples a second, once prepared."""
        return self._smoothed.measure_rate(torch.from_numpy(np.array(image)))

    def base_labels(self, images: Sequence[np.ndarray]) -> list[int]:
        """Labels of images without noise."""
        return self._smoothed.base_labels([np.array(image) for image in images])

    def answered(self, sent: Iterable[Sent | None], settings: Settings) -> Iterator[Line]:
        """The lines of these images, as they are finished."""
        unusable = 0

        def load(image: Sent) -> Tensor:
            nonlocal unusable
            try:
                if image.raw is None:
                    raise ImageError(image.error)
                raw = image.raw if isinstance(image.raw, bytes) else np.array(image.raw)  # what Ray gives is read-only
                return self._smoothed.check(preprocess(raw, self._smoothed.classifier.input))  # type: ignore[attr-defined]
            except ImageError:
                unusable += 1
                raise

        def tasks() -> Iterator[Task | None]:
            for image in sent:
                if image is not None:
                    yield Task(image.place, image.id, image.label, functools.partial(load, image))
                elif unusable:
                    return  # its line is written at the end of a pass, which would wait for it
                else:
                    yield None

        yield from answered(self._smoothed, tasks(), settings)
