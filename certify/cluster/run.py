"""A run on a cluster: chosen images through its workers into the run file, which the driver alone writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from certify.cluster.worker import Sent
from certify.errors import ImageError
from certify.runs.records import ImageRow
from certify.runs.runner import owed, refuse_unusable, store
from certify.smoothing.procedures import samples
from certify.smoothing.sequential_tests import LEAST

if TYPE_CHECKING:
    from certify.cluster.driver import Crew
    from certify.images.dataset import ImageSet
    from certify.runs.config import Settings
    from certify.runs.run_file import RunFile

_DEEPEST = 512  # images that a worker holds at once, at most: they run again when it dies


def process_on(
    crew: Crew,
    images: ImageSet,
    settings: Settings,
    file: RunFile,
    *,
    places: Sequence[int] | None = None,
    strict: bool = False,
    progress: Callable[[int], None],
    warn: Callable[[str], None],
) -> None:
    """As :func:`certify.runs.runner.process`, on the workers of a cluster; lines come as they are finished.

    The same images give the same lines as there, their ``seconds`` apart. An image whose worker fails again and again
    is recorded with its ``error``. ``progress`` is called with images.

    Raises:
        ImageError: with ``strict``, the first unusable image.
        UserError: a worker with other code or weights than this process.
        RunFault: no worker is left, or the run file cannot be written; what it holds is kept.
    """
    tasks = {task.place: task for task in owed(images, file, places, strict=strict)}
    unusable = [place for place, task in tasks.items() if task.id in file.done]  # only with strict
    if unusable:
        task = tasks[unusable[0]]
        raise refuse_unusable(task, file.done[task.id].error)

    def read(place: int) -> Sent:
        task = tasks[place]
        try:
            return Sent(place, task.id, task.label, images.items[place].read())
        except ImageError as error:
            return Sent(place, task.id, task.label, None, str(error))

    for place, found in crew.answers(list(tasks), read, settings, depth=depth(crew, settings)):
        task = tasks[place]
        row = found
        if isinstance(row, str):  # the image was set aside
            row = ImageRow.unusable(settings.procedure, task.id, task.label, row)
        if strict and row.error is not None:
            raise refuse_unusable(task, row.error)
        store(file, place, row, warn)
        progress(1)


def depth(crew: Crew, settings: Settings) -> int:
    """Images that a worker holds at once: one more than what fills its batches twice."""
    batch = crew.execution.batch_size if crew.execution is not None else 1
    first = LEAST if settings.procedure.sequential else samples(settings.procedure)
    return min(_DEEPEST, 1 + max(1, -(-2 * batch // first)))
