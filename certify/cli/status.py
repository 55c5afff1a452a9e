"""``certify status``: how far runs are, from their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from certify.cli.console import tell
from certify.cli.option_groups import JsonOptions
from certify.cli.options import command

if TYPE_CHECKING:
    from certify.runs.status import RunStatus

_CODES = {"finished": 0, "running": 3, "stalled": 4}


@command("Show the progress of runs.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN|FOLDER...")
def status(runs: tuple[str, ...], output: JsonOptions) -> None:
    """Show how far runs and comparisons are, from their files, while they run or after they stopped.

    A folder stands for the run files in it; shards without a file are named. A run is stalled if no process writes to
    its file, or without a new line for ten minutes and ten times the time of a result.

    Exit code: 0 if all are finished, 3 if some are running, 4 if one is stalled or a shard is missing.
    """
    from certify.runs.status import STALLED, find_runs, missing_shards, read_status

    files = find_runs(runs)
    states, missing = [read_status(file) for file in files], missing_shards(files)
    named = {first: shards for first, (_, shards) in missing.items()}
    overall = STALLED if missing else max((one.state for one in states), key=_CODES.__getitem__)
    if output.as_json:
        tell(json.dumps({"state": overall, "runs": [asdict(one) for one in states], "missing_shards": named}))
    else:
        _show(states, missing)
    click.get_current_context().exit(_CODES[overall])


def _show(states: Sequence[RunStatus], missing: Mapping[str, tuple[int, Sequence[str]]]) -> None:
    from certify.runs.progress import duration

    for one in states:
        counts = {"undecided": one.undecided, "unusable": one.unusable}
        about = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        parts = [f"{one.done:,} of {one.expected:,} {one.unit}{f' ({about})' if about else ''}"]
        if one.state != "finished":
            parts += [] if one.seconds_left is None else [f"about {duration(one.seconds_left)} left"]
            parts.append(f"last write {duration(one.seconds_since_write)} ago")
        tell(f"{one.file}: {one.state}, {', '.join(parts)}")
        if one.state == "stalled":
            tell(f"  resume it with: {one.command or 'its command'}")
    for first, (count, shards) in missing.items():
        more = f" and {count - 10:,} more" if count > 10 else ""
        tell(f"no file of shard {', '.join(shards[:10])}{more} of the run of {first}")
    if len(states) > 1:
        units = {one.unit for one in states}
        total = f"{sum(one.done for one in states):,} of {sum(one.expected for one in states):,}"
        tell(f"all: {total} {units.pop() if len(units) == 1 else 'results'}")
