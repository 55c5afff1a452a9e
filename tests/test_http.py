"""Queries to a faulty service: the budget is exact, the ledger complete, and the key goes to the service alone."""

from __future__ import annotations

import asyncio
import datetime
import itertools
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import RAW, FaultServer, Seen, label_of, picture, queries
from servers import wait_for

from certify.blackbox.client.credentials import public, read_credential
from certify.blackbox.client.http import TIMEOUT, HttpSender, check_endpoint, run_async
from certify.blackbox.client.query_client import QueryClient
from certify.blackbox.client.rate_limit import QueryLimits, RateLimiter, retry_after
from certify.blackbox.ledger import Ledger
from certify.blackbox.ledger_contents import ledger_header, read_ledger
from certify.blackbox.protocols.cloud_vision import clarifai
from certify.blackbox.types import Answer, BadReply, Query, Reply, Request
from certify.cli.service_options import ServiceOptions, query_limits
from certify.errors import BudgetSpent, CertifyError, RunFault, UserError

CLARIFAI = {"status": {"code": 10000}, "outputs": [{"data": {"concepts": [{"name": "cat", "value": 0.9}]}}]}
SECRETS = "X-Amz-Signature x-functions-key sv_sig pwd passwd authorization cred jwt client_secret id_token code".split()
KEY = "sk-4f9a/Zq+0123=%x"
HERE = Path(__file__).parent
SOON = QueryLimits(concurrency=4, first_wait=0.01, longest_wait=0.3, grace=5.0)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SERVICE_KEY", KEY)
    return "SERVICE_KEY"


def ask(
    server: FaultServer,
    path: Path,
    wanted: list[Query],
    *,
    budget: int | None = None,
    limits: QueryLimits = SOON,
    timeout: float = 20.0,
) -> tuple[list[Answer], CertifyError | None]:
    """Return the answers, and the error that ended the call."""
    found: list[Answer] = []
    with (
        HttpSender(server.url, timeout=timeout, max_bytes=100_000) as send,
        Ledger(path, ledger_header(send.endpoint, RAW)) as ledger,
    ):
        try:
            found += itertools.islice(QueryClient(send, RAW, ledger, budget=budget, limits=limits)(wanted), len(wanted))
        except CertifyError as error:
            return found, error
    return found, None


def lines(path: Path, kind: str) -> list[dict[str, object]]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["type"] == kind]


FAULTS = {  # fault -> True if another attempt may bring the answer
    "later:0": True,
    "date:0": True,
    "status:500": True,
    "status:503": True,
    "reset": True,
    "cut": True,
    "hang": True,
    "drip:0.05": True,
    "drip-head:0.05": True,
    "truncated": False,
    "type": False,
    "empty": False,
    "page": False,
    "huge:200000": False,
    "bomb:5000000": False,
    "status:400": False,
    "redirect:http://127.0.0.2:9/": False,
}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[pytest.mark.slow] * fault.startswith(("hang", "drip"))) for fault in FAULTS]
)
def test_a_fault_costs_what_was_sent_and_nothing_else(fault: str, tmp_path: Path) -> None:
    """Every third request fails (one, where that takes time); what is answered is what a faultless service answers."""
    wanted, slow = queries(8), fault.startswith(("hang", "drip"))

    def plan(number: int, seen: Seen) -> str:
        # From the fifth request on, since one is answered by then: a redirect before any answer stops everything.
        return fault if number == 4 or (number % 3 == 1 and number > 4 and not slow) else ""

    with FaultServer(plan) as server:
        found, error = ask(server, tmp_path / "ledger", wanted, timeout=1.5 if slow else 20.0)
    assert error is None
    assert [answer.name for answer in found] == [query.name for query in wanted]
    sent = read_ledger(tmp_path / "ledger")
    assert len(server.seen) == len(lines(tmp_path / "ledger", "sent")) == sent.spent == sum(a.attempts for a in found)
    right = [label_of(query.picture.pixels.tobytes()) for query in wanted]
    for answer, label in zip(found, right, strict=True):
        assert [one.label for one in answer.ranked] == ([label, "other"] if answer.ranked else [])
        assert bool(answer.failure) != bool(answer.ranked)
    failed = sum(not answer.ranked for answer in found)
    assert (failed == 0) == FAULTS[fault], [answer.failure for answer in found]
    assert server.count() == {
        query.picture.pixels.tobytes(): a.attempts for query, a in zip(wanted, found, strict=True)
    }
    assert sent.answers == {
        a.name: Answer(a.name, a.ranked, a.failure, round(a.seconds, 6), a.attempts, True) for a in found
    }


