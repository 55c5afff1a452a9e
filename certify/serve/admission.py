"""Admission control: how many requests are read and in work at a time, shared fairly among client addresses."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from certify.serve.limits import Limits, Refused, read_body

_SHARED = 2  # slots in all, for each that one address may hold when it is alone
_BODIES = 3  # bodies that are received at a time, for each request that may be in work


class Slots:
    """Slots shared by client addresses: an address may hold at most as many as it leaves free.

    A busy address alone gets half of them, n busy addresses 1/(n + 1) each, and a newcomer still finds one. The rule is
    that of Choudhury and Hahne (1998) for buffers shared by flows (dynamic thresholds).

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
        """Raise ``Refused`` if this address can have no further slot now."""
        mine = self._held[client]
        if mine + 1 > self.total - self.used:
            why = f"requests of your address hold {mine} slots, the most that it can have now"
            full = f"other requests hold all {self.total} slots"
            raise Refused(429 if mine else 503, why if mine else full, "full", retry_after)

    @contextlib.contextmanager
    def hold(self, client: str, retry_after: int) -> Iterator[None]:
        """Hold a slot for this address.

        Raises:
            Refused: it can have none now (429), or nobody can (503).
        """
        self.check(client, retry_after)
        self._held[client] += 1
        try:
            yield
        finally:
            self._held[client] -= 1
            self._held += Counter()  # forgets addresses that hold none


class Admission:
    """Admits requests, and knows whether any is unanswered. Belongs to the event loop's thread.

    Attributes:
        limits: the server's limits.
        inside: requests that were admitted and are not answered yet.
        closed: whether new requests are refused.
        receiving: slots of bodies that are being received, one for each third of the longest body.
        working: slots of requests whose body is complete, until their work has ended.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.inside, self.closed = limits, 0, False
        self.working = Slots(_SHARED * limits.concurrency)
        self.receiving = Slots(_BODIES * self.working.total)
        self._usual = 0.0

    async def receive(self, client: str, stream: AsyncIterator[bytes], stated: str | None) -> bytes:
        """Receive a body; the slots that it holds grow with it, so that slow bodies hold few.

        Raises:
            Refused: too long, too slow, or no slot is free.
        """
        with contextlib.ExitStack() as slots:

            def grow() -> None:
                slots.enter_context(self.receiving.hold(client, self.retry_after))

            return await read_body(stream, stated, self.limits, grow, -(-self.limits.max_bytes // _BODIES))

    @property
    def retry_after(self) -> int:
        """Seconds that requests took lately, from 1 to 60."""
        return max(1, min(60, math.ceil(self._usual)))

    @contextlib.contextmanager
    def admit(self, client: str) -> Iterator[None]:
        """Count a request as unanswered.

        Raises:
            Refused: the server is stopping, or the request could not get a slot once it is read.
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
            self._usual += 0.2 * (time.monotonic() - start - self._usual)


def client_key(host: str) -> str:
    """Return the name under which an address shares slots: IPv6 counts by /64 network, which one client owns whole."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket, or a test client's name
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), 64), strict=False))
