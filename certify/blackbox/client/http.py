"""Send requests over HTTP: each once, bounded in time and size, with the key sent only to the service.

Redirects are not followed: each would be an uncounted request, and one to another host would reveal the key. Cookies
are not kept, so that a service cannot link queries.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import os
import re
import threading
from collections.abc import Coroutine
from contextlib import ExitStack
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from certify import __version__
from certify.blackbox.client.credentials import Credential, redacted, redacted_logs, redactor_for, secret_name
from certify.blackbox.types import MAX_REPLY_BYTES, BadReply, Reply, Request
from certify.errors import UserError, first_line

TIMEOUT = 60.0
"""Default seconds per request, from the DNS lookup to the last byte."""

_CONNECT = 10.0  # seconds to connect, as part of the timeout
_IDLE = 2.0  # seconds to keep an idle connection; reusing one that the server has closed costs a request
_THREAD = "certify-queries"
_LOGGERS = ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))

T = TypeVar("T")


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Return this process's event loop for queries, which runs in a background thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=_THREAD, daemon=True).start()
    return loop


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=event_loop.cache_clear)  # threads do not survive a fork


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on :func:`event_loop` from another thread and return its result."""
    return asyncio.run_coroutine_threadsafe(coroutine, event_loop()).result()


def on_event_loop() -> bool:
    """True if the caller runs on :func:`event_loop`, where waiting for it would deadlock."""
    return threading.current_thread().name == _THREAD


def check_endpoint(url: str, *, key: bool = False, insecure: bool = False) -> str:
    """Validate the URL of a service and return it in a form that may be displayed and stored.

    Args:
        url: the URL as given.
        key: True if a key will be sent there.
        insecure: allow sending a key over plain HTTP to another machine.

    Raises:
        UserError: not an HTTP URL, a password or key in it, or a key that would be sent unencrypted.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = SplitResult("", "", "", "", ""), None
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() or not c.isprintable() for c in url):
        shown = re.split("[?&#]", url.rpartition("@")[2])[0]  # no part of a password
        raise UserError(f"endpoint {shown!r}: expected http://HOST[:PORT]/PATH or https://...")
    if parts.username is not None or parts.password is not None:
        raise UserError(
            "the endpoint holds a user name or password; expected the URL without them, and the key by --api-key-env"
        )
    named = secret_name(parts.query)
    if named is not None:
        raise UserError(
            f"the endpoint's query holds {named!r}, which looks like a key; expected the URL without it, and "
            f"--api-key-env NAME --auth-query '{named}={{key}}'"
        )
    if key and parts.scheme == "http" and not insecure and not is_loopback(host):
        raise UserError(
            f"the key would go to {host} over plain HTTP, where anyone on the network can read it; use https://, or "
            "--insecure to send it nevertheless"
        )
    return parts._replace(fragment="").geturl()


def is_loopback(host: str) -> bool:
    """True if a host name or address is the loopback interface."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HttpSender:
    """Send requests to one endpoint; a :data:`~certify.blackbox.types.Sender` and a context manager.

    A deadline covers the whole request (name lookup, TLS, slow headers), not just the wait for the next bytes. Host
    certificates are always verified; ``SSL_CERT_FILE`` names a custom certificate authority. Proxies from the
    environment are used, but never for loopback.

    Args:
        url: the endpoint's URL; the path of each request is appended.
        credential: the service's key, or None.
        insecure: see :func:`check_endpoint`.
        timeout: total seconds per request.
        max_bytes: maximum length of a reply.
        connections: maximum number of open connections.

    Raises:
        UserError: httpx2 is not installed, or the endpoint is refused by :func:`check_endpoint`.
    """

    def __init__(
        self,
        url: str,
        credential: Credential | None = None,
        *,
        insecure: bool = False,
        timeout: float = TIMEOUT,
        max_bytes: int = MAX_REPLY_BYTES,
        connections: int = 64,
    ) -> None:
        self.endpoint = check_endpoint(url, key=credential is not None, insecure=insecure)
        try:
            import httpx2
        except ImportError:
            raise UserError(
                "querying a service needs httpx2, which is not installed; pip install 'certify-toolkit[audit]'"
            ) from None
        self._url = urlsplit(self.endpoint)
        self._credential, self._timeout, self._max_bytes = credential, timeout, max_bytes
        self._failures = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError)
        self._late = httpx2.TimeoutException
        redactor = redactor_for(credential)
        try:
            self._client = httpx2.AsyncClient(
                headers={"user-agent": f"certify-toolkit/{__version__}", "accept-encoding": "identity"},
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                timeout=httpx2.Timeout(None, connect=_CONNECT),
                limits=httpx2.Limits(
                    max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=_IDLE
                ),
                follow_redirects=False,
                trust_env=not is_loopback(self._url.hostname or ""),
            )
        except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
            why = first_line(error) if redactor is None else redactor.text(first_line(error))
            raise UserError(
                f"the proxies or certificates set in the environment cannot be used: {why}; check HTTP_PROXY, "
                "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
            ) from None
        self._send = redacted(self._send_once, redactor)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._logs = ExitStack()
        self._logs.enter_context(redacted_logs(redactor, _LOGGERS))

    def __repr__(self) -> str:
        return f"HttpSender({self.endpoint})"

    async def __call__(self, request: Request) -> Reply:
        """Send a request once; must run on :func:`event_loop`.

        Raises:
            OSError: no complete reply: ``TimeoutError`` or ``ConnectionError``, with the reason in one line.
            BadReply: the reply is longer than ``max_bytes``.
        """
        return await self._send(request)

    def close(self) -> None:
        """Abort the requests in flight and close the connections."""
        run_async(self._close())
        self._logs.close()

    def __enter__(self) -> HttpSender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        while self._tasks:
            await asyncio.sleep(0.01)
        await self._client.aclose()

    async def _send_once(self, request: Request) -> Reply:
        if self._closed:
            raise ConnectionError("the sender was closed")
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await self._exchange(request)
        except asyncio.CancelledError:
            if not self._closed:
                raise
            raise ConnectionError("the sender was closed") from None
        except TimeoutError:
            raise TimeoutError(f"no complete reply within {self._timeout:g} s") from None
        except self._late:
            raise TimeoutError(f"no connection to {self._url.netloc} within {_CONNECT:g} s") from None
        except self._failures as error:
            raise ConnectionError(f"{self._url.netloc}: {first_line(error)} ({type(error).__name__})") from None
        finally:
            self._tasks.discard(task)

    async def _exchange(self, request: Request) -> Reply:
        body = bytearray()
        secret = self._credential.headers if self._credential else {}
        headers = {**request.headers, **secret}
        async with (
            asyncio.timeout(self._timeout),
            self._client.stream(request.method, self._address(request), content=request.body, headers=headers) as reply,
        ):
            async for piece in reply.aiter_bytes():
                body += piece
                if len(body) > self._max_bytes:
                    raise BadReply(f"HTTP {reply.status_code}: a reply of more than {self._max_bytes:,} bytes")
        return Reply(reply.status_code, bytes(body), dict(reply.headers))

    def _address(self, request: Request) -> str:
        below, _, query = request.path.partition("?")
        path = f"{self._url.path.rstrip('/')}/{below.lstrip('/')}" if below else self._url.path
        queries = (self._url.query, query, self._credential.query if self._credential else "")
        return self._url._replace(path=path, query="&".join(filter(None, queries))).geturl()
