"""Describe the queried service (endpoint, protocol, options, credential) and open a sender for it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from certify.blackbox.function_service import FUNCTION_FORMAT, Ask, function_name, function_sender
from certify.errors import RunFault, UserError, first_line

if TYPE_CHECKING:
    from certify.blackbox.client.credentials import Credential
    from certify.blackbox.types import Format, Sender


@dataclass(frozen=True)
class ServiceSpec:
    """A service, before it is queried.

    Attributes:
        endpoint: URL without credentials.
        protocol: name in :data:`certify.blackbox.protocols.FORMATS`.
        options: protocol options by name.
        credential: API key, or None.
        insecure: allow sending the key over plain HTTP to another machine.
        function: a Python function in place of an HTTP service, or None.
    """

    endpoint: str
    protocol: str
    options: Mapping[str, Any]
    credential: Credential | None = None
    insecure: bool = False
    function: Ask | None = None

    @property
    def format(self) -> Format:
        """The wire format.

        Raises:
            UserError: an unknown protocol or invalid options.
        """
        from certify.blackbox.protocols import FORMATS

        if self.function is not None:
            return FUNCTION_FORMAT
        built: Format = FORMATS.get(self.protocol)(**self.options)
        return built

    @property
    def needs_metadata(self) -> bool:
        """True if the model's metadata is requested before the first query: protocol v2 with unset options."""
        from certify.blackbox.protocols.v2 import DESCRIBED

        return self.protocol == "v2" and not self.options.keys() >= {*DESCRIBED}

    def as_recorded(self, header: Mapping[str, Any] | None) -> ServiceSpec:
        """Return the service with the options recorded in a ledger's header, so that they are not requested again.

        Args:
            header: first line of the ledger, or None for a new audit.
        """
        if header is None or not self.needs_metadata:
            return self
        from certify.blackbox.protocols.v2 import RECORDED

        recorded = header.get("format") or {}
        options = {key: recorded[key] for key in RECORDED if key in recorded}
        return replace(self, options={**options, **self.options})

    def with_metadata(self, send: Sender) -> ServiceSpec:
        """Return the service with model and options completed from a v2 server's metadata.

        If the server has no metadata, the options are unchanged.

        Raises:
            RunFault: the server cannot be reached, is not ready, or refuses the key.
            UserError: no model was given, and the server does not list exactly one.
        """
        from certify.blackbox.client.http import run_async
        from certify.blackbox.protocols.parsing import check_status
        from certify.blackbox.protocols.v2 import index_request, metadata_request, only_model, options_from
        from certify.blackbox.types import BadReply

        if not self.needs_metadata:
            return self
        given = dict(self.options)
        try:
            given["model"] = given.get("model") or only_model(run_async(send(index_request())))
            reply = run_async(send(metadata_request(given["model"], given.get("version", ""))))
        except BadReply:  # longer than any metadata
            return replace(self, options=given)
        except OSError as error:
            raise RunFault(f"{self.endpoint} cannot be reached: {first_line(error)}; no query was sent") from None
        try:
            if reply.status in (401, 403, 407, 408, 429) or (reply.status >= 500 and reply.status != 501):
                check_status(reply)
        except BadReply as error:
            raise RunFault(
                f"{self.endpoint} does not describe its model: {error}; no query was sent: try the same command again, "
                "check the key, or give input, output, datatype and layout by --protocol-option"
            ) from None
        try:
            return replace(self, options=options_from(reply, given))
        except BadReply:
            return replace(self, options=given)


def function_service(function: Ask) -> ServiceSpec:
    """Return a Python function as a service."""
    return ServiceSpec(function_name(function), FUNCTION_FORMAT.name, {}, function=function)


def checked_service(
    url: str | None,
    protocol: str,
    options: Mapping[str, Any],
    *,
    api_key_env: str | None = None,
    auth_header: str | None = None,
    auth_query: str | None = None,
    insecure: bool = False,
) -> ServiceSpec:
    """Validate the description of a service, without sending anything.

    Args:
        url: endpoint URL; None uses the protocol's own, if it has one.
        protocol: name in :data:`certify.blackbox.protocols.FORMATS`.
        options: protocol options by name.
        api_key_env: environment variable that contains the key, or None.
        auth_header: header for the key, with ``{key}`` in its place; None uses the protocol's.
        auth_query: URL query for the key, in place of a header.
        insecure: allow sending the key over plain HTTP to another machine.

    Raises:
        UserError: an invalid URL or option, a missing one, no key in the variable, or a text that contains the key.
    """
    from certify.blackbox.client.credentials import BEARER, read_credential
    from certify.blackbox.client.http import check_endpoint
    from certify.blackbox.protocols import ENDPOINTS, KEY_HEADERS

    parameters = protocol_parameters(protocol)
    for name in options:
        if name not in parameters:
            raise UserError(f"unknown option {name!r} of protocol {protocol}; its options: {', '.join(parameters)}")
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in options]
    if missing:
        raise UserError(f"protocol {protocol} needs --protocol-option {missing[0]}=VALUE")
    url = url or ENDPOINTS.get(protocol)
    if url is None:
        raise UserError(f"--endpoint is missing: expected the URL of the service for --protocol {protocol}")
    if api_key_env is None and (auth_header or auth_query):
        raise UserError("--auth-header or --auth-query without --api-key-env: there is no key to send")
    if protocol == "rekognition" and (auth_header or auth_query):
        raise UserError("--auth-header or --auth-query with rekognition: boto3 signs requests itself; leave them out")
    credential = None
    if api_key_env is not None:
        credential = read_credential(api_key_env, auth_header or KEY_HEADERS.get(protocol, BEARER), auth_query)
    endpoint = check_endpoint(url, key=credential is not None, insecure=insecure)
    texts = (("the endpoint", endpoint), *((f"protocol option {name}", value) for name, value in options.items()))
    for name, value in texts:
        if credential is not None and credential.key in unquote(str(value)):
            raise UserError(
                f"{name} contains the key itself, which would be written to the records; expected it only in "
                f"${api_key_env} (--auth-header and --auth-query say where it is sent)"
            )
    service = ServiceSpec(endpoint, protocol, options, credential, insecure)
    _ = service.format  # raises for invalid options
    return service


def protocol_parameters(protocol: str) -> Mapping[str, inspect.Parameter]:
    """Return the options of a protocol by name.

    Raises:
        UserError: an unknown protocol.
    """
    from certify.blackbox.protocols import FORMATS

    return inspect.signature(FORMATS.get(protocol)).parameters


@contextlib.contextmanager
def open_sender(
    service: ServiceSpec, *, timeout: float = 60.0, connections: int = 5
) -> Iterator[tuple[Sender, ServiceSpec]]:
    """Open connections to a service; yield a sender, and the service completed from its metadata.

    Args:
        service: the service.
        timeout: seconds per request.
        connections: maximum number of open connections.
    """
    if service.function is not None:
        yield function_sender(service.function), service
        return
    endpoint, credential, insecure = service.endpoint, service.credential, service.insecure
    if service.protocol == "rekognition":
        from certify.blackbox.client.aws import rekognition_sender

        yield rekognition_sender(endpoint, credential, insecure=insecure, timeout=timeout), service
        return
    from certify.blackbox.client.http import HttpSender

    with HttpSender(endpoint, credential, insecure=insecure, timeout=timeout, connections=connections) as http:
        yield http, service.with_metadata(http)
