"""Write the ledger of an audit: every request before it is sent, every answer before it is used.

The format of its lines is documented in :mod:`certify.blackbox.ledger_contents`.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from certify.blackbox.function_service import comparable
from certify.blackbox.ledger_contents import LedgerContents, parse
from certify.blackbox.types import Answer, Query
from certify.errors import RunFault, UserError
from certify.runs.files import open_to_append, write_all

_PROVENANCE = ("created", "version")  # may differ when a ledger is resumed
_REMEMBERED = 10_000  # unanswered queries in memory; far fewer are in flight at a time


class Ledger:
    """Append to a new or resumed ledger; a context manager, to be used on one event loop.

    A line is on disk when the coroutine that wrote it returns; lines written during a flush share the next flush.

    Args:
        path: the file.
        header: result of :func:`~certify.blackbox.ledger_contents.ledger_header`.

    Attributes:
        contents: the state of all queries; one in flight counts as lost.

    Raises:
        UserError: the file belongs to another endpoint, format, setting or function, is damaged or in use, or cannot be
            written.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.contents = LedgerContents(dict(header))
        self._length = self._flushed = 0  # bytes written, and bytes known to be on disk
        self._fault = ""
        self._disk = ThreadPoolExecutor(1, "certify-ledger")
        self._file = open_to_append(self.path, private=True)  # replies may be confidential
        try:
            self._resume()
        except BaseException:
            self._file.close()
            raise

    @property
    def spent(self) -> int:
        """Requests sent over the ledger's lifetime."""
        return self.contents.spent

    def find(self, query: Query) -> Answer | None:
        """Return the answer to a query, if there is one.

        Raises:
            UserError: a different picture was sent under this name.
        """
        entry = self.contents.entries.get(query.name)
        if entry is None:
            return None
        if entry.pixels != (pixels := query.picture.sha256):
            raise UserError(
                f"{self.path}: query {query.name!r} was another picture when it was sent (SHA-256 {entry.pixels[:12]} "
                f"then, {pixels[:12]} now): image, noise, seed, denoiser or version of a library changed; "
                "restore them to resume, or choose another folder"
            )
        return entry.answer

    def attempts(self, name: str) -> int:
        """Return the number of requests sent for a query so far."""
        entry = self.contents.entries.get(name)
        return entry.attempts if entry else 0

    async def sent(self, query: Query, body: bytes) -> None:
        """Log that a request with this body is about to be sent.

        Raises:
            RunFault: it could not be logged, so it must not be sent.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        row = {"type": "sent", "name": query.name, "attempt": self.attempts(query.name) + 1}
        hashes = {"pixels": query.picture.sha256, "body": hashlib.sha256(body).hexdigest()}
        await self._append({**row, **hashes, "time": now})

    async def refused(self, name: str, why: str) -> None:
        """Log that a request had no answer; the query may be sent again."""
        await self._append({"type": "refused", "name": name, "attempt": self.attempts(name), "why": why})

    async def answer(self, answer: Answer) -> None:
        """Log the answer to a query; it must not be used before."""
        row = {
            "type": "answer",
            "name": answer.name,
            "attempts": answer.attempts,
            "ranked": [[one.label, one.score] for one in answer.ranked],
            "failure": answer.failure,
            "seconds": round(answer.seconds, 6),
        }
        await self._append(row)

    async def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        if self._fault or self._file.closed:
            raise self._error(self._fault or "it was closed")
        self.contents.add(row)
        try:
            write_all(self._file, line)
        except (OSError, ValueError) as error:
            with suppress(OSError, ValueError):
                self._file.truncate(self._length)  # a partial line must not be followed by others
            raise self._fail(error) from None
        self._length += len(line)
        try:
            await asyncio.get_running_loop().run_in_executor(self._disk, self._flush, self._length)
        except (OSError, ValueError, RuntimeError) as error:  # the latter two if it was closed in the meantime
            raise self._fail(error) from None

    def _flush(self, length: int) -> None:
        """Ensure, on the disk thread, that ``length`` bytes are on disk; one flush covers all lines before it."""
        if self._fault:
            raise OSError(0, self._fault)
        if self._flushed < length:
            written = self._length
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self._fail(error)
                raise
            self._flushed = written

    def _fail(self, error: Exception) -> RunFault:
        """Reject all further lines: the state on disk is no longer certain."""
        self._fault = self._fault or getattr(error, "strerror", None) or "it was closed"
        return self._error(self._fault)

    def _error(self, why: str) -> RunFault:
        return RunFault(
            f"could not write {self.path}: {why}; its lines are kept: free space and run the same command to resume"
        )

    def _resume(self) -> None:
        """Read an existing file and drop a torn last line, or start a new ledger."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; choose another folder") from None
        old = parse(content, self.path)
        try:
            if old is None:
                self._file.truncate(0)
                write_all(self._file, json.dumps(self.contents.header, allow_nan=False).encode() + b"\n")
            else:
                _refuse_other(self.path, old.header, self.contents.header)
                self.contents = old
                self._file.truncate(content.rfind(b"\n") + 1)
            os.fsync(self._file.fileno())
            _sync_folder(self.path.parent)
        except OSError as error:
            raise self._fail(error) from None
        self._length = self._flushed = os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file; its lines are already on disk."""
        self._file.close()
        self._disk.shutdown(wait=False)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InMemoryLog:
    """Replacement for :class:`Ledger` that counts requests and forgets answered queries."""

    def __init__(self) -> None:
        self.spent = 0
        self._attempts: OrderedDict[str, int] = OrderedDict()

    def find(self, query: Query) -> None:
        """Return None: no answer is kept."""

    def attempts(self, name: str) -> int:
        """Return the number of requests sent for an unanswered query so far."""
        return self._attempts.get(name, 0)

    async def sent(self, query: Query, body: bytes) -> None:
        """Count a request."""
        self.spent += 1
        self._attempts[query.name] = self.attempts(query.name) + 1
        if len(self._attempts) > _REMEMBERED:  # queries left unanswered by an error
            self._attempts.popitem(last=False)

    async def refused(self, name: str, why: str) -> None:
        """Keep the count: the query may be sent again."""

    async def answer(self, answer: Answer) -> None:
        """Forget an answered query."""
        self._attempts.pop(answer.name, None)


def _sync_folder(folder: Path) -> None:
    """Flush the directory entry of a new file, if the system supports it."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _refuse_other(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Check that a ledger to resume is of the same service, format, settings and function.

    Raises:
        UserError: names the differences.
    """
    keys = [k for k in {**old, **new} if k not in (*_PROVENANCE, "function") and old.get(k) != new.get(k)]
    if keys:
        shown = "; ".join(f"{k} {json.dumps(old.get(k))} there, {json.dumps(new.get(k))} here" for k in keys)
        raise UserError(f"{path} is the ledger of another audit ({shown}); it was not changed: choose another folder")
    before, now = old.get("function"), new.get("function")
    if comparable(before, now) and before != now:
        raise UserError(
            f"{path} is the ledger of another function of the same name (its code or networks: {before} there, {now} "
            "here); pass the earlier function, add --trust-identity if both compute the same, or choose another folder"
        )
