"""How often a service is asked, and how soon again."""

from __future__ import annotations

import datetime
import email.utils
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from certify.blackbox.types import Reply
from certify.errors import UserError


@dataclass(frozen=True)
class Manners:
    """How a service is treated.

    Attributes:
        concurrency: requests under way at a time.
        rate: requests a second, evenly spaced; None for no limit.
        attempts: requests for one query, at most.
        first_wait: seconds before the second attempt; doubled each time, with as much again at random.
        longest_wait: seconds between two attempts; a service that asks for more is left alone.
        grace: seconds that requests under way get when everything else stops; longer than one may take, or paid answers
            are lost.
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
            raise UserError(f"rate {self.rate}: expected requests a second, above 0")


class Rate:
    """When the next request may go out: a token bucket that holds one token.

    Args:
        per_second: tokens a second; None for no limit.
        clock: seconds.
    """

    def __init__(self, per_second: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._gap, self._clock = 1 / per_second if per_second else 0.0, clock
        self._next, self._lock = -math.inf, threading.Lock()

    def take(self) -> float:
        """Take a token; the seconds until it is there."""
        with self._lock:
            now = self._clock()
            start = max(now, self._next)
            self._next = start + self._gap
            return start - now

    def pause(self, seconds: float) -> None:
        """No token before that long from now: the service asked for it."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


def retry_after(reply: Reply, now: datetime.datetime | None = None) -> float | None:
    """Seconds that a reply asks to wait, in either form of RFC 9110, from 0; None if it does not ask.

    Args:
        reply: of the service.
        now: the time there, for a reply without a usable Date header; None: this machine's, whose clock may differ.
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
    """A date of an HTTP header; None where there is none."""
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # the latter: a year or zone that no clock has
        return None
    return date.replace(tzinfo=datetime.UTC) if date.tzinfo is None else date