def test_everything_at_once_and_the_same_answers(tmp_path: Path) -> None:
    """The faults that another attempt mends, in turn, at some concurrency: the answers are the faultless run's."""
    mended = [fault for fault, mends in FAULTS.items() if mends and not fault.startswith(("drip", "hang"))]
    wanted, seen_before = queries(60), set[bytes]()

    def plan(number: int, seen: Seen) -> str:
        first = seen.body not in seen_before
        seen_before.add(seen.body)
        return mended[number % len(mended)] if first else ""

    with FaultServer() as calm, FaultServer(plan) as wild:
        faultless, _ = ask(calm, tmp_path / "calm", wanted)
        found, error = ask(wild, tmp_path / "wild", wanted, limits=QueryLimits(8, first_wait=0.01, longest_wait=0.3))
    assert error is None
    assert [(a.name, a.ranked) for a in found] == [(a.name, a.ranked) for a in faultless]
    assert len(wild.seen) == 120 == read_ledger(tmp_path / "wild").spent


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("budget", [0, 1, 17, 40])
def test_the_budget_is_never_exceeded(budget: int, concurrency: int, tmp_path: Path) -> None:
    """Under concurrency and retries; the answers are a prefix without gaps, and a larger budget resumes there."""
    wanted = queries(40)
    limits = QueryLimits(concurrency, first_wait=0.005, longest_wait=0.05)

    def plan(number: int, seen: Seen) -> str:
        return "status:503" if number % 4 == 3 else ""

    with FaultServer(plan, delay=0.002) as server:
        found, error = ask(server, tmp_path / "ledger", wanted, budget=budget, limits=limits)
        assert isinstance(error, BudgetSpent)
        assert len(server.seen) == read_ledger(tmp_path / "ledger").spent == budget
        assert [answer.name for answer in found] == [query.name for query in wanted[: len(found)]]
        kept = read_ledger(tmp_path / "ledger").answers
        assert all(kept[answer.name].ranked == answer.ranked for answer in found)
        again, error = ask(server, tmp_path / "ledger", wanted, budget=1000, limits=limits)
    assert error is None
    assert [one.ranked[0].label for one in again] == [label_of(query.picture.pixels.tobytes()) for query in wanted]
    assert {answer.name for answer in again if answer.known} == kept.keys()
    assert len(server.seen) == read_ledger(tmp_path / "ledger").spent
    assert all(count <= 5 for count in server.count().values())


def test_retries_end(tmp_path: Path) -> None:
    with FaultServer(lambda number, seen: "status:502") as server:
        found, error = ask(server, tmp_path / "ledger", queries(1), limits=QueryLimits(attempts=3, first_wait=0.01))
    assert error is None
    assert (len(server.seen), found[0].attempts, found[0].failure) == (3, 3, "HTTP 502: something")
    assert found[0].down


def test_a_busy_service_that_answers_with_status_200_is_retried(tmp_path: Path) -> None:
    bodies = [{"status": {"code": 11005, "description": "Throttled"}}, CLARIFAI]
    form = clarifai()

    async def send(request: Request) -> Reply:
        return Reply(200, json.dumps(bodies.pop(0)).encode())

    with Ledger(tmp_path / "ledger", ledger_header("http://x", form)) as ledger:
        (found,) = QueryClient(send, form, ledger, limits=SOON)(queries(1))
    assert (found.attempts, found.ranked[0].label) == (2, "cat")


def test_failures_of_the_service_differ_from_failures_of_a_picture(tmp_path: Path) -> None:
    faults = ["", "status:400", "empty", "reset", "page"]
    with FaultServer(faults) as server:
        found, _ = ask(server, tmp_path / "ledger", queries(5), limits=QueryLimits(1, attempts=1))
    assert [answer.down for answer in found] == [False, True, False, True, False]


