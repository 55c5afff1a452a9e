"""Four cloud services against stand-ins on loopback that really classify, and against failing ones."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request, Response
from servers import wait_for
from vision_stubs import Log, cloud_app, noisy_digits, serving

from certify.blackbox import types
from certify.blackbox.client import aws
from certify.blackbox.client.aws import rekognition_sender
from certify.blackbox.client.credentials import Credential, read_credential, redactor_for
from certify.blackbox.client.http import HttpSender, run_async
from certify.blackbox.encoding import to_pictures, to_tensor
from certify.blackbox.protocols import FORMATS, KEY_HEADERS
from certify.blackbox.types import BadReply, Picture
from certify.errors import UserError
from certify.models.classifier import Classifier

pytest.importorskip("boto3")

OPTIONS: dict[str, dict[str, Any]] = {"rekognition": {"min_confidence": 0}, "clarifai": {"model": "digits"}}
AWS_KEY = "AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"  # the example in AWS's own documentation
KEY = "Zq8-secret-Xw41-of-a-test"
SERVICES = ("rekognition", "google-vision", "azure-vision", "clarifai")


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_TEST_KEY", AWS_KEY)
    monkeypatch.setenv("TEST_KEY", KEY)


def secret(name: str) -> Credential:
    """The key as `certify audit --api-key-env` reads it."""
    return read_credential("AWS_TEST_KEY") if name == "rekognition" else read_credential("TEST_KEY", KEY_HEADERS[name])


@contextmanager
def sender(name: str, url: str, credential: Credential | None, timeout: float = 20) -> Iterator[types.Sender]:
    """A sender as `certify audit` opens it."""
    if name == "rekognition":
        yield rekognition_sender(url, credential, timeout=timeout)
        return
    with HttpSender(url, credential, timeout=timeout) as send:
        yield send


def made(name: str) -> types.Format:
    found: types.Format = FORMATS.get(name)(**OPTIONS.get(name, {}))
    return found


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return to_pictures(noisy_digits())


@pytest.fixture(scope="module")
def cloud(digits: Classifier) -> Iterator[tuple[str, Log]]:
    """URL of all services, and the headers of each request."""
    log: Log = []
    with serving(cloud_app(digits, log)) as url:
        yield url, log


def signed(headers: dict[str, str]) -> bool:
    """True if the headers carry the key as the service documents it."""
    authorization = headers.get("authorization", "")
    return (
        headers.get("x-goog-api-key") == KEY
        or headers.get("ocp-apim-subscription-key") == KEY
        or authorization == f"Key {KEY}"
        or (
            authorization.startswith(f"AWS4-HMAC-SHA256 Credential={AWS_KEY.split(':', maxsplit=1)[0]}/")
            and "/us-east-1/rekognition/aws4_request" in authorization
            and headers["x-amz-target"] == "RekognitionService.DetectLabels"
        )
    )


@pytest.mark.parametrize("name", SERVICES)
def test_votes_through_the_service_equal_local_ones(
    cloud: tuple[str, Log], digits: Classifier, pictures: list[Picture], name: str
) -> None:
    url, log = cloud
    log.clear()
    wire = made(name)
    with sender(name, url, secret(name)) as send:
        answers = [wire.reply(run_async(send(wire.request(picture)))) for picture in pictures]
    local = digits.logits(torch.stack([to_tensor(picture) for picture in pictures])).softmax(1)
    assert [one[0].label for one in answers] == [f"digit {n}" for n in local.argmax(1).tolist()]
    assert [one[0].score for one in answers] == pytest.approx(local.max(1).values.tolist(), abs=1e-6)
    assert len(log) == len(pictures)  # each sent once
    assert all(map(signed, log))
    log.clear()
    with sender(name, url, None) as send:
        run_async(send(wire.request(pictures[0])))
    assert len(log) == 1
    assert not signed(log[0])


def test_detect_labels_matches_an_independent_implementation(pictures: list[Picture]) -> None:
    moto = pytest.importorskip("moto")
    wire = made("rekognition")
    with moto.mock_aws():
        send = rekognition_sender("https://rekognition.eu-west-1.amazonaws.com", secret("rekognition"))
        ranked = wire.reply(run_async(send(wire.request(pictures[0]))))
    assert ranked[0].label == "Mobile Phone"
    assert ranked[0].score == pytest.approx(0.999364, abs=1e-6)


# Failures


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
        (401, f'{{"message": "bad key {KEY} {AWS_KEY}"}}'.encode(), {"WWW-Authenticate": f"Bearer {KEY}"}),
        (200, b'{"responses": [{"labelAnn', {}),
        (200, b"<html><title>Sign in</title></html>", {"Content-Type": "text/html"}),
        (200, b"", {}),
    ],
)
def test_every_reply_is_passed_on_unchanged_and_sent_once(
    pictures: list[Picture], status: int, body: bytes, headers: dict[str, str]
) -> None:
    log: Log = []
    with serving(failing(log, status, body, headers)) as url:
        for sent, name in enumerate(SERVICES, start=1):
            credential = secret(name)
            with sender(name, url, credential) as send:
                reply = run_async(send(made(name).request(pictures[0])))
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
                for name in SERVICES:
                    with sender(name, url, secret(name)) as send:
                        assert run_async(send(made(name).request(pictures[0]))).status == status
    assert len(log) == 2 * len(SERVICES)
    assert not elsewhere


@pytest.mark.parametrize("name", SERVICES)
def test_no_reply_is_a_network_error(name: str, pictures: list[Picture]) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{door.getsockname()[1]}"
        with sender(name, url, secret(name), 5) as send, pytest.raises(ConnectionError) as found:
            run_async(send(made(name).request(pictures[0])))
    assert secret(name).key not in str(found.value)


@pytest.mark.slow
def test_a_service_that_hangs_is_abandoned_in_time(pictures: list[Picture]) -> None:
    log: Log = []
    with serving(failing(log, 200, b"{}", {}, seconds=3)) as url:
        for sent, name in enumerate(SERVICES, start=1):
            with sender(name, url, secret(name), 1.0) as send, pytest.raises(TimeoutError):
                run_async(send(made(name).request(pictures[0])))
            wait_for(lambda sent=sent: len(log) >= sent)
            assert len(log) == sent  # and not sent again


def test_an_aws_key_is_not_sent_over_plain_http_to_another_machine() -> None:
    with pytest.raises(UserError, match="plain HTTP"):
        rekognition_sender("http://vision.example.com", secret("rekognition"))
    assert rekognition_sender("http://vision.example.com", secret("rekognition"), insecure=True)


TALKING = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
for name in ("botocore.auth", "botocore", "urllib3"):
    logging.getLogger(name).setLevel(logging.DEBUG)
import numpy as np
from certify.blackbox.client import aws
from certify.blackbox.client.credentials import Credential
from certify.blackbox.client.http import run_async
from certify.blackbox.protocols import FORMATS
from certify.blackbox.types import Picture
how, url, key = sys.argv[1:]
if how == "talking":
    aws._silence_loggers = lambda: None
wire = FORMATS.get("rekognition")()
send = aws.rekognition_sender(url, Credential("TEST_KEY", key))
run_async(send(wire.request(Picture(np.zeros((8, 8, 1), np.uint8)))))
logging.getLogger("test").warning("the end")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["silent", "talking"])
def test_what_boto3_logs_is_silenced(cloud: tuple[str, Log], how: str) -> None:
    """Also with every logger at DEBUG; without the silencing, boto3 logs secrets."""
    command = [sys.executable, "-c", TALKING, how, cloud[0], f"{AWS_KEY}:a-session-token"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ}, check=True)
    said = done.stdout + done.stderr
    assert "WARNING:test:the end" in said
    names = {line.split(":")[1].partition(".")[0] for line in said.splitlines() if line.startswith("DEBUG:")}
    if how == "silent":
        assert not names & {*aws._LOGGERS}
        assert not any(part in said for part in (KEY, "a-session-token", "Signature", *AWS_KEY.split(":")))
    else:
        assert names >= {"botocore", "urllib3"}
        assert "a-session-token" in said


def test_aws_keys_of_another_form_are_refused() -> None:
    for key in ("AKIAIOSFODNN7EXAMPLE", "a:b:c:d", "longenough:"):
        with pytest.raises(UserError, match="ACCESS_KEY_ID:SECRET") as found:
            rekognition_sender("https://rekognition.eu-west-1.amazonaws.com", Credential("TEST_KEY", key))
        assert key not in str(found.value)
