"""One request over HTTP: bounded in time and size, nothing sent twice, the key to nobody else.

Redirects are not followed: each would be a request that nobody counted, and one to another host would take the key
along. Cookies are not kept: a service shall not know one query from the next.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import threading
import weakref
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import SplitResult, urlsplit

from certify import __version__
from certify.blackbox.client.credentials import Credential, cleaned, cleaned_logs, redactor_for, secret_name
from certify.blackbox.types import MOST_BYTES, BadReply, Reply, Request
from certify.errors import UserError, first_line

TIMEOUT = 60.0
"""Seconds for one request, from the first look for the host to the last byte."""

_CONNECT = 10.0  # seconds to connect, within those
_IDLE = 2.0  # seconds a connection is kept: a server that closes it first costs a request
_LOGGERS = ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))


def check_endpoint(url: str, *, key: bool = False, insecure: bool = False) -> str:
    """The address of a service, as it may be shown and written.

    Args:
        url: as given.
        key: whether a key will be sent there.
        insecure: whether a key may go over plain HTTP to another machine.

    Raises:
        UserError: no such address, a password or key inside of it, or a key that everybody on the way could read.
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
        raise UserError("the endpoint holds a user name or password; expected it without, and the key by --api-key-env")
    named = secret_name(parts.query)
    if named is not None:
        raise UserError(
            f"the endpoint's query holds {named!r}, which looks like a key; expected the URL without it, and "
            f"--api-key-env NAME --auth-query '{named}={{key}}'"
        )
    if key and parts.scheme == "http" and not insecure and not is_loopback(host):
        raise UserError(
            f"the key would go to {host} over plain HTTP, where anybody on the way can read it; write https://, or "
            "--insecure to send it nevertheless"
        )
    return parts._replace(fragment="").geturl()


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HttpSender:
    """Sends requests to one endpoint, from any thread; a :data:`~certify.blackbox.types.Sender` and a context manager.

    Its client runs in an event loop of its own thread: only there can a deadline end everything (the look for the
    host, TLS, headers that drip), not just the wait for the next bytes. Certificates of hosts are always checked; one's
    own authority is named by ``SSL_CERT_FILE``. Proxies of the environment are used, but never for loopback.

    Args:
        url: of the endpoint; what a request calls its path is added.
        credential: the key, if it wants one.
        insecure: see :func:`check_endpoint`.
        timeout: seconds for one request, whatever happens.
        most_bytes: of a reply.
        connections: that may be open at a time.

    Raises:
        UserError: httpx2 is not installed, or as :func:`check_endpoint`.
    """

    def __init__(
        self,
        url: str,
        credential: Credential | None = None,
        *,
        insecure: bool = False,
        timeout: float = TIMEOUT,
        most_bytes: int = MOST_BYTES,
        connections: int = 64,
    ) -> None:
        self.endpoint = check_endpoint(url, key=credential is not None, insecure=insecure)
        try:
            import httpx2
        except ImportError:
            raise UserError(
                "asking a service needs httpx2, which is not installed; pip install 'certify-toolkit[audit]'"
            ) from None
        self._url = urlsplit(self.endpoint)
        self._credential, self._timeout, self._most_bytes = credential, timeout, most_bytes
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
                f"the proxies or the certificates that the environment names cannot be used: {why}; check HTTP_PROXY, "
                "HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
            ) from None
        self._send = cleaned(self._send_once, redactor)
        held = ExitStack()
        held.enter_context(cleaned_logs(redactor, _LOGGERS))
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="certify-http", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, self._loop, thread, self._client, held)

    def __repr__(self) -> str:
        return f"HttpSender({self.endpoint})"

    def __call__(self, request: Request) -> Reply:
        """Send it once.

        Raises:
            OSError: no whole reply came: ``TimeoutError`` or ``ConnectionError``, with the reason in one line.
            BadReply: more bytes than may be.
        """
        return self._send(request)

    def close(self) -> None:
        """Break off what is under way and end the thread."""
        self._end()

    def __enter__(self) -> HttpSender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_once(self, request: Request) -> Reply:
        if not self._end.alive:
            raise ConnectionError("the sender was closed")
        try:
            return asyncio.run_coroutine_threadsafe(self._exchange(request), self._loop).result()
        except CancelledError:
            raise ConnectionError("the sender was closed") from None
        except TimeoutError:
            raise TimeoutError(f"no whole reply within {self._timeout:g} s") from None
        except self._late:
            raise TimeoutError(f"no connection to {self._url.netloc} within {_CONNECT:g} s") from None
        except self._failures as error:
            raise ConnectionError(f"{self._url.netloc}: {first_line(error)} ({type(error).__name__})") from None

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
                if len(body) > self._most_bytes:
                    raise BadReply(f"HTTP {reply.status_code}: a reply of more than {self._most_bytes:,} bytes")
        return Reply(reply.status_code, bytes(body), dict(reply.headers))

    def _address(self, request: Request) -> str:
        below, _, query = request.path.partition("?")
        path = f"{self._url.path.rstrip('/')}/{below.lstrip('/')}" if below else self._url.path
        queries = (self._url.query, query, self._credential.query if self._credential else "")
        return self._url._replace(path=path, query="&".join(filter(None, queries))).geturl()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, client: Any, held: ExitStack) -> None:
    async def finish() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await client.aclose()

    with held:
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(finish(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        if not thread.is_alive():
            loop.close()