def test_known_answers_cost_nothing_and_need_the_same_picture(tmp_path: Path) -> None:
    with FaultServer() as server:
        first, _ = ask(server, tmp_path / "ledger", queries(5))
        second, _ = ask(server, tmp_path / "ledger", queries(7), budget=7)
        assert len(server.seen) == 7
        assert [answer.known for answer in second] == [True] * 5 + [False] * 2
        assert [answer.ranked for answer in second[:5]] == [answer.ranked for answer in first]
        other = [Query(queries(1)[0].name, picture(99))]
        _, error = ask(server, tmp_path / "ledger", other)
        assert isinstance(error, UserError)
        assert "was another picture when it was sent" in str(error)
        twice = [queries(30)[28]] * 2
        assert "occurs twice at a time" in str(ask(server, tmp_path / "ledger", twice)[1])


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        ("status:401", "HTTP 401: something; check the key"),
        ("status:403", "api_key_env"),
        ("status:404", "check the endpoint and the protocol"),
        ("redirect:https://elsewhere.example/x", "it redirects to 'https://elsewhere.example/x'"),
    ],
)
def test_a_service_that_refuses_the_first_query_stops_the_run(fault: str, remedy: str, tmp_path: Path) -> None:
    with FaultServer([fault, "", "", fault]) as server:
        found, error = ask(server, tmp_path / "ledger", queries(50), budget=50, limits=QueryLimits(1, grace=5))
        assert type(error) is RunFault
        assert not found
        assert remedy in str(error)
        assert len(server.seen) == 1
        found, error = ask(server, tmp_path / "ledger", queries(4), limits=QueryLimits(1, grace=5))
        if fault in ("status:401", "status:403"):  # a key that ended is about no picture: nothing fails for it
            assert "refused a query" in str(error)
            assert len(found) == 2 == len(read_ledger(tmp_path / "ledger").answers)
            found, error = ask(server, tmp_path / "ledger", queries(4), limits=QueryLimits(1, grace=5))
            assert [answer.attempts for answer in found] == [2, 1, 2, 1]
        else:  # it was about one picture, once something was answered
            assert not found.pop(2).ranked
    assert error is None
    assert all(answer.ranked for answer in found)
    assert found[0].attempts == 2


def test_a_request_for_a_long_pause_stops_the_run(tmp_path: Path) -> None:
    with FaultServer(["", "later:3600"]) as server:
        found, error = ask(server, tmp_path / "ledger", queries(4), limits=QueryLimits(1, grace=5))
        assert type(error) is RunFault
        assert "a pause of 3,600 s" in str(error)
        assert (len(found), len(server.seen)) == (1, 2)
        found, error = ask(server, tmp_path / "ledger", queries(4), limits=QueryLimits(1, grace=5))
    assert error is None
    assert [(bool(a.ranked), a.attempts) for a in found] == [(True, 1), (True, 2), (True, 1), (True, 1)]


def test_a_burst_of_refusals_stops_at_once(tmp_path: Path) -> None:
    # held, because a pause that comes before the second query is under way is one for every query
    with FaultServer(lambda number, seen: "status:401" if number else "later:30", hold=2) as server:
        start = time.monotonic()
        _, error = ask(server, tmp_path / "ledger", queries(500), limits=QueryLimits(8, longest_wait=30, grace=5))
    assert "check the key" in str(error)
    assert time.monotonic() - start < 20  # though a query before it would wait for half a minute
    assert len(server.seen) == read_ledger(tmp_path / "ledger").spent <= 8


def test_an_answer_is_logged_before_it_is_used(tmp_path: Path) -> None:
    header = ledger_header("http://x", RAW)
    with FaultServer() as server, HttpSender(server.url) as send, Ledger(tmp_path / "ledger", header) as ledger:
        for answer in QueryClient(send, RAW, ledger, limits=SOON)(queries(12)):
            assert read_ledger(tmp_path / "ledger").answers[answer.name].ranked == answer.ranked


