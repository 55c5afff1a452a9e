"""The server under load and abuse: no client blocks others, and every resource is released in time."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from servers import wait_for
from serving import INFER, SIZE, Held, application, connect, listening, outputs, process, request, serving

from certify import SmoothedClassifier
from certify.serve.admission import Admission, Limits
from certify.serve.batching import Service, class_names
from certify.serve.protocol import RequestOptions
from certify.smoothing.procedures import Certify

ONE = np.full((1, *SIZE), 0.5, np.float32)
HEALTH = ("/v2/health/live", "/v2/health/ready", "/metrics")
PICTURE = {"content-type": "image/png"}


@contextlib.contextmanager
def held_server(limits: Limits, **more: Any) -> Iterator[tuple[str, Held, Admission]]:
    """Run a server whose classifier waits until released; yield its address, classifier and admission."""
    held = Held(held=True)
    with application(held, limits, **more) as (app, _, admission, _), listening(app, admission) as address:
        try:
            yield address, held, admission
        finally:
            held.let.set()


@contextlib.contextmanager
def plain_server() -> Iterator[str]:
    """Run a server with two trivial routes; yield its address."""
    app = FastAPI()

    @app.get("/")
    async def home() -> str:
        return "here"

    @app.get("/long")
    async def long() -> PlainTextResponse:
        return PlainTextResponse("x" * 2**25)

    with listening(app, Admission(Limits(concurrency=1))) as address:
        yield address


def client_at(host: str, address: str) -> httpx2.Client:
    """Return a client that connects from this address of the loopback network."""
    return httpx2.Client(base_url=address, timeout=60, transport=httpx2.HTTPTransport(local_address=host))


def is_closed_there(connection: socket.socket) -> bool:
    """True if the server closed its end, by the system's table: unread bytes hide that from this end."""
    mine, other = (f":{name[1]:04X}" for name in (connection.getsockname(), connection.getpeername()))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return [row[3] for row in rows if row[1].endswith(other) and row[2].endswith(mine)] != ["01"]  # established


def can_send(connection: socket.socket) -> bool:
    """True if the other side accepts another byte."""
    try:
        connection.sendall(b"x")
    except ConnectionError:
        return False
    return True


def is_cut(connection: socket.socket) -> bool:
    """True if the other side closed the connection; reads nothing from it."""
    watch = select.poll()
    watch.register(connection, select.POLLRDHUP)
    return bool(watch.poll(0))


# Connections


@pytest.mark.slow
def test_silent_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certify.serve.server._HEAD", 1.2)
    with plain_server() as address:
        whole = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
        for first in (b"", whole[:-2], whole + whole[:-2]):  # nothing; half a head; half a second one
            with connect(address) as connection:
                connection.sendall(first)
                cut, end = False, time.monotonic() + 20
                while not cut and time.monotonic() < end:
                    try:
                        connection.sendall(b"x: y\r\n" if first else b"")  # a trickle does not help
                        connection.settimeout(0.1)
                        cut = connection.recv(65_536) == b""
                    except TimeoutError:
                        continue
                    except ConnectionError:
                        cut = True
                assert cut
        host, _, port = address.removeprefix("http://").partition(":")
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as connection:
            connection.connect()
            connection.auto_open = 0  # this very connection: who asks may stay longer
            for pause in (0.5, 0.5, 0.5, 0):
                connection.request("GET", "/")
                assert connection.getresponse().read() == b'"here"'
                time.sleep(pause)


