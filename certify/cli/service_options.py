"""Options that name a service and limit its queries; ``certify audit`` and ``certify serve`` share them."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from certify.blackbox import RETRIES
from certify.cli.options import Options, flag, option
from certify.cli.parameter_types import Count, Positive
from certify.errors import UserError

if TYPE_CHECKING:
    from certify.blackbox.client.rate_limit import QueryLimits
    from certify.blackbox.service_spec import ServiceSpec


class ServiceOptions(Options, section="Service"):
    """A service, its protocol and its key."""

    endpoint: str | None = option(metavar="URL", help="URL of the service; protocols with a fixed URL need none.")
    protocol: str | None = option(help="Protocol of the service (`certify list protocols`).")
    extra: tuple[str, ...] = option(
        "--protocol-option", default=(), metavar="KEY=VALUE", help="Option of the protocol; repeatable."
    )
    encoding: str = option(default="png", help="Encoding of the images sent: png, jpeg or jpegQ, such as jpeg90.")
    sdk: bool = flag(hidden=True, help="Removed; the error names the HTTP protocol to use.")
    api_key_env: str | None = option(metavar="NAME", help="Environment variable that holds the API key.")
    auth_header: str | None = option(
        metavar="'NAME: VALUE'",
        help="Header that carries the key as {key} (default: the protocol's, else 'Authorization: Bearer {key}').",
    )
    auth_query: str | None = option(metavar="'NAME={key}'", help="Send the key in the URL's query instead.")
    insecure: bool = flag(help="Allow sending the key over plain HTTP to another machine.")
    rate: float | None = option(
        type=Positive("requests per second, above 0"), help="Maximum number of requests per second (default: no limit)."
    )
    retries: int = option(
        type=Count("repetitions", least=0),
        default=RETRIES,
        help="Retries of a query that was declined (429, 5xx) or lost; each counts against the budget.",
    )


def service_from(options: ServiceOptions) -> ServiceSpec:
    """Return the service that the options name, checked without sending anything.

    Raises:
        UserError: options that are missing, wrong, or contain the key itself.
    """
    from certify.blackbox.service_spec import checked_service, protocol_parameters

    protocol = options.protocol
    assert protocol is not None
    parameters = protocol_parameters(protocol)
    values = _protocol_options(options.extra, protocol, parameters)
    if "encoding" in parameters:
        values.setdefault("encoding", options.encoding)
    elif options.encoding != "png":
        raise UserError(f"--encoding {options.encoding}: protocol {protocol} sends pixels as they are; leave it out")
    if options.sdk and protocol != "rekognition":
        raise UserError(
            f"--sdk: protocol {protocol} is queried over HTTP alone; leave --sdk out, also to resume an audit "
            "that was begun with it"
        )
    return checked_service(
        options.endpoint,
        protocol,
        values,
        api_key_env=options.api_key_env,
        auth_header=options.auth_header,
        auth_query=options.auth_query,
        insecure=options.insecure,
    )


def query_limits(options: ServiceOptions, *, concurrency: int, timeout: float) -> QueryLimits:
    """Return the limits on queries: requests in flight, rate and attempts; ``timeout`` is in seconds per request."""
    from certify.blackbox.client.rate_limit import QueryLimits

    return QueryLimits(concurrency, options.rate, options.retries + 1, grace=timeout + 5)


def _protocol_options(
    given: tuple[str, ...], protocol: str, parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` texts; values are JSON unless the option is text."""
    values: dict[str, Any] = {}
    for item in given:
        key, sign, text = item.partition("=")
        if not sign or key not in parameters:
            shown = f"{key}=..." if sign else item  # the value may be a key that was put there by mistake
            known = ", ".join(parameters)
            raise UserError(f"--protocol-option {shown!r}: expected KEY=VALUE; options of {protocol}: {known}")
        values[key] = text
        if parameters[key].annotation not in (str, "str"):
            with contextlib.suppress(ValueError):
                values[key] = json.loads(text)
    return values
