"""Debian's Chromium without a window, spoken to by its DevTools protocol over two pipes: no package, no port."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page. ``events`` holds everything that it reported, in order.

    Args:
        to: where to write commands.
        back: where to read replies and events.
    """

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._count = to, back, b"", 0
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """One command to the page, and its result."""
        return self._call(method, self._session, **given)

    def _call(self, method: str, session: str | None = None, **given: Any) -> dict[str, Any]:
        self._count += 1
        line = {"id": self._count, "method": method, "params": given} | ({"sessionId": session} if session else {})
        data = json.dumps(line).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while (found := self._next()).get("id") != self._count:
            self.events.append(found)
        assert "error" not in found, (method, found["error"])
        return dict(found["result"])

    def _next(self, seconds: float = 60.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(self._back, 2**20) if ready else b""
            assert piece, "the browser ended or does not answer"
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def open(self, url: str) -> None:
        """Go there and wait until it is loaded; ``events`` starts anew."""
        self.events = []
        self.call("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript (or of its promise) in the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def view(
        self, width: int, height: int = 900, *, scale: float = 1, dark: bool = False, media: str = "screen"
    ) -> None:
        """The window's size in CSS pixels, the colour scheme, ``screen`` or ``print``."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        if whole:
            size = self.evaluate(
                "[innerWidth, document.documentElement.scrollHeight, devicePixelRatio, innerWidth < 600]"
            )
            given = dict(zip(("width", "height", "deviceScaleFactor", "mobile"), size, strict=True))
            self.call("Emulation.setDeviceMetricsOverride", **given)
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def pdf(self) -> bytes:
        """The page printed on A4, as PDF."""
        printed = self.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(printed["data"])

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for, data URIs left out."""
        sent = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        found = [event["params"]["request"]["url"] for event in sent]
        return [url for url in found if not url.startswith("data:")]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, violations of the page's policy."""
        found = []
        for event in self.events:
            if event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] in ("error", "warning"):
                found.append(event["params"]["entry"]["text"])
            elif event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                found.append(json.dumps(event["params"]))
        return found


def _out_of_the_way(descriptor: int) -> int:
    """The same pipe under a number that is neither 3 nor 4."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, ended with all its processes whatever happens; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    (child_in, to), (back, child_out) = os.pipe(), os.pipe()
    child_in, child_out = _out_of_the_way(child_in), _out_of_the_way(child_out)
    with tempfile.TemporaryDirectory(prefix="certify-browser-", ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-extensions", f"--user-data-dir={profile}"]
        # Chromium reads commands from descriptor 3 and writes to 4
        shell = f'exec "$0" "$@" 3<&{child_in} 4>&{child_out} {child_in}<&- {child_out}>&-'
        running = subprocess.Popen(
            ["/bin/bash", "-c", shell, CHROMIUM, "--remote-debugging-pipe", *flags],
            pass_fds=(child_in, child_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(child_in)
        os.close(child_out)
        try:
            yield Browser(to, back)
        finally:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait(timeout=20)
            os.close(to)
            os.close(back)
