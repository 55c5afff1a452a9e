"""State of runs and comparisons from their files alone, also while another process writes to them."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from certify.errors import UserError
from certify.runs.comparison_records import ComparisonHeader
from certify.runs.files import is_locked
from certify.runs.identity import identity_digest
from certify.runs.records import Header, RunHeader
from certify.runs.run_file import ComparisonRun, Run, peek_header
from certify.runs.shards import missing_parts, whole_header
from certify.types import UNDECIDED

FINISHED, RUNNING, STALLED = "finished", "running", "stalled"
_NAMED = 1000  # missing shards that are named
_PATIENCE, _SLOW = 600.0, 10.0  # stalled: no write for 10 minutes, and for 10 times the seconds of a result


@dataclass(frozen=True)
class RunStatus:
    """State of one file.

    Attributes:
        file: its path.
        state: ``finished``; ``running`` if a process writes to it; ``stalled`` if none does, or without progress.
        unit: ``images`` or ``outcomes``.
        done: results in the file.
        expected: results when it is finished.
        unusable: results that are errors.
        undecided: images that the samples did not settle, where a radius is decided.
        seconds_left: estimated time left, from the results so far; None without any.
        seconds_since_write: age of the last line.
        shard: ``i/n``, or None for a whole run.
        command: resumes it.
    """

    file: str
    state: str
    unit: str
    done: int
    expected: int
    unusable: int
    undecided: int
    seconds_left: float | None
    seconds_since_write: float
    shard: str | None
    command: str


def read_status(path: Path, *, now: float | None = None) -> RunStatus:
    """Read the state of a run file or comparison.

    Args:
        path: of the file.
        now: the time as ``time.time()`` gives it; None: the present.

    Raises:
        UserError: another file, or a damaged one.
    """
    header = peek_header(path)
    run = (ComparisonRun if isinstance(header, ComparisonHeader) else Run).read(path, allow_partial=True)
    written = path.stat().st_mtime
    age = max(0.0, (time.time() if now is None else now) - written)
    done, left = len(run.images), run.header.expected - len(run.images)
    each = _seconds_each(run, written)
    writing = is_locked(path)
    late = age > max(_PATIENCE, _SLOW * each if done else 0.0)
    state = FINISHED if left <= 0 else STALLED if late or writing is False else RUNNING
    place = run.header.shard if isinstance(run.header, RunHeader) else None
    outcomes = [row.outcomes for row in run.images] if isinstance(run, Run) else []
    return RunStatus(
        file=str(path),
        state=state,
        unit="images" if isinstance(run, Run) else "outcomes",
        done=done,
        expected=run.header.expected,
        unusable=done - len(run.usable),
        undecided=sum(any(one.outcome == UNDECIDED for one in row) for row in outcomes),
        seconds_left=left * each if done else None,
        seconds_since_write=age,
        shard=None if place is None else f"{place.index}/{place.of}",
        command=run.header.command,
    )


def _seconds_each(run: Run | ComparisonRun, written: float) -> float:
    """Return the seconds per result: those recorded, or fewer by the clock, where several workers share the run."""
    if not run.images:
        return 0.0
    recorded = sum(row.seconds or 0.0 for row in run.images)
    try:
        begun = datetime.datetime.fromisoformat(run.header.created if isinstance(run, Run) else "").timestamp()
    except ValueError:  # unknown; a pause would make the time by the clock longer, never shorter
        begun = written - recorded
    return min(recorded, max(0.0, written - begun)) / len(run.images)


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files named, and the run files and comparisons in the folders named.

    Raises:
        UserError: no such file or folder, or a folder without runs.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected a run file, or a folder of them")
        files += _runs_in(path) if path.is_dir() else [path]
    return files


def find_shards(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files named, and the shards in the folders named.

    Raises:
        UserError: a folder without shards.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += _shards_in(path) if path.is_dir() else [path]
    return files


def _runs_in(folder: Path) -> dict[Path, Header]:
    """Return the headers of the runs and comparisons in a folder."""
    headers = {file: peek_header(file) for file in sorted(folder.glob("*.jsonl"))}
    runs = {file: header for file, header in headers.items() if header is not None}
    if not runs:
        raise UserError(f"{folder} holds no run files; expected one that `certify` or `certify compare` writes")
    return runs


def _shards_in(folder: Path) -> list[Path]:
    shards = [file for file, header in _runs_in(folder).items() if isinstance(header, RunHeader) and header.shard]
    if not shards:
        raise UserError(f"{folder} holds no shards; expected files written with --shard i/n")
    return shards


def missing_shards(files: Sequence[Path]) -> Mapping[str, tuple[int, list[str]]]:
    """Return the number of shards without a file, and the first of them, by the first file of their run."""
    present: dict[str, tuple[str, int, set[int]]] = {}
    for file in files:
        header = peek_header(file)
        if isinstance(header, RunHeader) and header.shard is not None:
            run = identity_digest(whole_header(header).to_json())
            place = header.shard
            present.setdefault(f"{run} {place.of}", (str(file), place.of, set()))[2].add(place.index)
    missing = {first: missing_parts(of, own, most=_NAMED) for first, of, own in present.values()}
    return {first: parts for first, parts in missing.items() if parts[0]}
