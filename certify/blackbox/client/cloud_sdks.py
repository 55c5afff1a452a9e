"""Senders through the official SDKs of four cloud services: theirs are address, signature and wire; the rest is ours.

A sender takes the format's request, hands its picture to the SDK, and stops the SDK as soon as the raw reply is there:
nothing is sent twice (retries, redirects and renewed sign-ins of an SDK would be paid for and not counted), and the
format reads the reply as if it had come over plain HTTP. Clarifai replies by gRPC, which is turned into the JSON that
its REST interface would send.

What SDKs log names headers, signatures and more, in forms that no cleaning would find: from the first sender on, their
loggers are silent in this process.
"""

from __future__ import annotations

import base64
import importlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

from certify.blackbox.client.credentials import Credential, cleaned, redactor_for
from certify.blackbox.client.http import TIMEOUT, check_endpoint
from certify.blackbox.types import MOST_BYTES, Reply, Request, Sender
from certify.errors import UserError
from certify.registry import Registry

SENDERS = Registry("sdk")
_HERE = "certify.blackbox.client.cloud_sdks"
SENDERS.add("rekognition", f"{_HERE}:boto3_sender", "boto3, signature version 4")
SENDERS.add("google-vision", f"{_HERE}:google_sender", "google-cloud-vision over REST")
SENDERS.add("azure-vision", f"{_HERE}:azure_sender", "azure-ai-vision-imageanalysis")
SENDERS.add("clarifai", f"{_HERE}:clarifai_sender", "the package clarifai-grpc")


_PACKAGES = {
    "rekognition": ("boto3", "boto3"),
    "google-vision": ("google.cloud.vision_v1", "google-cloud-vision"),
    "azure-vision": ("azure.ai.vision.imageanalysis", "azure-ai-vision-imageanalysis"),
    "clarifai": ("clarifai_grpc.grpc.api.service_pb2", "clarifai-grpc"),
}
"""The module of each SDK, and what it is called where it is installed from."""

_Way = tuple[Callable[[Request], None], *tuple[type[Exception], ...]]
"""What asks, and raises the reply; then the SDK's own words for no reply."""

_LOGGERS = ("azure", "boto3", "botocore", "clarifai_grpc", "google", "grpc", "requests", "s3transfer", "urllib3")


class _Answered(Exception):
    """Carries the raw reply out of an SDK, past whatever it would do next."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


def sdk_sender(
    protocol: str,
    endpoint: str,
    credential: Credential | None = None,
    *,
    insecure: bool = False,
    timeout: float = TIMEOUT,
) -> Sender:
    """Sends requests of a protocol's format through the SDK of its service.

    Args:
        protocol: of ``SENDERS``.
        endpoint: of the service; the builders below say what it looks like.
        credential: in the form that the builder below names; None: nothing is signed.
        insecure: whether a key may go over plain HTTP to another machine.
        timeout: seconds to connect, and seconds without an answer.

    Raises:
        UserError: no such protocol, its SDK is not installed, the key has another form, or as
            :func:`~certify.blackbox.client.http.check_endpoint`.
    """
    build = SENDERS.get(protocol)
    module, package = _PACKAGES[protocol]
    try:
        importlib.import_module(module)
    except ImportError:
        raise UserError(f"{package} is not installed; pip install 'certify-toolkit[clouds]'") from None
    _silence()  # after the import, which may turn loggers on
    endpoint = check_endpoint(endpoint, key=credential is not None, insecure=insecure)
    return cleaned(_sender(*build(endpoint, credential.key if credential else "", timeout)), redactor_for(credential))


def boto3_sender(endpoint: str, key: str, timeout: float) -> _Way:
    """Rekognition through boto3; the region is read from ``https://rekognition.eu-west-1.amazonaws.com``.

    The key is ``ACCESS_KEY_ID:SECRET_ACCESS_KEY``, with ``:SESSION_TOKEN`` where there is one.

    Raises:
        UserError: the key has another form.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    parts = key.split(":") if key else []
    if len(parts) not in (0, 2, 3) or not all(parts):
        raise UserError("the key for AWS has another form; expected ACCESS_KEY_ID:SECRET_ACCESS_KEY[:SESSION_TOKEN]")
    region = re.search(r"rekognition(?:-fips)?\.([a-z0-9-]+)\.", endpoint)
    # A session of its own, of keys given: profiles, files and machine roles of the SDK's search stay out.
    client = boto3.session.Session().client(
        "rekognition",
        endpoint_url=endpoint,
        region_name=region[1] if region else "us-east-1",
        config=Config(
            retries={"total_max_attempts": 1},
            connect_timeout=timeout,
            read_timeout=timeout,
            max_pool_connections=64,
            signature_version="v4" if parts else UNSIGNED,
        ),
        **dict(zip(("aws_access_key_id", "aws_secret_access_key", "aws_session_token"), parts, strict=False)),
    )

    def answered(response_dict: Mapping[str, Any], **_: Any) -> NoReturn:
        body, headers = response_dict["body"], dict(response_dict["headers"])
        raise _Answered(Reply(response_dict["status_code"], body, headers))

    client.meta.events.register("before-parse.rekognition.DetectLabels", answered)

    def ask(request: Request) -> None:
        asked = json.loads(request.body)
        asked["Image"] = {"Bytes": base64.b64decode(asked["Image"]["Bytes"])}
        client.detect_labels(**asked)

    return ask, BotoCoreError


