"""Output on the terminal: lines on stderr and stdout without control characters, a progress bar, durations."""

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
    """Print on stderr; characters that would act on the terminal are shown as escapes."""
    click.echo(printable_lines(text), err=True)


def tell(text: str) -> None:
    """Print a result on stdout; characters that would act on the terminal are shown as escapes."""
    click.echo(printable_lines(text))


def silent(text: str) -> None:
    """In place of :func:`say`: nothing."""


def speaker(*, quiet: bool) -> Callable[[str], None]:
    """:func:`say`, or :func:`silent`."""
    return silent if quiet else say


def warn(text: str) -> None:
    """Print a warning of one line on stderr."""
    say(f"warning: {printable(text)}")


@contextlib.contextmanager
def few_warnings(where: str = "", most: int = 10) -> Iterator[Callable[[str], None]]:
    """:func:`warn` for images that are left out: the first are named, the others counted at the end of the block.

    Args:
        where: the end of the sentence about the others: what names them.
        most: images that are named.
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


_LARGE = 4.0  # sigma in [0, 1] pixels above which it was hardly meant; Cohen et al. use at most 1


def warn_of_units(sigma: float) -> None:
    """A noise level that drowns every image is one of 255."""
    if sigma > _LARGE:
        warn(f"sigma = {sigma:g} drowns images in [0, 1]; is it in pixels of 255? that is --sigma {sigma / 255:.3g}")


def warn_of_precisions(runs: Sequence[Run]) -> None:
    """Runs that are shown together are compared, and ``auto`` may have chosen otherwise for each."""
    found = sorted({str(run.header["precision"]) for run in runs if run.header.get("precision")})
    if len(found) > 1:
        warn(f"these runs are of classifiers run in {' and '.join(found)}; --precision makes them alike")


def clock(seconds: float) -> str:
    """A duration in the unit a person would use."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def progress_bar(total: int, unit: str, *, hidden: bool = False, scaled: bool = False) -> Any:
    """A tqdm bar on stderr, shown on a terminal only and gone at its end; ``scaled`` writes 12k for 12,000."""
    from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}", unit_scale=scaled, disable=hidden or None, leave=False, file=sys.stderr)
