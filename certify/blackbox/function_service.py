"""Serve a Python function as a black-box service: pictures in, labels out, one query per call."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import inspect
import io
import json
import platform
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from certify.blackbox.types import BadReply, Format, Picture, Ranked, Reply, Request, Scored, Sender
from certify.errors import first_line

EXPECTED = "expected a label, a sequence of labels (best first), or a mapping from labels to scores"

Ask = Callable[[np.ndarray], Any]
"""Function from an image ``(H, W, C)``, uint8, to a label, labels (best first), or a mapping from labels to scores."""


def function_name(function: Ask) -> str:
    """Return the name used in place of a URL: ``python:MODULE.NAME``."""
    own: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"python:{own.__module__}.{own.__qualname__}"


def function_fingerprint(function: Ask) -> str | None:
    """Return a hash of a function's code and of the networks that it uses: ``"python 3.12: 16 digits"``.

    It covers the bytecode of the function and of the functions and classes of its module that it uses, and the
    parameters of every ``torch.nn.Module`` reachable through closures, globals and attributes. Anything else it reads
    (files, URLs, other objects) is not covered; therefore its answers for clean images are also compared on resuming.

    Returns:
        None for a function without bytecode, such as a built-in one.
    """
    digest = hashlib.sha256()
    own: Any = function
    while isinstance(own, functools.partial):
        own = own.func
    parts = list(_parts(function, getattr(own, "__module__", ""), set()))
    for part in parts:
        digest.update(part)
    version = ".".join(platform.python_version_tuple()[:2])  # bytecode depends on it
    return f"python {version}: {digest.hexdigest()[:16]}" if parts else None


def comparable(fingerprint: str | None, other: str | None) -> bool:
    """True if two fingerprints are comparable: both exist and are of the same Python version."""
    return None not in (fingerprint, other) and str(fingerprint).split(":")[0] == str(other).split(":")[0]


def _parts(value: Any, module: str, seen: set[int]) -> Iterator[bytes]:
    """Yield the bytes to hash for a value and for the values that it refers to."""
    from torch import nn

    from certify.models.identity import state_digest

    if id(value) in seen:
        return
    seen.add(id(value))
    inner: list[Any] = []
    if isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        inner = [value.__func__, value.__self__]
    elif isinstance(value, types.FunctionType):
        if value.__module__ != module:
            return
        yield _code(value.__code__)
        with contextlib.suppress(ValueError):  # an unbound variable
            variables = inspect.getclosurevars(value)
            inner = [*variables.nonlocals.values(), *variables.globals.values(), *(value.__defaults__ or ())]
    elif isinstance(value, nn.Module):
        yield (state_digest(value) or type(value).__qualname__).encode()
        inner = [type(value)]
    elif isinstance(value, type):
        inner = [f for f in vars(value).values() if isinstance(f, types.FunctionType)] * (value.__module__ == module)
    elif type(value).__module__ == module:
        inner = [type(value), *getattr(value, "__dict__", {}).values()]
    for one in inner:
        yield from _parts(one, module, seen)


def _code(code: types.CodeType) -> bytes:
    """Return bytecode, names and constants; without line numbers, so that comments and layout do not matter."""
    constants = [_code(c).hex() if isinstance(c, types.CodeType) else _stable(c) for c in code.co_consts]
    return repr((code.co_code.hex(), code.co_names, constants)).encode()


def _stable(constant: Any) -> str:
    """Return the text of a constant; set elements are sorted, since their order varies between processes."""
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


def function_sender(function: Ask) -> Sender:
    """Return a sender that calls the function in a thread; an exception becomes a reply of status 500."""

    def call(body: bytes) -> Reply:
        try:
            answer = function(np.load(io.BytesIO(body), allow_pickle=False))
        except Exception as error:
            return Reply(500, f"{type(error).__name__}: {first_line(error)}".encode())
        return Reply(200, json.dumps(_as_json(answer)).encode())

    async def send(request: Request) -> Reply:
        return await asyncio.to_thread(call, request.body)

    return send


def label_text(label: Any) -> str | None:
    """Return a label (name or class number) as text; None for anything else, such as None or 0.5."""
    if isinstance(label, np.generic) or getattr(label, "ndim", None) == 0:
        label = label.item()
    return str(label) if isinstance(label, str | int) and not isinstance(label, bool) else None


def _as_json(answer: Any) -> list[list[Any]] | str:
    """Return (label, score) pairs, best first, or a description of an invalid answer."""
    scored = isinstance(answer, Mapping)
    entries: Iterable[tuple[Any, Any]]
    entries = answer.items() if isinstance(answer, Mapping) else ((label, None) for label in _as_labels(answer))
    pairs: list[list[Any]] = []
    for label, score in entries:
        text = label_text(label)
        if text is None:
            return type(answer).__name__ if label is answer else f"{label!r:.40} as a label"
        try:
            pairs.append([text, float(score) if scored else None])
        except (TypeError, ValueError):
            return f"{score!r:.40} as the score of {text!r:.40}"
    return sorted(pairs, key=lambda pair: -pair[1]) if scored else pairs


def _as_labels(answer: Any) -> Sequence[Any]:
    return answer if isinstance(answer, list | tuple) else [answer]


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
"""Wire format for Python functions: pixels as a NumPy array, the answer as JSON."""
