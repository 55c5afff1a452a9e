"""One run, from loaded objects to its finished file: header, execution settings, run file, sampling, rows.

``certify run``, ``certify predict`` and their functions in Python all call :func:`execute`; an :class:`Observer` sees
what happens on the way. Warnings are :class:`certify.errors.CertifyWarning`, which the command prints as lines.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from certify.engine.execution import Execution
from certify.engine.noisy_classifier import NoisyClassifier
from certify.errors import CertifyError, UserError, warn
from certify.images.dataset import ImageSet
from certify.runs.config import Circumstances, Settings, execution_of, run_header, with_execution
from certify.runs.progress import progress_bar
from certify.runs.records import RunHeader
from certify.runs.run_file import Run, RunFile, peek_header
from certify.runs.runner import CheckedImages, near_chance, process
from certify.runs.shards import Shard
from certify.smoothing.procedures import Certify, expected_samples, samples

_TRIED = 50  # images without noise at most, to check that labels and classifier agree


class Engine(Protocol):
    """Runs the base classifier: in this process, or on the workers of a cluster."""

    execution: Execution | None

    def prepare(self, image: Tensor, samples: int, execution: Execution | None = None) -> Execution:
        """Choose how to run it for this number of samples, or run it with the given settings."""
        ...

    def base_labels(self, images: Sequence[Tensor]) -> list[int] | None:
        """Return labels of images without noise; None if that is not possible here."""
        ...

    def measure_rate(self, image: Tensor) -> float | None:
        """Return samples per second of one device; None if that is not possible here."""
        ...


class Pool(Engine, Protocol):
    """The workers of a cluster."""

    def __len__(self) -> int: ...

    def facts(self) -> Circumstances:
        """Return device, versions and machine of the workers, for the header."""
        ...

    def where(self) -> str:
        """Return the number of workers and their device as text."""
        ...

    def process(
        self,
        images: ImageSet,
        settings: Settings,
        file: RunFile,
        *,
        places: Sequence[int],
        strict: bool,
        progress: Callable[[int], object],
        warn: Callable[[str], None],
    ) -> None:
        """Do the work of :func:`certify.runs.runner.process`; ``progress`` is called with images."""
        ...


class Observer:
    """Follows a run. Every method does nothing here, except that a progress bar is shown.

    Args:
        shown: how progress is shown, as for :func:`certify.runs.progress.progress_bar`.
    """

    def __init__(self, *, shown: bool | float = True) -> None:
        self.shown = shown

    def resolved(self, job: Job, header: RunHeader, image: Tensor | None) -> None:
        """Called with what the options mean and the first usable image, before anything is sampled."""

    def preparing(self) -> None:
        """Called before the way to run the base classifier is chosen, which may take a while."""

    def running(self, job: Job, execution: Execution, where: str) -> None:
        """Called with the execution settings; ``where`` describes the workers, if there are any."""

    def opened(self, file: RunFile, expected: int) -> None:
        """Called with the run file and the number of its images when it is finished."""

    def ready(self, job: Job, engine: Engine, image: Tensor, left: int, devices: int) -> None:
        """Called when the base classifier is prepared and ``left`` images are to be sampled on so many devices."""

    @contextlib.contextmanager
    def progress(self, total: int, unit: str, each: int = 1) -> Iterator[Callable[[int], object]]:
        """Enter the context of the sampling; it gives the function that is called with the number of units done."""
        with progress_bar(total, unit, shown=self.shown, each=each) as bar:
            yield bar.update

    def left_out(self, text: str) -> None:
        """Called with a line about each image that cannot be used."""


@dataclass(frozen=True, eq=False)
class Job:
    """A run to execute.

    Attributes:
        smoothed: the smoothed classifier.
        images: all chosen images.
        settings: the question, and the seed of the noise.
        model: name of the base classifier, for the record; so are the next two.
        data: name of the images.
        denoiser: name of the denoiser.
        shard: the part of the images to process; None: all of them.
        workers: starts the workers of a cluster for this many images; None: this process does the work.
        strict: stop at the first image that cannot be used.
        trust_identity: resume a file that cannot prove that its model is still the same.
        dry: stop before anything is written or certified, after ``Observer.ready``.
    """

    smoothed: NoisyClassifier
    images: ImageSet
    settings: Settings
    model: str
    data: str
    denoiser: str
    shard: Shard | None = None
    workers: Callable[[int], AbstractContextManager[Pool]] | None = None
    strict: bool = False
    trust_identity: bool = False
    dry: bool = False

    @property
    def places(self) -> Sequence[int]:
        """The indices of the images to process."""
        return range(len(self.images)) if self.shard is None else self.shard.places(len(self.images))

    @property
    def work(self) -> int:
        """Samples to expect, in the largest shard: alike in all shards, and so the execution settings."""
        count = len(self.images) if self.shard is None else self.shard.largest(len(self.images))
        return count * expected_samples(self.settings.procedure)


def execute(job: Job, path: Callable[[RunHeader], Path], *, command: str, observer: Observer) -> Run:
    """Do a run, or resume the one that its file holds.

    Args:
        job: the run.
        path: gives the run file for a header.
        command: for the record.
        observer: follows the run.

    Returns:
        The run, in the order in which its images were finished.

    Raises:
        UserError: settings that contradict each other, or a file of another run.
        RunFault: the base classifier failed, or the file cannot be written; what it holds is kept.
    """
    smoothed, images, settings, places = job.smoothed, job.images, job.settings, job.places
    checked = CheckedImages(smoothed, images)
    first = checked.first
    header = run_header(
        smoothed, images, settings, model=job.model, data=job.data, denoiser=job.denoiser, command=command
    )
    if first is not None and any("fingerprint" in step for step in header.pipeline):
        smoothed.check_contract(first)  # before fingerprints are compared: randomness would look like another model
    with contextlib.nullcontext() if job.workers is None else job.workers(len(places)) as pool:
        header = header if pool is None else header.replace(**vars(pool.facts()))
        header = header if job.shard is None else job.shard.header(header)
        target = path(header)
        observer.resolved(job, header, first)
        _warn_of_settings(job, first)
        engine: Engine = smoothed if pool is None else pool
        execution = _execution(job, engine, first, target, observer)
        if execution is not None:
            observer.running(job, execution, "" if pool is None else pool.where())
            header = with_execution(header, execution)
        devices = 1 if pool is None else len(pool)
        ready = functools.partial(_make_ready, job, engine, execution, checked, observer, devices)
        if job.dry:
            run = Run.read(target, allow_partial=True) if target.exists() else Run(target, header)
            ready(target, len(places) - len(run.images))
            return run
        with RunFile(target, header, trust_identity=job.trust_identity) as file:
            observer.opened(file, len(places))
            left = len(places) - len(file.done)
            ready(file.path, left)
            by_image = settings.procedure.sequential or pool is not None
            each = 1 if by_image else samples(settings.procedure)
            work = functools.partial(process, smoothed, load=checked.load) if pool is None else pool.process
            with observer.progress(left * each, "images" if by_image else "samples", each) as advance:
                work(images, settings, file, places=places, strict=job.strict, progress=advance, warn=observer.left_out)
            return Run(file.path, file.header, list(file.done.values()))


def _make_ready(
    job: Job,
    engine: Engine,
    execution: Execution | None,
    checked: CheckedImages,
    observer: Observer,
    devices: int,
    path: Path,
    left: int,
) -> None:
    """Check the base classifier and report the cost, if ``left`` images of the run file are to be sampled."""
    if left > 0 and checked.first is not None and execution is not None:
        if engine.execution is None:
            _run_like(engine, checked.first, execution, path)
        _check_base(engine, job.smoothed, job.images, checked)
        observer.ready(job, engine, checked.first, left, devices)


def run_words(header: RunHeader) -> list[str]:
    """Return the words of a run file's name."""
    words = [Path(header.model).stem, Path(header.data).stem, f"sigma{header.sigma:g}", f"n{header.n}"]
    words = words if header.kind == Certify.kind else [header.kind, *words]
    return words if header.shard is None else [*words, f"shard{header.shard.index}of{header.shard.of}"]


