"""Admission control: limits per request, and slots shared fairly among client addresses."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from certify.errors import UserError

MIN_RATE = 16 * 2**10
"""Minimum average rate, in bytes per second, at which a client must send or receive after the first seconds."""

_GRACE = 5.0  # seconds
_SHARED = 2  # total slots as a multiple of the maximum for a single address
_BODIES = 3  # slots for receiving bodies as a multiple of those for requests in progress


class Refused(Exception):
    """Raised to refuse a request.

    Args:
        status: HTTP status.
        why: reason in one line, for the client.
        kind: reason in one word, for the metrics.
        retry_after: seconds after which a retry may succeed, or None.
    """

    def __init__(self, status: int, why: str, kind: str = "invalid", retry_after: int | None = None) -> None:
        super().__init__(why)
        self.status, self.why, self.kind, self.retry_after = status, why, kind, retry_after


@dataclass(frozen=True)
class Limits:
    """Limits of a request, and of all requests together.

    Attributes:
        max_bytes: maximum size of a request's body.
        max_pixels: maximum number of pixels of all images of a request, and of an image file before it is decoded.
        budget: maximum number of noise samples per request.
        concurrency: maximum requests in progress per client address; twice as many in total.
        timeout: seconds from a request's head to its answer.
        max_images: maximum images per request; even a small image costs a full block of noise.
    """

    max_bytes: int = 16 * 2**20
    max_pixels: int = 16_000_000
    budget: int = 100_000
    concurrency: int = 32
    timeout: float = 60.0
    max_images: int = 256

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_pixels", "budget", "concurrency", "max_images"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: expected a whole number from 1")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"timeout {self.timeout:g}: expected seconds above 0")

    def most_images(self, size: Sequence[int]) -> int:
        """Return the maximum number of images ``(C, H, W)`` per request."""
        return min(self.max_images, self.max_pixels // (size[1] * size[2]))


class Slots:
    """Slots shared by client addresses: an address may hold at most as many as it leaves free.

    A single busy address gets half of the slots, n busy addresses get 1/(n + 1) each, and a new address still finds one
    (dynamic thresholds, Choudhury and Hahne 1998).

    Args:
        total: number of slots.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._held: Counter[str] = Counter()

    @property
    def used(self) -> int:
        """Slots held by all addresses together."""
        return self._held.total()

    def check(self, client: str, retry_after: int) -> None:
        """Raise ``Refused`` if this address cannot get another slot now."""
        mine = self._held[client]
        if mine + 1 > self.total - self.used:
            why = f"requests from your address hold {mine} slots, its current maximum"
            full = f"other requests hold all {self.total} slots"
            raise Refused(429 if mine else 503, why if mine else full, "full", retry_after)

    @contextlib.contextmanager
    def hold(self, client: str, retry_after: int) -> Iterator[None]:
        """Hold a slot for this address.

        Raises:
            Refused: no slot is free for this address (429), or for any (503).
        """
        self.check(client, retry_after)
        self._held[client] += 1
        try:
            yield
        finally:
            self._held[client] -= 1
            self._held += Counter()  # removes addresses that hold none


class Admission:
    """Admit requests and count the unanswered ones. Use only on the event loop's thread.

    Attributes:
        limits: the server's limits.
        inside: number of admitted requests without an answer yet.
        closed: True if new requests are refused.
        receiving: slots for bodies being received, one per third of the maximum size.
        working: slots for requests with a complete body, until their work has ended.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.inside, self.closed = limits, 0, False
        self.working = Slots(_SHARED * limits.concurrency)
        self.receiving = Slots(_BODIES * self.working.total)
        self._average = 0.0

    @property
    def retry_after(self) -> int:
        """Value of the header Retry-After: average seconds of recent requests, from 1 to 60."""
        return max(1, min(60, math.ceil(self._average)))

    @contextlib.contextmanager
    def admit(self, client: str) -> Iterator[None]:
        """Count a request as unanswered.

        Raises:
            Refused: the server is stopping, or there would be no slot for the request once it is received.
        """
        if self.closed:
            raise Refused(503, "the server is stopping", "stopping", self.retry_after)
        self.working.check(client, self.retry_after)
        start = time.monotonic()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            self._average += 0.2 * (time.monotonic() - start - self._average)

    async def receive(self, client: str, stream: AsyncIterator[bytes], stated: str | None) -> bytes:
        """Receive a body, which takes more slots as it grows, so that slow bodies hold few.

        Args:
            client: the client's key (:func:`client_key`).
            stream: chunks of the body.
            stated: value of the header Content-Length, or None.

        Raises:
            Refused: too long, too slow, or no slot is free.
        """
        with contextlib.ExitStack() as slots:

            def take_slot() -> None:
                slots.enter_context(self.receiving.hold(client, self.retry_after))

            return await _read_body(stream, stated, self.limits, take_slot, -(-self.limits.max_bytes // _BODIES))


async def _read_body(
    stream: AsyncIterator[bytes], stated: str | None, limits: Limits, take_slot: Callable[[], None], step: int
) -> bytes:
    """Receive a body; call ``take_slot`` before its first byte and every ``step`` bytes."""
    too_long = Refused(
        413, f"the body is longer than {limits.max_bytes:,} bytes, the limit of this server", "too large"
    )
    if stated is not None and stated.isdecimal() and int(stated[:20]) > limits.max_bytes:
        raise too_long
    body, start = bytearray(), asyncio.get_running_loop().time()
    take_slot()
    try:
        async with asyncio.timeout(min(_GRACE, limits.timeout)) as deadline:
            async for piece in stream:
                if len(body) + len(piece) > limits.max_bytes:
                    raise too_long
                for _ in range(len(body) // step, (len(body) + len(piece)) // step):
                    take_slot()
                body += piece
                deadline.reschedule(start + min(_GRACE + len(body) / MIN_RATE, limits.timeout))
    except TimeoutError:
        why = f"the body came too slowly: expected {MIN_RATE:,} bytes per second, and all within {limits.timeout:g} s"
        raise Refused(408, why, "slow") from None
    return bytes(body)


def client_key(host: str) -> str:
    """Return the key under which an address shares slots; IPv6 addresses of one /64 network share a key."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket, or the name of a test client
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), 64), strict=False))
