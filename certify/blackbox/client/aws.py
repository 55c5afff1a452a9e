"""Send requests to AWS Rekognition through boto3, which signs them.

boto3 signs the request and opens the connection; nothing else of it is used. Its retries are disabled, because they
would be paid for without being counted, and the raw reply is intercepted before boto3 parses it, so that the protocol
reads it like any other reply.

boto3 logs headers, signatures and bodies in forms that redaction does not recognise. Its loggers are therefore silenced
in this process as soon as a sender is created.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from certify.blackbox.client.credentials import Credential, redacted, redactor_for
from certify.blackbox.client.http import TIMEOUT, check_endpoint
from certify.blackbox.types import Reply, Request, Sender
from certify.errors import UserError

_LOGGERS = ("boto3", "botocore", "s3transfer", "urllib3")
_MOST_CONNECTIONS = 64


class _RawReply(Exception):
    """Carries the raw reply out of boto3, past its parsing and retries."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


def rekognition_sender(
    endpoint: str, credential: Credential | None = None, *, insecure: bool = False, timeout: float = TIMEOUT
) -> Sender:
    """Return a sender for requests of the protocol ``rekognition``.

    Args:
        endpoint: such as ``https://rekognition.eu-west-1.amazonaws.com``; the region is read from it.
        credential: its key is ``ACCESS_KEY_ID:SECRET_ACCESS_KEY``, followed by ``:SESSION_TOKEN`` for temporary
            credentials; None sends unsigned requests. Profiles, credential files and machine roles are not used.
        insecure: allow sending a signed request over plain HTTP to another machine.
        timeout: seconds to connect, and seconds without a byte of the reply.

    Raises:
        UserError: boto3 is not installed, the key has another form, or the endpoint is refused by
            :func:`~certify.blackbox.client.http.check_endpoint`.
    """
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise UserError("boto3 is not installed; pip install 'certify-toolkit[aws]'") from None
    _silence_loggers()  # after the import, which may configure them
    endpoint = check_endpoint(endpoint, key=credential is not None, insecure=insecure)
    parts = credential.key.split(":") if credential else []
    if len(parts) not in (0, 2, 3) or not all(parts):
        raise UserError("the key for AWS has another form; expected ACCESS_KEY_ID:SECRET_ACCESS_KEY[:SESSION_TOKEN]")
    region = re.search(r"rekognition(?:-fips)?\.([a-z0-9-]+)\.", endpoint)
    client = boto3.session.Session().client(
        "rekognition",
        endpoint_url=endpoint,
        region_name=region[1] if region else "us-east-1",
        config=Config(
            retries={"total_max_attempts": 1},
            connect_timeout=timeout,
            read_timeout=timeout,
            max_pool_connections=_MOST_CONNECTIONS,
            signature_version="v4" if parts else UNSIGNED,
        ),
        **dict(zip(("aws_access_key_id", "aws_secret_access_key", "aws_session_token"), parts, strict=False)),
    )

    def take_reply(response_dict: Mapping[str, Any], **_: Any) -> NoReturn:
        body, headers = response_dict["body"], dict(response_dict["headers"])
        raise _RawReply(Reply(response_dict["status_code"], body, headers))

    client.meta.events.register("before-parse.rekognition.DetectLabels", take_reply)

    def send_blocking(request: Request) -> Reply:
        arguments = json.loads(request.body)
        arguments["Image"] = {"Bytes": base64.b64decode(arguments["Image"]["Bytes"])}
        try:
            client.detect_labels(**arguments)
        except _RawReply as raw:
            return raw.reply
        except (OSError, BotoCoreError) as error:
            # boto3's messages contain URLs and more; only the exception type is reported.
            kind = TimeoutError if "timeout" in (name := type(error).__name__).lower() else ConnectionError
            raise kind(f"no reply ({name})") from None
        raise ConnectionError("boto3 sent nothing")

    pool = ThreadPoolExecutor(_MOST_CONNECTIONS, "certify-aws")

    async def send(request: Request) -> Reply:
        return await asyncio.get_running_loop().run_in_executor(pool, send_blocking, request)

    return redacted(send, redactor_for(credential))


def _silence_loggers() -> None:
    """Silence boto3's loggers, including those with a level of their own."""
    for name in [*logging.root.manager.loggerDict]:
        if name.partition(".")[0] in _LOGGERS:
            logging.getLogger(name).setLevel(logging.NOTSET)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
