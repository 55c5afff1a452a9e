"""Refuse requests that a browser sends for another site's page: cross-site requests and DNS rebinding."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.requests import Request

from certify.errors import UserError
from certify.serve.limits import Refused


def site_check(names: Collection[str] = ()) -> Callable[[Request], None]:
    """Return a check that raises ``Refused`` on a request sent by another site's page.

    A foreign ``Origin`` is another site's request. A page whose own host name was made to point to this server (DNS
    rebinding) has the server's origin, but its ``Host`` is a name: so the host must be an IP address, ``localhost``,
    this machine's own name or one of ``names``, whatever address the server listens on.

    Args:
        names: further host names by which browsers and clients reach the server, such as that of a proxy in front.

    Raises:
        UserError: not a host name.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise UserError(f"--allow-host {name!r}: expected a host name without scheme and port, such as api.example")
    allowed = frozenset(name.lower() for name in names)
    known = allowed | {"localhost", socket.gethostname().lower()} - {""}

    def check(request: Request) -> None:
        host = request.headers.get("host", "")
        name = _host(f"//{host}")
        if name.rstrip(".") not in known and not _is_address(name):
            raise Refused(
                403,
                f"host {host[:60]!r}: expected an IP address, localhost, or a name given by --allow-host",
                "foreign",
            )
        origin = request.headers.get("origin")
        if origin is not None and _authority(origin) != host.lower() and _host(origin) not in allowed:
            raise Refused(403, f"a page of {origin[:60]!r} may not ask this server; --allow-host names more", "foreign")

    return check


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _authority(url: str) -> str | None:
    """Return the host and port of a URL in lower case; None if it has none."""
    try:
        return urlsplit(url).netloc.lower() or None
    except ValueError:
        return None


def _host(url: str) -> str:
    """Return the host of a URL in lower case; empty if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
