"""Progress of long work: a bar in terminals and notebooks, a line now and then where stderr is a file."""

from __future__ import annotations

import itertools
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

from certify.errors import UserError

_FIRST = (60.0, 120.0, 300.0, 600.0)
_THEN = 600.0
_WARM_UP = 1.0  # seconds; work that is reported as done by then was done before


def progress_bar(total: int, unit: str, *, shown: bool | float = True, each: int = 1) -> Any:
    """Return a context manager with ``update(n)``, a bar of tqdm or :class:`ProgressLines`.

    Args:
        total: units of work.
        unit: their name, in the plural.
        shown: True shows a bar in terminals and notebooks, and lines where stderr is a file: after 1, 2, 5 and 10
            minutes, then every 10. A number of seconds: a line every so often. False: nothing.
        each: units per image, if the units are samples.

    Raises:
        UserError: ``shown`` is neither.
    """
    if not isinstance(shown, bool | int | float) or shown < 0:
        raise UserError(f"--progress {shown!r}: expected a number of seconds, or True or False in Python")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook without ipywidgets the bar is text
        from tqdm.auto import tqdm
        from tqdm.autonotebook import tqdm as notebook_or_plain
        from tqdm.std import tqdm as plain
    if shown is not False and (shown is not True or (notebook_or_plain is plain and not sys.stderr.isatty())):
        return ProgressLines(total, unit, None if shown is True else float(shown), each)
    return tqdm(total=total, unit=f" {unit}", unit_scale=each > 1, disable=shown is False, leave=False)


class ProgressLines:
    """Print lines such as ``12:31  430 of 10,000 images, 812 samples/s, about 3 h 10 min left`` on stderr.

    The rate is that since the line before, so that it follows a machine that becomes slower.

    Args:
        total: units of work.
        unit: their name, in the plural.
        every: seconds between lines; None: as :func:`progress_bar` says.
        each: units per image, if the units are samples.
    """

    def __init__(self, total: int, unit: str, every: float | None = None, each: int = 1) -> None:
        self.total, self.unit, self.each = total, unit, each
        self.done, self.note = 0, ""
        self._start = self._since = time.monotonic()
        self._before = 0
        self._times = self._due_times(every)
        self._due = next(self._times)

    def _due_times(self, every: float | None) -> Iterator[float]:
        if every is not None:
            return itertools.count(self._start + every, every)
        later = itertools.count(self._start + _FIRST[-1] + _THEN, _THEN)
        return itertools.chain((self._start + seconds for seconds in _FIRST), later)

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Add a note to the next line."""
        self.note = text

    def update(self, count: int = 1) -> None:
        """Count units as done, and print a line if one is due."""
        self.done += count
        now = time.monotonic()
        if now < self._start + _WARM_UP:
            self._since, self._before = now, self.done
        if now >= self._due:
            sys.stderr.write(self._line(now) + "\n")
            sys.stderr.flush()
            self._since, self._before = now, self.done
            self._due = next(due for due in self._times if due > now)

    def _line(self, now: float) -> str:
        rate = (self.done - self._before) / max(1e-9, now - self._since)
        images = f"{self.done // self.each:,} of {self.total // self.each:,} {'images' if self.each > 1 else self.unit}"
        left = f"about {duration((self.total - self.done) / rate)} left" if rate > 0 else "nothing was finished lately"
        parts = [images, *([self.note] if self.note else []), f"{rate_text(rate)} {self.unit}/s", left]
        return f"{time.strftime('%H:%M')}  {', '.join(parts)}"


def rate_text(rate: float) -> str:
    """Format a rate: whole numbers from 10 on, one decimal below, two below one."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes, hours and minutes, or days and hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
