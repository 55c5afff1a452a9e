"""A worker of a cluster: builds its pipeline once, refuses another one than the driver's, and answers images.

The records come from :func:`certify.runs.runner.answered`, as on a single machine. This module does not import torch:
modules that do are loaded when the pipeline is built, after the version of this package has been compared.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify import __version__
from certify.errors import CertifyError, ImageError, RunFault, UserError, first_line
from certify.runs.identity import FINGERPRINT, same_answers

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from certify.engine.execution import Execution
    from certify.engine.noisy_classifier import NoisyClassifier
    from certify.runs.config import Circumstances, Settings
    from certify.runs.records import ImageRow

Line = tuple[int, "ImageRow"]
"""An image's place among the chosen images, and its row of the run file."""

SAME = ("device", "accelerator", "torch")
"""Facts that shape the noise or the arithmetic: equal on all workers of a run."""


class Unfit(RunFault):
    """This machine cannot take part in the run; others may."""


@dataclass(frozen=True, eq=False)
class WorkItem:
    """An image for a worker, as its source gave it: the file's bytes, or an array.

    Attributes:
        place: among the chosen images.
        id: names its noise streams.
        label: its class, or None.
        raw: its content; None where it could not be read.
        error: the reason for that.
    """

    place: int
    id: str
    label: int | None
    raw: bytes | np.ndarray | None
    error: str = ""


@dataclass(frozen=True)
class WorkerSpec:
    """Specification of a worker.

    Attributes:
        build: makes its engine; a function that a module holds, so that the worker's own code runs.
        folder: the driver's working folder, to which paths are relative, if the worker has it too.
        code: the driver's :func:`code_identity`.
        steps: the driver's pipeline with its hashes.
        sent: True if a classifier or denoiser is sent as an object, with the driver's own code.
        threads: of the processor that it uses; None leaves it to torch.
    """

    build: Callable[[], WorkerEngine]
    folder: str
    code: Mapping[str, str]
    steps: Sequence[Mapping[str, Any]]
    sent: bool = False
    threads: int | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Execution settings of all workers.

    Attributes:
        execution: the settings.
        example: an image ``(C, H, W)`` to prepare them with.
        facts: of the worker on which they were chosen.
    """

    execution: Execution
    example: np.ndarray
    facts: Circumstances


class WorkerEngine:
    """Answers images with a smoothed classifier.

    Args:
        load: makes the smoothed classifier, from weights that this machine can read.
    """

    def __init__(self, load: Callable[[], NoisyClassifier]) -> None:
        self._smoothed = load()

    def describe(self) -> Sequence[Mapping[str, Any]]:
        """Return the pipeline's steps, with hashes of what was loaded here, as in the run file's header."""
        return self._smoothed.base.record()

    def facts(self) -> Circumstances:
        """Return device, versions and machine, as in the run file's header."""
        from certify.runs.config import circumstances

        return circumstances(self._smoothed.device)

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
        from certify.runs.runner import Task, answered

        tasks = (Task(item.place, item.id, item.label, functools.partial(self._load, item)) for item in items)
        return list(answered(self._smoothed, tasks, settings))

    def _load(self, item: WorkItem) -> Tensor:
        from certify.images.preprocess import preprocess

        if item.raw is None:
            raise ImageError(item.error)
        raw = item.raw if isinstance(item.raw, bytes) else item.raw.copy()  # arrays from Ray's store are read-only
        return self._smoothed.check(preprocess(raw, self._smoothed.classifier.input))  # type: ignore[attr-defined]

    def _checked(self, image: np.ndarray) -> Tensor:
        return self._smoothed.check(image.copy())


def build_engine(load: Callable[[str], NoisyClassifier], device: str) -> WorkerEngine:
    """Build the engine of a worker, which loads the smoothed classifier itself."""
    return WorkerEngine(lambda: load(device))


