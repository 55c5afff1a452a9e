"""The ledger being kept: what was paid for, on the disk before it is used. Its lines: ``ledger_lines``."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certify.blackbox.ledger_contents import Entry, answers_of, enter, parse
from certify.blackbox.types import Answer, Query
from certify.errors import RunFault, UserError
from certify.runs.files import open_to_append, write_all

_FREE = ("created", "version")  # circumstances, not settings


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
        header: of :func:`~certify.blackbox.ledger_contents.ledger_header`.

    Raises:
        UserError: the file belongs to another endpoint, format or setting, is damaged, in use, or cannot be written.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.header = dict(header)
        self._progress = _Progress()
        self._entries: dict[str, Entry] = {}
        self._spent = 0
        self._file = open_to_append(self.path, private=True)  # replies may be confidential
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
            return answers_of(self._entries)

    def find(self, query: Query) -> Answer | None:
        """The answer to a query, if it has been paid for.

        Raises:
            UserError: another picture was sent under this name.
        """
        entry = self._entries.get(query.name)
        if entry is None:
            return None
        if entry.pixels != (pixels := query.picture.sha256):
            raise UserError(
                f"{self.path}: query {query.name!r} was another picture when it was sent (SHA-256 {entry.pixels[:12]} "
                f"then, {pixels[:12]} now): image, noise, seed, denoiser or version of a library changed; "
                "go on with those of then, or name another --out"
            )
        return answers_of({query.name: entry}).get(query.name)

    def attempts(self, name: str) -> int:
        """Requests sent for a query so far."""
        entry = self._entries.get(name)
        return entry.attempts if entry else 0

    def sent(self, query: Query, body: bytes) -> None:
        """Record that a request with this body is about to be sent.

        Raises:
            RunFault: it could not be recorded, so it must not be sent.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        row = {"type": "sent", "name": query.name, "attempt": self.attempts(query.name) + 1}
        hashes = {"pixels": query.picture.sha256, "body": hashlib.sha256(body).hexdigest()}
        self._append({**row, **hashes, "time": now})

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
            enter(self._entries, row)
            try:
                write_all(self._file, line)
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
        old, self._entries, _ = parse(content, self.path)
        try:
            if old is None:
                self._file.truncate(0)
                write_all(self._file, json.dumps(self.header, allow_nan=False).encode() + b"\n")
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

    def __exit__(self, *_: object) -> None:
        self.close()


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
