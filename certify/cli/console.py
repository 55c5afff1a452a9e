"""Terminal output: lines on stderr and stdout without control characters, a progress bar, durations."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from certify.text import printable, printable_lines

if TYPE_CHECKING:
    from certify.runs.run_file import Run


def say(text: str) -> None:
    """Print on stderr; control characters are shown as escapes."""
    click.echo(printable_lines(text), err=True)


def tell(text: str) -> None:
    """Print a result on stdout; control characters are shown as escapes."""
    click.echo(printable_lines(text))


def silent(text: str) -> None:
    """Print nothing, in place of :func:`say`."""


def speaker(*, quiet: bool) -> Callable[[str], None]:
    """Return :func:`say`, or :func:`silent`."""
    return silent if quiet else say


def warn(text: str) -> None:
    """Print a warning of one line on stderr."""
    say(f"warning: {printable(text)}")


@contextlib.contextmanager
def few_warnings(where: str = "", most: int = 10) -> Iterator[Callable[[str], None]]:
    """Yield :func:`warn` for images that are left out: the first are named, the others counted at the end.

    Args:
        where: end of the line about the others, such as a file that lists them.
        most: number of images named.
    """
    given = 0

    def count(text: str) -> None:
        nonlocal given
        given += 1
        if given <= most:
            warn(text)

    try:
        yield count
    finally:
        if given > most:
            warn(f"{given - most:,} more images are left out{where}")


_LARGE = 4.0  # sigma in [0, 1] pixels above which the unit is in doubt; Cohen et al. use at most 1


def warn_of_units(sigma: float) -> None:
    """Warn of a noise level that is probably meant in pixels of 255."""
    if sigma > _LARGE:
        warn(
            f"sigma = {sigma:g} is very large for images in [0, 1]; did you mean "
            f"--sigma {sigma / 255:.3g} ({sigma:g}/255)?"
        )


def warn_of_precisions(runs: Sequence[Run]) -> None:
    """Warn if runs that are compared used different precisions, such as those that ``auto`` chose."""
    precisions = sorted({run.header.precision for run in runs if run.header.has("precision")})
    if len(precisions) > 1:
        warn(f"these runs used different precisions: {' and '.join(precisions)}; pass the same --precision to all")


def clock(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def progress_bar(total: int, unit: str, *, hidden: bool = False, scaled: bool = False) -> Any:
    """Return a tqdm bar on stderr, on a terminal only; ``scaled`` writes 12k for 12,000."""
    from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}", unit_scale=scaled, disable=hidden or None, leave=False, file=sys.stderr)
