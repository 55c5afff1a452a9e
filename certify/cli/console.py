"""Terminal output: lines on stderr and stdout without control characters, durations, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from certify.errors import Stopped
from certify.smoothing.norms import DECIMALS, IN_WORDS
from certify.smoothing.rounding import ceil_to
from certify.text import printable, printable_lines

if TYPE_CHECKING:
    from certify.cli.option_groups import OutputOptions
    from certify.engine.execution import Execution
    from certify.engine.noisy_classifier import NoisyClassifier
    from certify.runs.run_file import RecordFile, Run
    from certify.smoothing.procedures import Procedure
    from certify.types import Radii


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


def tell_dry_run(written: str, output: OutputOptions, **cost: Any) -> None:
    """End a dry run: print what is not written, or the cost as JSON."""
    tell(json.dumps({"dry_run": True, **cost}) if output.as_json else f"dry run: {written}")


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


def warn_of_precisions(runs: Sequence[Run]) -> None:
    """Warn if runs that are compared used different precisions, such as those that ``auto`` chose."""
    precisions = sorted({run.header.precision for run in runs if run.header.has("precision")})
    if len(precisions) > 1:
        warn(f"these runs used different precisions: {' and '.join(precisions)}; pass the same --precision to all")


def warn_of_samples(runs: Sequence[Run]) -> None:
    """Warn if runs that are compared differ in the number of samples, or hold different images."""
    counts = sorted({run.header.n for run in runs if run.header.has("n") and run.header.stopping is None})
    if len(counts) > 1:
        shown = " and ".join(f"{n:,}" for n in counts)
        warn(f"these runs took n = {shown} samples per image: fewer samples give smaller radii for the same classifier")
    images = [{row.id for row in run.images} for run in runs]
    if any(ids != images[0] for ids in images):
        common = f"{len(set.intersection(*images)):,}"
        warn(f"these runs hold different images ({common} are in all of them): their accuracies differ by that too")


@contextlib.contextmanager
def stoppable(file: RecordFile[Any, Any], expected: int, what: str) -> Iterator[None]:
    """Turn Ctrl-C into an error of one line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        done = f"{len(file.done):,} of {expected:,} {what} are finished ({file.path})"
        raise Stopped(f"stopped: {done}; re-run the command to resume") from None


def show_prospects(
    procedure: Procedure, stated: Radii, sigma: float, say: Callable[[str], None], noise: str = "", implied: str = ""
) -> None:
    """Show the sampling plan and the largest radii it can certify."""
    prospects = procedure.prospects(stated)
    say(f"procedure  {procedure.describe()}{noise}")
    if prospects.statement:
        say(f"statement  {prospects.statement}")
    for line in prospects.lines:
        say(f"radius     {line}")
    if prospects.largest is not None and not procedure.radii:
        cap = prospects.largest
        in_sigma = f" ({ceil_to(cap / sigma, 2)} sigma)" if stated.norm == "l2" else ""
        most = f"{ceil_to(cap, DECIMALS[stated.norm])}{in_sigma}"
        say(f"radius     {IN_WORDS[stated.norm]}, at most {most} at this n and alpha{implied}")


def show_engine(execution: Execution, smoothed: NoisyClassifier, say: Callable[[str], None], where: str = "") -> None:
    """Show how the base classifier is run, where (by default in this process), and why."""
    import torch

    from certify.engine.hardware import in_threads

    threads = f" ({in_threads(torch.get_num_threads())})" if smoothed.device.type == "cpu" else ""
    say(f"engine     {execution.describe()}, on {where or f'{smoothed.device}{threads}'}")
    for why in execution.why:
        say(f"           {why}")
