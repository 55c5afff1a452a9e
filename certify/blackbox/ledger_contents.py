"""Read the ledger of an audit and reconstruct the state of every query.

JSON Lines: a header, then in the order of events:

- ``{"type": "sent", "name", "attempt", "pixels", "body", "time"}`` before a request is sent: ``pixels`` is the SHA-256
  of the picture (shape and pixels), which identifies a resumed query; ``body`` is the SHA-256 of the request's body as
  sent;
- ``{"type": "refused", "name", "attempt", "why"}`` if there was no answer and it may be sent again;
- ``{"type": "answer", "name", "attempts", "ranked": [[label, score], ...], "failure", "seconds"}``.

A query whose last line is ``sent`` was paid for but its answer was lost: it is a failed trial and never sent again. A
query whose last line is ``refused`` is open. The number of ``sent`` lines is the number of requests. A last line that
``kill -9`` cut off is ignored; any other invalid line is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certify import __version__
from certify.blackbox.record import SCORED_LABEL
from certify.blackbox.types import Answer, Format, Scored
from certify.errors import UserError
from certify.runs.run_file import now
from certify.runs.schema import AMOUNT, COUNT, OBJECT, TEXT, fault, parse_object

SCHEMA = 2
LOST = "sent before a stop, no answer kept"

_HEADER = {"schema": COUNT, "endpoint": TEXT, "format": OBJECT, "function": TEXT.or_null()}
_LINE = {
    **dict.fromkeys(("type", "name", "pixels", "why"), TEXT),
    **dict.fromkeys(("attempt", "attempts"), COUNT),
    "ranked": SCORED_LABEL.list(),
    "failure": TEXT.or_null(),
    "seconds": AMOUNT,
}
_START = b'{"type": "ledger"'


@dataclass
class Entry:
    """The state of one query: in flight, answered, or else open.

    Attributes:
        name: name of the query.
        pixels: SHA-256 of its picture.
        attempts: number of requests sent for it.
        in_flight: True from a request until its outcome; after the process has ended, the answer is lost.
        logged: the answer, if any.
    """

    name: str
    pixels: str
    attempts: int = 0
    in_flight: bool = False
    logged: Answer | None = None

    @property
    def answer(self) -> Answer | None:
        """The answer; a failed one if it was lost, None for an open query."""
        if self.in_flight:
            return Answer(self.name, failure=LOST, attempts=self.attempts, known=True)
        return self.logged


@dataclass
class LedgerContents:
    """The contents of a ledger.

    Attributes:
        header: the first line.
        torn: True if the last line was cut off.
        spent: number of requests sent.
        entries: all queries sent at least once, by name, in the order of their first requests.
    """

    header: dict[str, Any]
    torn: bool = False
    spent: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def answers(self) -> dict[str, Answer]:
        """All answers by name, each marked ``known``; a lost answer is a failure."""
        return {entry.name: answer for entry in [*self.entries.values()] if (answer := entry.answer) is not None}

    @property
    def open(self) -> dict[str, int]:
        """Number of requests for each open query, which has no answer yet and may be sent again."""
        return {entry.name: entry.attempts for entry in [*self.entries.values()] if entry.answer is None}

    @property
    def queries(self) -> int:
        """Number of queries sent at least once."""
        return len(self.entries)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a line.

        Raises:
            KeyError, TypeError, ValueError: the line is invalid after those before it.
        """
        _require(not fault(row, _LINE))
        kind, name = row["type"], row["name"]
        if kind == "sent":
            entry = self.entries.setdefault(name, Entry(name, row["pixels"]))
            _require(entry.answer is None, row["attempt"] == entry.attempts + 1, row["pixels"] == entry.pixels)
            entry.attempts, entry.in_flight = entry.attempts + 1, True
            self.spent += 1
            return
        entry = self.entries[name]
        _require(entry.in_flight)
        if kind == "refused":
            _require(row["attempt"] == entry.attempts)
        else:
            ranked = tuple(Scored(label, None if score is None else float(score)) for label, score in row["ranked"])
            failure = row["failure"] or ""
            _require(kind == "answer", row["attempts"] == entry.attempts, bool(ranked) != bool(failure))
            entry.logged = Answer(name, ranked, failure, float(row["seconds"]), entry.attempts, known=True)
        entry.in_flight = False


def ledger_header(endpoint: str, format: Format, **settings: Any) -> dict[str, Any]:
    """Return the first line of a ledger.

    Args:
        endpoint: URL without credentials, from :func:`certify.blackbox.client.http.check_endpoint`.
        format: the protocol of the service.
        settings: other values that must be the same when the ledger is resumed, such as the encoding of pictures.
    """
    return {
        "type": "ledger",
        "schema": SCHEMA,
        "endpoint": endpoint,
        "format": {"name": format.name, **format.about},
        **settings,
        "version": __version__,
        "created": now(),
    }


def read_ledger(path: str | Path) -> LedgerContents:
    """Read a ledger, which may be in use.

    Raises:
        UserError: the file is unreadable, is not a ledger, was written by another version, or is damaged.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected the ledger of an audit") from None
    contents = parse(content, path)
    if contents is None:
        raise UserError(f"{path} holds no header: the program was stopped before it sent a query")
    return contents


def read_header(path: str | Path) -> dict[str, Any] | None:
    """Read only the first line of a ledger; None if there is none yet.

    Raises:
        UserError: the file is unreadable, is not a ledger, or was written by another version.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            first = file.readline()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected the ledger of an audit") from None
    return None if _cut_off(first) else _header(first, path)


def parse(content: bytes, path: Path) -> LedgerContents | None:
    """Parse a ledger; return None if the file ends within its header.

    Raises:
        UserError: not a ledger, written by another version, or damaged; the message contains ``path``.
    """
    if _cut_off(content):
        return None
    first, *lines, rest = content.split(b"\n") if b"\n" in content else (content, b"")
    contents = LedgerContents(_header(first, path), torn=bool(rest))
    for number, line in enumerate(lines, 2):
        try:
            contents.add(parse_object(line) or {})
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path} is damaged at line {number}; it is left alone: put back a copy of it, or choose another folder"
            ) from None
    return contents


def _cut_off(content: bytes) -> bool:
    """True if these bytes are a ledger truncated within its first line."""
    return b"\n" not in content and (_START.startswith(content) or content.startswith(_START))


def _header(line: bytes, path: Path) -> dict[str, Any]:
    header = parse_object(line)
    if header is None or header.get("type") != "ledger" or not isinstance(header.get("schema"), int):
        raise UserError(f"{path} is not a ledger of certify: its first line is not a header")
    if wrong := fault(header, _HEADER):
        raise UserError(f"{path} has a damaged header: {wrong}; put back a copy of it, or choose another folder")
    if header["schema"] != SCHEMA:
        newer = header["schema"] > SCHEMA
        age, remedy = ("a newer", "update") if newer else ("an older", "resume with that version of")
        raise UserError(
            f"{path} was written by {age} version (schema {header['schema']}, not {SCHEMA}); {remedy} "
            "certify-toolkit, or choose another folder"
        )
    return header


def _require(*conditions: bool) -> None:
    if not all(conditions):
        raise ValueError
