"""Servers in processes of their own, the ports they take, and waiting for what others do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from certify.blackbox.client.http import HttpSender, run_async
from certify.blackbox.types import Request


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    """Return when it is; fail when it is not for so long."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"not ready within {seconds} seconds")
        time.sleep(0.01)


def free_ports(count: int) -> list[int]:
    doors = [socket.socket() for _ in range(count)]
    for door in doors:
        door.bind(("127.0.0.1", 0))
    ports = [door.getsockname()[1] for door in doors]
    for door in doors:
        door.close()
    return ports


@contextmanager
def process(command: list[str], folder: Path, url: str, ready: str) -> Iterator[HttpSender]:
    """A server that answers ``ready`` with 200 within five minutes; its whole process group ends with the block."""
    log = folder / "log.txt"
    with log.open("wb") as out, HttpSender(url, timeout=20) as send:
        server = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True)

        def up() -> bool:
            if server.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
            try:
                return run_async(send(Request(b"", ready, "GET"))).status == 200
            except OSError:
                return False

        try:
            wait_for(up, 300)
            yield send
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(20)
