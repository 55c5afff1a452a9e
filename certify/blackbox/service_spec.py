"""Which service is queried and how: endpoint, protocol, protocol options and credential, and the sender for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from certify.errors import RunFault, first_line

if TYPE_CHECKING:
    from certify.blackbox.client.credentials import Credential
    from certify.blackbox.types import Format, Sender


@dataclass(frozen=True)
class ServiceSpec:
    """A service, before it is queried.

    Attributes:
        endpoint: URL without credentials.
        protocol: name in :data:`certify.blackbox.protocols.FORMATS`.
        options: of the protocol, by name.
        credential: API key, or None.
    """

    endpoint: str
    protocol: str
    options: Mapping[str, Any]
    credential: Credential | None = None

    @property
    def format(self) -> Format:
        """The wire format.

        Raises:
            UserError: unknown protocol, or options that it refuses.
        """
        from certify.blackbox.protocols import FORMATS

        built: Format = FORMATS.get(self.protocol)(**self.options)
        return built

    @property
    def needs_metadata(self) -> bool:
        """True if the model's metadata is requested before the first query: v2, with options left open."""
        from certify.blackbox.protocols.v2 import DESCRIBED

        return self.protocol == "v2" and not self.options.keys() >= {*DESCRIBED}

    def as_recorded(self, header: Mapping[str, Any] | None) -> ServiceSpec:
        """Return the service with the options that a ledger's header recorded, so that they are not requested again.

        Args:
            header: first line of the ledger, or None for a new audit.
        """
        if header is None or not self.needs_metadata:
            return self
        from certify.blackbox.protocols.v2 import DESCRIBED

        recorded = header.get("format") or {}
        options = {key: recorded[key] for key in DESCRIBED if key in recorded}
        return replace(self, options={**options, **self.options})

    def with_metadata(self, send: Sender) -> ServiceSpec:
        """Return the service with the options that a v2 model's metadata gives; unchanged where there is none.

        Raises:
            RunFault: the server cannot be reached, is not ready, or refuses the key.
        """
        from certify.blackbox.client.http import run_async
        from certify.blackbox.protocols.parsing import check_status
        from certify.blackbox.protocols.v2 import metadata_request, options_from
        from certify.blackbox.types import BadReply

        if not self.needs_metadata:
            return self
        try:
            reply = run_async(send(metadata_request(self.options["model"], self.options.get("version", ""))))
        except BadReply:  # longer than any metadata
            return self
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
            return replace(self, options=options_from(reply, dict(self.options)))
        except BadReply:
            return self


@contextlib.contextmanager
def open_sender(
    service: ServiceSpec, *, insecure: bool = False, timeout: float = 60.0, connections: int = 5
) -> Iterator[tuple[Sender, ServiceSpec]]:
    """Open connections to a service; yield what sends requests, and the service with the options of its metadata.

    Args:
        service: which one.
        insecure: send the key over plain HTTP to another machine.
        timeout: seconds per request.
        connections: open at the same time, at most.
    """
    if service.protocol == "rekognition":
        from certify.blackbox.client.aws import rekognition_sender

        sender = rekognition_sender(service.endpoint, service.credential, insecure=insecure, timeout=timeout)
        yield sender, service
        return
    from certify.blackbox.client.http import HttpSender

    with HttpSender(
        service.endpoint, service.credential, insecure=insecure, timeout=timeout, connections=connections
    ) as http:
        yield http, service.with_metadata(http)
