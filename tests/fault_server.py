"""A service on loopback that labels pictures by their bytes and misbehaves on purpose."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import numpy as np

from certify.blackbox.types import BadReply, Format, Picture, Query, Ranked, Reply, Request, Scored

CLASSES = 7


def label_of(body: bytes) -> str:
    """The label of a picture: a fixed function of its bytes, with nothing to guess."""
    return f"class {hashlib.sha256(body).digest()[0] % CLASSES}"


def picture(number: int, side: int = 8) -> Picture:
    """A picture of its own for every number."""
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    pixels.reshape(-1)[:8] = np.frombuffer(struct.pack("<Q", number), dtype=np.uint8)
    return Picture(pixels)


def queries(count: int, start: int = 0) -> list[Query]:
    return [Query(f"image {n // 10} | estimation | {n % 10}", picture(n)) for n in range(start, start + count)]


def _to_request(shown: Picture) -> Request:
    return Request(shown.pixels.tobytes(), "label", headers={"content-type": "application/octet-stream"})


def _to_ranked(reply: Reply) -> Ranked:
    if "json" not in reply.headers.get("content-type", ""):
        raise BadReply(f"content type {reply.headers.get('content-type')!r}, not JSON")
    try:
        found = json.loads(reply.body)["labels"]
    except ValueError:
        raise BadReply("not JSON") from None
    if not found:
        raise BadReply("no labels")
    return tuple(Scored(label, score) for label, score in found)


RAW = Format("raw", _to_request, _to_ranked, {"side": 8})


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


Plan = Callable[[int, Seen], str]
"""What happens to a request, from its number from 0: the name of a fault, with a value after a colon, or ``""``."""


@dataclass
class FaultServer:
    """Serves in a thread while its ``with`` lasts.

    Args:
        plan: of faults.
        delay: seconds before every answer.
        hold: no answer before so many requests have come.
    """

    plan: Plan | Sequence[str] = ()
    delay: float = 0.0
    hold: int = 0
    seen: list[Seen] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0

    def __enter__(self) -> FaultServer:
        started: threading.Event = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(started)), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self) -> Counter[bytes]:
        """Requests for every body."""
        return Counter(seen.body for seen in self.seen)

    async def _main(self, started: threading.Event) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._ended.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request on a connection; whether there may be another."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        seen = Seen(method, target, headers, await reader.readexactly(int(headers.get("content-length", 0))))
        number, plan = len(self.seen), self.plan
        self.seen.append(seen)
        fault = plan(number, seen) if callable(plan) else plan[number] if number < len(plan) else ""
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            await asyncio.sleep(self.delay)
            while len(self.seen) < self.hold:
                await asyncio.sleep(0.01)
            return await self._answer(fault, seen, writer)
        finally:
            self._now -= 1

    async def _answer(self, fault: str, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        kind, _, value = fault.partition(":")
        status, headers = 200, {"content-type": "application/json"}
        body = json.dumps({"labels": [[label_of(seen.body), 0.75], ["other", 0.25]]}).encode()
        whole = 0
        if kind == "hang":
            await asyncio.sleep(float(value or 3600))
            return False
        if kind == "reset":
            found = writer.get_extra_info("socket")
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        if kind in ("later", "date"):
            status, body = 429, b'{"error": "too many requests"}'
            headers["retry-after"] = value if kind == "later" else formatdate(time.time() + float(value), usegmt=True)
        elif kind == "status":
            status, body = int(value), b'{"error": "something"}'
        elif kind == "truncated":
            body = body[:-9]
        elif kind == "cut":
            whole = len(body) + 10  # promised, never sent
        elif kind == "type":
            headers["content-type"] = "text/plain"
        elif kind == "empty":
            body = b'{"labels": []}'
        elif kind == "page":
            headers["content-type"] = "text/html"
            body = b"<html><head><title>It works</title></head></html>"
        elif kind == "huge":
            body = b" " * int(value)
        elif kind == "bomb":
            headers["content-encoding"], body = "gzip", gzip.compress(b" " * int(value))
        elif kind == "redirect":
            status, body, headers["location"] = 307, b"", value
        elif kind == "echo":
            status = int(value)
            said = f"{seen.headers.get('authorization')} {seen.target}"
            body = json.dumps({"error": f"bad key: {said}", "labels": [[said, 1.0]]}).encode()
            headers["x-said"] = said
        elif kind not in ("", "drip", "drip-head"):
            raise AssertionError(fault)
        headers["content-length"] = str(whole or len(body))
        lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {text}" for name, text in headers.items()), "", ""]
        head = "\r\n".join(lines).encode()
        if kind.startswith("drip"):
            at_once, slowly = (b"", head + body) if kind == "drip-head" else (head, body)
            writer.write(at_once)
            for byte in slowly:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(float(value))
            return False
        writer.write(head + body)
        await writer.drain()
        return kind != "cut"