def _execution(job: Job, engine: Engine, image: Tensor | None, path: Path, observer: Observer) -> Execution | None:
    """Return how to run the base classifier, as an existing file says or chosen now; None if no image can be read."""
    if engine.execution is not None:
        return engine.execution
    begun = peek_header(path)
    if isinstance(begun, RunHeader):
        return execution_of(begun, job.smoothed.options)
    if image is None:
        return None
    observer.preparing()
    execution = engine.prepare(image, job.work)
    if execution.failed:
        advice = "; shards that are compiled cannot be merged with it: pass --compile off to all"
        warn(f"{execution.failed}{advice if job.shard is not None else ''}")
    return execution


def _run_like(engine: Engine, image: Tensor, execution: Execution, path: Path) -> None:
    """Run the base classifier as the file says; refuse where this machine cannot."""
    real = engine.prepare(image, 1, execution)
    if not real.runs_like(execution):
        raise UserError(
            f"{path} was begun as {execution.describe()}; here it can only resume as {real.describe()} "
            f"({real.why[-1]}): name another --out"
        )


def _warn_of_settings(job: Job, image: Tensor | None) -> None:
    """Warn of settings that cannot work: images of one class, a number of samples that can certify nothing."""
    classes = {label for label in job.images.labels if label is not None}
    if len(job.images) >= 20 and len(classes) == 1 and job.smoothed.num_classes > 1:
        count = f"all {len(job.images)} images are of class {classes.pop()}"
        warn(f"{count}: is the data sorted? take every K-th with --skip")
    stated = job.smoothed.stated(1 if image is None else image.numel())
    for warning in job.settings.procedure.prospects(stated).warnings:
        warn(warning)


