"""Parse replies into labels for all protocols (status, JSON, fields, ranking), and build JSON requests.

Replies are untrusted: anything wrong with one becomes a ``BadReply`` with a one-line reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn
from urllib.parse import quote

from certify.blackbox.types import MAX_REPLY_BYTES, BadReply, Ranked, Reply, Request, Scored
from certify.errors import UserError

_LONGEST_LABEL = 1000
_LONGEST_MESSAGE = 140
_WORDS = re.compile(r"[A-Z]?[a-z]{2,}(?:[A-Z][a-z]{2,})*[.:]?")  # such as InvalidParameterException
_ERRORS = "message error detail msg errors errormessage error_message reason fault exception".split()
_MESSAGES = (*_ERRORS, "description", "details", "title", "text", "status", "__type")  # case-insensitive


def read_json(reply: Reply) -> Any:
    """Parse the JSON of a reply.

    Raises:
        BadReply: an error status, a body that is too long, or not JSON.
    """
    check_status(reply)
    return parse(reply.body)


def check_status(reply: Reply) -> None:
    """Check that a reply has a success status.

    Raises:
        BadReply: a status outside 200 to 299, with the service's message; or a body that is too long.
    """
    if len(reply.body) > MAX_REPLY_BYTES:
        raise BadReply(f"HTTP {reply.status}: a reply of {len(reply.body):,} bytes; the limit is {MAX_REPLY_BYTES:,}")
    if not 200 <= reply.status < 300:
        said = safe_text(reply.body)
        raise BadReply(f"HTTP {reply.status}" + (f": {said}" if said else ""))


def parse(body: bytes) -> Any:
    """Parse JSON in UTF-8, without the NaN and Infinity that Python would accept.

    Raises:
        BadReply: not such JSON, or nested too deeply.
    """
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise BadReply("JSON nested too deeply") from None
    except ValueError:  # also bytes that are not UTF-8, and integers of thousands of digits
        begins = safe_text(body)[:40]
        raise BadReply(f"not JSON: begins {begins!r}" if begins else "not JSON: nothing in it") from None


def _no_number(text: str) -> NoReturn:
    raise BadReply(f"{text} in JSON")


def safe_text(body: bytes) -> str:
    """Return the message of an error reply in one short line, without markup and anything that looks like a key."""
    text = ""
    try:
        text = _message(json.loads(body.decode("utf-8")), 4)
    except (ValueError, RecursionError):
        page = body[:20_000].decode("utf-8", "replace")
        titled = re.search(r"<title[^>]{0,200}>([^<]*)", page, re.IGNORECASE)
        text = titled[1] if titled else re.sub(r"<[^>]{0,200}>", " ", page)
    return _short(text)


def _short(text: str) -> str:
    """Return one line of printable text, without long words, since a service may echo a rejected key."""
    text = "".join(c if c.isprintable() else " " for c in text[:5000])
    text = re.sub(r"[^\s\"'`,;()<>]{20,}", lambda run: run[0] if _WORDS.fullmatch(run[0]) else "[...]", text)
    return " ".join(text.split())[:_LONGEST_MESSAGE]


def _message(value: Any, depth: int, names: Sequence[str] = _MESSAGES) -> str:
    """Return the first string under a usual key of error messages, at most ``depth`` levels deep."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return _message(value[0], depth - 1) if value and depth else ""
    if isinstance(value, dict) and depth:
        lower = {name.lower(): inner for name, inner in reversed(value.items())}
        return next((text for name in names if (text := _message(lower.get(name), depth - 1))), "")
    return ""


def quoting(why: str, body: bytes) -> str:
    """Append the reply's error message to a reason, or else the keys of its object."""
    try:
        body_json = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        return why
    if isinstance(body_json, list):
        body_json = next((one for one in body_json if isinstance(one, dict)), None)
    if said := _short(_message(body_json, 4, _ERRORS)):
        return why if said in why else f"{why}, which says {said!r}"
    names = ", ".join(_short(name)[:40] for name in [*body_json][:8]) if isinstance(body_json, dict) else ""
    return f"{why}, which holds {names}" if names else why


def json_request(path: str, value: Any) -> Request:
    """Return a request with a JSON body."""
    return Request(json.dumps(value).encode(), path, headers={"Content-Type": "application/json"})


def at(value: Any, *path: str | int) -> Any:
    """Return the value at a path of keys and indices.

    Raises:
        BadReply: the path does not exist.
    """
    for n, step in enumerate(path):
        inside = (isinstance(step, str) and isinstance(value, dict) and step in value) or (
            isinstance(step, int) and isinstance(value, list) and step < len(value)
        )
        if not inside:
            raise BadReply(f"no {'.'.join(map(str, path[: n + 1]))} in the reply")
        value = value[step]
    return value