def test_answers_in_flight_are_logged_when_the_consumer_stops(tmp_path: Path) -> None:
    """Requests that are under way are waited for and recorded; queries that were only pulled are not sent."""
    path, header = tmp_path / "ledger", ledger_header("http://x", RAW)
    with FaultServer(delay=0.1) as server, HttpSender(server.url) as send, Ledger(path, header) as ledger:
        client = QueryClient(send, RAW, ledger, budget=20, limits=QueryLimits(3))
        answers = client(queries(100))
        next(answers)
        answers.close()
        kept = ledger.contents.answers
        assert len(server.seen) == client.spent == len(kept) <= 6
        assert all(answer.ranked for answer in kept.values())
        assert sum(1 for _ in client(queries(20))) == 20  # the budget of those not sent is there again


@pytest.mark.slow
def test_the_grace_period_is_longer_than_a_request_may_take(tmp_path: Path) -> None:
    assert QueryLimits().grace > TIMEOUT
    assert query_limits(ServiceOptions(), concurrency=1, timeout=120.0).grace > 120
    path, header, said = tmp_path / "ledger", ledger_header("http://x", RAW), list[str]()
    slow = picture(1).pixels.tobytes()  # by content: either request may arrive first
    with (
        FaultServer(lambda number, seen: "drip:0.06" if seen.body == slow else "", hold=2) as server,
        HttpSender(server.url) as send,
        Ledger(path, header) as ledger,
    ):
        answers = QueryClient(send, RAW, ledger, limits=QueryLimits(2), tell=said.append)(queries(2))
        next(answers)
        answers.close()
        assert all(answer.ranked for answer in ledger.contents.answers.values())
        assert len(server.seen) == len(ledger.contents.answers) == 2
    assert said == ["waiting for requests in flight: 1, 65 s at most; their answers are kept"]


