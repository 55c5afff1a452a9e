"""One process that serves until it is told to stop: then it finishes what it accepted, and refuses the rest."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from certify.errors import RunFault, UserError
from certify.serve.request_handler import Gate

_HEAD = 10.0  # seconds for the head of a request: its line and headers
_CONNECTIONS = 8  # for each request that may be in work; more are turned away
_FLUSH = 5  # seconds for the last bytes of responses
_IDLE = 15  # seconds that an unused connection stays open


class _Hurried(H11Protocol):
    """A connection that is cut when the head of its first or next request is not there in time."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._look()

    def data_received(self, data: bytes) -> None:
        """Stop the clock once a request is under way; what follows an answer starts it again."""
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop()
        super().connection_lost(exc)

    def _look(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # from here on the request has its own limit
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(_HEAD, self.transport.abort)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class _Draining(uvicorn.Server):
    """Goes on answering 503 until everybody inside was answered; every request has its own time limit."""

    def __init__(self, config: uvicorn.Config, gate: Gate, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._gate, self._on_start, self._until = gate, on_start, float("inf")
        self.unanswered = 0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, and count who is still inside."""
        await super().shutdown(sockets)
        self.unanswered = self._gate.inside

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal closes the gate, the second one does not wait."""
        if self._gate.closed:
            self.should_exit = self.force_exit = True
        self._gate.closed = True
        self._until = time.monotonic() + self._gate.limits.timeout

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to leave."""
        if self._gate.closed and (not self._gate.inside or time.monotonic() > self._until):
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


def serve(app: FastAPI, gate: Gate, listening: socket.socket, on_start: Callable[[], None] = lambda: None) -> int:
    """Answer until SIGTERM or Ctrl-C, and then until nobody waits; how many requests were left without an answer."""
    config = uvicorn.Config(
        app,
        http=_Hurried,
        limit_concurrency=_CONNECTIONS * gate.limits.concurrency + 64,  # health checks have room
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_FLUSH,
    )
    server = _Draining(config, gate, on_start)
    server.run(sockets=[listening])
    return server.unanswered
