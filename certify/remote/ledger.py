"""The ledger: what was paid for, JSON Lines, on the disk before it is used.

A header, then in the order of events:

- ``{"type": "sent", "name", "attempt", "digest", "time"}`` before a request goes out;
- ``{"type": "refused", "name", "attempt", "why"}`` where it brought nothing that counts, and may be sent once more;
- ``{"type": "answer", "name", "attempts", "ranked": [[label, score], ...], "failure", "seconds"}``.

A query whose last line is ``sent`` was paid for and its answer lost: a failed trial, never sent again. One whose last
line is ``refused`` is still open. The number of ``sent`` lines is what was spent. ``kill -9`` may tear the last line,
which is then left out; anything else that does not fit is refused.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from certify import __version__
from certify.errors import RunFault, UserError
from certify.records import open_to_append
from certify.remote.types import Answer, Format, Query, Scored

SCHEMA = 1
LOST = "sent before a stop, no answer kept"

_START = b'{"type": "ledger"'
_FREE = ("created", "version")  # circumstances, not settings
_OPEN, _SENT, _ANSWERED = "open", "sent", "answered"


@dataclass
class _Entry:
    """What became of one query."""

    digest: str
    attempts: int = 0
    state: str = _OPEN
    answer: Answer | None = None


@dataclass(frozen=True)
class Kept:
    """A ledger as it was read.

    Attributes:
        header: its first line.
        answers: by name, each ``known``; a lost one is a failure.
        spent: requests sent.
        torn: whether its last line was cut off.
        queries: that were sent at least once; one that was refused and not sent again has no answer yet.
    """

    header: dict[str, Any]
    answers: dict[str, Answer]
    spent: int
    torn: bool
    queries: int


def ledger_header(endpoint: str, format: Format, **settings: Any) -> dict[str, Any]:
    """The first line of a ledger.

    Args:
        endpoint: without credentials, of :func:`certify.remote.http.check_endpoint`.
        format: how the service is asked.
        settings: what else must be the same when the ledger is opened again, such as the encoding of pictures.
    """
    return {
        "type": "ledger",
        "schema": SCHEMA,
        "endpoint": endpoint,
        "format": {"name": format.name, **format.about},
        **settings,
        "version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def read_ledger(path: str | Path) -> Kept:
    """Read a ledger, which may be in use.

    Raises:
        UserError: it cannot be read, is none, was written by a newer version, or is damaged.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected the ledger of an audit") from None
    header, entries, torn = _parse(content, path)
    if header is None:
        raise UserError(f"{path} holds no header: the program was stopped before anything was asked")
    spent = sum(entry.attempts for entry in entries.values())
    return Kept(header, _answers(entries), spent, torn, len(entries))


def read_answers(path: str | Path) -> dict[str, Answer]:
    """The answers of a ledger by name; see :func:`read_ledger`."""
    return read_ledger(path).answers


def _answers(entries: Mapping[str, _Entry]) -> dict[str, Answer]:
    found = {}
    for name, entry in entries.items():
        if entry.state == _SENT:
            found[name] = Answer(name, failure=LOST, attempts=entry.attempts, known=True)
        elif entry.answer is not None:
            found[name] = entry.answer
    return found


def _parse(content: bytes, path: Path) -> tuple[dict[str, Any] | None, dict[str, _Entry], bool]:
    """Header (None where the file was cut off before its end), queries, and whether the last line is torn."""
    *lines, rest = content.split(b"\n")
    if not lines and (_START.startswith(rest) or rest.startswith(_START)):
        return None, {}, bool(rest)
    header = _object(lines[0]) if lines else None
    if header is None or header.get("type") != "ledger" or not isinstance(header.get("schema"), int):
        raise UserError(f"{path} is not a ledger of certify: its first line is no header")
    if header["schema"] > SCHEMA:
        raise UserError(f"{path} was written by a newer version (schema {header['schema']}); update certify-toolkit")
    entries: dict[str, _Entry] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            _enter(entries, _object(line) or {})
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path} is damaged at line {number}; it is left alone: put back a copy of it, or name another --out"
            ) from None
    return header, entries, bool(rest)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _enter(entries: dict[str, _Entry], row: Mapping[str, Any]) -> None:
    """Take a line into the books.

    Raises:
        KeyError, TypeError, ValueError: it cannot follow the lines before it.
    """
    kind, name = row["type"], row["name"]
    if kind == "sent":
        entry = entries.setdefault(name, _Entry(str(row["digest"])))
        _require(entry.state == _OPEN, row["attempt"] == entry.attempts + 1, row["digest"] == entry.digest)
        entry.attempts, entry.state = entry.attempts + 1, _SENT
        return
    entry = entries[name]
    _require(entry.state == _SENT)
    if kind == "refused":
        _require(row["attempt"] == entry.attempts)
        entry.state = _OPEN
        return
    ranked = tuple(Scored(str(label), None if score is None else float(score)) for label, score in row["ranked"])
    failure = str(row["failure"] or "")
    _require(kind == "answer", row["attempts"] == entry.attempts, bool(ranked) != bool(failure))
    entry.answer = Answer(name, ranked, failure, float(row["seconds"]), entry.attempts, known=True)
    entry.state = _ANSWERED


def _require(*conditions: bool) -> None:
    if not all(conditions):
        raise ValueError


@dataclass
class _Progress:
    """Lines written, and how many of them are safe."""

    written: int = 0
    safe: int = 0
    length: int = 0  # bytes
    fault: str = ""
    flushing: bool = False
    change: threading.Condition = field(default_factory=threading.Condition)


