"""Run the server: time limits per connection, and a graceful shutdown that finishes accepted requests."""

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
from certify.serve.admission import MIN_RATE, Admission, client_key

_HEAD = 10.0  # seconds for the head of a request
_TAKE = 10.0  # seconds for a client to receive a response, plus a time proportional to its size
_PIECE = 2**14  # bytes parsed at a time; the size of a head is checked only in between
_LINGER = 2.0  # seconds after a refusal in which the client may still send
_CHUNKS, _CHUNK = 1000, 256  # chunks allowed at any size; beyond that, their minimum average size
_CONNECTIONS, _SPARE = 8, 64  # connections per concurrent request of an address, plus a reserve
_OTHER_FILES = 128  # open files of the process other than connections
_FLUSH = 5  # seconds for the last bytes of responses
_IDLE = 15  # seconds until an unused connection is closed

_numbers = itertools.count()  # of connections, in order of arrival


class _Parser(h11.Connection):
    """An HTTP parser that rejects bodies in tiny chunks, since a chunk's cost does not depend on its size."""

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
    """A connection that is closed if the client is slow; malformed HTTP is answered with an error in JSON.

    There are two timers: until the head of the next request is complete, and while the client receives a response. The
    time limit on a body is enforced where it is read.
    """

    limit = 0
    """Maximum number of open connections of all clients."""

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _refused = False

    def __init__(self, config: uvicorn.Config, *more: Any, **named: Any) -> None:
        super().__init__(config, *more, **named)
        self.conn = _Parser(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the head timer; close another connection if there are too many."""
        super().connection_made(transport)
        # report when the system accepts no more bytes, and when all are sent
        transport.set_write_buffer_limits(high=0)
        self._number, self._host = next(_numbers), client_key(self.client[0] if self.client else "")
        self._update_timer()
        if len(self.connections) > self.limit:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Stop the timer once a request is in progress, and restart it for data after its response."""
        for start in range(0, len(data), _PIECE):
            if self._refused:
                return
            super().data_received(data[start : start + _PIECE])
        if not self._refused:
            self._update_timer()

    def pause_writing(self) -> None:
        """Start the timer for the response being sent."""
        super().pause_writing()
        size = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(_TAKE + size / MIN_RATE, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer, since everything has been sent."""
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_head_timer()
        super().connection_lost(exc)
        self._stop_write_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with an error in JSON."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        body = json.dumps({"error": f"the request is not HTTP that can be read: {error or msg}"}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        headers.append(("x-content-type-options", "nosniff"))
        with contextlib.suppress(h11.LocalProtocolError):  # a response has begun already
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        if self.cycle is not None:  # its response would not be sent
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(_LINGER, self.transport.abort)
        self.transport.write_eof()  # after an immediate close, more data would make the system drop the response

    @property
    def _idle(self) -> bool:
        """True if the connection is waiting for its client."""
        return self.cycle is None or self.cycle.response_complete or self.flow.write_paused

    def _make_room(self) -> None:
        """Close the oldest idle connection of the address with the most connections."""
        others = [other for other in self.connections if isinstance(other, _Connection)]
        hosts = Counter(other._host for other in others)
        idle = [other for other in others if other._idle and other is not self]
        if idle:
            oldest = min(idle, key=lambda other: (-hosts[other._host], other._number))
            oldest.transport.abort()
            self.connections.discard(oldest)  # at once: other connections may arrive before this one is lost

    def _update_timer(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # has a time limit of its own
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(_HEAD, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


class _Draining(uvicorn.Server):
    """A server that, after a signal, responds 503 to new requests until all accepted ones are answered or time out."""

    def __init__(
        self, config: uvicorn.Config, admission: Admission, on_start: Callable[[], None], on_stop: Callable[[int], None]
    ) -> None:
        super().__init__(config)
        self._admission, self._on_start, self._on_stop = admission, on_start, on_stop
        self._until = float("inf")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections and report unanswered requests, before any wait that might not end."""
        await super().shutdown(sockets)
        self._on_stop(self._admission.inside)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening and report it."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Close admission at the first signal, exit at the second; a watchdog ends the process in any case."""
        timeout = self._admission.limits.timeout
        if self._admission.closed:
            self.should_exit = self.force_exit = True
            timeout = 0.0
        self._admission.closed = True
        self._until = time.monotonic() + timeout
        nowhere = os.open(os.devnull, os.O_WRONLY)  # discards the tracebacks of the threads
        faulthandler.dump_traceback_later(timeout + 2 * _FLUSH, exit=True, file=nowhere)

    async def on_tick(self, counter: int) -> bool:
        """Return True to exit; called ten times per second."""
        if self._admission.closed and (not self._admission.inside or time.monotonic() > self._until):
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to this address; port 0 selects a free one.

    Raises:
        UserError: not an address of this machine.
        RunFault: the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: {error}; expected an address of this machine, such as 127.0.0.1") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise RunFault(f"cannot listen on {host} port {port}: {error.strerror}; pass another --port, or 0") from None
    return listening


def url_of(listening: socket.socket) -> str:
    """Return the URL of the server."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listening: socket.socket) -> bool:
    """True if only this machine can reach the server."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def _open_files() -> int:
    """Return the maximum number of open files and sockets of this process."""
    return os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 512


def _is_not_cancellation(record: logging.LogRecord) -> bool:
    """False for a log record about a request cancelled when the server stopped; those are counted instead."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)


def serve(
    app: FastAPI,
    admission: Admission,
    listening: socket.socket,
    on_start: Callable[[], None] = lambda: None,
    on_stop: Callable[[int], None] = lambda unanswered: None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish the accepted ones.

    After a signal the process ends within the time limit of a request plus a few seconds, whatever its threads do.

    Args:
        app: the application.
        admission: admission control, closed by the first signal.
        listening: socket on which to accept connections.
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
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,  # by default uvicorn trusts clients on this machine
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_FLUSH,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_not_cancellation)
    _Draining(config, admission, on_start, on_stop).run(sockets=[listening])
