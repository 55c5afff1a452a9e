"""A run in n parts that know nothing of each other: which images a part holds, and one file out of all of them.

Shard i of n takes every n-th of the chosen images, from the i-th: classes that follow each other are spread over all
shards, and nothing but the selection decides. No image's record depends on its shard, so the merged file is the one
that a single process would have written.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from certify.errors import UserError
from certify.runs.identity import differences, unproven
from certify.runs.run_file import Run, new_run_file, now, read_run, write_derived

_LOG = logging.getLogger("certify")


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 1) of ``of`` parts.

    Raises:
        UserError: there is no such part.
    """

    index: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.of:
            raise UserError(f"--shard {self}: expected i/n with i from 1 to n, such as 1/8 for the first of eight")

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"`` to the second of eight.

        Raises:
            UserError: anything else.
        """
        first, _, second = text.partition("/")
        if not (first.isdecimal() and second.isdecimal()):
            raise UserError(f"--shard {text!r}: expected i/n, such as 1/8 for the first of eight")
        return cls(int(first), int(second))

    def places(self, images: int) -> range:
        """The places of its images among all chosen ones, from 0.

        Raises:
            UserError: more shards than images.
        """
        if self.of > images:
            raise UserError(
                f"--shard {self}: more shards than images, some would be empty; expected at most {images} shards"
            )
        return range(self.index - 1, images, self.of)

    def header(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """The header of this part of a run."""
        places = self.places(whole["expected"])
        return {**whole, "expected": len(places), "shard": {**asdict(self), "images": whole["expected"]}}


def whole_header(part: Mapping[str, Any]) -> dict[str, Any]:
    """The header of the run that this is a part of; its own if it is none."""
    shard = part.get("shard")
    if shard is None:
        return dict(part)
    whole = copy.copy(part) if isinstance(part, dict) else dict(part)
    del whole["shard"]
    whole["expected"] = shard["images"]
    return whole


def merge_shards(
    paths: Sequence[str | Path], *, command: str = "", warn: Callable[[str], None] = _LOG.warning
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and image lines of the run whose shards these files hold, the images in the order of their selection.

    A shard that cannot prove which model it met is merged with a warning; the merged file cannot prove it either.

    Raises:
        UserError: a file that is no shard, one of another run, one twice, one missing, or one unfinished; by name.
    """
    runs = sorted((_read(path) for path in paths), key=lambda run: int(run.header["shard"]["index"]))
    first = next((run for run in runs if not unproven(run.header)), runs[0])
    whole = whole_header(first.header)
    for run in runs:
        other = differences(whole, whole_header(run.header))
        of, wanted = run.header["shard"]["of"], first.header["shard"]["of"]
        if of != wanted:
            other = f"one of {wanted} shards there, of {of} here" + (f", {other}" if other else "")
        if other:
            raise UserError(f"{run.path} is a shard of another run than {first.path} ({other}); leave it out")
    _complete(runs)
    for run in runs:
        if doubt := unproven(run.header):
            warn(f"{run.path}: {doubt}")
            whole = whole_header(run.header)
    rows = [_placed(run, row) for run in runs for row in run.images]
    rows.sort(key=lambda placed: placed[0])
    names = [row["id"] for _, row in rows]
    if len(set(names)) < len(names):
        raise UserError(f"{first.path} and the others hold an image twice; they are damaged: run one of them again")
    whole.update({"created": now(), "command": command, "merged": [_origin(run) for run in runs]})
    return whole, [row for _, row in rows]


def _read(path: str | Path) -> Run:
    run = read_run(path, allow_partial=True)
    shard = run.header.get("shard")
    if not isinstance(shard, Mapping) or not all(type(shard.get(k)) is int for k in ("index", "of", "images")):
        raise UserError(f"{path} is a whole run, not a shard of one; expected files written with --shard i/n")
    Shard(shard["index"], shard["of"])
    if "recomputed" in run.header:
        raise UserError(f"{path} was recomputed; merge the shards it came from, and recompute what comes out")
    return run


def _complete(runs: Sequence[Run]) -> None:
    """Refuse shards that are there twice, missing or unfinished."""
    of = runs[0].header["shard"]["of"]
    found: dict[int, Run] = {}
    for run in runs:
        index = run.header["shard"]["index"]
        if index in found:
            raise UserError(f"{found[index].path} and {run.path} are both shard {index}/{of}; leave one of them out")
        found[index] = run
    missing = of - len(found)
    if missing:
        named = list(itertools.islice((index for index in range(1, of + 1) if index not in found), 5))
        shown = ", ".join(f"{index}/{of}" for index in named) + (", ..." if missing > len(named) else "")
        raise UserError(
            f"{missing} of {of} shards are missing: {shown}; name their files too, or run the command of "
            f"{runs[0].path} with --shard {named[0]}/{of}"
        )
    for run in runs:
        if run.partial:
            raise UserError(
                f"{run.path} (shard {run.header['shard']['index']}/{of}) is unfinished: {len(run.images)} of "
                f"{run.header['expected']} images; go on with: {run.header.get('command') or 'its command'}"
            )


def _placed(run: Run, row: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """An image's place among all, and its line as a single run has it."""
    shard, place = run.header["shard"], row.get("place")
    if type(place) is not int or place not in Shard(shard["index"], shard["of"]).places(shard["images"]):
        raise UserError(f"{run.path} is damaged: image {row['id']!r} has no place in its shard; run its command again")
    without = copy.copy(row)
    del without["place"]
    return place, without


def _origin(run: Run) -> dict[str, Any]:
    """Where a part came from, for the record."""
    return run.origin | {key: run.header.get(key) for key in ("created", "command", "machine")}


def merge_files(
    paths: Sequence[str | Path], target: str | Path, *, command: str = "", warn: Callable[[str], None] = _LOG.warning
) -> Run:
    """Write the merged run, whole or not at all.

    Raises:
        UserError: as :func:`merge_shards`; the target is there already, or no run file by its name.
        RunFault: it cannot be written.
    """
    target = new_run_file(target)
    header, rows = merge_shards(paths, command=command, warn=warn)
    return write_derived(target, header, rows)
