"""The driver of a run on a cluster: starts the workers, checks them, hands images out, writes what comes back.

It alone writes the run file. A worker that dies is replaced, as Ray finds room; its images go to others
(:mod:`certify.cluster.scheduler`). A worker that does not fit the run is refused.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from certify.cluster.compatibility import how_it_ended, other_code, other_weights
from certify.cluster.connect import Slot
from certify.cluster.scheduler import TRIES, Handing
from certify.cluster.worker import Line, Order, Sent, Worker, code_identity
from certify.errors import CertifyError, RunFault, UserError
from certify.runs.run_file import SET_ASIDE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from certify.engine.execution import Execution
    from certify.runs.config import Settings
    from certify.runs.records import ImageRow

PATIENCE = 600.0
"""Seconds without any news from any worker until the run is given up."""

_TURN = 10.0  # seconds that a worker waits for a line before it answers, so that it can be given more
_GLANCE = 2.0  # seconds that the driver waits for any worker before it looks around
_AHEAD = 64  # images that are read before anybody asks for them
_SAME = ("device", "accelerator", "torch")  # facts that shape the noise or the arithmetic


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it: its actor, and the one call that is under way."""

    slot: Slot
    actor: Any
    stage: str = "hello"
    call: Any = None
    told: Execution | None = None
    why: str = ""
    name: str = "a worker"
    facts: dict[str, Any] = field(default_factory=dict)


