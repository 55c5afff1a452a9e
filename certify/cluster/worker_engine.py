"""A smoothed classifier on a worker: the same pure functions and the same record as on a single machine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from certify.errors import ImageError
from certify.images.preprocess import preprocess
from certify.runs.config import circumstances
from certify.runs.runner import Task, answered

if TYPE_CHECKING:
    from torch import Tensor

    from certify.cluster.worker import Line, WorkItem
    from certify.engine.execution import Execution
    from certify.engine.noisy_classifier import NoisyClassifier
    from certify.runs.config import Settings


class WorkerEngine:
    """Answers images with a smoothed classifier.

    Args:
        load: makes the smoothed classifier, from weights that this machine can read.
    """

    def __init__(self, load: Callable[[], NoisyClassifier]) -> None:
        self._smoothed = load()

    def describe(self) -> list[dict[str, Any]]:
        """Return the pipeline's steps, with hashes of what was loaded here, as in the run file's header."""
        return self._smoothed.base.record()

    def facts(self) -> dict[str, Any]:
        """Return device, versions and machine, as in the run file's header."""
        return vars(circumstances(self._smoothed.device))

    def prepare(self, image: np.ndarray, samples: int, execution: Execution | None) -> Execution:
        """Choose how to run the base classifier: :meth:`certify.engine.noisy_classifier.NoisyClassifier.prepare`."""
        return self._smoothed.prepare(self._checked(image), samples, execution)

    def measure_rate(self, image: np.ndarray) -> float:
        """Measure the samples per second, once prepared."""
        return self._smoothed.measure_rate(self._checked(image))

    def base_labels(self, images: Sequence[np.ndarray]) -> list[int]:
        """Return labels of images without noise."""
        return self._smoothed.base_labels(map(self._checked, images))

    def answer(self, items: Sequence[WorkItem], settings: Settings) -> list[Line]:
        """Return the lines of these images."""
        tasks = (Task(item.place, item.id, item.label, functools.partial(self._load, item)) for item in items)
        return list(answered(self._smoothed, tasks, settings))

    def _load(self, item: WorkItem) -> Tensor:
        if item.raw is None:
            raise ImageError(item.error)
        raw = item.raw if isinstance(item.raw, bytes) else np.array(item.raw)  # arrays from Ray's store are read-only
        return self._smoothed.check(preprocess(raw, self._smoothed.classifier.input))  # type: ignore[attr-defined]

    def _checked(self, image: np.ndarray) -> Tensor:
        return self._smoothed.check(np.array(image))
