"""Serve until a signal, then finish the accepted requests and refuse new ones; time limits of connections."""

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
_TAKE = 10.0  # seconds for receiving a response, besides those by its size
_PIECE = 2**14  # bytes parsed at a time: the size of a head is checked only between them
_LINGER = 2.0  # seconds after a refusal in which the client may still send
_CHUNKS, _CHUNK = 1000, 256  # number of chunks of any size, and the average size from which more are accepted
_CONNECTIONS, _SPARE = 8, 64  # connections per concurrent request of an address, and in addition
_OTHER_FILES = 128  # open files of the process other than connections
_FLUSH = 5  # seconds for the last bytes of responses
_IDLE = 15  # seconds until an unused connection is closed

_numbers = itertools.count()  # of connections, in order of arrival


class _Parser(h11.Connection):
    """An HTTP parser that refuses bodies in tiny chunks: each chunk costs the same, whatever its size."""

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
    """A connection that is closed if the client is slow; what is not HTTP is refused in JSON.

    Two timers run: until the head of the next request is complete, and while the client receives a response. The body
    of a request is timed where it is read.
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
        """Start the timer of the head; close another connection if there are too many."""
        super().connection_made(transport)
        # report when the system accepts no more bytes, and when all are sent
        transport.set_write_buffer_limits(high=0)
        self._number, self._host = next(_numbers), client_key(self.client[0] if self.client else "")
        self._update_timer()
        if len(self.connections) > self.limit:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Stop the timer once a request is in progress, and start it again for data after its response."""
        for start in range(0, len(data), _PIECE):
            if self._refused:
                return
            super().data_received(data[start : start + _PIECE])
        if not self._refused:
            self._update_timer()

    def pause_writing(self) -> None:
        """Start the timer of the response that is being sent."""
        super().pause_writing()
        size = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(_TAKE + size / MIN_RATE, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer: everything is sent."""
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_head_timer()
        super().connection_lost(exc)
        self._stop_write_timer()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP with a JSON body."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        body = json.dumps({"error": f"the request is not HTTP that can be read: {error or msg}"}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        headers.append(("x-content-type-options", "nosniff"))
        with contextlib.suppress(h11.LocalProtocolError):  # a response has begun already
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self._refused = True
        if self.cycle is not None:  # its answer would not be sent
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(_LINGER, self.transport.abort)
        self.transport.write_eof()  # closing at once would make the system discard the answer if more data arrives

    @property
    def _idle(self) -> bool:
        """True if the connection waits for its client."""
        return self.cycle is None or self.cycle.response_complete or self.flow.write_paused

    def _make_room(self) -> None:
        """Close the oldest idle connection of the address with most connections, in favour of the new one."""
        others = [other for other in self.connections if isinstance(other, _Connection)]
        hosts = Counter(other._host for other in others)
        idle = [other for other in others if other._idle and other is not self]
        if idle:
            oldest = min(idle, key=lambda other: (-hosts[other._host], other._number))
            oldest.transport.abort()
            self.connections.discard(oldest)  # now: more new connections may follow before the loop reports it lost

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
    """A server that answers 503 after a signal until all accepted requests are answered; each has its time limit."""

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
        """Start to listen, and report it."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Close admission at the first signal, exit at the second; the process ends in any case."""
        timeout = self._admission.limits.timeout
        if self._admission.closed:
            self.should_exit = self.force_exit = True
            timeout = 0.0
        self._admission.closed = True
        self._until = time.monotonic() + timeout
        nowhere = os.open(os.devnull, os.O_WRONLY)  # the tracebacks of its threads are not shown
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
    """Return True if only this machine can reach the server."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def _open_files() -> int:
    """Return the number of files and sockets that this process may open."""
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
        proxy_headers="FORWARDED_ALLOW_IPS" in os.environ,  # otherwise uvicorn trusts clients on this machine
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_FLUSH,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_not_cancellation)
    _Draining(config, admission, on_start, on_stop).run(sockets=[listening])