class Crew:
    """Workers of a cluster, as one place that runs the base classifier.

    Args:
        slots: one for each worker.
        order: what they build.
        steps: the pipeline as the driver knows it, with its hashes.
        warn: told of workers that are lost or left out.
    """

    def __init__(
        self, slots: Sequence[Slot], order: Order, steps: Sequence[Mapping[str, Any]], warn: Callable[[str], None]
    ) -> None:
        import ray

        self._ray, self._remote = ray, ray.remote(Worker)
        self._order, self._steps, self._warn = order, list(steps), warn
        self._mine = code_identity()
        self._facts: dict[str, Any] = {}
        self.execution: Execution | None = None
        self._example: np.ndarray | None = None
        self._heard = time.monotonic()
        self._deaths, self._last = 0, ""
        self._members = [self._start(slot) for slot in slots]

    def __len__(self) -> int:
        return len(self._members)

    def close(self) -> None:
        """End all workers."""
        for member in list(self._members):
            self._remove(member)

    # One place that runs the base classifier, for whoever plans

    def facts(self) -> dict[str, Any]:
        """Device, versions and machine of the first worker, for the header; all others have the same device."""
        facts = self._first().facts
        return {**facts, "machine": {**facts["machine"], "workers": len(self)}}

    def where(self) -> str:
        """The workers and what they run on, in words."""
        from certify.engine.hardware import in_threads

        facts = self._first().facts
        device = facts["accelerator"] or f"{facts['device']} ({in_threads(facts['machine']['threads'])})"
        return f"{len(self)} workers, each on {device}"

    def prepare(self, image: Tensor, samples: int, execution: Execution | None = None) -> Execution:
        """Decide on one worker how to run the base classifier for its share of the samples, or run it as this says.

        All workers that come later are told to run it in the same way.
        """
        self.execution = None
        for member in self._members:
            member.stage = "ready" if member.stage == "working" else member.stage
        real: Execution | None = self._ask("prepare", image.numpy(), -(-samples // len(self)), execution)
        if real is None:
            raise RunFault(f"{TRIES} workers failed when they tried the base classifier{self._because()}")
        return real

    def base_labels(self, images: Sequence[Tensor]) -> list[int] | None:
        """Labels of images without noise; None where a worker does not survive one of them."""
        labels: list[int] | None = self._ask("base_labels", [image.numpy() for image in images], tries=1)
        return labels

    def measure_rate(self, image: Tensor) -> float | None:
        """Samples a second of one worker; None where it does not survive this image."""
        rate: float | None = self._ask("measure_rate", image.numpy(), tries=1)
        return rate

    def _first(self) -> _Member:
        """A worker that stands ready, and is prepared once it is known how, as soon as there is one."""
        while True:
            for member in self._members:
                if member.stage == ("ready" if self.execution is None else "working"):
                    return member
            self._step()

    def _ask(self, what: str, *given: Any, tries: int = TRIES) -> Any:
        """What a ready worker answers; the next one is asked where it dies. None: they all died."""
        for _ in range(tries):
            member = self._first()
            try:
                found = self._ray.get(member.actor.ask.remote(what, *given))
            except self._ray.exceptions.RayError as error:
                self._failed(member, error)
                continue
            self._heard = time.monotonic()
            if what == "prepare":
                self._example, self.execution, member.told, member.stage = given[0], found, found, "working"
            return found
        return None

    # The work

    def answers(
        self, places: Sequence[int], read: Callable[[int], Sent], settings: Settings, *, depth: int
    ) -> Iterator[tuple[int, ImageRow | str]]:
        """The rows of these images as they are finished; the reason alone for an image that was set aside.

        Args:
            places: of the images.
            read: gives one of them; from several threads.
            settings: of the run.
            depth: images that a worker holds at once, at most.

        Raises:
            UserError: a mistake that shows on the workers, such as other weights than the driver's.
            RunFault: no worker is left, or they die without getting anything done.
        """
        self._deaths = 0
        handing = Handing(places, depth)
        with ThreadPoolExecutor(8, "certify-read") as pool:
            reader = _Reader(read, handing.waiting, pool)
            while handing.left:
                self._hand_out(handing, reader, settings)
                for member, found in self._step():
                    for place, line in found:
                        if handing.done(member, place):
                            self._deaths = 0
                            yield place, line
                for member in [member for member in handing.held if member not in self._members]:
                    for place in handing.lost(member):
                        self._deaths = 0
                        reason = f"{SET_ASIDE}: its worker failed {TRIES} times on it alone ({member.why})"
                        yield place, reason

    def _hand_out(self, handing: Handing, reader: _Reader, settings: Settings) -> None:
        for member in self._members:
            if member.stage == "working" and member.call is None:
                taken = handing.take(member, len(self))
                if taken or handing.held[member]:
                    member.call = member.actor.exchange.remote(reader.get(taken), settings, _TURN)

    def _step(self) -> list[tuple[_Member, list[Line]]]:
        """Wait for news from any worker, and see to it; the lines that came."""
        for member in self._members:
            if member.stage == "ready" and self.execution is not None:
                member.stage, member.told = "preparing", self.execution
                member.call = member.actor.ask.remote("prepare", self._example, 1, self.execution)
        calls = {member.call: member for member in self._members if member.call is not None}
        if not calls:
            raise RunFault(f"no worker is left{self._because()}")
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=_GLANCE)
        if not ready and time.monotonic() - self._heard > PATIENCE:
            raise RunFault(f"no worker answered within {PATIENCE:.0f} s{self._because()}; is the cluster busy or full?")
        if ready and len(calls) > 1:  # whatever else is there already
            ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
        came = []
        for call in ready:
            member = calls[call]
            member.call = None
            self._heard = time.monotonic()
            try:
                found = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                self._failed(member, error)
                continue
            lines = self._advance(member, found)
            if lines:
                came.append((member, lines))
        return came

    def _advance(self, member: _Member, found: Any) -> list[Line]:
        """The next stage of a worker whose call has come back."""
        if member.stage == "hello":
            member.name = f"the worker on {found['host']} (process {found['pid']})"
            if refused := other_code(self._mine, found, member.name):
                raise UserError(refused)
            member.stage = "building"
            member.call = member.actor.build.remote(replace(self._order, threads=member.slot.threads))
        elif member.stage == "building":
            steps, member.facts = found
            if refused := other_weights(self._steps, steps, member.name):
                raise UserError(refused)
            self._facts = self._facts or member.facts
            differs = [key for key in _SAME if member.facts[key] != self._facts[key]]
            if differs:
                key = differs[0]
                self._leave_out(member, f"{key} {member.facts[key]} there, {self._facts[key]} on the others")
            else:
                member.stage = "ready"
        elif member.stage == "preparing":
            told = member.told
            assert told is not None
            if told is not self.execution:
                member.stage = "ready"
            elif (found.precision, found.folded, found.compiled) == (told.precision, told.folded, told.compiled):
                member.stage = "working"
            else:
                self._leave_out(member, f"it can only run as {found.describe()} ({found.why[-1]})")
        elif member.stage == "working":
            lines: list[Line] = found
            return lines
        return []

    # Faults

    def _start(self, slot: Slot) -> _Member:
        member = _Member(slot, self._remote.options(**slot.options()).remote())
        member.call = member.actor.hello.remote()
        return member

    def _failed(self, member: _Member, error: Exception) -> None:
        """A call broke: refuse what is the user's mistake, leave out what cannot be, replace what died."""
        cause = getattr(error, "cause", None)
        if isinstance(cause, CertifyError) and member.stage == "building":
            self._leave_out(member, str(cause))  # it would fail again: no such file there, no such device
            return
        if member.stage == "hello" and "No module named" in str(error):
            self._leave_out(member, "certify-toolkit is not installed there, or in another version")
            return
        if isinstance(cause, UserError):
            raise cause
        self._last = member.why = how_it_ended(error, cause)
        self._deaths += 1
        self._remove(member)
        limit = (TRIES + 1) * (len(self) + 1)
        if self._deaths >= limit:
            raise RunFault(f"{self._deaths} workers failed one after the other and finished no image{self._because()}")
        self._warn(f"{member.name} failed ({self._last}); another one takes its place")
        self._members.append(self._start(member.slot))

    def _leave_out(self, member: _Member, why: str) -> None:
        self._last = why
        self._remove(member)
        self._warn(f"{member.name} is left out: {why}")
        if not self._members:
            raise RunFault(f"no worker is left{self._because()}")

    def _remove(self, member: _Member) -> None:
        self._members.remove(member)
        self._ray.kill(member.actor, no_restart=True)

    def _because(self) -> str:
        return f"; the last one: {self._last}" if self._last else ""


class _Reader:
    """Reads images before they are asked for, so that the driver does not wait for a disk."""

    def __init__(self, read: Callable[[int], Sent], waiting: deque[int], pool: ThreadPoolExecutor) -> None:
        self._read, self._waiting, self._pool = read, waiting, pool
        self._ahead: dict[int, Future[Sent]] = {}

    def get(self, places: Sequence[int]) -> list[Sent]:
        """These images; those that come next are on their way."""
        found = [
            self._ahead.pop(place) if place in self._ahead else self._pool.submit(self._read, place) for place in places
        ]
        for k in range(min(_AHEAD, len(self._waiting))):
            if self._waiting[k] not in self._ahead:
                self._ahead[self._waiting[k]] = self._pool.submit(self._read, self._waiting[k])
        return [image.result() for image in found]