def test_concurrency_is_kept(tmp_path: Path) -> None:
    with FaultServer(delay=0.05, hold=6) as server:
        found, _ = ask(server, tmp_path / "ledger", queries(24), limits=QueryLimits(6))
    assert len(found) == 24
    assert server.most_at_once == 6


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting."""

    now = 100.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def test_requests_are_evenly_spaced_and_pauses_hold_for_all() -> None:
    async def times(limiter: RateLimiter, count: int) -> list[float]:
        loop, found = asyncio.get_running_loop(), list[float]()

        async def one() -> None:
            await limiter.acquire()
            found.append(loop.time())

        start = loop.time()
        await asyncio.gather(*(one() for _ in range(count)))
        return [round(time - start, 6) for time in found]

    async def check() -> None:
        limiter = RateLimiter(4.0)
        assert await times(limiter, 3) == [0.0, 0.25, 0.5]
        await asyncio.sleep(0.1)
        assert await times(limiter, 1) == [0.15]
        await asyncio.sleep(10)
        assert await times(limiter, 3) == [0.0, 0.25, 0.5]  # no burst after a rest
        limiter.pause(3.0)
        found = await times(limiter, 3)
        assert found[0] >= 3.0
        assert found[1] - found[0] >= 0.25 <= found[2] - found[1]
        assert await times(RateLimiter(None), 3) == [0.0, 0.0, 0.0]
        unlimited = RateLimiter(None)
        unlimited.pause(2.0)
        unlimited.pause(1.0)  # a shorter pause does not end a longer one
        assert await times(unlimited, 2) == [2.0, 2.0]

    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        runner.run(check())


def test_the_rate_holds(tmp_path: Path) -> None:
    with FaultServer() as server:
        start = time.monotonic()
        ask(server, tmp_path / "ledger", queries(16), limits=QueryLimits(8, rate=50.0))
    assert time.monotonic() - start >= 15 / 50


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        ("0", 0.0),
        ("-5", 0.0),
        ("100000", 100000.0),
        ("1.5", 1.5),
        ("inf", float("inf")),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Sat, 21 Nov 2026 12:00:09 GMT", 9.0),
        ("Sat, 21 Nov 2026 13:00:00 GMT", 3600.0),
        ("Sat, 21 Nov 2026 11:00:00 GMT", 0.0),
        ("Sat, 99 Nov 2026 11:00:00 GMT", None),
        ("Sat, 21 Nov 99999999999999999999 11:00:00 GMT", None),
        ("Sat, 21 Nov 2026 99999999999999999999:00:00 GMT", None),
    ],
)
def test_retry_after(text: str, seconds: float | None) -> None:
    noon = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC)
    assert retry_after(Reply(429, b"", {"Retry-After": text}), noon) == seconds
    assert retry_after(Reply(429, b"", {}), noon) is None


@pytest.mark.parametrize(
    ("retry", "date", "seconds"),
    [
        ("Sat, 21 Nov 2026 13:00:02 GMT", "Sat, 21 Nov 2026 13:00:00 GMT", 2.0),  # this machine is an hour slow
        ("Saturday, 21-Nov-26 13:00:02 GMT", "Sat Nov 21 13:00:00 2026", 2.0),  # the obsolete forms of a date
        ("Sat, 21 Nov 2026 11:00:02 GMT", "Sat, 21 Nov 2026 12:00:00 +0100", 2.0),  # an hour fast
        ("Sat, 21 Nov 2026 11:00:00 GMT", "Sat, 21 Nov 2026 11:00:05 GMT", 0.0),
        ("Sat, 21 Nov 2026 12:00:02 GMT", "Sat, 99 Nov 2026 11:00:00 GMT", 2.0),  # no usable date: this machine's clock
        ("Sat, 21 Nov 2026 12:00:02 GMT", "Sat, 21 Nov 99999 11:00:00 GMT", 2.0),
        ("7", "Sat, 21 Nov 2026 13:00:00 GMT", 7.0),
    ],
)
def test_retry_after_counts_from_the_date_of_the_reply(retry: str, date: str, seconds: float) -> None:
    noon = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC)
    assert retry_after(Reply(429, b"", {"retry-after": retry, "date": date}), noon) == seconds


def test_retry_after_holds_back_all_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paused, pause = list[float](), RateLimiter.pause

    def spy(limiter: RateLimiter, seconds: float) -> None:
        paused.append(seconds)
        pause(limiter, seconds)

    monkeypatch.setattr(RateLimiter, "pause", spy)  # which all queries share: see the test of the limiter
    with FaultServer(["later:0.4"]) as server:
        start = time.monotonic()
        found, _ = ask(server, tmp_path / "ledger", queries(5), limits=QueryLimits(1, longest_wait=1.0))
        assert time.monotonic() - start >= 0.4
    assert found[0].attempts == 2
    assert paused == [0.4]


@pytest.mark.parametrize("fault", ["hang", "drip:0.1", "drip-head:0.1"])
def test_a_deadline_ends_everything(fault: str) -> None:
    with FaultServer([fault]) as server, HttpSender(server.url, timeout=0.4) as send:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"no complete reply within 0\.4 s"):
            run_async(send(Request(b"x")))
        assert time.monotonic() - start < 10  # a hanging service never ends, a dripping one after 15 s
        send._timeout = 20.0  # what comes next is about the connection alone, however busy the machine
        assert run_async(send(Request(b"x"))).status == 200


def test_no_server() -> None:
    with FaultServer() as server:
        url = server.url
    with HttpSender(url) as send, pytest.raises(ConnectionError, match=r"^127\.0\.0\.1:\d+: .*ConnectError"):
        run_async(send(Request(b"x")))
    with pytest.raises(ConnectionError, match="the sender was closed"):
        run_async(send(Request(b"x")))


def test_closing_a_sender_aborts_requests_in_flight() -> None:
    with FaultServer(["hang"]) as server:
        send = HttpSender(server.url)
        threading.Timer(0.3, send.close).start()
        with pytest.raises(ConnectionError, match="closed"):
            run_async(send(Request(b"x")))


def test_paths_queries_and_keys_of_requests(key: str) -> None:
    with FaultServer() as server:
        with HttpSender(f"{server.url}/v1/base?version=3", read_credential(key)) as send:
            run_async(send(Request(b"x", "models/m:label?top=5", headers={"content-type": "image/png"})))
            run_async(send(Request(b"x")))
        with HttpSender(server.url, read_credential(key, query="key={key}")) as send:
            run_async(send(Request(b"x", "/y")))
        with HttpSender(server.url, read_credential(key, "X-Key: {key}")) as send:
            run_async(send(Request(b"x")))
    first, second, third, fourth = server.seen
    assert first.target == "/v1/base/models/m:label?version=3&top=5"
    assert (first.headers["authorization"], first.headers["content-type"]) == (f"Bearer {KEY}", "image/png")
    assert second.target == "/v1/base?version=3"
    assert third.target == "/y?key=sk-4f9a%2FZq%2B0123%3D%25x"
    assert "authorization" not in third.headers
    assert fourth.headers["x-key"] == KEY


def test_cookies_are_not_kept_and_redirects_not_followed(key: str) -> None:
    with (
        FaultServer() as other,
        FaultServer([f"redirect:http://127.0.0.1:{other.port}/", ""]) as server,
        HttpSender(server.url, read_credential(key)) as send,
    ):
        assert run_async(send(Request(b"x"))).status == 307
        run_async(send(Request(b"x")))
    assert (len(server.seen), len(other.seen)) == (2, 0)
    assert all("cookie" not in seen.headers for seen in server.seen)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/x", "expected http://HOST"),
        ("host:80/x", "expected http://HOST"),
        ("http://", "expected http://HOST"),
        ("http://ho st/", "expected http://HOST"),
        ("http://host:99999/", "expected http://HOST"),
        (f"http://user:{KEY[:6]}@host/", "user name or password"),
        ("https://host/x?Api_Key=abcdefgh", "auth_query='Api_Key={key}'"),
        *((f"https://host/x?size=5&{name}=abcdefgh", f"holds {name!r}") for name in SECRETS),
    ],
)
def test_endpoints_that_are_refused(url: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        check_endpoint(url)
    assert KEY[:6] not in str(caught.value)
    assert "abcdefgh" not in str(caught.value)


@pytest.mark.parametrize("sign", ["?", "@", "#", "&", "/?", ":?"])
def test_no_part_of_a_password_is_displayed_whatever_signs_it_holds(sign: str) -> None:
    with pytest.raises(UserError) as refused:
        check_endpoint(f"https://user:hunter2{sign}secret3@host/")
    assert "hunter2" not in str(refused.value)
    assert "secret3" not in str(refused.value)


def test_an_endpoint_may_hold_a_query_without_a_key() -> None:
    url = "https://host/x?sigma=0.25&version=3&postcode=1"
    assert check_endpoint(url) == url
    found = public("certify audit --endpoint 'https://me:abcdefgh@host/x?a=abcdefgh#abcdefgh' --data d")
    assert found == "certify audit --endpoint 'https://host/x' --data d"


def test_a_key_is_sent_over_plain_http_to_loopback_alone(key: str) -> None:
    for url in ("http://localhost:1/x", "http://127.9.9.9/", "http://[::1]:8/", "https://host/"):
        assert check_endpoint(url, key=True) == url
    for url in ("http://host/", "http://10.0.0.1/", "http://localhost.example/", "http://127.0.0.1.example/"):
        with pytest.raises(UserError, match="over plain HTTP, where anyone on the network can read it; use https://"):
            check_endpoint(url, key=True)
        assert check_endpoint(url) == check_endpoint(url, key=True, insecure=True) == url
    with pytest.raises(UserError, match="over plain HTTP"):
        HttpSender("http://host/", read_credential(key))


def test_keys_come_from_environment_variables_alone(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    with pytest.raises(UserError, match=r"\$NOT_THERE is not set"):
        read_credential("NOT_THERE")
    with pytest.raises(UserError) as caught:
        read_credential(KEY)  # the key itself instead of the name of its variable
    assert KEY not in str(caught.value)
    for name in ("hf_AbCdEfGhIjKlMnOpQrStUvWxYz", "AKIA" + 50 * "A", "s3cr3tvalue"):
        with pytest.raises(UserError, match="the variable named is not set") as caught:
            read_credential(name)
        assert name not in str(caught.value)
    for template in (f"Authorization: Bearer {KEY}", "Bearer {key}", "X: {key} {key}", "X Y: {key}"):
        with pytest.raises(UserError, match=r"expected NAME: VALUE with \{key\} in it") as caught:
            read_credential(key, template)
        assert KEY not in str(caught.value)
    with pytest.raises(UserError, match=r"expected NAME=\{key\}"):
        read_credential(key, query=f"key={KEY}")
    for bad in ("short", "two\nlines of it", "nicht-ascii-ü"):
        monkeypatch.setenv("SERVICE_KEY", bad)
        with pytest.raises(UserError, match="expected a key of 8 or more"):
            read_credential(key)


@pytest.mark.parametrize("place", ["header", "query"])
def test_no_file_log_or_error_holds_the_key(
    place: str, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Against a service that repeats it in errors, labels and headers, with every logger at its loudest."""
    caplog.set_level(logging.DEBUG)
    credential = read_credential(key, query="token={key}" if place == "query" else None)
    said = [repr(credential), str(credential), f"{credential!r:>40}"]
    faults = ["echo:200", "echo:500", "echo:400", "reset", "cut", "hang", "echo:401"]
    for start, attempts in ((0, 1), (20, 2), (40, 1)):
        with FaultServer(faults * 4 if start < 40 else ["echo:403"]) as server:
            with HttpSender(server.url, credential, timeout=0.4) as send:
                said.append(repr(send))
                with Ledger(tmp_path / f"{start}.jsonl", ledger_header(send.endpoint, RAW)) as ledger:
                    client = QueryClient(
                        send, RAW, ledger, limits=QueryLimits(2, attempts=attempts, first_wait=0.01, grace=5)
                    )
                    try:
                        said += [repr(answer) for answer in client(queries(14, start))]
                    except RunFault as error:
                        said += [*traceback.format_exception(error), repr(error.__context__)]
            assert any(KEY in str(seen.headers) or "sk-4f9a" in seen.target for seen in server.seen)  # it was sent
    assert any("[key]" in text for text in said)  # and the service did repeat it
    with HttpSender("http://127.0.0.1:1", credential) as send:
        try:
            run_async(send(Request(b"x")))
        except ConnectionError as error:
            said += traceback.format_exception(error)
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    logged = [caplog.text, *(repr(vars(record)) for record in caplog.records)]
    shown = "".join([*said, *written, *logged, *capfd.readouterr()])
    assert "HTTP Request" in caplog.text
    for form in (KEY, "sk-4f9a", "Zq%2B0123", "Zq+0123"):
        assert form not in shown


