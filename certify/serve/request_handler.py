"""Request handling shared by the routes (receive, parse in a thread, answer in time or refuse), and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from certify.serve.admission import Admission, Refused, client_key
from certify.serve.batching import Service
from certify.serve.protocol import Answer, InferenceRequest, Stated

_READERS = 2  # bodies parsed or decoded concurrently; each takes several times its size in memory
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Prometheus metrics of one server, in their own registry."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "certify_requests", "Requests with a response, including refusals.", ["route", "status"], registry=registry
        )
        self.rejected = Counter("certify_rejected", "Refused requests.", ["reason"], registry=registry)
        self.seconds = Histogram(
            "certify_request_seconds", "Seconds per request.", ["route"], buckets=_SECONDS, registry=registry
        )
        self.images = Counter("certify_images", "Answered images.", ["outcome"], registry=registry)
        self.samples = Counter("certify_samples", "Labelled noise samples.", registry=registry)
        self.failures = Counter("certify_failures", "Noise samples without a label.", registry=registry)
        self.abstentions = Counter("certify_abstentions", "Images about which nothing is claimed.", registry=registry)
        self.beyond = Gauge(
            "certify_labels_beyond", "Answers of the service with a label beyond --num-classes.", registry=registry
        )
        self.queue = Gauge("certify_queue_length", "Requests received, waiting or in progress.", registry=registry)

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class RequestHandler:
    """Answer requests of all routes.

    Args:
        service: running service.
        model: name of the model in URLs.
        decode_picture: function from an image file to an image ``(C, H, W)`` in [0, 1]; raises ``ImageError``.
        metrics: metrics to update.
        admission: admission control for inference requests.
        about: settings included in every response.
        example: PNG file of the page's example image, or None.
    """

    def __init__(
        self,
        service: Service,
        model: str,
        decode_picture: Callable[[bytes], np.ndarray],
        metrics: Metrics,
        admission: Admission,
        about: Stated,
        example: bytes | None = None,
    ) -> None:
        self.service, self.model, self.decode_picture, self.example = service, model, decode_picture, example
        self.metrics, self.admission, self.about = metrics, admission, about
        metrics.queue.set_function(lambda: admission.inside)
        self._pool, self._readers = ThreadPoolExecutor(_READERS, "certify-read"), asyncio.Semaphore(_READERS)
        self._stuck = 0  # readers whose request has ended
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def ready(self) -> bool:
        """True if a request that arrives now would be accepted and parsed."""
        service = self.service
        return service.alive and service.healthy and not self.admission.closed and self._stuck < _READERS

    async def answer(
        self, request: Request, parse: Callable[[bytes], InferenceRequest]
    ) -> tuple[InferenceRequest, list[Answer]]:
        """Receive a request, parse its body in a thread, and return it with the answers for its images.

        Raises:
            Refused: no slot is free, the request is invalid, it timed out, or the client has disconnected.
        """
        client, admission = client_key(request.client.host if request.client else ""), self.admission
        end = time.monotonic() + admission.limits.timeout
        with admission.admit(client):
            try:
                body = await admission.receive(client, request.stream(), request.headers.get("content-length"))
            except ClientDisconnect:
                raise Refused(499, "the client disconnected", "gone") from None
            work = asyncio.create_task(self._work(client, functools.partial(parse, body)))
            work.add_done_callback(lambda done: done.cancelled() or done.exception())  # avoids a warning
            disconnected = asyncio.create_task(_wait_for_disconnect(request))
            try:
                left = end - time.monotonic()
                await asyncio.wait({work, disconnected}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return work.result()
                if disconnected.done():
                    raise Refused(499, "the client disconnected", "gone")
            except asyncio.CancelledError:
                if not admission.closed:
                    raise
                raise Refused(503, "the server is stopping", "stopping") from None
            finally:  # a thread that cannot be stopped keeps its slot
                disconnected.cancel()
                work.cancel()
        raise Refused(504, f"not finished within {admission.limits.timeout:g} s; request fewer samples", "timeout")

    async def _work(self, client: str, parse: Callable[[], InferenceRequest]) -> tuple[InferenceRequest, list[Answer]]:
        with contextlib.ExitStack() as slot:
            slot.enter_context(self.admission.working.hold(client, self.admission.retry_after))
            parsed = await self._parse(client, parse, slot)
            futures = [asyncio.wrap_future(f) for f in self.service.submit(parsed.images, parsed.options, client)]
            try:
                answers = await asyncio.gather(*futures)
            finally:
                for future in futures:
                    future.cancel()
            for answer in answers:
                self.metrics.images.labels(answer.outcome).inc()
                self.metrics.failures.inc(answer.failures)
                self.metrics.abstentions.inc(answer.label < 0)
            return parsed, answers

    async def _parse(
        self, client: str, parse: Callable[[], InferenceRequest], slot: contextlib.ExitStack
    ) -> InferenceRequest:
        """Parse in a thread, one request per address at a time, so that addresses take turns.

        A thread cannot be stopped. If the request is cancelled in the meantime, its slot and turn stay taken until the
        thread has ended, so that threads do not pile up behind a slow body.
        """
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as turn:
            for lock in (self._turns.setdefault(client, asyncio.Lock()), self._readers):
                await lock.acquire()
                turn.callback(lock.release)
            job = self._pool.submit(parse)
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


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class MetricsMiddleware:
    """Count requests and seconds by route and status, and disable content sniffing in browsers."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request and record the status of its response."""
        start, status = time.monotonic(), 500

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).append("x-content-type-options", "nosniff")
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        finally:
            route = scope["route"].path if "route" in scope else "other"
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.monotonic() - start)
