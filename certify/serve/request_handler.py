"""What the routes share: a request is read, answered by the service in time, or refused."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from certify.serve.admission import Admission, client_key
from certify.serve.batching import Service
from certify.serve.limits import Refused
from certify.serve.metrics import Metrics
from certify.serve.protocol import Answer, Asked

_READERS = 2  # bodies that are parsed or decoded at a time: they take several times their size in memory


class Front:
    """What all routes share.

    Args:
        service: running.
        model: the name under which it is asked.
        picture: bytes of an image file to ``(C, H, W)`` in [0, 1]; raises ``ImageError``.
        metrics: to write to.
        admission: of the requests that cost something.
        about: settings that every response states: numbers and strings.
    """

    def __init__(
        self,
        service: Service,
        model: str,
        picture: Callable[[bytes], np.ndarray],
        metrics: Metrics,
        admission: Admission,
        about: Mapping[str, Any],
    ) -> None:
        self.service, self.model, self.picture = service, model, picture
        self.metrics, self.admission, self.about = metrics, admission, dict(about)
        metrics.queue.set_function(lambda: admission.inside)
        self._pool, self._readers = ThreadPoolExecutor(_READERS, "certify-read"), asyncio.Semaphore(_READERS)
        self._stuck = 0  # readers of requests that nobody waits for any more
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def answers(self, request: Request, read: Callable[[bytes], Asked]) -> tuple[Asked, list[Answer]]:
        """Receive a request, read it with ``read`` in a thread, and return what it asked with the service's answers.

        Raises:
            Refused: no slot is free, the request cannot be read, its time is up, or the client has gone.
        """
        client, admission = client_key(request.client.host if request.client else ""), self.admission
        end = time.monotonic() + admission.limits.timeout
        with admission.admit(client):
            try:
                body = await admission.receive(client, request.stream(), request.headers.get("content-length"))
            except ClientDisconnect:
                raise Refused(499, "the client went away", "gone") from None
            work = asyncio.create_task(self._work(client, functools.partial(read, body)))
            work.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may look at it
            gone = asyncio.create_task(_gone(request))
            try:
                await asyncio.wait({work, gone}, timeout=end - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return work.result()
                if gone.done():
                    raise Refused(499, "the client went away", "gone")
            except asyncio.CancelledError:
                if not admission.closed:
                    raise
                raise Refused(503, "the server is stopping", "stopping") from None
            finally:  # a thread that cannot be stopped keeps its slot
                gone.cancel()
                work.cancel()
        raise Refused(504, f"not done within {admission.limits.timeout:g} s; ask for fewer samples", "timeout")

    async def _work(self, client: str, read: Callable[[], Asked]) -> tuple[Asked, list[Answer]]:
        with contextlib.ExitStack() as slot:
            slot.enter_context(self.admission.working.hold(client, self.admission.retry_after))
            asked = await self._read(client, read, slot)
            futures = [asyncio.wrap_future(future) for future in self.service.ask(asked.images, asked.wishes, client)]
            try:
                answers = await asyncio.gather(*futures)
            finally:
                for future in futures:
                    future.cancel()
            for answer in answers:
                self.metrics.images.labels(answer.outcome).inc()
                self.metrics.failures.inc(answer.failures)
                self.metrics.abstentions.inc(answer.label < 0)
            return asked, answers

    async def _read(self, client: str, read: Callable[[], Asked], slot: contextlib.ExitStack) -> Asked:
        """Read in a thread: one request of an address at a time, so that addresses take turns.

        A thread cannot be stopped. If the request is cancelled meanwhile, its slot and its turn stay taken until the
        thread has ended: threads do not pile up behind a body that takes long.
        """
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as turn:
            for lock in (self._turns.setdefault(client, asyncio.Lock()), self._readers):
                await lock.acquire()
                turn.callback(lock.release)
            job = self._pool.submit(read)
            try:
                return await asyncio.wrap_future(job)
            except asyncio.CancelledError:
                held = slot.pop_all()
                held.push(turn.pop_all())
                self._stuck += 1

                def free() -> None:
                    self._stuck -= 1
                    held.close()

                def release(_: object) -> None:
                    with contextlib.suppress(RuntimeError):  # the event loop is closed: the server has stopped
                        loop.call_soon_threadsafe(free)

                job.add_done_callback(release)
                raise

    @property
    def ready(self) -> bool:
        """True if a request that comes now would be accepted and read."""
        service = self.service
        return service.alive and service.well and not self.admission.closed and self._stuck < _READERS


async def _gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Counted:
    """Middleware: count requests and seconds by route and status; forbid browsers to guess content types."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and note the status of its response."""
        start, status = time.monotonic(), [500]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                MutableHeaders(scope=message).append("x-content-type-options", "nosniff")
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = scope["route"].path if "route" in scope else "other"
            self.metrics.requests.labels(route, str(status[0])).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - start)
