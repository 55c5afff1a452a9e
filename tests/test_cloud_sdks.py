"""The official SDKs of four clouds against services on loopback that really classify, and against failing ones."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request, Response
from servers import wait_for
from vision_stubs import Log, clarifai_grpc_service, cloud_app, noisy_digits, serving

from certify.blackbox import types
from certify.blackbox.client import cloud_sdks as sdk
from certify.blackbox.client.cloud_sdks import SENDERS, sdk_sender
from certify.blackbox.client.credentials import Credential, redactor_for
from certify.blackbox.encoding import to_pictures, to_tensor
from certify.blackbox.protocols import FORMATS
from certify.blackbox.types import BadReply, Picture
from certify.errors import UserError
from certify.models.classifier import Classifier

for _package in ("boto3", "google.cloud.vision_v1", "azure.ai.vision.imageanalysis", "clarifai_grpc"):
    pytest.importorskip(_package)

OPTIONS: dict[str, dict[str, Any]] = {"rekognition": {"min_confidence": 0}, "clarifai": {"model": "digits"}}
AWS = "AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"  # the example of AWS's own documentation
KEY = "Zq8-secret-Xw41-of-a-test"
REST = ("rekognition", "google-vision", "azure-vision")


def secret(name: str) -> Credential:
    return Credential("TEST_KEY", AWS if name == "rekognition" else KEY)


def made(name: str) -> types.Format:
    found: types.Format = FORMATS.get(name)(**OPTIONS.get(name, {}))
    return found


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return to_pictures(noisy_digits())


@pytest.fixture(scope="module")
def clouds(digits: Classifier) -> Iterator[dict[str, tuple[str, Log]]]:
    """Name -> URL and the headers of each request."""
    rest: Log = []
    calls: Log = []
    with serving(cloud_app(digits, rest)) as url, clarifai_grpc_service(digits, calls) as channel:
        yield {**dict.fromkeys(REST, (url, rest)), "clarifai": (channel, calls)}


def signed(headers: dict[str, str]) -> bool:
    """As documented, by each service."""
    authorization = headers.get("authorization", "")
    return (
        headers.get("x-goog-api-key") == KEY
        or headers.get("ocp-apim-subscription-key") == KEY
        or authorization == f"Key {KEY}"
        or (
            authorization.startswith(f"AWS4-HMAC-SHA256 Credential={AWS.split(':', maxsplit=1)[0]}/")
            and "/us-east-1/rekognition/aws4_request" in authorization
            and headers["x-amz-target"] == "RekognitionService.DetectLabels"
        )
    )


@pytest.mark.parametrize("name", sorted(SENDERS))
def test_votes_through_the_sdk_equal_local_ones(
    clouds: dict[str, tuple[str, Log]], digits: Classifier, pictures: list[Picture], name: str
) -> None:
    url, log = clouds[name]
    log.clear()
    wire, send = made(name), sdk_sender(name, url, secret(name), timeout=20)
    answers = [wire.reply(send(wire.request(picture))) for picture in pictures]
    local = digits.logits(torch.stack([to_tensor(picture) for picture in pictures])).softmax(1)
    assert [one[0].label for one in answers] == [f"digit {n}" for n in local.argmax(1).tolist()]
    assert [one[0].score for one in answers] == pytest.approx(local.max(1).values.tolist(), abs=1e-6)
    assert len(log) == len(pictures)  # each sent once
    assert all(map(signed, log))
    log.clear()
    sdk_sender(name, url)(wire.request(pictures[0]))
    assert len(log) == 1
    assert not signed(log[0])


def test_clarifai_is_asked_for_the_model_that_is_meant(
    clouds: dict[str, tuple[str, Log]], pictures: list[Picture]
) -> None:
    url, log = clouds["clarifai"]
    log.clear()
    wire = FORMATS.get("clarifai")(model="my model", user="me", app="mine", version="3")
    wire.reply(sdk_sender("clarifai", url)(wire.request(pictures[0])))
    assert (log[0]["model"], log[0]["user"]) == ("my model", "me")


def test_the_wire_of_detect_labels_is_that_of_others(pictures: list[Picture]) -> None:
    moto = pytest.importorskip("moto")
    wire = made("rekognition")
    with moto.mock_aws():
        send = sdk_sender("rekognition", "https://rekognition.eu-west-1.amazonaws.com", secret("rekognition"))
        ranked = wire.reply(send(wire.request(pictures[0])))
    assert ranked[0].label == "Mobile Phone"
    assert ranked[0].score == pytest.approx(0.999364, abs=1e-6)


# What goes wrong


def failing(log: Log, status: int, body: bytes, headers: dict[str, str], seconds: float = 0) -> FastAPI:
    """A service that answers everything with the same reply."""
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    def answer(request: Request) -> Response:
        log.append(dict(request.headers))
        time.sleep(seconds)
        return Response(body, status, headers)

    return app


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (429, b'{"message": "slow down"}', {"Retry-After": "7"}),
        (503, b"<html><title>Service Unavailable</title></html>", {}),
        (500, b'{"message": "boom"}', {}),
        (401, f'{{"message": "bad key {KEY} {AWS}"}}'.encode(), {"WWW-Authenticate": f"Bearer {KEY}"}),
        (200, b'{"responses": [{"labelAnn', {}),
        (200, b"<html><title>Sign in</title></html>", {"Content-Type": "text/html"}),
        (200, b"", {}),
    ],
)
def test_every_reply_comes_through_as_it_is_and_only_once(
    pictures: list[Picture], status: int, body: bytes, headers: dict[str, str]
) -> None:
    log: Log = []
    with serving(failing(log, status, body, headers)) as url:
        for sent, name in enumerate(REST, start=1):
            credential = secret(name)
            reply = sdk_sender(name, url, credential, timeout=20)(made(name).request(pictures[0]))
            assert len(log) == sent
            redactor = redactor_for(credential)
            assert redactor is not None
            assert (reply.status, reply.body) == (status, redactor.body(body))
            found = {key.lower(): value for key, value in reply.headers.items()}
            assert all(found[key.lower()] == redactor.text(value) for key, value in headers.items())
            assert credential.key not in repr(reply)
            with pytest.raises(BadReply) as why:
                made(name).reply(reply)
            assert credential.key not in str(why.value)
            assert status == 200 or f"HTTP {status}" in str(why.value)


def test_redirects_are_not_followed(pictures: list[Picture]) -> None:
    log: Log = []
    elsewhere: Log = []
    with serving(failing(elsewhere, 200, b"{}", {})) as other:
        for status in (302, 307):
            with serving(failing(log, status, b"", {"Location": f"{other}/v1/images:annotate"})) as url:
                for name in REST:
                    reply = sdk_sender(name, url, secret(name), timeout=20)(made(name).request(pictures[0]))
                    assert reply.status == status
    assert len(log) == 2 * len(REST)
    assert not elsewhere


@pytest.mark.parametrize("name", sorted(SENDERS))
def test_no_reply_is_an_error_of_the_network(name: str, pictures: list[Picture]) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))  # and nobody listens
        send = sdk_sender(name, f"http://127.0.0.1:{door.getsockname()[1]}", secret(name), timeout=5)
        with pytest.raises(ConnectionError) as found:
            send(made(name).request(pictures[0]))
    assert secret(name).key not in str(found.value)


def test_a_service_that_hangs_is_left_in_time(pictures: list[Picture]) -> None:
    log: Log = []
    with serving(failing(log, 200, b"{}", {}, seconds=3)) as url:
        for sent, name in enumerate(REST, start=1):
            send, request = sdk_sender(name, url, secret(name), timeout=1.0), made(name).request(pictures[0])
            with pytest.raises(TimeoutError):
                send(request)
            wait_for(lambda sent=sent: len(log) >= sent)
            assert len(log) == sent  # and not asked again


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("RESOURCE_EXHAUSTED", 429),
        ("UNAUTHENTICATED", 401),
        ("INTERNAL", 500),
        ("UNAVAILABLE", 0),
        ("DEADLINE_EXCEEDED", 0),
    ],
)
def test_grpc_failures_are_statuses_or_no_reply(
    digits: Classifier, pictures: list[Picture], code: str, status: int
) -> None:
    import grpc

    log: Log = []
    wire = made("clarifai")
    with clarifai_grpc_service(digits, log, getattr(grpc.StatusCode, code)) as url:
        send = sdk_sender("clarifai", url, secret("clarifai"), timeout=10)
        if not status:
            with pytest.raises(TimeoutError if code == "DEADLINE_EXCEEDED" else ConnectionError):
                send(wire.request(pictures[0]))
        else:
            with pytest.raises(BadReply, match=f"HTTP {status}: gRPC {code}: refused on purpose"):
                wire.reply(send(wire.request(pictures[0])))
    assert len(log) == 1  # the SDK's own channel would have sent five


@pytest.mark.parametrize("name", sorted(SENDERS))
def test_a_key_does_not_go_over_plain_http_to_others(name: str) -> None:
    with pytest.raises(UserError, match="plain HTTP"):
        sdk_sender(name, "http://vision.example.com", secret(name))
    assert sdk_sender(name, "http://vision.example.com", secret(name), insecure=True)


TALKING = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
for name in ("azure", "azure.core.pipeline.policies.http_logging_policy", "botocore.auth", "google.auth", "urllib3"):
    logging.getLogger(name).setLevel(logging.DEBUG)
import numpy as np
from certify.blackbox.client import cloud_sdks as sdk
from certify.blackbox.client.credentials import Credential
from certify.blackbox.protocols import FORMATS
from certify.blackbox.types import Picture
if sys.argv[1] == "talking":
    sdk._silence = lambda: None
for name, url, key in zip(*[iter(sys.argv[2:])] * 3):
    wire = FORMATS.get(name)(**({"model": "digits"} if name == "clarifai" else {}))
    sdk.sdk_sender(name, url, Credential("TEST_KEY", key))(wire.request(Picture(np.zeros((8, 8, 1), np.uint8))))
logging.getLogger("test").warning("the end")
"""


