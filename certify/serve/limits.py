"""What a request may cost, and how it is refused: with a status and one line that says why."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from certify.errors import UserError

JSON_DEPTH = 16
"""Nested lists and objects, at most: a batch of images is 7 deep."""

_SCANNED = 2**16  # bytes whose brackets are counted at a time


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
        concurrency: requests that are read, wait or are in work at a time; more are turned away.
        timeout: seconds from a request's first byte to its answer.
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


async def read_body(stream: AsyncIterator[bytes], stated: str | None, max_bytes: int) -> bytes:
    """The whole body, refused as soon as it is known to be too long.

    Args:
        stream: its pieces.
        stated: the header Content-Length.
        max_bytes: the longest body.

    Raises:
        Refused: too long.
    """
    too_long = Refused(413, f"the body is longer than {max_bytes:,} bytes, the limit of this server", "too large")
    if stated is not None and stated.isdecimal() and int(stated[:20]) > max_bytes:
        raise too_long
    body = bytearray()
    async for piece in stream:
        if len(body) + len(piece) > max_bytes:
            raise too_long
        body += piece
    return bytes(body)


def read_json(text: bytes) -> Any:
    """JSON as the standard has it (no NaN, no infinity), not nested deeper than ``JSON_DEPTH``.

    Raises:
        Refused: anything else.
    """
    _check_depth(text)
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # a bracket in a string may hide depth from the count
        raise Refused(400, f"the body is not JSON: {str(error)[:120]}") from None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _check_depth(text: bytes) -> None:
    """Count brackets, those in strings too, before a parser follows them."""
    depth = 0
    for start in range(0, len(text), _SCANNED):
        part = np.frombuffer(text, dtype=np.uint8, count=min(_SCANNED, len(text) - start), offset=start)
        upper = part & 0xDF  # [ and {, ] and } differ in one bit
        running = depth + np.cumsum((upper == 0x5B).astype(np.int32) - (upper == 0x5D).astype(np.int32))
        if running.max() > JSON_DEPTH:
            raise Refused(400, f"the JSON is nested deeper than {JSON_DEPTH}")
        depth = int(running[-1])