class Worker:
    """A Ray actor. Ray restarts it when its process dies; whatever it needs is then built and checked again."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._name = f"the worker on {socket.gethostname()} (process {os.getpid()})"
        self._built: WorkerEngine | None = None
        self._facts: Circumstances | None = None
        self._prepared: Execution | None = None

    def start(self) -> tuple[str, Circumstances]:
        """Build the pipeline; return the worker's name for messages, and the facts of its machine.

        Raises:
            UserError: another version of this package, or another pipeline than the driver's.
            Unfit: the pipeline cannot be built here.
        """
        self._engine()
        assert self._facts is not None
        return self._name, self._facts

    def prepare(self, image: np.ndarray, samples: int, execution: Execution | None) -> Execution:
        """Choose how to run the base classifier for this many samples, or run it as ``execution`` says."""
        self._prepared = self._engine().prepare(image, samples, execution)
        return self._prepared

    def ask(self, method: str, plan: Plan, *arguments: Any) -> Any:
        """Call a method of the :class:`WorkerEngine`, run as planned.

        Raises:
            Unfit: this machine cannot run the base classifier as planned.
            CertifyError: the method failed.
        """
        try:
            self._follow(plan)
            return getattr(self._engine(), method)(*arguments)
        except CertifyError:
            raise
        except Exception as error:  # its own class may not exist on the driver
            raise RunFault(f"{type(error).__name__}: {first_line(error)}") from error

    def answer(self, items: Sequence[WorkItem], settings: Settings, plan: Plan) -> list[Line]:
        """Return the lines of these images; errors as for :meth:`ask`."""
        lines: list[Line] = self.ask("answer", plan, items, settings)
        return lines

    def _engine(self) -> WorkerEngine:
        """Return the engine; the first time, build it and compare it with the driver's."""
        if self._built is None:
            if refused := other_code(self._spec.code, code_identity(), self._name):
                raise UserError(refused)
            with contextlib.suppress(OSError):  # not there: absolute names and names of models still work
                os.chdir(self._spec.folder)
            if self._spec.threads is not None:
                import torch

                torch.set_num_threads(self._spec.threads)
            try:
                engine = self._spec.build()
            except CertifyError as error:  # no such file here, no such device
                raise Unfit(str(error)) from error
            if refused := other_weights(self._spec.steps, engine.describe(), self._name, sent=self._spec.sent):
                raise UserError(refused)
            self._built, self._facts = engine, engine.facts()
        return self._built

    def _follow(self, plan: Plan) -> None:
        self._engine()
        for key in SAME:
            there, others = getattr(self._facts, key), getattr(plan.facts, key)
            if there != others:
                raise Unfit(f"{key} {there} there, {others} on the others")
        if self._prepared is None or not self._prepared.runs_like(plan.execution):
            real = self.prepare(plan.example, 1, plan.execution)
            if not real.runs_like(plan.execution):
                raise Unfit(f"it can only run as {real.describe()} ({real.why[-1]})")


def code_identity() -> dict[str, str]:
    """Return the version and a hash of the code that shapes the records: this package's and the denoisers' modules."""
    total = hashlib.sha256()
    for package in ("certify", "denoisers"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            for path in sorted(Path(folder).rglob("*.py")):
                total.update(f"{package}/{path.relative_to(folder).as_posix()}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return {"certify": __version__, "code": total.hexdigest()[:12]}


def other_code(driver: Mapping[str, str], worker: Mapping[str, str], name: str) -> str:
    """Return why the worker of this name has other code than the driver; empty if it is the same."""
    if driver == worker:
        return ""
    return (
        f"{name} runs certify-toolkit {worker['certify']} (code {worker['code']}), this driver {driver['certify']} "
        f"(code {driver['code']}): install the same version on every machine"
    )


def other_weights(
    driver: Sequence[Mapping[str, Any]], worker: Sequence[Mapping[str, Any]], name: str, *, sent: bool = False
) -> str:
    """Return why the worker of this name has another pipeline than the driver; empty if it is the same.

    Args:
        driver: the driver's steps.
        worker: those of the worker.
        name: of the worker.
        sent: do not compare files of code: the driver has sent the object itself.
    """
    if len(driver) != len(worker):
        return f"{name} has a pipeline of {len(worker)} steps, this driver one of {len(driver)}"
    for own, other in zip(driver, worker, strict=True):
        for key in sorted(own.keys() | other.keys(), key=lambda key: key not in ("sha256", "code_sha256")):
            same = key == FINGERPRINT and same_answers(own.get(key), other.get(key))
            if same or (sent and key == "code_sha256"):
                continue
            if key == FINGERPRINT:
                return (
                    f"{name} gives other answers of {own['step']} {own['name']} to the same probe images than this "
                    "driver: give every machine the same code, and the same files that it reads"
                )
            if own.get(key) != other.get(key):
                what = {"sha256": "weights", "code_sha256": "code"}.get(key, key)
                mine, theirs = str(own.get(key))[:16], str(other.get(key))[:16]
                return (
                    f"{name} has other {what} of {own['step']} {own['name']} ({theirs}) than this driver ({mine}): "
                    "give every machine the same file"
                )
    return ""
