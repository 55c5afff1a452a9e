"""A run in n parts that know nothing of each other: which images a part holds, and one file out of all of them.

Shard i of n takes every n-th of the chosen images, from the i-th: classes that follow each other are spread over all
shards, and nothing but the selection decides. No image's record depends on its shard, so the merged file is the one
that a single process would have written.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from certify.errors import UserError, warn
from certify.runs.identity import differences, unproven
from certify.runs.records import ImageRow, RunHeader, ShardPlace
from certify.runs.run_file import Run, now


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
        first, _, second = text.partition("/") if isinstance(text, str) else ("", "", "")
        if not (first.isdecimal() and second.isdecimal()):
            raise UserError(f"--shard {text!r}: expected i/n, such as 1/8 for the first of eight")
        return cls(int(first), int(second))

    def places(self, images: int) -> range:
        """Return the places of its images among all chosen ones, from 0.

        Raises:
            UserError: more shards than images.
        """
        if self.of > images:
            raise UserError(
                f"--shard {self}: more shards than images, some would be empty; expected at most {images} shards"
            )
        return range(self.index - 1, images, self.of)

    def largest(self, images: int) -> int:
        """Return the number of images in the largest shard of a run."""
        return -(-images // self.of)

    def header(self, whole: RunHeader) -> RunHeader:
        """Return the header of this part of a run."""
        place = ShardPlace(index=self.index, of=self.of, images=whole.expected)
        return whole.replace(expected=len(self.places(whole.expected)), shard=place)


def whole_header(part: RunHeader) -> RunHeader:
    """Return the header of the run that this is a shard of; its own if it is none."""
    return part if part.shard is None else part.replace(expected=part.shard.images, shard=None)


def merge_shards(runs: Iterable[Run], *, command: str = "") -> tuple[RunHeader, list[ImageRow]]:
    """Return header and rows of the whole run from its shards, with the images in the order of their selection.

    A shard that cannot prove the identity of its model is merged with a warning, and neither can the merged file.

    Raises:
        UserError: a run that is not a shard, a shard of another run, a duplicate, missing or unfinished shard; by name.
    """
    parts = sorted((_part(run) for run in runs), key=lambda part: part.place.index)
    first = next((part for part in parts if not unproven(part.run.header)), parts[0])
    whole = whole_header(first.run.header)
    for part in parts:
        other = differences(whole, whole_header(part.run.header))
        if part.place.of != first.place.of:
            count = f"one of {first.place.of} shards there, of {part.place.of} here"
            other = f"{count}, {other}" if other else count
        if other:
            raise UserError(f"{part.run.path} is a shard of another run than {first.run.path} ({other}); leave it out")
    _complete(parts)
    for part in parts:
        if doubt := unproven(part.run.header):
            warn(f"{part.run.path}: {doubt}")
            whole = whole_header(part.run.header)
    rows = sorted((_placed(part, row) for part in parts for row in part.run.images), key=lambda placed: placed[0])
    if len({row.id for _, row in rows}) < len(rows):
        raise UserError(f"{first.run.path} and the others hold an image twice; they are damaged: run one of them again")
    merged = [_origin(part.run) for part in parts]
    return whole.replace(created=now(), command=command, merged=merged), [row for _, row in rows]


def missing_parts(of: int, present: Collection[int], *, most: int) -> tuple[int, list[str]]:
    """Return the number of parts that are not present, and the first ``most`` of them, such as ``3/8``.

    ``of`` comes from a file and may be huge; the time does not depend on it.
    """
    absent = (f"{index}/{of}" for index in range(1, of + 1) if index not in present)
    return of - len(present), list(itertools.islice(absent, most))


@dataclass(frozen=True)
class _Part:
    """A run file with its place among the shards."""

    run: Run
    place: ShardPlace


def _part(run: Run) -> _Part:
    path = run.path
    if run.header.shard is None:
        raise UserError(f"{path} is a whole run, not a shard of one; expected files written with --shard i/n")
    Shard(run.header.shard.index, run.header.shard.of)
    if run.header.recomputed is not None:
        raise UserError(f"{path} was recomputed; merge the shards it came from, and recompute what comes out")
    return _Part(run, run.header.shard)


def _complete(parts: Sequence[_Part]) -> None:
    """Refuse shards that are there twice, missing or unfinished."""
    of = parts[0].place.of
    known: dict[int, Run] = {}
    for part in parts:
        index = part.place.index
        if index in known:
            raise UserError(
                f"{known[index].path} and {part.run.path} are both shard {index}/{of}; leave one of them out"
            )
        known[index] = part.run
    missing, named = missing_parts(of, known, most=5)
    if missing:
        shown = ", ".join(named) + (", ..." if missing > len(named) else "")
        raise UserError(
            f"{missing} of {of} shards are missing: {shown}; name their files too, or run the command of "
            f"{parts[0].run.path} with --shard {named[0]}"
        )
    for index, run in known.items():
        if run.partial:
            raise UserError(
                f"{run.path} (shard {index}/{of}) is unfinished: {len(run.images)} of {run.header.expected} images; "
                f"resume it with `{run.header.command or 'its command'}`"
            )


def _placed(part: _Part, row: ImageRow) -> tuple[int, ImageRow]:
    """Return an image's place among all, and its row as a single run has it."""
    if row.place is None or row.place not in Shard(part.place.index, part.place.of).places(part.place.images):
        raise UserError(
            f"{part.run.path} is damaged: image {row.id!r} has no place in its shard; run its command again"
        )
    return row.place, row.replace(place=None)


def _origin(run: Run) -> Mapping[str, Any]:
    """Return where a part came from, for the record."""
    return run.origin | {key: run.header.get(key) for key in ("created", "command", "machine")}
