"""Run the server in this process or another, and make requests."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from certify import SmoothedClassifier
from certify.engine.contract import COPIES
from certify.serve.admission import Admission, Limits
from certify.serve.app import build_app, site_check
from certify.serve.batching import Service, class_names
from certify.serve.pictures import read_picture
from certify.serve.protocol import STATEMENT, Stated
from certify.serve.request_handler import Metrics, RequestHandler
from certify.serve.server import listen, serve, url_of
from certify.smoothing.procedures import Accuracy, Certify

SIZE = (1, 8, 8)
SEED, N0, N, ALPHA = 7, 50, 400, 0.01
INFER = "/v2/models/digits/infer"
CERTIFY = (sys.executable, "-m", "certify")
LIMITS = Limits(100_000, max_pixels=1500, budget=10_000, concurrency=8, timeout=120.0, max_images=23)


@contextlib.contextmanager
def application(
    classifier: Any,
    limits: Limits = LIMITS,
    *,
    size: tuple[int, int, int] = SIZE,
    batch_size: int | None = 256,
    names: Callable[[int], str] | None = None,
    picture: Callable[[bytes], np.ndarray] | None = None,
    one_copy: bool = False,
    **own: Any,
) -> Iterator[tuple[FastAPI, Service, Admission, Metrics]]:
    """Yield the application without a server."""
    smoothed = SmoothedClassifier(classifier, 0.25, batch_size=batch_size)
    metrics, admission = Metrics(), Admission(limits)
    procedure = Accuracy() if one_copy else Certify(**{"n0": N0, "n": N, "alpha": ALPHA, **own})
    names = names or class_names(getattr(classifier, "class_names", None))
    spec = getattr(classifier, "input", None)
    with Service(smoothed, size, procedure, limits, names, metrics.samples.inc, SEED) as service:
        picture = picture or functools.partial(read_picture, spec=spec, max_pixels=limits.max_pixels)
        alpha, statement = (None, STATEMENT) if one_copy else (ALPHA, "")
        about = Stated(0.25, "gaussian", "l2", alpha, "none", "x".join(map(str, size)), statement)
        handler = RequestHandler(service, "digits", picture, metrics, admission, about)
        yield build_app(handler, site_check(["testserver", "x"])), service, admission, metrics


@contextlib.contextmanager
def serving(classifier: Any, *own: Any, **named: Any) -> Iterator[tuple[TestClient, Service, Admission, Metrics]]:
    """Run a server in this process, without sockets."""
    with (
        application(classifier, *own, **named) as (app, service, admission, metrics),
        TestClient(app, raise_server_exceptions=False) as client,
    ):
        yield client, service, admission, metrics


@contextlib.contextmanager
def listening(app: FastAPI, admission: Admission) -> Iterator[str]:
    """Run a server with sockets in a thread of this process; yield its address."""
    with listen("127.0.0.1", 0) as place:
        started = threading.Event()
        thread = threading.Thread(target=serve, args=(app, admission, place, started.set))
        thread.start()
        try:
            assert started.wait(60)
            yield url_of(place)
        finally:
            admission.closed = True
            thread.join(60)


def request(images: np.ndarray, **more: Any) -> dict[str, Any]:
    """Return an inference request with JSON tensors."""
    datatype = "UINT8" if images.dtype == np.uint8 else "FP32"
    tensor = {"name": "image", "datatype": datatype, "shape": list(images.shape), "data": images.ravel().tolist()}
    return {"inputs": [tensor], **more}


def outputs(reply: Any) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    return {output["name"]: output["data"] for output in reply.json()["outputs"]}


class Held:
    """A base classifier that returns class 1: after a delay, when released, or never; at once for small batches."""

    num_classes = 2

    def __init__(self, seconds: float = 0.0, held: bool = False, broken: bool = False) -> None:
        self.seconds, self.broken, self.samples = seconds, broken, 0
        self.called, self.let = threading.Event(), threading.Event()
        if not held:
            self.let.set()

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) <= COPIES:  # the contract check
            return torch.ones(len(images), dtype=torch.int64)
        self.called.set()
        self.samples += len(images)
        time.sleep(self.seconds)
        self.let.wait(60)
        if self.broken:
            raise ConnectionError("the endpoint is gone")
        return torch.ones(len(images), dtype=torch.int64)

    def describe(self) -> dict[str, Any]:
        return {"name": "held"}


@contextlib.contextmanager
def process(*options: str, command: Sequence[str] = CERTIFY) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run ``certify serve`` on a free port; yield the process and its address."""
    command = [*command, "serve", "--model", "digits", "--sigma", "0.25", "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as started:
        guard = threading.Timer(300, started.kill)
        guard.start()
        try:
            assert started.stderr is not None
            address = next((m[0] for line in started.stderr if (m := re.search(r"http://\S+", line))), None)
            assert address is not None
            yield started, address
        finally:
            guard.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)


def connect(address: str) -> socket.socket:
    """Return a connection to a server."""
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def send(address: str, content: bytes) -> bytes:
    """Send these bytes on a new connection and return the response."""
    with connect(address) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65_536):
            found += part
    return found
