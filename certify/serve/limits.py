"""Limits of a request, and its refusal: a status and one line that says why."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from certify.errors import UserError

SLOWEST = 16 * 2**10
"""Bytes per second that a client must send or take, on average, after the first seconds."""

_GRACE = 5.0  # seconds
_OTHERS = 1000  # lists, objects and members of a request beside its tensor, at most


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        why: one line for who asked.
        kind: one word for the metrics.
        retry_after: seconds after which to ask again, if that helps.
    """

    def __init__(self, status: int, why: str, kind: str = "invalid", retry_after: int | None = None) -> None:
        super().__init__(why)
        self.status, self.why, self.kind, self.retry_after = status, why, kind, retry_after


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all together.

    Attributes:
        max_bytes: of a request's body.
        max_pixels: of all images of a request, and of a picture before it is decoded.
        budget: noise samples of a request.
        concurrency: requests of one client address in work at a time; more are refused. Twice as many of all addresses.
        timeout: seconds from a request's head to its answer.
        max_images: of a request: even a small one costs a block of noise, which belongs to no other.
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
        """Images ``(C, H, W)`` of one request, at most."""
        return max(1, min(self.max_images, self.max_pixels // (size[1] * size[2])))


async def read_body(
    stream: AsyncIterator[bytes], stated: str | None, limits: Limits, grow: Callable[[], None], step: int
) -> bytes:
    """Receive a whole body; refuse it as soon as it is known to be too long or too slow.

    Args:
        stream: its pieces.
        stated: the header Content-Length.
        limits: ``max_bytes`` and ``timeout``.
        grow: called before the first byte, and for every ``step`` bytes that follow.
        step: bytes, at least 1.

    Raises:
        Refused: too long, or slower than ``SLOWEST``.
    """
    too_long = Refused(
        413, f"the body is longer than {limits.max_bytes:,} bytes, the limit of this server", "too large"
    )
    if stated is not None and stated.isdecimal() and int(stated[:20]) > limits.max_bytes:
        raise too_long
    body, start = bytearray(), asyncio.get_running_loop().time()
    grow()
    try:
        async with asyncio.timeout(min(_GRACE, limits.timeout)) as deadline:
            async for piece in stream:
                if len(body) + len(piece) > limits.max_bytes:
                    raise too_long
                for _ in range(len(body) // step, (len(body) + len(piece)) // step):
                    grow()
                body += piece
                deadline.reschedule(start + min(_GRACE + len(body) / SLOWEST, limits.timeout))
    except TimeoutError:
        why = f"the body came too slowly: expected {SLOWEST:,} bytes per second, and all within {limits.timeout:g} s"
        raise Refused(408, why, "slow") from None
    return bytes(body)


def read_json(text: bytes, size: Sequence[int], limits: Limits) -> Any:
    """Parse JSON that holds no more than the largest request to this server.

    The parser makes an object of each value and lets no other thread run meanwhile, so delimiters are counted first,
    those in strings too.

    Args:
        text: UTF-8.
        size: (C, H, W) of the images.
        limits: on the number of images.

    Raises:
        Refused: not JSON, nested deeper than the parser follows (about 200), or more values than a request needs.
    """
    channels, height, width = size
    images = limits.most_images(size)
    lists = images * (1 + channels * (1 + height)) + _OTHERS
    for what, count, most in (
        ("lists and objects", text.count(b"[") + text.count(b"{"), lists),
        ("values", text.count(b","), images * channels * height * width + lists),
        ("members of objects", text.count(b":"), _OTHERS),
    ):
        if count > most:
            raise Refused(413, f"the JSON has more than {most:,} {what}, which no request needs here", "too large")
    try:
        return from_json(text)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON that can be read: {str(error)[:120]}") from None
