"""A key for a service: from an environment variable that the user names to where the service wants it, nowhere else.

Nothing here is written. Replies, errors and log records are redacted (:mod:`certify.blackbox.client.redaction`) before
anything else reads them, since a service may repeat the key it refuses.
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
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,40}")  # what else is named may be the key itself, given by mistake
_SHORTEST = 8  # a shorter one could be part of a label or a score, which cleaning would then change
_SECRET = re.compile(r"key|token|secret|sig(?!ma)|pass|pwd|auth|cred|jwt|^code$", re.IGNORECASE)  # names in a query
_USER, _QUERY = re.compile(r"(\b\w+://)[^\s/'\"@]*@"), re.compile(r"(\b\w+://[^\s?#'\"]*)[?#][^\s'\"]*")
_FORMATTER = logging.Formatter()
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a header's name, RFC 9110


def secret_name(query: str) -> str | None:
    """The first name in a URL's query whose value looks like a key, by what such names contain; None without one.

    A key inside a path cannot be told from the path.
    """
    return next((name for name, _ in parse_qsl(query, keep_blank_values=True) if _SECRET.search(name)), None)


def public(text: str) -> str:
    """A text without what addresses in it may hide: user and password, query, fragment."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


@dataclass(frozen=True, repr=False)
class Credential:
    """A key and where it goes.

    Attributes:
        variable: of the environment, that it came from.
        key: the secret itself.
        headers: to be sent with every request, the key in one of them.
        query: to be added to every URL, encoded; empty where the key goes into a header.
    """

    variable: str
    key: str
    headers: dict[str, str] = field(default_factory=dict)
    query: str = ""

    def __repr__(self) -> str:
        return f"Credential(${self.variable})"


def redactor_for(credential: Credential | None) -> Redactor | None:
    """Return what hides the key, and the passwords of the environment's proxies; None where there are neither."""
    secrets = [] if credential is None else [credential.key]
    for proxy in getproxies().values():
        user, _, password = unquote(proxy.rpartition("@")[0].rpartition("//")[2]).partition(":")
        secrets += [f"{user}:{password}", password] if password else []
    return Redactor(secrets) if secrets else None


def read_credential(variable: str, header: str = BEARER, query: str | None = None) -> Credential:
    """The key in an environment variable.

    Args:
        variable: its name.
        header: ``NAME: VALUE`` with ``{key}`` where the key goes.
        query: ``NAME={key}``, for a service that wants the key in the URL; then there is no header.

    Raises:
        UserError: no such variable, no usable key in it, or no place for the key. No message repeats what was given
            as header or query, since the key itself may have been written there by mistake.
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


def cleaned(send: Sender, redactor: Redactor | None) -> Sender:
    """Return the same sender with redacted replies and errors; errors have no context, which is not redacted."""
    if redactor is None:
        return send
    redact = redactor.text

    def send_cleaned(request: Request) -> Reply:
        try:
            reply = send(request)
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

    return send_cleaned


@contextmanager
def cleaned_logs(redactor: Redactor | None, loggers: Iterable[str]) -> Iterator[None]:
    """Keep the key out of what these loggers, by name, write meanwhile: HTTP libraries log URLs and headers."""

    def clean(record: logging.LogRecord) -> bool:
        assert redactor is not None
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + _FORMATTER.formatException(record.exc_info)
        if (without := redactor.text(text)) != text:
            record.msg, record.args, record.exc_info, record.exc_text = without, (), None, None
        return True

    found = [logging.getLogger(name) for name in loggers] if redactor is not None else []
    for logger in found:
        logger.addFilter(clean)
    try:
        yield
    finally:
        for logger in found:
            logger.removeFilter(clean)