def test_replies_have_a_size_limit() -> None:
    why = "HTTP 200: a reply of more than 2,000 bytes"
    with FaultServer(["huge:3000"]) as server, HttpSender(server.url, max_bytes=2000) as send:
        with pytest.raises(BadReply, match=why):
            run_async(send(Request(b"x")))
        assert run_async(send(Request(b"x"))).status == 200


@pytest.fixture
def query_child(tmp_path: Path, interruptible: None) -> Iterator[tuple[subprocess.Popen[str], FaultServer, Path]]:
    code = (
        "import sys\nfrom fault_server import *\nfrom certify.blackbox.client.query_client import *\n"
        "from certify.blackbox.client.http import *\nfrom certify.blackbox.ledger import *\n"
        "from certify.blackbox.ledger_contents import *\nurl, path = sys.argv[1:]\n"
        "with HttpSender(url) as send, Ledger(path, ledger_header(url, RAW)) as ledger:\n"
        "    client = QueryClient(send, RAW, ledger, limits=QueryLimits(3))\n"
        "    for a in client(queries(1000)): print(a.name, flush=True)\n"
    )
    path = tmp_path / "ledger"
    with FaultServer(delay=0.3) as server:
        child = subprocess.Popen(
            [sys.executable, "-c", code, server.url, path], cwd=HERE, stdout=-1, stderr=-1, text=True
        )
        try:
            yield child, server, path
        finally:
            child.kill()
            child.communicate()


def test_ctrl_c_waits_for_requests_in_flight(query_child: tuple[subprocess.Popen[str], FaultServer, Path]) -> None:
    child, server, path = query_child
    assert child.stdout is not None
    child.stdout.readline()
    wait_for(lambda: len(server.seen) >= 4)  # three others are on their way
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode != 0
    assert "KeyboardInterrupt" in errors
    kept = read_ledger(path)
    assert len(server.seen) == kept.spent == len(kept.answers) >= 4
    assert all(answer.ranked for answer in kept.answers.values())


def test_light_imports() -> None:
    code = (
        "import sys, certify.blackbox.types, certify.blackbox.ledger\n"
        "import certify.blackbox.client.query_client, certify.blackbox.client.http\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
