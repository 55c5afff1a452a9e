"""One process that serves until it is told to stop: then it finishes what it accepted, and refuses the rest."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import ipaddress
import itertools
import json
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from certify.errors import RunFault, UserError
from certify.serve.admission import Admission, client_key
from certify.serve.limits import SLOWEST

_HEAD = 10.0  # seconds for the head of a request: its line and headers
_TAKE = 10.0  # seconds to begin with for taking a response
_PIECE = 2**14  # bytes that are parsed at a time: a head is measured only where it ends beyond them
_LINGER = 2.0  # seconds after a refusal, in which the client may send what nobody reads
_CHUNKS, _CHUNK = 1000, 256  # a body has so many chunks, and further ones of so many bytes on average
_CONNECTIONS, _SPARE = 8, 64  # connections: for each request of an address that may be in work, and beyond
_OTHER_FILES = 128  # of the process, beside connections but for the spare ones
_FLUSH = 5  # seconds for the last bytes of responses
_IDLE = 15  # seconds that an unused connection stays open

_numbers = itertools.count()  # of connections, in the order of their coming


class _Parser(h11.Connection):
    """An HTTP parser that refuses bodies in crumbs: each chunk costs it the same, however small."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        """Parse the next event of a request."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks, self._bytes = self._chunks + 1, self._bytes + len(event.data)
            if self._chunks > _CHUNKS + self._bytes // _CHUNK:
                raise h11.RemoteProtocolError(f"{self._chunks:,} chunks hold {self._bytes:,} bytes; send larger ones")
        return event


class _Connection(H11Protocol):
    """A connection that is cut when the client keeps it waiting; what is not HTTP is refused in JSON.

    Two clocks run: until the head of the first or next request is there, and while the client takes a response. The
    body of a request is timed where it is read.
    """

    limit = 0
    """Connections that are kept open, of all clients together."""

    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _refused = False

    def __init__(self, config: uvicorn.Config, *more: Any, **named: Any) -> None:
        super().__init__(config, *more, **named)
        self.conn = _Parser(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock; make room if need be."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # says when the system takes no more bytes, and when all are gone
        self._number, self._host = next(_numbers), client_key(self.client[0] if self.client else "")
        self._look()
        if len(self.connections) > self.limit:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Stop the clock once a request is under way; what follows an answer starts it again."""
        for start in range(0, len(data), _PIECE):
            if self._refused:
                return
            super().data_received(data[start : start + _PIECE])
        if not self._refused:
            self._look()

    def pause_writing(self) -> None:
        """Give the client so long to take what is written."""
        super().pause_writing()
        size = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(_TAKE + size / SLOWEST, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the clock: all is taken."""
        super().resume_writing()
        self._stop_unread()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop()
        super().connection_lost(exc)
        self._stop_unread()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, as everything else is refused."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        body = json.dumps({"error": f"the request is not HTTP that can be read: {error or msg}"}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        headers.append(("x-content-type-options", "nosniff"))
        with contextlib.suppress(h11.LocalProtocolError):  # a response has begun already
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        if self.cycle is not None:  # nobody waits for its answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._stop()
        self._late = self.loop.call_later(_LINGER, self.transport.abort)
        self.transport.write_eof()  # closed at once, what comes meanwhile would make the system drop the answer

    @property
    def _idle(self) -> bool:
        """Whether it waits for its client."""
        return self.cycle is None or self.cycle.response_complete or self.flow.write_paused

    def _make_room(self) -> None:
        """Cut the oldest idle connection of the address that has most, so that a newcomer is heard."""
        others = [other for other in self.connections if isinstance(other, _Connection)]
        hosts = Counter(other._host for other in others)
        idle = [other for other in others if other._idle and other is not self]
        if idle:
            oldest = min(idle, key=lambda other: (-hosts[other._host], other._number))
            oldest.transport.abort()
            self.connections.discard(oldest)  # already now: more newcomers may be next

    def _look(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # from here on the request has its own limit
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(_HEAD, self.transport.abort)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _Draining(uvicorn.Server):
    """Goes on answering 503 until everybody inside was answered; every request has its own time limit."""

    def __init__(
        self, config: uvicorn.Config, admission: Admission, on_start: Callable[[], None], on_stop: Callable[[int], None]
    ) -> None:
        super().__init__(config)
        self._admission, self._on_start, self._on_stop = admission, on_start, on_stop
        self._until = float("inf")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections and report the unanswered requests, before waiting for anything that may never end."""
        await super().shutdown(sockets)
        self._on_stop(self._admission.inside)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal closes admission, the second one does not wait; the process ends in any case."""
        timeout = self._admission.limits.timeout
        if self._admission.closed:
            self.should_exit = self.force_exit = True
            timeout = 0.0
        self._admission.closed = True
        self._until = time.monotonic() + timeout
        nowhere = os.open(os.devnull, os.O_WRONLY)  # its threads are nobody's concern then
        faulthandler.dump_traceback_later(timeout + 2 * _FLUSH, exit=True, file=nowhere)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to leave."""
        if self._admission.closed and (not self._admission.inside or time.monotonic() > self._until):
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address, to listen on; port 0 takes a free one.

    Raises:
        UserError: no such address here.
        RunFault: the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: {error}; expected an address of this machine, such as 127.0.0.1") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise RunFault(f"cannot listen on {host} port {port}: {error.strerror}; pass another --port, or 0") from None
    return found


def url_of(listening: socket.socket) -> str:
    """Where it can be reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def _open_files() -> int:
    """Files and sockets that the system lets this process have."""
    return os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 512


def _is_not_cancellation(record: logging.LogRecord) -> bool:
    """False for a log record about a request that was cut off when the server stopped: it is counted instead."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


def serve(
    app: FastAPI,
    admission: Admission,
    listening: socket.socket,
    on_start: Callable[[], None] = lambda: None,
    on_stop: Callable[[int], None] = lambda unanswered: None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish the accepted ones.

    After a signal the process ends within the time limit of a request and some seconds, whatever its threads do.

    Args:
        app: the application.
        admission: of the requests; closed by the first signal.
        listening: socket to accept connections on.
        on_start: called once the server accepts connections.
        on_stop: called with the number of unanswered requests as soon as the last connection is closed.
    """

    class Connection(_Connection):
        limit = min(_CONNECTIONS * admission.limits.concurrency, _open_files() - _OTHER_FILES) + _SPARE

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,  # uvicorn trusts this machine's clients otherwise
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_FLUSH,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_not_cancellation)
    _Draining(config, admission, on_start, on_stop).run(sockets=[listening])