def number(value: Any) -> float:
    """Return a score as a float.

    Raises:
        BadReply: not a number, or not a finite one.
    """
    score = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        score = float(value)
    if not math.isfinite(score):
        raise BadReply(f"{_shown(value)} where a score was expected")
    return score


def label(value: Any) -> str:
    """Return a label, a name or class number, as text.

    Raises:
        BadReply: neither, or a name that is empty, too long or not valid Unicode.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else value
    if not isinstance(text, str) or not text.strip() or len(text) > _LONGEST_LABEL:
        raise BadReply(f"{_shown(value)} where a label was expected")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadReply("a label that is not valid Unicode (half of a surrogate pair)") from None
    return text


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return _short(repr(value[:60]))
    if value is None or isinstance(value, float | bool):
        return json.dumps(value)
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return "an enormous integer"


def ranked(labels: Sequence[Any], scores: Sequence[Any] | None = None, percent: bool = False) -> Ranked:
    """Return labels best first, without duplicates: by score if there are scores, else in the order given.

    Args:
        labels: names or class numbers.
        scores: one per label; equal ones keep the order given.
        percent: True if scores are percentages, to be divided by 100.

    Raises:
        BadReply: no labels, or an invalid label or score.
    """
    if not labels:
        raise BadReply("an answer without labels")
    if scores is None:
        return _each_once(Scored(label(value)) for value in labels)
    if len(scores) != len(labels):
        raise BadReply(f"{len(labels)} labels and {len(scores)} scores")
    scale = 100.0 if percent else 1.0
    entries = [Scored(label(a), number(b) / scale) for a, b in zip(labels, scores, strict=True)]
    return _each_once(sorted(entries, key=lambda one: -(one.score or 0.0)))


def _each_once(entries: Iterable[Scored]) -> Ranked:
    kept: dict[str, Scored] = {}
    for one in entries:
        kept.setdefault(one.label, one)
    return tuple(kept.values())


def ranked_entries(entries: Any, name: str, score: str, percent: bool = False) -> Ranked:
    """Return ranked labels from a list of objects, as most services return them.

    Args:
        entries: the list.
        name: key of the label.
        score: key of the score.
        percent: as in :func:`ranked`.

    Raises:
        BadReply: not such a list, or an error of :func:`ranked`.
    """
    if not isinstance(entries, list):
        raise BadReply(f"{_shown(entries)} where a list of labels was expected")
    return ranked([at(e, name) for e in entries], [at(e, score) for e in entries], percent)


def class_scores(scores: Sequence[Any], names: Any = None, percent: bool = False) -> Ranked:
    """Rank the classes by their scores.

    Args:
        scores: one per class.
        names: one per class; None labels classes by their numbers from 0.
        percent: as in :func:`ranked`.

    Raises:
        BadReply: fewer than two classes, names that do not match, or scores that are not finite.
    """
    if len(scores) < 2:
        raise BadReply("a single score: neither a label nor the scores of two classes")
    if names is not None and not isinstance(names, list):
        raise BadReply(f"{_shown(names)} where names of classes were expected")
    return ranked(range(len(scores)) if names is None else names, scores, percent)


def flat(value: Any) -> list[Any]:
    """Flatten nested lists, row by row; a single value becomes a list of one.

    Raises:
        BadReply: a list mixes lists and values.
    """
    elements = value if isinstance(value, list) else [value]
    while elements and isinstance(elements[0], list):
        if not all(isinstance(row, list) for row in elements):
            raise BadReply("rows and values side by side in one list")
        elements = [element for row in elements for element in row]
    if any(isinstance(element, list) for element in elements):
        raise BadReply("rows and values side by side in one list")
    return elements


def one_of(option: str, value: Any, choices: Sequence[str]) -> str:
    """Check that an option has one of the allowed values.

    Raises:
        UserError: it has another.
    """
    if value not in choices:
        raise UserError(f"{option} {value!r}; expected one of {', '.join(choices)}")
    return str(value)


def in_path(value: Any) -> str:
    """Quote a name for a URL's path; slashes are kept, since model names contain them."""
    return quote(str(value).strip("/"), safe="/-._~")


def versioned(model: Any, version: Any) -> str:
    """Return ``models/NAME``, plus ``/versions/VERSION`` if given, as used by several protocols."""
    return f"models/{in_path(model)}" + (f"/versions/{in_path(version)}" if str(version) else "")
