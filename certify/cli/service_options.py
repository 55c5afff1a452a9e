"""Options that say which service is asked, how and how gently; and from them to what asks it."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import click

from certify.cli import options
from certify.errors import RunFault, UserError, first_line

if TYPE_CHECKING:
    from certify.blackbox.client.credentials import Credential
    from certify.blackbox.client.rate_limit import QueryLimits
    from certify.blackbox.types import Format, Sender

protocol_options = options.together(
    click.option(
        "--protocol-option", "extra", multiple=True, metavar="KEY=VALUE", help="Option of the protocol; repeatable."
    ),
    click.option("--encoding", default="png", help="Encoding of pictures: png, jpeg or jpegQ, such as jpeg90."),
    click.option("--sdk", is_flag=True, hidden=True, help="Removed; the error names the HTTP protocol to use."),
    click.option("--api-key-env", metavar="NAME", help="Environment variable that holds the service's key."),
    click.option(
        "--auth-header",
        metavar="'NAME: VALUE'",
        help="Header that carries the key, {key} in it (default: the protocol's, else 'Authorization: Bearer {key}').",
    ),
    click.option("--auth-query", metavar="'NAME={key}'", help="Send the key in the URL's query instead."),
    click.option("--insecure", is_flag=True, help="Send the key over plain HTTP to another machine nevertheless."),
    click.option("--rate", type=options.Positive("requests a second, above 0"), help="Most requests a second."),
    click.option(
        "--retries",
        type=options.Count("repetitions", least=0),
        default=4,
        help="Further requests for a query that was declined (429, 5xx) or got lost; each counts.",
    ),
)

service_options = options.together(
    click.option("--endpoint", metavar="URL", help="The service; those that are in one place need none."),
    click.option("--protocol", required=True, help="How it is asked and answers (`certify list protocols`)."),
    protocol_options,
    click.option(
        "--concurrency", type=options.Count("requests at a time"), default=4, help="Requests under way at a time."
    ),
    click.option(
        "--timeout",
        type=options.Positive("seconds above 0"),
        default=60.0,
        help="Seconds per request; for rekognition, seconds to connect and seconds without a byte.",
    ),
)


@dataclass(frozen=True)
class Wanted:
    """Which service is meant; nothing of it was asked yet.

    Attributes:
        endpoint: without credentials.
        protocol: its name.
        given: options of the protocol.
        credential: its key, if any.
    """

    endpoint: str
    protocol: str
    given: dict[str, Any]
    credential: Credential | None

    @property
    def format(self) -> Format:
        """How it is asked, by the options that are known."""
        from certify.blackbox.protocols import FORMATS

        found: Format = FORMATS.get(self.protocol)(**self.given)
        return found


def wanted_service(o: dict[str, Any]) -> Wanted:
    """What the options mean, checked without sending anything."""
    from certify.blackbox.client.credentials import BEARER, read_credential
    from certify.blackbox.client.http import check_endpoint
    from certify.blackbox.protocols import ENDPOINTS, FORMATS, KEY_HEADERS

    build = FORMATS.get(o["protocol"])
    known = inspect.signature(build).parameters
    given = _values(o["extra"], o["protocol"], known)
    if "encoding" in known:
        given.setdefault("encoding", o["encoding"])
    elif o["encoding"] != "png":
        raise UserError(f"--encoding {o['encoding']}: protocol {o['protocol']} sends pixels as they are; leave it out")
    needed = [name for name, option in known.items() if option.default is option.empty and name not in given]
    if needed:
        raise UserError(f"protocol {o['protocol']} needs --protocol-option {needed[0]}=VALUE")
    url = o["endpoint"] or ENDPOINTS.get(o["protocol"])
    if url is None:
        raise UserError(f"--endpoint is missing: expected the URL of the service that speaks {o['protocol']}")
    key = o["api_key_env"]
    if key is None and (o["auth_header"] or o["auth_query"]):
        raise UserError("--auth-header and --auth-query without --api-key-env: there is no key to send")
    if o["sdk"] and o["protocol"] != "rekognition":
        raise UserError(
            f"--sdk: protocol {o['protocol']} is queried over HTTP alone; leave --sdk out, also to resume an audit "
            "that was begun with it"
        )
    if o["protocol"] == "rekognition" and (o["auth_header"] or o["auth_query"]):
        raise UserError("--auth-header and --auth-query with rekognition: boto3 signs requests itself; leave them out")
    header = o["auth_header"] or KEY_HEADERS.get(o["protocol"], BEARER)
    credential = None if key is None else read_credential(key, header, o["auth_query"])
    endpoint = check_endpoint(url, key=credential is not None, insecure=o["insecure"])
    for option, value in (("--endpoint", endpoint), *((f"--protocol-option {name}", given[name]) for name in given)):
        if credential is not None and credential.key in unquote(str(value)):
            raise UserError(
                f"{option} holds the key itself, which would be written to the records; expected it in ${key} alone "
                "(--auth-header and --auth-query say where it is sent)"
            )
    wanted = Wanted(endpoint, o["protocol"], given, credential)
    _ = wanted.format  # refuses options that make no sense
    return wanted


def query_limits(o: dict[str, Any]) -> QueryLimits:
    """Return the limits on concurrency, rate and attempts."""
    from certify.blackbox.client.rate_limit import QueryLimits

    return QueryLimits(o["concurrency"], o["rate"], o["retries"] + 1, grace=o["timeout"] + 5)


@contextlib.contextmanager
def open_service(wanted: Wanted, o: dict[str, Any]) -> Iterator[tuple[Sender, Wanted]]:
    """What sends requests there; a model that describes itself (v2) is asked for what its options leave open."""
    from certify.blackbox.client.aws import rekognition_sender
    from certify.blackbox.client.http import HttpSender

    if wanted.protocol == "rekognition":
        how = {"insecure": o["insecure"], "timeout": o["timeout"]}
        yield rekognition_sender(wanted.endpoint, wanted.credential, **how), wanted
        return
    sender = HttpSender(
        wanted.endpoint,
        wanted.credential,
        insecure=o["insecure"],
        timeout=o["timeout"],
        connections=o["concurrency"] + 1,
    )
    with sender:
        yield sender, described(wanted, sender)


def asks_for_metadata(wanted: Wanted) -> bool:
    """Whether the model is asked to describe itself first: v2, with options that are not given."""
    from certify.blackbox.protocols.v2 import DESCRIBED

    return wanted.protocol == "v2" and not wanted.given.keys() >= {*DESCRIBED}


def as_before(wanted: Wanted, kept: Mapping[str, Any] | None) -> Wanted:
    """With the options that the model gave when the ledger with this header was begun: it is not asked again."""
    if kept is None or not asks_for_metadata(wanted):
        return wanted
    from certify.blackbox.protocols.v2 import DESCRIBED

    there = kept.get("format") or {}
    return replace(wanted, given={**{key: there[key] for key in DESCRIBED if key in there}, **wanted.given})


def described(wanted: Wanted, send: Sender) -> Wanted:
    """With the options that a v2 model's metadata gives; as it was where nothing is open, or there is no metadata.

    Raises:
        RunFault: the server cannot be reached, is not ready, or turns the key down.
    """
    from certify.blackbox.client.http import run_async
    from certify.blackbox.protocols.parsing import check_status
    from certify.blackbox.protocols.v2 import metadata_request, options_from
    from certify.blackbox.types import BadReply

    if not asks_for_metadata(wanted):
        return wanted
    try:
        reply = run_async(send(metadata_request(wanted.given["model"], wanted.given.get("version", ""))))
    except BadReply:  # longer than any metadata
        return wanted
    except OSError as error:
        raise RunFault(f"{wanted.endpoint} cannot be reached: {first_line(error)}; nothing was asked") from None
    try:
        if reply.status in (401, 403, 407, 408, 429) or (reply.status >= 500 and reply.status != 501):
            check_status(reply)
    except BadReply as error:
        raise RunFault(
            f"{wanted.endpoint} does not describe its model: {error}; no query was sent: try the same command again, "
            "check the key, or give input, output, datatype and layout by --protocol-option"
        ) from None
    try:
        return replace(wanted, given=options_from(reply, wanted.given))
    except BadReply:
        return wanted


def _values(given: tuple[str, ...], protocol: str, known: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """``KEY=VALUE`` texts as options of a protocol; JSON where the option is no text."""
    found: dict[str, Any] = {}
    for item in given:
        key, sign, text = item.partition("=")
        if not sign or key not in known:
            shown = f"{key}=..." if sign else item  # the value may be a key that was put there by mistake
            raise UserError(f"--protocol-option {shown!r}: expected KEY=VALUE; {protocol} knows {', '.join(known)}")
        found[key] = text
        if known[key].annotation not in (str, "str"):
            with contextlib.suppress(ValueError):
                found[key] = json.loads(text)
    return found
