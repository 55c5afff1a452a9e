"""Read a service's key from an environment variable and send it only to the service.

Nothing here is stored. Replies, errors and log records are redacted (:mod:`certify.blackbox.client.redaction`) before
anything else reads them, since a service may echo a rejected key.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote
from urllib.request import getproxies

from certify.blackbox.client.redaction import Redactor
from certify.blackbox.types import BadReply, Reply, Request, Sender
from certify.errors import CertifyError, RunFault, UserError, first_line

BEARER = "Authorization: Bearer {key}"
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,40}")  # any other name may be the key itself, given by mistake
_SHORTEST = 8  # a shorter key could be part of a label or a score, which redaction would then change
_SECRET = re.compile(r"key|token|secret|sig(?!ma)|pass|pwd|auth|cred|jwt|^code$", re.IGNORECASE)  # names in a query
_USER, _QUERY = re.compile(r"(\b\w+://)[^\s/'\"@]*@"), re.compile(r"(\b\w+://[^\s?#'\"]*)[?#][^\s'\"]*")
_FORMATTER = logging.Formatter()
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a header's name, RFC 9110


def secret_name(query: str) -> str | None:
    """Return the first name in a URL's query that suggests a secret value; None without one.

    A key inside a path cannot be distinguished from the path.
    """
    return next((name for name, _ in parse_qsl(query, keep_blank_values=True) if _SECRET.search(name)), None)


def public(text: str) -> str:
    """Return a text without the users, passwords, queries and fragments of the addresses in it."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


@dataclass(frozen=True, repr=False)
class Credential:
    """A key and its place in a request.

    Attributes:
        variable: environment variable from which it was read.
        key: the secret itself.
        headers: headers sent with every request; one of them contains the key.
        query: encoded query appended to every URL; empty if a header contains the key.
    """

    variable: str
    key: str
    headers: dict[str, str] = field(default_factory=dict)
    query: str = ""

    def __repr__(self) -> str:
        return f"Credential(${self.variable})"


def redactor_for(credential: Credential | None) -> Redactor | None:
    """Return a redactor for the key and the passwords of the environment's proxies; None if there are neither."""
    secrets = [] if credential is None else [credential.key]
    for proxy in getproxies().values():
        user, _, password = unquote(proxy.rpartition("@")[0].rpartition("//")[2]).partition(":")
        secrets += [f"{user}:{password}", password] if password else []
    return Redactor(secrets) if secrets else None


def read_credential(variable: str, header: str = BEARER, query: str | None = None) -> Credential:
    """Read the key in an environment variable.

    Args:
        variable: its name.
        header: ``NAME: VALUE`` with ``{key}`` in the place of the key.
        query: ``NAME={key}``, for a service that expects the key in the URL; then there is no header.

    Raises:
        UserError: no such variable, no usable key in it, or no ``{key}`` in header or query. Messages do not repeat
            the header or query, which may contain the key itself by mistake.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        shown = f"${variable}" if _VARIABLE.fullmatch(variable) else "the variable named"
        raise UserError(
            f"--api-key-env: {shown} is not set, or empty; expected the name of an environment variable that holds "
            "the key, such as SERVICE_KEY after `export SERVICE_KEY=...`"
        )
    if len(key) < _SHORTEST or not key.isascii() or not key.isprintable():
        raise UserError(
            f"${variable} holds {len(key)} characters; expected a key of {_SHORTEST} or more, printable ASCII, one line"
        )
    if query is not None:
        name, _, value = query.partition("=")
        if value != "{key}" or not _TOKEN.fullmatch(name):
            raise UserError("--auth-query: expected NAME={key}, written so: the key itself stays in the environment")
        return Credential(variable, key, query=f"{name}={quote(key, safe='')}")
    name, colon, value = header.partition(":")
    if not colon or value.count("{key}") != 1 or not _TOKEN.fullmatch(name.strip()) or not value.isascii():
        raise UserError(
            f"--auth-header: expected NAME: VALUE with {{key}} in it, such as {BEARER!r}: the key itself stays in the "
            "environment"
        )
    return Credential(variable, key, {name.strip(): value.strip().replace("{key}", key)})


def redacted(send: Sender, redactor: Redactor | None) -> Sender:
    """Wrap a sender to redact replies and errors; errors lose their context, which could contain the key."""
    if redactor is None:
        return send
    redact = redactor.text

    async def send_redacted(request: Request) -> Reply:
        try:
            reply = await send(request)
        except BadReply as error:
            failure: Exception = BadReply(redact(str(error)))
        except TimeoutError as error:
            failure = TimeoutError(redact(str(error)))
        except OSError as error:
            failure = ConnectionError(redact(str(error)))
        except CertifyError as error:
            failure = type(error)(redact(str(error)))
        except Exception as error:
            failure = RunFault(redact(f"the request failed: {type(error).__name__}: {first_line(error)}"))
        else:
            headers = {redact(name): redact(value) for name, value in reply.headers.items()}
            return Reply(reply.status, redactor.body(reply.body), headers)
        raise failure

    return send_redacted


@contextmanager
def redacted_logs(redactor: Redactor | None, loggers: Iterable[str]) -> Iterator[None]:
    """Redact the records of these loggers within the block: HTTP libraries log URLs and headers."""

    def clean(record: logging.LogRecord) -> bool:
        assert redactor is not None
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + _FORMATTER.formatException(record.exc_info)
        if (without := redactor.text(text)) != text:
            record.msg, record.args, record.exc_info, record.exc_text = without, (), None, None
        return True

    filtered = [logging.getLogger(name) for name in loggers] if redactor is not None else []
    for logger in filtered:
        logger.addFilter(clean)
    try:
        yield
    finally:
        for logger in filtered:
            logger.removeFilter(clean)
