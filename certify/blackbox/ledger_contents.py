"""A ledger's lines -> what became of every query: what was paid for, answered, refused, lost.

JSON Lines: a header, then in the order of events:

- ``{"type": "sent", "name", "attempt", "pixels", "body", "time"}`` before a request goes out: ``pixels`` is the SHA-256
  of the picture (its shape and pixels), by which a query is known again; ``body`` that of the request's body, the bytes
  that the protocol sends;
- ``{"type": "refused", "name", "attempt", "why"}`` where it brought nothing that counts, and may be sent once more;
- ``{"type": "answer", "name", "attempts", "ranked": [[label, score], ...], "failure", "seconds"}``.

A query whose last line is ``sent`` was paid for and its answer lost: a failed trial, never sent again. One whose last
line is ``refused`` is still open. The number of ``sent`` lines is what was spent. ``kill -9`` may tear the last line,
which is then left out; anything else that does not fit is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certify import __version__
from certify.blackbox.types import Answer, Format, Scored
from certify.errors import UserError
from certify.runs.run_file import now
from certify.runs.schema import AMOUNT, COUNT, NUMBER, OBJECT, TEXT, Kind, fault, parse_object

SCHEMA = 2
LOST = "sent before a stop, no answer kept"

_HEADER = {"schema": COUNT, "endpoint": TEXT, "format": OBJECT}
_LABEL = Kind(
    "a label and a score",
    lambda v: isinstance(v, list) and len(v) == 2 and TEXT.fits(v[0]) and NUMBER.or_null().fits(v[1]),
)
_LINE = {
    **dict.fromkeys(("type", "name", "pixels", "why"), TEXT),
    **dict.fromkeys(("attempt", "attempts"), COUNT),
    "ranked": _LABEL.list(),
    "failure": TEXT.or_null(),
    "seconds": AMOUNT,
}
_START = b'{"type": "ledger"'
_OPEN, _SENT, _ANSWERED = "open", "sent", "answered"


@dataclass
class Entry:
    """What became of one query; ``pixels`` is its picture's SHA-256."""

    pixels: str
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
        open: requests sent for each query that was refused last: it has no answer yet, and may be sent again.
    """

    header: dict[str, Any]
    answers: dict[str, Answer]
    spent: int
    torn: bool
    open: dict[str, int]

    @property
    def queries(self) -> int:
        """Queries that were sent at least once."""
        return len(self.answers) + len(self.open)


def ledger_header(endpoint: str, format: Format, **settings: Any) -> dict[str, Any]:
    """The first line of a ledger.

    Args:
        endpoint: without credentials, of :func:`certify.blackbox.client.http.check_endpoint`.
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
        "created": now(),
    }


def read_ledger(path: str | Path) -> Kept:
    """Read a ledger, which may be in use.

    Raises:
        UserError: it cannot be read, is none, was written by another version, or is damaged.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected the ledger of an audit") from None
    header, entries, torn = parse(content, path)
    if header is None:
        raise UserError(f"{path} holds no header: the program was stopped before anything was asked")
    spent = sum(entry.attempts for entry in entries.values())
    still_open = {name: entry.attempts for name, entry in entries.items() if entry.state == _OPEN}
    return Kept(header, answers_of(entries), spent, torn, still_open)


def read_header(path: str | Path) -> dict[str, Any] | None:
    """The first line of a ledger, without reading the others; None where there is none yet.

    Raises:
        UserError: it cannot be read, is none, or was written by another version.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            first = file.readline()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; expected the ledger of an audit") from None
    if not first.endswith(b"\n") and (_START.startswith(first) or first.startswith(_START)):
        return None
    return _header(first, path)


def read_answers(path: str | Path) -> dict[str, Answer]:
    """The answers of a ledger by name; see :func:`read_ledger`."""
    return read_ledger(path).answers


def answers_of(entries: Mapping[str, Entry]) -> dict[str, Answer]:
    """The answers there are, by name; one that was sent and not answered is lost."""
    found = {}
    for name, entry in entries.items():
        if entry.state == _SENT:
            found[name] = Answer(name, failure=LOST, attempts=entry.attempts, known=True)
        elif entry.answer is not None:
            found[name] = entry.answer
    return found


def parse(content: bytes, path: Path) -> tuple[dict[str, Any] | None, dict[str, Entry], bool]:
    """Header (None where the file was cut off before its end), queries, and whether the last line is torn."""
    *lines, rest = content.split(b"\n")
    if not lines and (_START.startswith(rest) or rest.startswith(_START)):
        return None, {}, bool(rest)
    header = _header(lines[0] if lines else b"", path)
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            enter(entries, parse_object(line) or {})
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path} is damaged at line {number}; it is left alone: put back a copy of it, or name another --out"
            ) from None
    return header, entries, bool(rest)


def _header(line: bytes, path: Path) -> dict[str, Any]:
    found = parse_object(line)
    if found is None or found.get("type") != "ledger" or not isinstance(found.get("schema"), int):
        raise UserError(f"{path} is not a ledger of certify: its first line is no header")
    if wrong := fault(found, _HEADER):
        raise UserError(f"{path} has a damaged header: {wrong}; put back a copy of it, or name another --out")
    if found["schema"] != SCHEMA:
        which = ("a newer", "update") if found["schema"] > SCHEMA else ("an older", "go on with that version of")
        raise UserError(
            f"{path} was written by {which[0]} version (schema {found['schema']}, not {SCHEMA}); {which[1]} "
            "certify-toolkit, or name another --out"
        )
    return found


def enter(entries: dict[str, Entry], row: Mapping[str, Any]) -> None:
    """Take a line into the books.

    Raises:
        KeyError, TypeError, ValueError: it cannot follow the lines before it.
    """
    _require(not fault(row, _LINE))
    kind, name = row["type"], row["name"]
    if kind == "sent":
        entry = entries.setdefault(name, Entry(row["pixels"]))
        _require(entry.state == _OPEN, row["attempt"] == entry.attempts + 1, row["pixels"] == entry.pixels)
        entry.attempts, entry.state = entry.attempts + 1, _SENT
        return
    entry = entries[name]
    _require(entry.state == _SENT)
    if kind == "refused":
        _require(row["attempt"] == entry.attempts)
        entry.state = _OPEN
        return
    ranked = tuple(Scored(label, None if score is None else float(score)) for label, score in row["ranked"])
    failure = row["failure"] or ""
    _require(kind == "answer", row["attempts"] == entry.attempts, bool(ranked) != bool(failure))
    entry.answer = Answer(name, ranked, failure, float(row["seconds"]), entry.attempts, known=True)
    entry.state = _ANSWERED


def _require(*conditions: bool) -> None:
    if not all(conditions):
        raise ValueError
