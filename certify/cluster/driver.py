"""The driver of a run on a cluster: gives images to the workers and yields the lines that come back.

Ray restarts a worker whose process or machine dies; the images it held run again one at a time, so that a further death
can be blamed on one of them. An image that its worker does not survive alone ``TRIES`` times is set aside. The driver
alone writes the run file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from certify.cluster.connect import Address, Slot, connected
from certify.cluster.worker import Line, Plan, Unfit, Worker, WorkerSpec, WorkItem, build_engine, code_identity
from certify.errors import ImageError, RunFault, UserError, in_words, warn
from certify.runs.records import ImageRow
from certify.runs.run_file import SET_ASIDE
from certify.runs.runner import pending, refuse_unusable, store
from certify.smoothing.procedures import samples
from certify.smoothing.sequential_tests import LEAST

if TYPE_CHECKING:
    from torch import Tensor

    from certify.engine.execution import Execution
    from certify.engine.noisy_classifier import NoisyClassifier
    from certify.images.dataset import ImageSet
    from certify.runs.config import Circumstances, Settings
    from certify.runs.run_file import RunFile

TRIES = 3
"""Deaths of a worker on one image alone until the image is set aside."""

PATIENCE = 600.0
"""Seconds for which the run waits for a worker to start while none is at work."""

_POLL = 2.0  # seconds of one wait, after which signals are handled
_READERS = 8  # threads that read images ahead of the workers
_BATCHES = 20  # that a worker fills at once; the last one of them may be half empty
_MOST = 4096  # images that a worker gets at once: they run again when it dies


@dataclass(eq=False)
class _Handle:
    """A worker as the driver sees it."""

    actor: Any
    name: str = "a worker"
    facts: Circumstances | None = None

    @property
    def known(self) -> Circumstances:
        """Device, versions and machine of a worker that has started."""
        assert self.facts is not None
        return self.facts


@dataclass(frozen=True, eq=False)
class _Call:
    """A call that is under way: the start of a worker, or images that it answers."""

    worker: _Handle
    places: Sequence[int] = ()


class WorkerPool:
    """The workers of a cluster, as one place that runs the base classifier.

    Args:
        slots: one for each worker.
        spec: what they build.
        warn: called with a message about every worker that fails or is left out.
    """

    def __init__(self, slots: Sequence[Slot], spec: WorkerSpec, warn: Callable[[str], None] = warn) -> None:
        import ray

        self._ray, self._warn = ray, warn
        self.execution: Execution | None = None
        self._plan: Plan | None = None
        self._calls: dict[Any, _Call] = {}
        self._failures, self._reason = 0, ""
        actor_class = ray.remote(Worker)
        self._workers = [
            _Handle(actor_class.options(**slot.options()).remote(replace(spec, threads=slot.threads))) for slot in slots
        ]
        for worker in self._workers:
            self._start(worker)

    def __len__(self) -> int:
        return len(self._workers)

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._workers):
            self._remove(worker)

    def facts(self) -> Circumstances:
        """Return device, versions and machine of the first worker, for the header; the others have the same device."""
        facts = self._first().known
        return replace(facts, machine={**facts.machine, "workers": len(self)})

    def where(self) -> str:
        """Return the number of workers and their device as text."""
        from certify.engine.hardware import in_threads

        facts = self._first().known
        device = facts.accelerator or f"{facts.device} ({in_threads(facts.machine['threads'])})"
        return f"{len(self)} workers, each on {device}"

    def prepare(self, image: Tensor, samples: int, execution: Execution | None = None) -> Execution:
        """Choose on one worker how to run the base classifier for its share of the samples, or take ``execution``.

        All workers run it in this way from then on, or are left out.
        """
        example = image.numpy()
        answered: tuple[_Handle, Execution] | None
        answered = self._ask("prepare", example, -(-samples // len(self)), execution)
        if answered is None:
            raise RunFault(f"{TRIES} workers failed when they tried the base classifier{self._because()}")
        worker, execution = answered
        self._plan, self.execution = Plan(execution, example, worker.known), execution
        return execution

    def base_labels(self, images: Sequence[Tensor]) -> list[int] | None:
        """Return labels of images without noise; None where a worker does not survive one of them."""
        answered = self._ask("ask", "base_labels", self._plan, [image.numpy() for image in images], tries=1)
        return None if answered is None else answered[1]

    def measure_rate(self, image: Tensor) -> float | None:
        """Measure the samples per second of one worker; None where it does not survive this image."""
        answered = self._ask("ask", "measure_rate", self._plan, image.numpy(), tries=1)
        return None if answered is None else answered[1]

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
        """Do the work of :func:`certify.runs.runner.process` on the workers; append the lines as they come.

        The same images give the same lines as there, except for ``seconds``. An image that its worker repeatedly does
        not survive is recorded with its ``error``. ``progress`` is called with images.

        Raises:
            ImageError: with ``strict``, the first unusable image.
            UserError: a worker with other code or weights than this process.
            RunFault: no worker is left, or the run file cannot be written; what it holds is kept.
        """
        tasks = {task.place: task for task in pending(images, file, images.load, places, strict=strict)}
        unusable = next((task for task in tasks.values() if task.id in file.done), None)  # only with strict
        if unusable is not None:
            raise refuse_unusable(unusable, file.done[unusable.id].error)

        def read(place: int) -> WorkItem:
            task = tasks[place]
            try:
                return WorkItem(place, task.id, task.label, images.items[place].read())
            except ImageError as error:
                return WorkItem(place, task.id, task.label, None, str(error))

        for place, answer in self.answers(list(tasks), read, settings, most=self._images_at_once(settings)):
            task, row = tasks[place], answer
            if isinstance(row, str):  # the image was set aside
                row = ImageRow.unusable(settings.procedure, task.id, task.label, row)
            if strict and row.error is not None:
                raise refuse_unusable(task, row.error)
            store(file, place, row, warn)
            progress(1)

    def _images_at_once(self, settings: Settings) -> int:
        """Return how many images fill a worker's batches: a sequential test begins with few samples and takes more."""
        batch = self.execution.batch_size if self.execution is not None else 1
        first = LEAST if settings.procedure.sequential else samples(settings.procedure)
        batches = _BATCHES // 4 if settings.procedure.sequential else _BATCHES
        return max(1, min(_MOST, -(-batches * batch // first)))

    def answers(
        self, places: Sequence[int], read: Callable[[int], WorkItem], settings: Settings, *, most: int
    ) -> Iterator[tuple[int, ImageRow | str]]:
        """Yield the rows of these images as they are finished; the reason alone for an image that was set aside.

        Args:
            places: of the images.
            read: gives one of them; called from several threads.
            settings: of the run.
            most: images that a worker gets at once, at most.

        Raises:
            UserError: a mistake that shows on the workers, such as other weights than the driver's.
            RunFault: no worker is left, or they fail without getting anything done.
        """
        waiting, suspects, deaths = deque(places), deque[int](), Counter[int]()
        ahead: deque[dict[int, Future[WorkItem]]] = deque()
        self._failures = 0
        with ThreadPoolExecutor(_READERS, "certify-read") as threads:
            while True:
                while waiting and len(ahead) < len(self):
                    size = group_size(len(waiting), len(self), most)
                    group = [waiting.popleft() for _ in range(size)]
                    ahead.append({place: threads.submit(read, place) for place in group})
                for worker in self._free():
                    if suspects:
                        place = suspects.popleft()
                        self._send(worker, {place: threads.submit(read, place)}, settings)
                    elif ahead:
                        self._send(worker, ahead.popleft(), settings)
                if not (waiting or ahead or suspects or any(call.places for call in self._calls.values())):
                    return
                call, found = self._wait()
                if not isinstance(found, Exception):
                    self._failures = 0 if found else self._failures
                    yield from found
                elif self._failed(call.worker, found):
                    deaths.update(call.places if len(call.places) == 1 else ())
                    for place in call.places:
                        if deaths[place] < TRIES:
                            suspects.append(place)
                            continue
                        self._failures = 0
                        yield place, f"{SET_ASIDE}: its worker failed {TRIES} times on it alone ({self._reason})"
                else:
                    waiting.extendleft(reversed(call.places))

    def _free(self) -> list[_Handle]:
        """Return the workers that have started and do nothing."""
        busy = [call.worker for call in self._calls.values()]
        return [worker for worker in self._workers if worker not in busy]

    def _first(self) -> _Handle:
        """Wait until a worker has started and is free, and return it."""
        while not (free := self._free()):
            call, found = self._wait()
            if isinstance(found, Exception):
                self._failed(call.worker, found)
        return free[0]

    def _ask(self, method: str, *arguments: Any, tries: int = TRIES) -> tuple[_Handle, Any] | None:
        """Return a free worker and its answer; the next one is asked where it fails. None: all of them failed."""
        for _ in range(tries):
            worker = self._first()
            try:
                return worker, self._ray.get(_once(getattr(worker.actor, method)).remote(*arguments))
            except self._ray.exceptions.RayError as error:
                self._failed(worker, error)
        return None

    def _send(self, worker: _Handle, items: Mapping[int, Future[WorkItem]], settings: Settings) -> None:
        images = [item.result() for item in items.values()]
        reference = _once(worker.actor.answer).remote(images, settings, self._plan)
        self._calls[reference] = _Call(worker, list(items))

    def _start(self, worker: _Handle) -> None:
        self._calls[_once(worker.actor.start).remote()] = _Call(worker)

    def _wait(self) -> tuple[_Call, list[Line] | Exception]:
        """Wait for a call to end; return it with the lines that came, or with the error it ended with."""
        if not self._workers:
            raise RunFault(f"no worker is left{self._because()}")
        working = any(call.places for call in self._calls.values())
        deadline = time.monotonic() + PATIENCE
        while not (ended := self._ray.wait(list(self._calls), timeout=_POLL)[0]):
            if working or time.monotonic() < deadline:
                continue
            raise RunFault(f"no worker started within {PATIENCE:.0f} s{self._because()}; is the cluster busy or full?")
        call = self._calls.pop(ended[0])
        try:
            found = self._ray.get(ended[0])
        except self._ray.exceptions.RayError as error:
            return call, error
        if call.places:
            lines: list[Line] = found
            return call, lines
        call.worker.name, call.worker.facts = found
        return call, []

    def _failed(self, worker: _Handle, error: Exception) -> bool:
        """Handle the failure of a call: True if the worker is restarted, False if it is left out.

        Raises:
            UserError: the user's mistake, which the worker found.
            RunFault: no worker is left, or they fail without getting anything done.
        """
        cause = getattr(error, "cause", None)
        missing = "No module named 'certify" in str(error) or "Can't get attribute" in str(error)
        if isinstance(cause, Unfit) or (missing and worker.facts is None):
            other = "certify-toolkit is not installed there, or in another version"
            self._reason = str(cause) if isinstance(cause, Unfit) else other
            self._remove(worker)
            self._warn(f"{worker.name} is left out: {self._reason}")
            return False
        if isinstance(cause, UserError):
            raise cause
        self._reason = describe_end(error, cause)
        self._failures += 1
        if self._failures >= (TRIES + 1) * (len(self) + 1):
            raise RunFault(
                f"{self._failures} workers failed one after the other and finished no image{self._because()}"
            )
        self._warn(f"{worker.name} failed ({self._reason}); another one takes its place")
        if cause is not None:  # its process lives, in an unknown state
            self._ray.kill(worker.actor, no_restart=False)
        self._start(worker)
        return True

    def _remove(self, worker: _Handle) -> None:
        self._workers.remove(worker)
        self._calls = {reference: call for reference, call in self._calls.items() if call.worker is not worker}
        self._ray.kill(worker.actor, no_restart=True)

    def _because(self) -> str:
        return f"; the last one: {self._reason}" if self._reason else ""


@contextlib.contextmanager
def started(
    address: Address,
    load: Callable[[str], NoisyClassifier],
    smoothed: NoisyClassifier,
    device: str,
    images: int,
    *,
    sent: bool = False,
) -> Iterator[WorkerPool]:
    """Start the workers of a cluster, no more than images, for the duration of the block.

    Args:
        address: of the cluster.
        load: loads the smoothed classifier on the device of this name; it is sent to the workers.
        smoothed: the smoothed classifier of this process, for its identity.
        device: ``auto``, ``cpu`` or ``cuda``: the workers' device.
        images: number of images to process.
        sent: True if ``load`` holds a classifier or denoiser as an object.
    """
    import torch

    gpus, threads = torch.cuda.device_count(), torch.get_num_threads()
    with connected(address, device=device, gpus=gpus, threads=threads, most=images) as slots:
        build = functools.partial(build_engine, load, "cuda" if slots[0].gpus else "cpu")
        spec = WorkerSpec(build, os.getcwd(), code_identity(), smoothed.base.record(), sent)
        with contextlib.closing(WorkerPool(slots, spec)) as pool:
            yield pool


def _once(method: Any) -> Any:
    """Return a method of an actor whose calls Ray does not repeat when the worker dies under them."""
    return method.options(max_task_retries=0)


def group_size(waiting: int, workers: int, most: int) -> int:
    """Return how many images to give to a worker: fewer towards the end, so that none waits beside an idle worker."""
    return max(1, min(most, waiting // (2 * workers)))


def describe_end(error: Exception, cause: BaseException | None) -> str:
    """Return an exception on a worker as text, or the line of Ray's report that says how the worker ended."""
    if cause is not None:
        return in_words(cause)
    lines = [line.strip() for line in str(error).splitlines()]
    told = next((line for line in lines if "exit type" in line or "node" in line.lower()), lines[0] if lines else "")
    return told.partition("Some common causes")[0].strip()[:200] or type(error).__name__