@pytest.mark.parametrize("how", ["silent", "talking"])
def test_what_sdks_log_reaches_nobody(clouds: dict[str, tuple[str, Log]], how: str) -> None:
    """Also with every logger at DEBUG, and with Google's own switch; without this package's care they do talk."""
    asked = []
    for name in sorted(SENDERS):
        asked += [name, clouds[name][0], f"{AWS}:a-session-token" if name == "rekognition" else KEY]
    command = [sys.executable, "-c", TALKING, how, *asked]
    switches = {**os.environ, "GOOGLE_SDK_PYTHON_LOGGING_SCOPE": "google"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=switches, check=True)
    said = done.stdout + done.stderr
    assert "WARNING:test:the end" in said
    names = {line.split(":")[1].partition(".")[0] for line in said.splitlines() if line.startswith("DEBUG:")}
    if how == "silent":
        assert not names & {*sdk._LOGGERS}
        assert not any(part in said for part in (KEY, "a-session-token", "Signature", *AWS.split(":")))
    else:
        assert names >= {"botocore", "urllib3"}
        assert "a-session-token" in said


def test_keys_of_another_form_are_refused() -> None:
    for key in ("AKIAIOSFODNN7EXAMPLE", "a:b:c:d", "longenough:"):
        with pytest.raises(UserError, match="ACCESS_KEY_ID:SECRET") as found:
            sdk_sender("rekognition", "https://rekognition.eu-west-1.amazonaws.com", Credential("TEST_KEY", key))
        assert key not in str(found.value)
