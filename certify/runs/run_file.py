"""The run file: JSON Lines, a header and then one line an image; written so that nothing that was done is lost.

Header keys that others rely on: ``type`` ("run"), ``schema``, ``model``, ``data``, ``denoiser``, ``noise``, ``sigma``,
``n0``, ``n``, ``alpha``, ``bound``, ``seed``, ``precision``, ``device``, ``expected``. Image keys: ``type`` ("image"),
``id``, ``label``, ``prediction`` (-1 abstains), ``radius``, ``p_lower``, ``votes``, ``selection``, ``trials``,
``failures``, ``seconds``. ``docs/run-file.md`` explains all of them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from certify.errors import RunFault, UserError
from certify.runs.files import open_to_append, replacing, write_all
from certify.runs.identity import refuse_other_run
from certify.runs.schema import Record, header_fault, image_fault, outcome_fault, parse_object

SCHEMA = 1

_HEADER_START = b'{"type": "'

COMPARISON = "comparison"
"""The other kind of file that is written this way: a header, then one line for each image, defence and condition."""

_OUTCOME_KEYS = ("id", "image", "defence", "condition", "label", "answers")
SET_ASIDE = "is set aside"
"""How the ``error`` of an image begins that can be read, but that no worker survives."""

IMAGE_KEYS = ("id", "label", "prediction", "radius", "p_lower", "votes", "selection", "trials", "failures", "seconds")


def now() -> str:
    """The time in UTC to the second, as headers say when they were made."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Run:
    """A run file as it was read.

    Attributes:
        path: of the file.
        header: its first line.
        images: its other lines, in file order.
        torn: whether the last line was cut off (and left out).
    """

    path: Path
    header: dict[str, Any]
    images: list[dict[str, Any]] = field(default_factory=list)
    torn: bool = False

    @property
    def partial(self) -> bool:
        """Whether images are still owed."""
        return len(self.images) < int(self.header["expected"])

    @property
    def usable(self) -> list[dict[str, Any]]:
        """The images that could be read; the others carry ``error`` and prove nothing."""
        return [row for row in self.images if "error" not in row]

    @property
    def origin(self) -> dict[str, Any]:
        """The file's name and hash, for the record of what is made of it."""
        return {"run": self.path.name, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}


def peek_header(path: str | Path) -> dict[str, Any] | None:
    """The header of a run file; None when there is no such file, or no whole header in it."""
    try:
        with Path(path).open("rb") as file:
            line = file.readline(2**24)
        header = parse_object(line) if line.endswith(b"\n") else None
    except OSError:
        return None
    if header is None or str(header.get("type")) not in _ROWS:
        return None
    return Record(header, f"{path}, line 1,")


