"""Which web page may ask: the server's own. Browsers carry requests of foreign pages to this machine too."""

from __future__ import annotations

from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from starlette.requests import Request

from certify.blackbox.client.http import is_loopback
from certify.serve.limits import Refused


def site_check(*, loopback: bool, names: Collection[str] = ()) -> Callable[[Request], None]:
    """What raises ``Refused`` on a request that a foreign page sent.

    A foreign ``Origin`` is another site's request. A foreign ``Host`` on a loopback address is another site whose name
    was made to point to this machine (DNS rebinding): its page has the origin of this server.

    Args:
        loopback: whether only this machine can reach the server.
        names: further host names by which browsers reach it, such as that of a proxy in front.
    """
    known = frozenset(name.lower() for name in names)

    def check(request: Request) -> None:
        host = request.headers.get("host", "")
        if loopback and not (is_loopback(name := _name("//" + host)) or name in known):
            raise Refused(403, f"host {host[:60]!r}: expected localhost, or a name given by --allow-host", "foreign")
        origin = request.headers.get("origin")
        if origin is not None and _place(origin) != host.lower() and _name(origin) not in known:
            raise Refused(403, f"a page of {origin[:60]!r} may not ask this server; --allow-host names more", "foreign")

    return check


def _place(url: str) -> str | None:
    """Host and port of a URL in lower case; None where it is none."""
    try:
        return urlsplit(url).netloc.lower() or None
    except ValueError:
        return None


def _name(url: str) -> str:
    """The host's name in a URL; empty where it is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
