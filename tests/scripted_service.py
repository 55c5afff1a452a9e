"""A service on loopback whose replies a test writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, str, dict[str, str]]
"""Status, body and headers."""

Answer = Callable[[int, Mapping[str, str]], Reply]
"""The reply to a request: its number, from 0, and its headers."""


@contextmanager
def service(answer: Answer) -> Iterator[str]:
    """Its URL, while it serves."""
    lock, count = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body in one packet: a second one would wait for a delayed acknowledgement

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                number, count[0] = count[0], count[0] + 1
            status, text, headers = answer(number, self.headers)
            content = text.encode()
            self.send_response_only(status)
            usual = {"Content-Type": "application/json", "Content-Length": str(len(content))}
            for name, value in {**usual, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/predict"
        finally:
            server.shutdown()
            thread.join(10)
