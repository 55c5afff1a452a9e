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
from certify.runs.records import RunHeader
from certify.runs.run_file import ComparisonRun, Run, peek_header
from certify.runs.shards import whole_header

FINISHED, RUNNING, STALLED = "finished", "running", "stalled"
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
        undecided=sum(any(one.outcome == "undecided" for one in row) for row in outcomes),
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
        if not path.is_dir():
            files.append(path)
            continue
        runs = [file for file in sorted(path.glob("*.jsonl")) if peek_header(file) is not None]
        if not runs:
            raise UserError(f"{path} holds no run files; expected one that `certify` or `certify compare` writes")
        files += runs
    return files


def find_shards(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files named, and the shards in the folders named.

    Raises:
        UserError: no such file or folder, or a folder without shards.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        headers = {file: peek_header(file) for file in find_runs([path])}
        shards = [file for file, header in headers.items() if isinstance(header, RunHeader) and header.shard]
        if not shards:
            raise UserError(f"{path} holds no shards; expected files written with --shard i/n")
        files += shards
    return files


def missing_shards(files: Sequence[Path]) -> Mapping[str, list[str]]:
    """Return the shards without a file, such as ``3/8``, by the first file of their run."""
    present: dict[str, tuple[str, int, set[int]]] = {}
    for file in files:
        header = peek_header(file)
        if isinstance(header, RunHeader) and header.shard is not None:
            run = identity_digest(whole_header(header).to_json())
            place = header.shard
            present.setdefault(f"{run} {place.of}", (str(file), place.of, set()))[2].add(place.index)
    found = {first: [f"{i}/{of}" for i in range(1, of + 1) if i not in own] for first, of, own in present.values()}
    return {first: shards for first, shards in found.items() if shards}
