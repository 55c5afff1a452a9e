"""Limits on how a service is queried: concurrency, rate, attempts, and waits that the service requests."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import math
from dataclasses import dataclass

from certify.blackbox.types import Reply
from certify.errors import UserError


@dataclass(frozen=True)
class QueryLimits:
    """Limits on how a service is queried.

    Attributes:
        concurrency: maximum number of requests in flight, from 1.
        rate: requests per second, evenly spaced; None for no limit.
        attempts: maximum number of requests per query, from 1.
        first_wait: seconds before the second attempt; doubled for each further one, plus a random jitter of up to
            ``first_wait``.
        longest_wait: maximum seconds between two attempts; a service that requests a longer pause ends the run.
        grace: seconds to wait for requests in flight when a run ends early. Should exceed the request timeout, or
            answers that were paid for are lost.
    """

    concurrency: int = 4
    rate: float | None = None
    attempts: int = 5
    first_wait: float = 0.5
    longest_wait: float = 60.0
    grace: float = 65.0

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1:
            raise UserError(f"concurrency {self.concurrency}, attempts {self.attempts}: expected whole numbers from 1")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise UserError(f"rate {self.rate}: expected requests per second, above 0")


class RateLimiter:
    """Space requests evenly, and delay all of them while the service requests a pause.

    Args:
        per_second: requests per second; None for no limit.
    """

    def __init__(self, per_second: float | None) -> None:
        from aiolimiter import AsyncLimiter

        self._limiter = None if per_second is None else AsyncLimiter(1, 1 / per_second)
        self._resume_at = -math.inf  # in the event loop's time

    async def acquire(self) -> None:
        """Wait until the next request may be sent, in the order of the calls."""
        while True:
            if self._limiter is not None:
                await self._limiter.acquire()
            wait = self._resume_at - asyncio.get_running_loop().time()
            if wait <= 0:
                return
            await asyncio.sleep(wait)

    def pause(self, seconds: float) -> None:
        """Delay all requests by at least ``seconds`` from now."""
        self._resume_at = max(self._resume_at, asyncio.get_running_loop().time() + seconds)


def retry_after(reply: Reply, now: datetime.datetime | None = None) -> float | None:
    """Return the wait in seconds, at least 0, of a reply's Retry-After (either form of RFC 9110); None without one.

    Args:
        reply: the service's reply.
        now: the service's time, for a reply without a usable Date header; None uses this machine's clock, which may
            differ.
    """
    headers = {name.lower(): value.strip() for name, value in reply.headers.items()}
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        until = _http_date(text)
        if until is None:
            return None
        start = _http_date(headers.get("date", "")) or now or datetime.datetime.now(datetime.UTC)
        seconds = (until - start).total_seconds()
    return None if math.isnan(seconds) else max(seconds, 0.0)


def _http_date(text: str) -> datetime.datetime | None:
    """Parse the date of an HTTP header; None if it is not one."""
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # the latter: a year or zone out of range
        return None
    return date.replace(tzinfo=datetime.UTC) if date.tzinfo is None else date