def google_sender(endpoint: str, key: str, timeout: float) -> _Way:
    """Google Cloud Vision over REST, such as ``https://vision.googleapis.com``; the key is an API key."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import vision_v1

    client = vision_v1.ImageAnnotatorClient(
        transport="rest",
        credentials=None if key else AnonymousCredentials(),
        client_options={"api_endpoint": endpoint, **({"api_key": key} if key else {})},
    )

    def answered(response: Any, *_: Any, **__: Any) -> NoReturn:
        raise _Answered(Reply(response.status_code, response.content, dict(response.headers)))

    # The SDK has no public way to its HTTP session; only there can a redirect be stopped, which would carry the key.
    client.transport._session.hooks["response"].append(answered)

    def ask(request: Request) -> None:
        asked = vision_v1.BatchAnnotateImagesRequest.from_json(request.body)
        client.batch_annotate_images(asked, retry=None, timeout=timeout)

    return (ask,)


def azure_sender(endpoint: str, key: str, timeout: float) -> _Way:
    """Azure AI Vision, such as ``https://NAME.cognitiveservices.azure.com``; the key is the resource's."""
    from azure.ai.vision.imageanalysis import ImageAnalysisClient
    from azure.core.credentials import AzureKeyCredential
    from azure.core.exceptions import AzureError

    def answered(response: Any) -> NoReturn:
        found = response.http_response
        raise _Answered(Reply(found.status_code, found.read(), dict(found.headers)))

    client = ImageAnalysisClient(
        endpoint,
        AzureKeyCredential(key or "none"),
        retry_total=0,
        permit_redirects=False,
        connection_timeout=timeout,
        read_timeout=timeout,
        raw_response_hook=answered,
    )

    def ask(request: Request) -> None:
        query = parse_qs(urlsplit(request.path).query)
        options = {"language": query["language"][0], "model_version": query["model-version"][0]}
        client.analyze(request.body, query["features"], **options)

    return ask, AzureError


def clarifai_sender(endpoint: str, key: str, timeout: float) -> _Way:
    """Clarifai by gRPC, with the messages of its SDK; the key is a personal access token.

    An endpoint of ``http://`` means a channel that is not encrypted; ``timeout`` is of a whole call.
    """
    import grpc
    from clarifai_grpc.grpc.api import service_pb2
    from google.protobuf import json_format

    where = urlsplit(endpoint)
    options = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", MOST_BYTES)]
    secure = where.scheme == "https"
    target = f"{where.hostname}:{where.port or (443 if secure else 80)}"
    # The SDK's own channel sends up to five times.
    channel = (
        grpc.secure_channel(target, grpc.ssl_channel_credentials(), options=options)
        if secure
        else grpc.insecure_channel(target, options=options)
    )
    call = channel.unary_unary(  # the SDK's stub works with its own channel only
        "/clarifai.api.V2/PostModelOutputs",
        request_serializer=service_pb2.PostModelOutputsRequest.SerializeToString,
        response_deserializer=service_pb2.MultiOutputResponse.FromString,
    )
    metadata = (("authorization", f"Key {key}"),) if key else ()

    def ask(request: Request) -> None:
        message = json_format.Parse(request.body, service_pb2.PostModelOutputsRequest())
        place = [unquote(part) for part in request.path.split("/")]
        named = dict(zip(place[1:-1:2], place[2:-1:2], strict=True))  # users/U/apps/A/models/M[/versions/V]
        message.user_app_id.user_id, message.user_app_id.app_id = named["users"], named["apps"]
        message.model_id, message.version_id = named["models"], named.get("versions", "")
        try:
            reply = call(message, timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            raise _Answered(_of_status(error, grpc.StatusCode)) from None
        text = json_format.MessageToJson(reply, preserving_proto_field_name=True, use_integers_for_enums=True)
        raise _Answered(Reply(200, text.encode()))

    return (ask,)


def _of_status(error: Any, code: Any) -> Reply:
    """A failed call as an HTTP reply.

    Raises:
        OSError: no reply came.
    """
    found = error.code()
    if found is code.DEADLINE_EXCEEDED:
        raise TimeoutError("no answer in time (gRPC)") from None
    if found in (code.UNAVAILABLE, code.CANCELLED):
        raise ConnectionError(f"no connection (gRPC {found.name})") from None
    status = {
        code.INVALID_ARGUMENT: 400,
        code.UNAUTHENTICATED: 401,
        code.PERMISSION_DENIED: 403,
        code.NOT_FOUND: 404,
        code.RESOURCE_EXHAUSTED: 429,
        code.UNIMPLEMENTED: 501,
    }.get(found, 500)
    headers = {name: value for name, value in error.trailing_metadata() or () if isinstance(value, str)}
    return Reply(status, json.dumps({"message": f"gRPC {found.name}: {error.details()}"}).encode(), headers)


def _sender(ask: Callable[[Request], None], *lost: type[Exception]) -> Sender:
    """A sender of what hands its reply over by raising it; ``lost`` are the SDK's own words for no reply."""
    no_reply: tuple[type[Exception], ...] = (OSError, *lost)

    def send(request: Request) -> Reply:
        try:
            ask(request)
        except _Answered as answered:
            return answered.reply
        except no_reply as error:
            # The texts of SDKs name addresses and more; the kind says what happened.
            kind = TimeoutError if "timeout" in (name := type(error).__name__).lower() else ConnectionError
            raise kind(f"no reply ({name})") from None
        raise ConnectionError("the SDK sent nothing")

    return send


def _silence() -> None:
    """Let no logger of an SDK say anything, whatever level it or the root was given; those to come inherit that."""
    for name in [*logging.root.manager.loggerDict]:
        if name.partition(".")[0] in _LOGGERS:
            logging.getLogger(name).setLevel(logging.NOTSET)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
