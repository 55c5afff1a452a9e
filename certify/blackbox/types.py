"""What the rooms of this package hand each other: a picture, a request, a reply, an answer.

The flow of one query: picture -> ``Format.request`` -> request -> sender -> reply -> ``Format.reply`` -> ranked labels
-> answer -> ledger -> vote. Formats are pure; only senders touch the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Picture:
    """An image exactly as a service gets it: 8 bits a channel.

    Attributes:
        pixels: uint8 ``(H, W, C)``, C 1 or 3, RGB.
    """

    pixels: np.ndarray

    @property
    def sha256(self) -> str:
        """SHA-256 of shape and pixels, hexadecimal: the same however they are encoded."""
        shape = "x".join(map(str, self.pixels.shape)).encode()
        return hashlib.sha256(shape + b"|" + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


@dataclass(frozen=True)
class Request:
    """What is sent, without credentials: those are the sender's.

    Attributes:
        body: its bytes.
        path: below the endpoint's URL; empty for the URL itself.
        method: of HTTP.
        headers: what the format needs, such as the content type.
    """

    body: bytes
    path: str = ""
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)


MOST_BYTES = 32 * 2**20
"""A longer reply is not read: scores of 100,000 classes take about 2 MB of JSON."""


@dataclass(frozen=True)
class Reply:
    """What came back, complete."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """A label as the service names it (a class number where it has no names), and its score, if any."""

    label: str
    score: float | None = None


Ranked = tuple[Scored, ...]
"""The labels of one answer, best first, each once; never empty."""


@dataclass(frozen=True)
class Format:
    """One way to ask and to be answered.

    Attributes:
        name: as registered.
        request: a picture to what is sent.
        reply: what came back to ranked labels; raises ``BadReply`` where there are none.
        about: options that shape the votes, for the ledger; nothing secret.
    """

    name: str
    request: Callable[[Picture], Request]
    reply: Callable[[Reply], Ranked]
    about: Mapping[str, Any] = field(default_factory=dict)


class BadReply(Exception):
    """A reply that holds no label: an error, another format, or an empty answer. A failed trial, nobody's vote.

    Args:
        why: one line, for the ledger and the report; holds no credential.
    """


class Busy(BadReply):
    """A reply of status 200 that says "too many requests" or "not now": another attempt may bring labels."""


Sender = Callable[[Request], Reply]
"""Sends one request once. Raises ``OSError`` (or a subclass, such as ``TimeoutError``) where no reply came."""


@dataclass(frozen=True)
class Query:
    """One paid question.

    Attributes:
        name: unique within a ledger, such as ``cat.png | estimation | 17``: the same name is never asked twice.
        picture: as sent.
    """

    name: str
    picture: Picture


@dataclass(frozen=True)
class Answer:
    """What a query brought.

    Attributes:
        name: of the query.
        ranked: labels, best first; empty where it failed.
        failure: why there are none, in one line; empty where there are some.
        seconds: from the last sending to the reply.
        attempts: requests sent for it, each of which counts against the budget.
        known: whether the ledger had it already, so that nothing was sent.
        down: whether no reply came, or an error status: nothing that is about this one picture. Not kept.
    """

    name: str
    ranked: Ranked = ()
    failure: str = ""
    seconds: float = 0.0
    attempts: int = 1
    known: bool = False
    down: bool = field(default=False, compare=False)


class Asking(Protocol):
    """Asks queries within the budget, several at a time, each recorded before it is used."""

    def __call__(self, queries: Iterable[Query]) -> Iterator[Answer]:
        """Their answers, in the order of the queries, which are pulled a few ahead of the answers.

        Raises:
            BudgetSpent: the budget does not cover the next query; every answer before it was handed out.
        """
        ...

    @property
    def spent(self) -> int:
        """Requests sent so far, retries included, those of earlier runs with this ledger too."""
        ...


class Books(Protocol):
    """What was sent and what came of it; called from several threads."""

    @property
    def spent(self) -> int:
        """Requests sent so far."""
        ...

    def find(self, query: Query) -> Answer | None:
        """The answer to a query, if it has been paid for."""
        ...

    def attempts(self, name: str) -> int:
        """Requests sent for a query so far."""
        ...

    def sent(self, query: Query, body: bytes) -> None:
        """A request with this body is about to go out."""
        ...

    def refused(self, name: str, why: str) -> None:
        """The request brought nothing that counts: the query may be sent once more."""
        ...

    def answer(self, answer: Answer) -> None:
        """What came of a query."""
        ...