@pytest.mark.parametrize("limit", ["own", "system"])
def test_a_new_connection_replaces_an_idle_one(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit the oldest idle connection of the address with most connections is closed."""
    if limit == "own":
        monkeypatch.setattr("certify.serve.server._CONNECTIONS", -60)  # 4 in all
    else:
        monkeypatch.setattr("os.sysconf", {"SC_OPEN_MAX": 68}.get)
    with held_server(Limits(concurrency=1)) as (address, held, _), contextlib.ExitStack() as stack:
        busy, other = (stack.enter_context(client_at(f"127.0.0.{i}", address)) for i in (1, 2))
        with ThreadPoolExecutor(1) as pool:
            assert other.get("/v2/health/live").status_code == 200  # its connection stays open
            inside = pool.submit(busy.post, INFER, json=request(ONE))
            assert held.called.wait(60)
            idle = [stack.enter_context(connect(address)) for _ in range(9)]
            wait_for(lambda: [is_cut(connection) for connection in idle] == [True] * 7 + [False] * 2)
            for path in HEALTH:
                assert httpx2.get(address + path).status_code == 200
            assert other._transport._pool.connections[0].is_idle()  # type: ignore[attr-defined]
            assert other.get("/v2/health/live").status_code == 200
            held.let.set()
            assert outputs(inside.result())["label"] == [1]  # what is in work is not idle


def test_a_client_that_does_not_read_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certify.serve.server._TAKE", 0.3)
    monkeypatch.setattr("certify.serve.server.MIN_RATE", 2**27)
    with plain_server() as address, connect(address) as silent, connect(address) as pipelining:
        assert not is_closed_there(silent)
        silent.sendall(b"GET /long HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        pipelining.sendall(b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
        wait_for(lambda: is_closed_there(silent) and is_closed_there(pipelining))
        with httpx2.Client(base_url=address) as reading:
            assert len(reading.get("/long").content) == 2**25


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"\x16\x03\x01 hello\r\n\r\n", 400, "illegal request line"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host: header"),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n", 431, "Receive buffer too long"),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"b" * 100_000, 431, "Receive buffer too long"),
        (
            b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 5000,
            400,
            "1,004 chunks hold 1,004 bytes; send larger ones",
        ),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", 501, "Only Transfer-Encoding: chunked"),
    ],
)
def test_invalid_http_is_refused_in_json(
    content: bytes, status: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("certify.serve.server._LINGER", 0.1)
    with plain_server() as address, connect(address) as connection:
        with contextlib.suppress(ConnectionError):  # it may close the connection early
            connection.sendall(content)
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        assert (reply.status, reply.getheader("content-type")) == (status, "application/json")
        assert reply.getheader("x-content-type-options") == "nosniff"
        assert reason in json.loads(reply.read())["error"]
        assert httpx2.get(address).json() == "here"
        wait_for(lambda: not can_send(connection))  # it closes soon


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"[]," * 300_000 + b"[]]",
        b"[" + b"{}," * 300_000 + b"{}]",
        b"{" + b",".join(b'"%d":0' % i for i in range(80_000)) + b"}",
        json.dumps({"inputs": [{"name": "image", "shape": [1, 1, 8, 8], "data": [0.5] * 200_000}]}).encode(),
        b'{"a":' * 100_000 + b"0" + b"}" * 100_000,
    ],
    ids=["lists", "objects", "members", "numbers", "nested"],
)  # fmt: skip
def test_json_with_too_many_values_is_refused_before_parsing(digits: Any, body: bytes) -> None:
    """A parser creates an object per value and blocks the interpreter meanwhile: no other request is answered."""
    with serving(digits, Limits()) as (client, *_):
        tracemalloc.start()
        try:
            reply = client.post(INFER, content=body)
            assert tracemalloc.get_traced_memory()[1] < 5 * len(body)  # copies of the body, and no values
        finally:
            tracemalloc.stop()
    assert reply.status_code == 413
    assert "more than any valid request needs" in reply.json()["error"]


def test_the_largest_request_is_accepted(digits: Any) -> None:
    limits = Limits(max_images=3)
    images = np.repeat(ONE, 3, 0)
    nested = request(images, id="x,[{:" * 200)
    nested["inputs"][0]["data"] = images.tolist()
    with serving(digits, limits) as (client, *_):
        reply = client.post(INFER, json=nested)
        assert len(outputs(reply)["label"]) == 3
        assert reply.json()["id"] == nested["id"]


@pytest.mark.slow
def test_a_slow_body_holds_no_slot_and_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps(request(ONE)).encode()
    head = b"POST %s HTTP/1.1\r\nhost: x\r\n" % INFER.encode()
    parts = (
        head + b"content-length: %d\r\n\r\n" % len(body) + body[:9],
        head + b"transfer-encoding: chunked\r\n\r\n9\r\n" + body[:9] + b"\r\n",
    )
    with held_server(Limits(concurrency=2)) as (address, held, admission), contextlib.ExitStack() as stack:
        held.let.set()
        slow = [stack.enter_context(connect(address)) for _ in parts]
        for connection, part in zip(slow, parts, strict=True):
            connection.sendall(part)
        wait_for(lambda: admission.inside == 2)
        assert outputs(httpx2.post(address + INFER, json=request(ONE), timeout=60))["label"] == [1]
        slow[0].sendall(body[9:])  # slow, but in time
        assert slow[0].recv(65_536).startswith(b"HTTP/1.1 200")
    monkeypatch.setattr("certify.serve.admission._GRACE", 0.3)
    with held_server(Limits(concurrency=2)) as (address, _, admission):
        for part in parts:
            with connect(address) as connection:
                connection.sendall(part)
                reply = http.client.HTTPResponse(connection)
                reply.begin()
                assert reply.status == 408
                assert json.loads(reply.read())["error"] == (
                    "the body came too slowly: expected 16,384 bytes per second, and all within 60 s"
                )
        wait_for(lambda: admission.inside == 0)


def test_a_trickling_body_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certify.serve.admission._GRACE", 0.2)
    with held_server(Limits()) as (address, _, _), connect(address) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 99999\r\n\r\n" % INFER.encode())
        connection.settimeout(0.01)
        reply, end = b"", time.monotonic() + 60
        while not reply and time.monotonic() < end:
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                reply = connection.recv(65_536)
        assert reply.startswith(b"HTTP/1.1 408")


def test_an_endless_chunked_body_is_refused() -> None:
    chunk = b"%x\r\n" % 50_000 + bytes(50_000) + b"\r\n"
    with held_server(Limits(100_000)) as (address, _, _):
        head = b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % INFER.encode()
        with connect(address) as connection:
            connection.sendall(head + 3 * chunk)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 413")


def test_a_form_is_refused_without_parsing(digits: Any) -> None:
    fields = b"".join(b'--x\r\ncontent-disposition: form-data; name="%d"\r\n\r\n0\r\n' % i for i in range(20_000))
    with serving(digits, Limits()) as (client, *_):
        for path in (INFER, "/classify"):
            reply = client.post(path, content=fields, headers={"content-type": "multipart/form-data; boundary=x"})
            assert reply.status_code == 415


# Slots


def test_a_busy_client_leaves_slots_for_others() -> None:
    """An address holds at most as many slots as it leaves free."""
    with contextlib.ExitStack() as stack:
        address, held, admission = stack.enter_context(held_server(Limits(concurrency=4)))
        with ThreadPoolExecutor(12) as pool:
            greedy, second, third = (stack.enter_context(client_at(f"127.0.0.{i}", address)) for i in (1, 2, 3))
            body = request(ONE)
            inside: list[Future[httpx2.Response]] = []
            for client, slots in ((greedy, 4), (second, 2), (third, 1)):  # of 8: half, and so on
                inside += [pool.submit(client.post, INFER, json=body) for _ in range(slots)]
                wait_for(functools.partial(lambda count: admission.working.used == count, len(inside)))
                refused = client.post(INFER, json=body)
                assert refused.status_code == 429
                assert refused.json()["error"] == (
                    f"requests from your address hold {slots} slots, its current maximum"
                )
                assert 1 <= int(refused.headers["retry-after"]) <= 60
            for path in HEALTH:
                assert greedy.get(path).status_code == 200
            held.let.set()
            assert [outputs(reply.result())["label"] for reply in inside] == [[1]] * 7
            assert greedy.post(INFER, json=body).status_code == 200


def test_a_full_server_answers_503() -> None:
    with held_server(Limits(concurrency=1)) as (address, held, admission), ThreadPoolExecutor(2) as pool:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(client_at(f"127.0.0.{i}", address)) for i in (1, 2, 3)]
            for number, client in enumerate(clients[:2], 1):
                pool.submit(client.post, INFER, json=request(ONE))
                wait_for(functools.partial(lambda count: admission.working.used == count, number))
            refused = clients[2].post(INFER, json=request(ONE))
            held.let.set()
        assert refused.status_code == 503
        assert refused.json() == {"error": "other requests hold all 2 slots"}
        assert "retry-after" in refused.headers


@pytest.mark.parametrize("trusted", [True, False])
def test_forwarded_addresses_count_only_from_trusted_proxies(trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if trusted:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    with held_server(Limits(concurrency=1)) as (address, held, admission), contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx2.Client(base_url=address, timeout=60))
        with ThreadPoolExecutor(2) as pool:

            def ask(host: str) -> httpx2.Response:
                return client.post(INFER, json=request(ONE), headers={"x-forwarded-for": host})

            first = pool.submit(ask, "2001:db8::1")
            wait_for(lambda: admission.working.used == 1)
            assert ask("2001:db8::ffff:1").status_code == 429  # of the same /64 network
            if not trusted:
                assert ask("192.0.2.1").status_code == 429
            held.let.set()
            assert first.result().status_code == 200
            held.let.clear()
            if trusted:
                first = pool.submit(ask, "192.0.2.1")
                wait_for(lambda: admission.working.used == 1)
                assert ask("::ffff:192.0.2.1").status_code == 429
                second = pool.submit(ask, "192.0.2.2")
                wait_for(lambda: admission.working.used == 2)
                held.let.set()
                assert (first.result().status_code, second.result().status_code) == (200, 200)


def test_clients_take_turns() -> None:
    """A request waits for one of each other client, not for all that others have sent."""
    held, order = Held(held=True), list[str]()
    smoothed = SmoothedClassifier(held, 0.25, batch_size=50)
    with Service(smoothed, SIZE, Certify(n0=50, n=50), Limits(), class_names(None)) as service:
        service.submit(ONE, RequestOptions())
        assert held.called.wait(60)
        asked = [("greedy", i) for i in range(6)] + [("polite", 0)]
        for client, number in asked:
            (answer,) = service.submit(ONE, RequestOptions(seed=number), client)
            answer.add_done_callback(lambda _, client=client: order.append(client))  # type: ignore[misc]
        held.let.set()
        wait_for(lambda: len(order) == 7)
    assert order.index("polite") <= 2


# Work that does not end


class Decoder:
    """Decode no picture until released; count the calls."""

    def __init__(self) -> None:
        self.let, self.started = threading.Event(), 0

    def __call__(self, content: bytes) -> np.ndarray:
        self.started += 1
        assert self.let.wait(60)
        return ONE[0]


def test_a_slot_is_held_until_the_work_ends() -> None:
    decoder = Decoder()
    limits = Limits(concurrency=3, timeout=0.3)
    with serving(Held(), limits, picture=decoder) as (client, _, admission, _):

        def ask() -> httpx2.Response:
            reply: httpx2.Response = client.post("/classify", content=b"x", headers=PICTURE)
            return reply

        replies = [ask() for _ in range(5)]  # each is told so in time; one of the client's is decoded at a time
        assert [reply.status_code for reply in replies] == [504] * 5
        wait_for(lambda: admission.working.used == 1)
        assert (decoder.started, admission.inside) == (1, 0)
        assert client.get("/v2/health/live").status_code == 200
        decoder.let.set()
        wait_for(lambda: admission.working.used == 0)
        assert ask().status_code == 200


def test_a_server_with_stuck_readers_is_not_ready() -> None:
    decoder = Decoder()
    with held_server(Limits(timeout=0.3), picture=decoder) as (address, _, admission), contextlib.ExitStack() as stack:
        for i in (1, 2):
            client = stack.enter_context(client_at(f"127.0.0.{i}", address))
            assert client.get("/v2/health/ready").status_code == 200
            assert client.post("/classify", content=b"x", headers=PICTURE).status_code == 504
        assert httpx2.get(address + "/v2/health/ready").status_code == 503
        decoder.let.set()
        wait_for(lambda: admission.working.used == 0)
        assert httpx2.get(address + "/v2/health/ready").status_code == 200


def test_slow_pictures_of_one_client_do_not_block_others() -> None:
    decoder = Decoder()

    def decode(content: bytes) -> np.ndarray:
        return decoder(content) if content == b"slow" else ONE[0]

    with (
        held_server(Limits(concurrency=4), picture=decode) as (address, held, admission),
        contextlib.ExitStack() as stack,
    ):
        held.let.set()
        with ThreadPoolExecutor(4) as pool:
            slow, quick = (stack.enter_context(client_at(f"127.0.0.{i}", address)) for i in (1, 2))
            inside = [pool.submit(slow.post, "/classify", content=b"slow", headers=PICTURE) for _ in range(4)]
            wait_for(lambda: admission.working.used == 4)
            for _ in range(3):
                assert quick.post("/classify", content=b"quick", headers=PICTURE).status_code == 200
            assert decoder.started == 1
            decoder.let.set()
            assert [reply.result().status_code for reply in inside] == [200] * 4


STUCK = """
import sys, threading
import certify.serve.pictures
certify.serve.pictures.read_picture = lambda *given, **named: threading.Event().wait()
from certify.cli.app import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("timeout", "signals"), [("1", 1), ("600", 2)])
def test_a_signal_ends_the_process_despite_stuck_threads(timeout: str, signals: int, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    command = [sys.executable, str(tmp_path / "stuck.py")]
    with process("--timeout", timeout, command=command) as (started, address), ThreadPoolExecutor(1) as pool:
        inside = pool.submit(httpx2.post, address + "/classify", content=b"x", headers=PICTURE, timeout=60)
        if signals == 1:
            assert inside.result().status_code == 504
        else:
            wait_for(lambda: "certify_queue_length 1.0" in httpx2.get(address + "/metrics").text)
            time.sleep(0.2)  # until its body is read, too
        started.send_signal(signal.SIGTERM)
        if signals == 2:  # two at once would be one
            wait_for(lambda: httpx2.get(address + "/v2/health/ready").status_code == 503)
            started.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(60)
        assert started.returncode == 1
        assert started.stderr is not None
        left = "everything that was accepted is answered" if signals == 1 else "1 requests were not answered"
        said = started.stderr.read()
        assert f"stopped    {left}" in said
        assert "Traceback" not in said
        inside.exception(60)