def _check_base(engine: Engine, smoothed: NoisyClassifier, images: ImageSet, checked: CheckedImages) -> None:
    """Warn if the classifier without noise is near chance: then labels or normalisation are probably wrong."""
    if not images.labelled:
        return
    loaded, truth = [], []
    for i in range(0, len(images), max(1, -(-len(images) // _TRIED))):
        with contextlib.suppress(CertifyError):
            loaded.append(checked.load(i))
            truth.append(images.labels[i])
    labels = engine.base_labels(loaded)
    if labels is not None:
        correct = sum(a == b for a, b in zip(labels, truth, strict=True))
        warn_near_chance(correct, len(loaded), smoothed.num_classes, denoised=smoothed.base.denoiser is not None)


def warn_near_chance(correct: int, total: int, classes: int, *, denoised: bool = False) -> None:
    """Warn if this many correct labels are near chance; ``denoised``: the classifier is behind a denoiser."""
    if total and near_chance(correct, total, classes):
        who = "the classifier behind the denoiser" if denoised else "the classifier"
        first = "a denoiser of other images or noise (without it: --denoiser none)? " if denoised else ""
        warn(
            f"without noise {who} is right on {correct} of {total} images, which is near chance: {first}"
            "wrong class order (--class-map)? normalised twice or not at all (--mean, --std)? another model's weights?"
        )


def warn_of_results(run: Run) -> None:
    """Warn of failed samples, and of labels that differ from those of plain float32.

    Raises:
        UserError: no image could be used.
    """
    if not run.usable:
        first = run.images[0]
        raise UserError(f"none of the {len(run.images)} images could be used; the first, {first.id}: {first.error}")
    failures, trials = run.failures
    if failures and failures == trials:
        warn("every sample failed (NaN or no finite answer): the base classifier returns no usable scores")
    elif failures:
        warn(f"{failures:,} of {trials:,} samples failed (NaN or no finite answer); they count against every class")
    if collapse := _collapse(run):
        warn(collapse)
    same, compared = run.agreement
    if compared and same < 0.95 * compared:
        warn(
            f"only {same:,} of {compared:,} labels agree with plain float32: the certificates hold for the "
            "classifier as it was run; pass --precision float32 to certify the float32 classifier"
        )


_FEW, _MANY = 5, 0.4  # images of a class that is never predicted; share of the predictions that one class has


def _collapse(run: Run) -> str:
    """Describe a smoothed classifier that predicts one class for most images and another for none; empty otherwise."""
    rows = run.usable
    labels = Counter(row.label for row in rows)
    predicted = Counter(row.prediction for row in rows if not row.abstained)
    if None in labels or not predicted:
        return ""
    most, count = predicted.most_common(1)[0]
    missing = [label for label, images in labels.items() if images >= _FEW and label not in predicted]
    if not missing or count < _MANY * len(rows) or count <= 2 * labels[most]:
        return ""
    names = run.class_names
    never = ", ".join(names.get(label, str(label)) for label in missing[:3]) + (", ..." if len(missing) > 3 else "")
    return (
        f"under noise no image is predicted as {never}, and {count:,} of {len(rows):,} are predicted as "
        f"{names.get(most, str(most))}: the smoothed classifier collapses; a denoiser or a smaller --sigma may help"
    )