class Ledger:
    """A ledger being kept: begun, or continued where it stopped. Any thread may call its methods. A context manager.

    A line is on the disk when the method that wrote it returns: threads that write at the same time share one flush.

    Args:
        path: of the file.
        header: of :func:`ledger_header`.

    Raises:
        UserError: the file belongs to another endpoint, format or setting, is damaged, in use, or cannot be written.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.header = dict(header)
        self._progress = _Progress()
        self._entries: dict[str, _Entry] = {}
        self._spent = 0
        self._file = open_to_append(self.path)
        try:
            self._continue()
        except BaseException:
            self._file.close()
            raise

    @property
    def spent(self) -> int:
        """Requests sent in the ledger's whole life."""
        return self._spent

    def answers(self) -> dict[str, Answer]:
        """All answers so far, by name, each ``known``; a query that is under way counts as lost."""
        with self._progress.change:
            return _answers(self._entries)

    def find(self, query: Query) -> Answer | None:
        """The answer to a query, if it has been paid for.

        Raises:
            UserError: another picture was sent under this name.
        """
        entry = self._entries.get(query.name)
        if entry is None:
            return None
        if entry.digest != (digest := query.picture.digest):
            raise UserError(
                f"{self.path}: query {query.name!r} was another picture when it was sent (SHA-256 {entry.digest[:12]} "
                f"then, {digest[:12]} now): image, noise, seed, denoiser or version of a library changed; "
                "go on with those of then, or name another --out"
            )
        return _answers({query.name: entry}).get(query.name)

    def attempts(self, name: str) -> int:
        """Requests sent for a query so far."""
        entry = self._entries.get(name)
        return entry.attempts if entry else 0

    def sent(self, name: str, digest: str) -> None:
        """Record that a request is about to be sent.

        Raises:
            RunFault: it could not be recorded, so it must not be sent.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._append({"type": "sent", "name": name, "attempt": self.attempts(name) + 1, "digest": digest, "time": now})

    def refused(self, name: str, why: str) -> None:
        """Record that the request brought nothing that counts, so that the query may be sent once more.

        Raises:
            RunFault: it could not be recorded.
        """
        self._append({"type": "refused", "name": name, "attempt": self.attempts(name), "why": why})

    def answer(self, answer: Answer) -> None:
        """Record what came of a query; only then may it be used.

        Raises:
            RunFault: it could not be recorded.
        """
        row = {
            "type": "answer",
            "name": answer.name,
            "attempts": answer.attempts,
            "ranked": [[one.label, one.score] for one in answer.ranked],
            "failure": answer.failure,
            "seconds": round(answer.seconds, 6),
        }
        self._append(row)

    def _append(self, row: Mapping[str, Any]) -> None:
        line, p = json.dumps(row, allow_nan=False).encode() + b"\n", self._progress
        with p.change:
            if p.fault or self._file.closed:
                raise self._fault(p.fault or "it was closed")
            _enter(self._entries, row)
            try:
                _write(self._file, line)
            except OSError as error:
                p.fault = error.strerror or type(error).__name__
                with suppress(OSError):
                    self._file.truncate(p.length)  # no half line that others would follow
                raise self._fault(p.fault) from None
            self._spent += row["type"] == "sent"
            p.length += len(line)
            p.written += 1
            mine = p.written
            while p.safe < mine:  # the first thread here flushes for all that have written by then
                if p.flushing:
                    p.change.wait()
                else:
                    self._flush()

    def _flush(self) -> None:
        """Bring what is written to the disk, in hold of the lock, which others get meanwhile."""
        p = self._progress
        if p.fault:
            raise self._fault(p.fault)
        p.flushing, reached = True, p.written
        p.change.release()
        fault = ""
        try:
            os.fsync(self._file.fileno())
        except (OSError, ValueError) as error:  # the latter where it was closed meanwhile
            fault = getattr(error, "strerror", None) or "it was closed"
        finally:
            p.change.acquire()
            p.flushing = False
            p.change.notify_all()
        if fault:
            p.fault = fault
            raise self._fault(fault)
        p.safe = reached

    def _fault(self, why: str) -> RunFault:
        return RunFault(
            f"could not write {self.path}: {why}; what it holds is kept: make room and run the same command to go on"
        )

    def _continue(self) -> None:
        """Take over what is there; cut off a torn line; begin a new ledger."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; name another --out") from None
        old, self._entries, _ = _parse(content, self.path)
        try:
            if old is None:
                self._file.truncate(0)
                _write(self._file, json.dumps(self.header, allow_nan=False).encode() + b"\n")
            else:
                _refuse_other(self.path, old, self.header)
                self.header = old
                self._file.truncate(content.rfind(b"\n") + 1)
            os.fsync(self._file.fileno())
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._fault(error.strerror or type(error).__name__) from None
        self._progress.length = os.fstat(self._file.fileno()).st_size
        self._spent = sum(entry.attempts for entry in self._entries.values())

    def close(self) -> None:
        """Let go of the file; every line is on the disk already."""
        with self._progress.change:
            self._progress.change.wait_for(lambda: not self._progress.flushing)
            self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write(file: io.FileIO, line: bytes) -> None:
    while line:
        line = line[file.write(line) :]


def _sync_folder(folder: Path) -> None:
    """A new file's name must be on the disk too; not every system can be told so."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _refuse_other(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    keys = [k for k in {**old, **new} if k not in _FREE and old.get(k) != new.get(k)]
    if keys:
        shown = "; ".join(f"{k} {json.dumps(old.get(k))} there, {json.dumps(new.get(k))} here" for k in keys)
        raise UserError(f"{path} is the ledger of something else ({shown}); it is left alone: name another --out")
