"""Files of records: JSON Lines, a header and then one line per result, appended so that no finished work is lost.

Run files hold images (:class:`Run`, :class:`RunFile`); comparisons hold one outcome per image, defence and condition
(:class:`ComparisonRun`, :class:`ComparisonFile`). ``docs/run-file.md`` explains the keys.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from certify.errors import RunFault, UserError
from certify.models.signatures import HEAD, name_content
from certify.runs.comparison_records import ComparisonHeader, Outcome
from certify.runs.files import open_to_append, replacing, write_all
from certify.runs.identity import refuse_other_run
from certify.runs.records import SCHEMA, Header, ImageRow, Row, RunHeader
from certify.runs.schema import parse_object

_HEADER_START = b'{"type": "'

SET_ASIDE = "is set aside"
"""Start of the ``error`` of an image that can be read, but that no worker survives."""

AnyHeader = TypeVar("AnyHeader", bound=Header)
AnyRow = TypeVar("AnyRow", bound=Row)


def now() -> str:
    """Return the time in UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Records(Generic[AnyHeader, AnyRow]):
    """A file of records as it was read.

    Attributes:
        path: of the file.
        header: its first line.
        images: its other lines, in file order.
        torn: True if the last line was cut off (it is left out).
    """

    path: Path
    header: AnyHeader
    images: list[AnyRow] = field(default_factory=list)
    torn: bool = False

    header_class: ClassVar[type[Header]]
    row_class: ClassVar[type[Row]]

    @property
    def partial(self) -> bool:
        """True if lines are missing."""
        return len(self.images) < self.header.expected

    @property
    def usable(self) -> list[AnyRow]:
        """The lines with a result; the others carry ``error`` and prove nothing."""
        return [row for row in self.images if row.error is None]

    @property
    def origin(self) -> dict[str, str]:
        """Name and hash of the file, for the record of what is derived from it."""
        return {"run": self.path.name, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}

    @classmethod
    def read(cls, path: str | Path, *, allow_partial: bool = False) -> Self:
        """Read a file of this kind.

        Args:
            path: of the file.
            allow_partial: accept a file with missing lines.

        Raises:
            UserError: another file, one of a newer version, a damaged line, a line twice, more lines than expected,
                or an unfinished file (unless ``allow_partial``).
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        lines = content.split(b"\n")
        torn = lines.pop() != b""  # a whole file ends in a newline
        if not lines:
            if not content or content.startswith(_HEADER_START):
                raise UserError(f"{path} holds no header: it was cut off at once; delete it and run the command again")
            raise UserError(f"{path} is not a run file of certify")
        header = _parse_header(lines[0], path, cls.header_class)
        rows = [_parse(line, number, path, header, cls.row_class) for number, line in enumerate(lines[1:], 2)]
        run = cls(path, header, rows, torn)  # type: ignore[arg-type]
        refuse_duplicates(path, run.images)
        if len(run.images) > header.expected:
            raise UserError(f"{path} holds {len(run.images)} images, but its header owes {header.expected}")
        if run.partial and not allow_partial:
            raise UserError(
                f"{path} is unfinished: {len(run.images)} of {header.expected} images; run its command again"
            )
        return run


class Run(Records[RunHeader, ImageRow]):
    """A run file as it was read; ``images`` are its rows, ``usable`` those without an error."""

    header_class = RunHeader
    row_class = ImageRow

    @property
    def agreement(self) -> tuple[int, int]:
        """Numbers of labels that agree with plain float32, and of labels compared."""
        pairs = [row.agreement for row in self.usable if row.agreement is not None]
        return sum(same for same, _ in pairs), sum(compared for _, compared in pairs)

    @property
    def failures(self) -> tuple[int, int]:
        """Numbers of failed samples and of all samples."""
        return sum(row.failures for row in self.usable), sum(row.trials for row in self.usable)

    @property
    def class_names(self) -> dict[int | None, str]:
        """Names of the classes that were predicted, with or without noise."""
        rows = self.usable
        pairs = [pair for row in rows for pair in ((row.base, row.base_class), (row.prediction, row.class_name))]
        return {label: name for label, name in pairs if name is not None}

    @property
    def omissions(self) -> str:
        """The number of images without a result, as a sentence; empty if there are none."""
        count = len(self.images) - len(self.usable)
        many = "images could not be used and are" if count > 1 else "image could not be used and is"
        return f"{count} {many} left out" if count else ""


class ComparisonRun(Records[ComparisonHeader, Outcome]):
    """A comparison as it was read."""

    header_class = ComparisonHeader
    row_class = Outcome


read_run = Run.read

_HEADERS: dict[str, type[Header]] = {kind.type_name: kind for kind in (RunHeader, ComparisonHeader)}


def peek_header(path: str | Path) -> Header | None:
    """Return the header of a run file or comparison; None if there is no such file, or no whole header in it.

    Raises:
        UserError: a damaged header, or one of a newer version.
    """
    try:
        with Path(path).open("rb") as file:
            line = file.readline(2**24)
        content = parse_object(line) if line.endswith(b"\n") else None
    except OSError:
        return None
    kind = None if content is None else _HEADERS.get(str(content.get("type")))
    if content is None or kind is None:
        return None
    return _parse_header(line, Path(path), kind)


def _parse_header(line: bytes, path: Path, kind: type[Header]) -> Header:
    content = parse_object(line)
    named = None if content is None else str(content.get("type"))
    if content is None or named not in _HEADERS or type(content.get("expected")) is not int:
        if other := name_content(line[:HEAD]):
            raise UserError(f"{path} is {other}, not a run file of certify")
        log = "; a published log holds no votes: `certify table` and `certify plot` read it" * line.startswith(b"idx\t")
        log = log or "; the columns of a published log are separated by tabs" * line.startswith(b"idx")
        raise UserError(f"{path} is not a run file of certify: its first line is no header{log}")
    if named != kind.type_name:
        raise UserError(f"{path} is a {named}, not a {kind.type_name}; `certify table` shows both")
    if type(schema := content.get("schema", 0)) is int and schema > SCHEMA:
        raise UserError(f"{path} was written by a newer version (schema {schema}); update certify-toolkit")
    if wrong := kind.fault(content):
        raise UserError(f"{path} has a damaged header: {wrong}; put back a copy of it, or name another file")
    return kind.from_json(content, f"{path}, line 1,")


def _parse(line: bytes, number: int, path: Path, header: Header, kind: type[Row]) -> Row:
    content = parse_object(line)
    if content is not None and str(content.get("type")) in _HEADERS:
        name = shlex.quote(str(path))
        raise UserError(
            f"{path} holds several runs: line {number} is another header; put each run in a file of its own (head -n "
            f"{number - 1} {name} > first.jsonl; tail -n +{number} {name} > second.jsonl); `certify merge` joins shards"
        )
    if content is None:
        wrong = "no JSON object"
    elif content.get("type") != kind.type_name:
        wrong = f"its type is not {kind.type_name!r}"
    else:
        wrong = kind.fault(content)
    if content is not None and not wrong:
        row = kind.from_json(content, f"{path}, line {number},")
        wrong = row.fault_in(header)
        if not wrong:
            return row
    raise UserError(
        f"{path} is damaged at line {number}: {wrong}; delete that line and run the command again to redo its image"
    )


def refuse_duplicates(path: Path, rows: Sequence[Row]) -> None:
    """Refuse results in which one image would be counted twice.

    Raises:
        UserError: two lines with the same ``id``.
    """
    seen = set[str]()
    for row in rows:
        if row.id in seen:
            raise UserError(f"{path} holds image {row.id!r} twice; expected one line per image: delete the repeats")
        seen.add(row.id)


class RecordFile(Generic[AnyHeader, AnyRow]):
    """A file being written: created with its header, or resumed where it stopped.

    Every line is appended and flushed at once, so a kill loses only the images in progress. Use as a context manager.

    Args:
        path: of the file.
        header: of the command; an existing file must belong to the same run.
        trust_identity: resume a file although it cannot prove that its model is still the same.

    Raises:
        UserError: the file belongs to another run, is damaged, in use, or cannot be written.
    """

    reader: ClassVar[type[Records[Any, Any]]]

    def __init__(self, path: str | Path, header: AnyHeader, *, trust_identity: bool = False) -> None:
        self.path = Path(path)
        self.header = header
        self._trust_identity = trust_identity
        self.done: dict[str, AnyRow] = {}
        self._file = open_to_append(self.path)  # locked from here on: what is read next cannot change any more
        try:
            whole = self._resume()
            self.resumed = whole > 0
            self._file.truncate(whole)
            if not self.resumed:
                self._append(self.header.to_json())
        except BaseException:
            self._file.close()
            raise

    def _resume(self) -> int:
        """Take over an existing file; return the number of bytes to keep, without a line torn by a kill."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; name another --out") from None
        if not content or (b"\n" not in content and content.startswith(_HEADER_START)):
            return 0  # new, or killed while the header was written
        run = self.reader.read(self.path, allow_partial=True)
        old, new = run.header.to_json(), self.header.to_json()
        refuse_other_run(self.path, old, new, trust_identity=self._trust_identity)
        self.header = run.header
        self.done = {row.id: row for row in run.images}
        return content.rfind(b"\n") + 1

    def append(self, row: AnyRow) -> None:
        """Write one line; it is on its way to the disk when this returns.

        Raises:
            RunFault: the disk is full or gone; what was written before stays.
        """
        self._append(row.to_json())
        self.done[row.id] = row

    def _append(self, content: dict[str, Any]) -> None:
        line = json.dumps(content, allow_nan=False).encode() + b"\n"
        try:
            write_all(self._file, line)
        except OSError as error:
            raise RunFault(
                f"could not write {self.path}: {error.strerror}; {len(self.done)} finished images are kept: "
                "make room and run the same command to go on"
            ) from None

    def __enter__(self) -> Self:
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


class RunFile(RecordFile[RunHeader, ImageRow]):
    """A run file being written."""

    reader = Run


class ComparisonFile(RecordFile[ComparisonHeader, Outcome]):
    """A comparison being written."""

    reader = ComparisonRun


def write_run(path: str | Path, header: RunHeader, rows: Iterable[ImageRow]) -> None:
    """Write a run file whole or not at all; an existing one is replaced.

    Raises:
        OSError: it cannot be written; an existing file is untouched.
    """
    with replacing(path, sync=True) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line.to_json(), allow_nan=False) + "\n" for line in (header, *rows))


def write_derived(target: Path, header: RunHeader, rows: list[ImageRow]) -> Run:
    """Write a run that was derived from others, whole or not at all.

    Raises:
        RunFault: it cannot be written.
    """
    try:
        write_run(target, header, rows)
    except OSError as error:
        raise RunFault(f"could not write {target}: {error.strerror}; what it is made from is untouched") from None
    return Run(target, header, rows)