def read_run(path: str | Path, *, allow_partial: bool = False, kind: str = "run") -> Run:
    """Read a run file.

    Args:
        path: of the file.
        allow_partial: whether it may owe images.
        kind: what its header says it is: ``"run"`` or ``COMPARISON``.

    Raises:
        UserError: not a run file, written by a newer version, torn in the middle, an image twice, more images than the
            run owes, or unfinished (unless ``allow_partial``).
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    lines = content.split(b"\n")
    torn = lines.pop() != b""  # a whole file ends in a newline
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        rows.append(_parse_header(line, path, kind) if not rows else _parse(line, number, path, rows[0]))
    if not rows:
        if not content or content.startswith(_HEADER_START):
            raise UserError(f"{path} holds no header: it was cut off at once; delete it and run the command again")
        raise UserError(f"{path} is not a run file of certify")
    run = Run(path, rows[0], rows[1:], torn)
    _check(run)
    if run.partial and not allow_partial:
        raise UserError(
            f"{path} is unfinished: {len(run.images)} of {run.header['expected']} images; run its command again"
        )
    return run


def _parse_header(line: bytes, path: Path, kind: str) -> dict[str, Any]:
    row = parse_object(line)
    if row is None or str(row.get("type")) not in _ROWS or not isinstance(row.get("expected"), int):
        log = "; a published log holds no votes: `certify table` and `certify plot` read it" * line.startswith(b"idx\t")
        raise UserError(f"{path} is not a run file of certify: its first line is no header{log}")
    if row["type"] != kind:
        raise UserError(f"{path} is a {row['type']}, not a {kind}; `certify table` shows both")
    if type(schema := row.get("schema", 0)) is int and schema > SCHEMA:
        raise UserError(f"{path} was written by a newer version (schema {schema}); update certify-toolkit")
    if found := header_fault(row):
        raise UserError(f"{path} has a damaged header: {found}; put back a copy of it, or name another file")
    return Record(row, f"{path}, line 1,")


def _parse(line: bytes, number: int, path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    row = parse_object(line)
    name, needed, fault_of = _ROWS[header["type"]]
    if row is not None and row.get("type") in _ROWS:
        name = shlex.quote(str(path))
        raise UserError(
            f"{path} holds several runs: line {number} is another header; put each run in a file of its own (head -n "
            f"{number - 1} {name} > first.jsonl; tail -n +{number} {name} > second.jsonl); `certify merge` joins shards"
        )
    if row is None:
        found = "no JSON object"
    elif row.get("type") != name:
        found = f"its type is not {name!r}"
    else:
        found = next((f"it has no {key!r}" for key in needed if key not in row), "") or fault_of(row, header)
    if found or row is None:
        raise UserError(
            f"{path} is damaged at line {number}: {found}; delete that line and run the command again to redo its image"
        )
    return Record(row, f"{path}, line {number},")


_ROWS = {"run": ("image", IMAGE_KEYS, image_fault), COMPARISON: ("outcome", _OUTCOME_KEYS, outcome_fault)}
"""The type of the lines after a header, the keys that they all have, and what else may be wrong with one."""


def _check(run: Run) -> None:
    refuse_duplicates(run.path, run.images)
    if len(run.images) > run.header["expected"]:
        raise UserError(f"{run.path} holds {len(run.images)} images, but its header owes {run.header['expected']}")


def refuse_duplicates(path: Path, images: Sequence[Mapping[str, Any]]) -> None:
    """Refuse results in which one image would be counted twice.

    Raises:
        UserError: two lines with the same ``id``.
    """
    seen = set[str]()
    for row in images:
        if row["id"] in seen:
            raise UserError(f"{path} holds image {row['id']!r} twice; expected one line per image: delete the repeats")
        seen.add(row["id"])


class RunFile:
    """A run file being written: created with its header, or continued where it stopped.

    Every image is appended and flushed at once, so a kill loses at most the images in work, those that share a
    batch. Use as a context manager.

    Args:
        path: of the file.
        header: what this command means; a file that is there already must mean the same.
        trust_identity: resume a file although it cannot prove that its model is still the same.

    Raises:
        UserError: the file is another run's, damaged, in use, or cannot be written.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], *, trust_identity: bool = False) -> None:
        self.path = Path(path)
        self.header = header
        self._trust_identity = trust_identity
        self.done: dict[str, dict[str, Any]] = {}
        self._file = open_to_append(self.path)  # locked from here on: what is read next cannot change any more
        try:
            whole = self._resume()
            self.resumed = whole > 0
            self._file.truncate(whole)
            if not self.resumed:
                self._append(self.header)
        except BaseException:
            self._file.close()
            raise

    def _resume(self) -> int:
        """Take over what is there; how many bytes of it stay, which leaves out a line torn by a kill."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; name another --out") from None
        if not content or (b"\n" not in content and content.startswith(_HEADER_START)):
            return 0  # new, or killed while the header was written
        run = read_run(self.path, allow_partial=True, kind=self.header["type"])
        refuse_other_run(self.path, run.header, self.header, trust_identity=self._trust_identity)
        self.header = run.header
        self.done = {row["id"]: row for row in run.images}
        return content.rfind(b"\n") + 1

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one image's line; it is on its way to the disk when this returns.

        Raises:
            RunFault: the disk is full or gone; what was written before stays.
        """
        line = {"type": _ROWS[self.header["type"]][0], **row}
        self._append(line)
        self.done[row["id"]] = line

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            write_all(self._file, line)
        except OSError as error:
            raise RunFault(
                f"could not write {self.path}: {error.strerror}; {len(self.done)} finished images are kept: "
                "make room and run the same command to go on"
            ) from None

    def __enter__(self) -> RunFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.fsync(self._file.fileno())  # every line was flushed when it was appended
        except OSError:
            if kind is None:
                raise RunFault(f"could not finish writing {self.path}") from None
        finally:
            self._file.close()


def write_run(path: str | Path, header: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a run file whole or not at all; one that is there is replaced.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    with replacing(path, sync=True) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in (header, *rows))


def new_run_file(path: str | Path) -> Path:
    """Where a run that is made from others may be written: before anything is read or computed for it.

    Raises:
        UserError: not a name of a run file, or something is there already.
    """
    target = Path(path)
    if target.suffix != ".jsonl":
        raise UserError(f"--out {path}: expected a file ending in .jsonl")
    if target.exists():
        raise UserError(f"{path} is there already and is left alone: name another --out")
    return target


def write_derived(target: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> Run:
    """Write a run that was made from others, whole or not at all.

    Raises:
        RunFault: it cannot be written.
    """
    try:
        write_run(target, header, rows)
    except OSError as error:
        raise RunFault(f"could not write {target}: {error.strerror}; what it is made from is untouched") from None
    return Run(target, header, rows)
