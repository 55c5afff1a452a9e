"""The threads that ask: they can be stopped, at once and for a reason."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, cast

from certify.blackbox.types import Answer


class Crew:
    """The threads of one call. They are daemons: one that waits before a retry does not keep a program from ending."""

    def __init__(self, size: int) -> None:
        self.size, self.fault = size, Future[None]()
        self.stopped = threading.Event()
        self.names: set[str] = set()  # under way
        self._tasks: SimpleQueue[tuple[Future[Answer], Callable[[], Answer]] | None] = SimpleQueue()
        self._threads = 0

    def submit(self, work: Callable[[], Answer]) -> Future[Answer]:
        """Have it done, as soon as a thread is free."""
        future = Future[Answer]()
        self._tasks.put((future, work))
        if self._threads < self.size:
            threading.Thread(target=self._work, name=f"certify-ask-{self._threads}", daemon=True).start()
            self._threads += 1
        return future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def stop(self, fault: BaseException) -> None:
        """Send nothing further, because of this."""
        self.stopped.set()
        with suppress(InvalidStateError):  # another was first
            self.fault.set_exception(fault)

    def result(self, future: Future[Answer]) -> Answer:
        """Its answer; what stopped all of them comes first."""
        if not future.done():
            wait(cast("tuple[Future[Any], ...]", (future, self.fault)), return_when=FIRST_COMPLETED)
        if self.fault.done():
            self.fault.result()
        return future.result()

    def dismiss(self) -> None:
        """End the threads; what they have not begun is left."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        for _ in range(self._threads):
            self._tasks.put(None)
