"""A run on a cluster: chosen images through its workers into the run file, which the driver alone writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from certify.cluster.worker import WorkItem
from certify.errors import ImageError
from certify.runs.records import ImageRow
from certify.runs.runner import pending, refuse_unusable, store
from certify.smoothing.procedures import samples
from certify.smoothing.sequential_tests import LEAST

if TYPE_CHECKING:
    from certify.cluster.driver import WorkerPool
    from certify.images.dataset import ImageSet
    from certify.runs.config import Settings
    from certify.runs.run_file import RunFile

_BATCHES = 20  # that a worker fills at once; the last one of them may be half empty
_MOST = 4096  # images that a worker gets at once: they run again when it dies


def process_on(
    pool: WorkerPool,
    images: ImageSet,
    settings: Settings,
    file: RunFile,
    *,
    places: Sequence[int] | None = None,
    strict: bool = False,
    progress: Callable[[int], None],
    warn: Callable[[str], None],
) -> None:
    """Do the work of :func:`certify.runs.runner.process` on the workers of a cluster, and append lines as they come.

    The same images give the same lines as there, except for ``seconds``. An image that its worker repeatedly does not
    survive is recorded with its ``error``. ``progress`` is called with images.

    Raises:
        ImageError: with ``strict``, the first unusable image.
        UserError: a worker with other code or weights than this process.
        RunFault: no worker is left, or the run file cannot be written; what it holds is kept.
    """
    tasks = {task.place: task for task in pending(images, file, places, strict=strict)}
    unusable = [place for place, task in tasks.items() if task.id in file.done]  # only with strict
    if unusable:
        task = tasks[unusable[0]]
        raise refuse_unusable(task, file.done[task.id].error)

    def read(place: int) -> WorkItem:
        task = tasks[place]
        try:
            return WorkItem(place, task.id, task.label, images.items[place].read())
        except ImageError as error:
            return WorkItem(place, task.id, task.label, None, str(error))

    for place, answer in pool.answers(list(tasks), read, settings, most=images_at_once(pool, settings)):
        task = tasks[place]
        row = answer
        if isinstance(row, str):  # the image was set aside
            row = ImageRow.unusable(settings.procedure, task.id, task.label, row)
        if strict and row.error is not None:
            raise refuse_unusable(task, row.error)
        store(file, place, row, warn)
        progress(1)


def images_at_once(pool: WorkerPool, settings: Settings) -> int:
    """Return how many images fill a worker's batches: a sequential test begins with few samples and takes more."""
    batch = pool.execution.batch_size if pool.execution is not None else 1
    first = LEAST if settings.procedure.sequential else samples(settings.procedure)
    batches = _BATCHES // 4 if settings.procedure.sequential else _BATCHES
    return max(1, min(_MOST, -(-batches * batch // first)))
