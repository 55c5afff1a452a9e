"""A Python function as a black-box service: pictures in, labels out, one query per call."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from certify.blackbox.types import BadReply, Format, Picture, Ranked, Reply, Request, Scored, Sender
from certify.errors import first_line

EXPECTED = "expected a label, a sequence of labels (best first), or a mapping from labels to scores"

Ask = Callable[[np.ndarray], Any]
"""Labels one 8-bit image ``(H, W, C)``, uint8: a label, labels best first, or a mapping from labels to scores."""


def function_name(function: Ask) -> str:
    """Return the name that stands for the URL: ``python:MODULE.NAME``."""
    own: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"python:{own.__module__}.{own.__qualname__}"


def function_sender(function: Ask) -> Sender:
    """Return what calls the function, in a thread, once per request; an exception is an answer of status 500."""

    def call(body: bytes) -> Reply:
        try:
            answer = function(np.load(io.BytesIO(body), allow_pickle=False))
        except Exception as error:
            return Reply(500, f"{type(error).__name__}: {first_line(error)}".encode())
        return Reply(200, json.dumps(_as_json(answer)).encode())

    async def send(request: Request) -> Reply:
        return await asyncio.to_thread(call, request.body)

    return send


def _as_json(answer: Any) -> list[list[Any]] | str:
    """Return (label, score) pairs, best first; the name of the type for anything that is no answer."""
    if isinstance(answer, Mapping):
        scores = {str(label): float(score) for label, score in answer.items()}
        return [[label, score] for label, score in sorted(scores.items(), key=lambda pair: -pair[1])]
    if isinstance(answer, np.generic) or getattr(answer, "ndim", None) == 0:
        answer = answer.item()
    if isinstance(answer, str | int) and not isinstance(answer, bool):
        return [[str(answer), None]]
    if isinstance(answer, list | tuple) and all(isinstance(label, str | int | np.integer) for label in answer):
        return [[str(label), None] for label in answer]
    return type(answer).__name__


def _request(picture: Picture) -> Request:
    body = io.BytesIO()
    np.save(body, picture.pixels)
    return Request(body.getvalue())


def _reply(reply: Reply) -> Ranked:
    answer = json.loads(reply.body)
    if isinstance(answer, str):
        raise BadReply(f"the function returned {answer}; {EXPECTED}")
    return tuple(Scored(label, score) for label, score in answer)


FUNCTION_FORMAT = Format("python", _request, _reply, {"encoding": "png"})
"""The pixels as an array of NumPy, the answer as JSON."""
