"""Types exchanged by the modules of this package: pictures, requests, replies, answers.

The data flow of one query: picture -> ``Format.request`` -> request -> sender -> reply -> ``Format.reply`` -> ranked
labels -> answer -> log -> vote. Formats are pure; only senders use the network.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Picture:
    """An image exactly as a service receives it: 8 bits per channel.

    Attributes:
        pixels: uint8 ``(H, W, C)``, C 1 or 3, RGB.
    """

    pixels: np.ndarray

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of shape and pixels, hexadecimal; it does not depend on the encoding."""
        shape = "x".join(map(str, self.pixels.shape)).encode()
        return hashlib.sha256(shape + b"|" + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


@dataclass(frozen=True)
class Request:
    """A request without credentials, which the sender adds.

    Attributes:
        body: the request's body.
        path: path appended to the endpoint's URL; empty for the URL itself.
        method: HTTP method.
        headers: headers required by the format, such as the content type.
    """

    body: bytes
    path: str = ""
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)


MAX_REPLY_BYTES = 32 * 2**20
"""Maximum length of a reply; scores of 100,000 classes take about 2 MB of JSON."""


@dataclass(frozen=True)
class Reply:
    """A complete reply."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A label as named by the service (a class number if it has no names), and its score, if any."""

    label: str
    score: float | None = None


Ranked = tuple[Scored, ...]
"""The labels of one answer, best first, without duplicates; never empty."""


@dataclass(frozen=True)
class Format:
    """The wire format of a service.

    Attributes:
        name: registered name.
        request: function from picture to request.
        reply: function from reply to ranked labels; raises ``BadReply`` if there are none.
        about: options that affect the votes, for the ledger; no secrets.
    """

    name: str
    request: Callable[[Picture], Request]
    reply: Callable[[Reply], Ranked]
    about: Mapping[str, Any] = field(default_factory=dict)


class BadReply(Exception):
    """A reply without a label: an error, an unknown format or an empty answer. A failed trial, without a vote.

    Args:
        why: reason in one line, for the ledger and the report; contains no credential.
    """


class Busy(BadReply):
    """A reply of status 200 that reports overload; a retry may succeed."""


Sender = Callable[[Request], Coroutine[Any, Any, Reply]]
"""Function that sends a request once; raises ``OSError`` (such as ``TimeoutError``) if no reply arrived."""


@dataclass(frozen=True)
class Query:
    """A picture to be labelled.

    Attributes:
        name: name, unique within a ledger, such as ``cat.png | estimation | 17``; not sent again once answered.
        picture: the picture as sent.
    """

    name: str
    picture: Picture


@dataclass(frozen=True)
class Answer:
    """The outcome of a query.

    Attributes:
        name: the query's name.
        ranked: labels, best first; empty if the query failed.
        failure: reason in one line; empty if there are labels.
        seconds: time from the last request to its reply.
        attempts: number of requests sent, each of which counts against the budget.
        known: True if the answer came from the ledger and nothing was sent.
        down: True if there was no reply or an error status, a failure unrelated to this picture. Not stored.
    """

    name: str
    ranked: Ranked = ()
    failure: str = ""
    seconds: float = 0.0
    attempts: int = 1
    known: bool = False
    down: bool = field(default=False, compare=False)


class Client(Protocol):
    """Answer queries within a budget, several at a time; every answer is logged before it is used."""

    def __call__(self, queries: Iterable[Query]) -> Iterator[Answer]:
        """Yield the answers in the order of the queries, which are pulled a few ahead of the answers.

        Raises:
            BudgetSpent: the budget does not cover the next query; every answer before it was yielded.
        """
        ...

    @property
    def spent(self) -> int:
        """Requests sent so far, including retries and earlier runs with this ledger."""
        ...
