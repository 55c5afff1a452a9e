"""Between routes and service: who may come in, how long it may take, whether anybody still waits, what is counted."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from certify.serve.batching import Service
from certify.serve.limits import Limits, Refused, read_body
from certify.serve.metrics import Metrics
from certify.serve.protocol import Answer, Wishes

_READERS = 2  # bodies that are parsed or decoded at a time: they take several times their size in memory
_T = TypeVar("_T")


@dataclass(eq=False)
class Gate:
    """Who may come in, and whether anybody is still inside. Belongs to the event loop's thread."""

    limits: Limits
    inside: int = 0
    closed: bool = False
    usual: float = 0.0
    """Seconds a request takes, of late."""

    def enter(self) -> float:
        """Come in; the time.

        Raises:
            Refused: it is closed, or too many are inside.
        """
        soon = max(1, min(60, math.ceil(self.usual)))
        if self.closed:
            raise Refused(503, "the server is stopping", "stopping", soon)
        if self.inside >= self.limits.concurrency:
            raise Refused(429, f"{self.inside} requests are in work, the most that this server takes", "full", soon)
        self.inside += 1
        return time.monotonic()

    def leave(self, entered: float) -> None:
        """Go out."""
        self.inside -= 1
        self.usual += 0.2 * (time.monotonic() - entered - self.usual)


class Front:
    """What all routes share.

    Args:
        service: running.
        model: the name under which it is asked.
        picture: bytes of an image file to ``(C, H, W)`` in [0, 1]; raises ``ImageError``.
        metrics: to write to.
        gate: of the requests that cost something.
        about: settings that every response states: numbers and strings.
    """

    def __init__(
        self,
        service: Service,
        model: str,
        picture: Callable[[bytes], np.ndarray],
        metrics: Metrics,
        gate: Gate,
        about: Mapping[str, Any],
    ) -> None:
        self.service, self.model, self.picture = service, model, picture
        self.metrics, self.gate, self.about = metrics, gate, dict(about)
        self._readers = anyio.CapacityLimiter(_READERS)

    async def within(self, work: Callable[[], Awaitable[Response]]) -> Response:
        """The response, within the gate, the time, and as long as somebody waits for it."""
        entered = self.gate.enter()
        self.metrics.queue.set(self.gate.inside)
        timeout = self.gate.limits.timeout
        try:
            async with asyncio.timeout(timeout):
                return await work()
        except TimeoutError:
            raise Refused(504, f"not done within {timeout:g} s; ask for fewer samples", "timeout") from None
        except ClientDisconnect:
            raise Refused(499, "the client went away", "gone") from None
        finally:
            self.gate.leave(entered)
            self.metrics.queue.set(self.gate.inside)

    async def body(self, request: Request) -> bytes:
        """The request's body, within the limit."""
        return await read_body(request.stream(), request.headers.get("content-length"), self.gate.limits.max_bytes)

    async def read(self, reader: Callable[..., _T], *given: Any) -> _T:
        """What a reader makes of a body, in a thread: the event loop goes on."""
        return await anyio.to_thread.run_sync(reader, *given, limiter=self._readers)

    async def answers(self, request: Request, images: np.ndarray, wishes: Wishes) -> list[Answer]:
        """The service's answers; cancelled when the time is up or the client has gone."""
        futures = [asyncio.wrap_future(future) for future in self.service.ask(images, wishes)]
        everything = asyncio.gather(*futures)
        everything.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may look at it
        gone = asyncio.ensure_future(_gone(request))
        waited: set[asyncio.Future[Any]] = {everything, gone}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not everything.done():
                raise ClientDisconnect
            found = everything.result()
        finally:
            gone.cancel()
            everything.cancel()
            for future in futures:
                future.cancel()
        for answer in found:
            self.metrics.images.labels(answer.outcome).inc()
            self.metrics.failures.inc(answer.failures)
            self.metrics.abstentions.inc(answer.label < 0)
        return found

    @property
    def ready(self) -> bool:
        """Whether a request that comes now would be taken."""
        return self.service.alive and self.service.well and not self.gate.closed


async def _gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Counted:
    """Middleware: how many requests of each route had which status, and how long they took."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and look at the status that goes out."""
        start, status = time.monotonic(), [500]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = scope["route"].path if "route" in scope else "other"
            self.metrics.requests.labels(route, str(status[0])).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - start)
