"""What runs on one device of a cluster: builds its pipeline once, then answers images in a thread of its own.

The records come from :func:`certify.runs.runner.answered`, as on a single machine. This module does not import torch:
modules that do are loaded when the pipeline is built, after the worker has reported its version of this package.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from certify import __version__
from certify.errors import CertifyError, RunFault, first_line

if TYPE_CHECKING:
    import numpy as np

    from certify.engine.execution import Execution
    from certify.runs.config import Settings
    from certify.runs.records import ImageRow

Result = TypeVar("Result")

Line = tuple[int, "ImageRow"]
"""An image's place, and its row of the run file."""


@dataclass(frozen=True, eq=False)
class Sent:
    """An image on its way to a worker, as its source gave it: the file's bytes, or an array.

    Attributes:
        place: among the chosen images.
        id: names its noise streams.
        label: its class, or None.
        raw: its content; None where it could not be read.
        error: why not.
    """

    place: int
    id: str
    label: int | None
    raw: bytes | np.ndarray | None
    error: str = ""


class Station(Protocol):
    """What answers images on a worker."""

    def describe(self) -> list[dict[str, Any]]:
        """The steps of the pipeline with the hashes of their weights, as the run file's header names them."""
        ...

    def facts(self) -> dict[str, Any]:
        """Device, versions and machine, as the run file's header names them."""
        ...

    def prepare(self, image: np.ndarray, samples: int, execution: Execution | None) -> Execution:
        """Decide how to run the base classifier for so many samples, or run it as this says."""
        ...

    def measure_rate(self, image: np.ndarray) -> float:
        """Samples a second, once prepared."""
        ...

    def base_labels(self, images: Sequence[np.ndarray]) -> list[int]:
        """The base classifier's labels of images without noise."""
        ...

    def answered(self, sent: Iterable[Sent | None], settings: Settings) -> Iterator[Line]:
        """Lines as they are finished. None: no image is there now; only while some are in work."""
        ...


@dataclass(frozen=True)
class Order:
    """What a worker has to be.

    Attributes:
        build: makes its station; by name where a module holds it, so that the worker's own code runs.
        folder: the driver's working folder, to which paths are relative, where the worker has it too.
        threads: of the processor that it uses; None leaves it to torch.
    """

    build: Callable[[], Station]
    folder: str
    threads: int | None = None


class Worker:
    """An actor. Everything that concerns torch happens in one thread; another one waits for calls."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="certify-station", daemon=True).start()  # never keeps a process alive
        self._station: Station | None = None
        self._inbox: queue.SimpleQueue[Sent] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._lines: list[Line] = []
        self._fault: BaseException | None = None
        self._started = False

    def hello(self) -> dict[str, str]:
        """Where this is, and which code runs here."""
        return {"host": socket.gethostname(), "pid": str(os.getpid()), **code_identity()}

    def build(self, order: Order) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Build the pipeline; its steps with their hashes, and the facts of this place.

        Raises:
            CertifyError: what is missing or wrong here.
        """
        return self._there(lambda: self._build(order))

    def _build(self, order: Order) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        with contextlib.suppress(OSError):  # not there: absolute names and names of models still work
            os.chdir(order.folder)
        if order.threads is not None:
            import torch

            torch.set_num_threads(order.threads)  # for the thread that calls it
        self._station = order.build()
        return self._station.describe(), self._station.facts()

    def ask(self, what: str, *given: Any) -> Any:
        """What the method of this name of its :class:`Station` gives."""
        return self._there(lambda: getattr(self._built, what)(*given))

    def exchange(self, sent: Sequence[Sent], settings: Settings, patience: float) -> list[Line]:
        """Take these images, give the lines that are finished; wait for one, but not longer than so many seconds.

        Raises:
            CertifyError: what ended the work here; nothing goes on after that.
        """
        for image in sent:
            self._inbox.put(image)
        if not self._started:
            self._started = True
            self._calls.put(lambda: self._work(settings))
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._fault, timeout=patience)
            lines, self._lines = self._lines, []
            if lines or self._fault is None:
                return lines
        if isinstance(self._fault, CertifyError):
            raise self._fault
        raise RunFault(f"{type(self._fault).__name__}: {first_line(self._fault)}")  # its own class may not travel

    @property
    def _built(self) -> Station:
        assert self._station is not None, "build comes first"
        return self._station

    def _serve(self) -> None:
        while True:
            self._calls.get()()

    def _there(self, do: Callable[[], Result]) -> Result:
        """What this gives in the thread that torch belongs to."""
        done: Future[Result] = Future()

        def call() -> None:
            try:
                done.set_result(do())
            except BaseException as error:
                done.set_exception(error)

        self._calls.put(call)
        return done.result()

    def _work(self, settings: Settings) -> None:
        try:
            while True:
                feed = _Feed(self._inbox, settings.procedure.sequential)
                for line in self._built.answered(feed, settings):
                    feed.open -= 1
                    with self._changed:
                        self._lines.append(line)
                        self._changed.notify()
        except BaseException as error:  # whatever it is, the driver must hear of it
            with self._changed:
                self._fault = error
                self._changed.notify()


class _Feed:
    """What is in the inbox, from the first image that comes until it is empty and nothing is in work.

    At a fixed n it ends when the inbox is empty, so that the last images do not wait for others to fill a batch.
    """

    def __init__(self, inbox: queue.SimpleQueue[Sent], refilled: bool) -> None:
        self._inbox, self._refilled = inbox, refilled
        self.open = 0

    def __iter__(self) -> Iterator[Sent | None]:
        found: Sent | None = self._inbox.get()
        while True:
            if found is not None:
                self.open += 1
            yield found
            try:
                found = self._inbox.get_nowait()
            except queue.Empty:
                if not self._refilled or self.open <= 0:
                    return
                found = None


def code_identity() -> dict[str, str]:
    """Version and hash of the code that shapes the records: this package's and the denoisers' modules."""
    total = hashlib.sha256()
    for package in ("certify", "denoisers"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            for path in sorted(Path(folder).rglob("*.py")):
                total.update(f"{package}/{path.relative_to(folder).as_posix()}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return {"certify": __version__, "code": total.hexdigest()[:12]}
