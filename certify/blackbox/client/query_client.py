"""Query a service within a budget, several requests at a time; requests are logged before they are sent.

A request counts against the budget before it is sent, and a reply is logged before it is used. Requests that the
service declines (429, 5xx) or that are lost (resets, timeouts) are retried after a wait, and each retry counts; a query
without a label after all attempts is a failed answer. A query whose answer is in the log is never sent again.

Everything except the caller's iteration runs on one event loop, so counts and log need no locks.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from certify.blackbox.client.http import event_loop, on_event_loop, run_async
from certify.blackbox.client.rate_limit import QueryLimits, RateLimiter, retry_after
from certify.blackbox.protocols.parsing import quoting, safe_text
from certify.blackbox.types import Answer, BadReply, Busy, Format, Query, Ranked, Reply, Request, Sender
from certify.errors import BudgetSpent, RunFault, UserError, first_line

if TYPE_CHECKING:
    from certify.blackbox.ledger import InMemoryLog, Ledger

_RETRIED = (408, 425, 429)  # and 5xx except 501
_KEY_REFUSED = (401, 403, 407)  # unrelated to the picture, so the query does not fail
_SILENT = 1.0  # seconds to wait before displaying a message
_AHEAD = 2  # queries pulled per request in flight, so that one late answer does not idle the others

logging.getLogger("stamina").addHandler(logging.NullHandler())  # otherwise every retry is printed


class _Retry(Exception):
    """An attempt without an answer that may be repeated, after ``seconds`` if the service requests that."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.why, self.seconds = why, seconds


class _Refused(Exception):
    """The service rejects the key or the URL, or accepts no queries at present; all other queries would fail, too.

    Args:
        why: the reply, in one line.
        remedy: advice for the user.
    """

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.why, self.remedy = why, remedy


class _ErrorStatus(BadReply):
    """A final error status: a failed trial, unrelated to the picture."""


@dataclass
class _Call:
    """The state of one call of the client; ``fault`` holds the first error, which ends the call."""

    tasks: dict[asyncio.Task[Answer], Query] = field(default_factory=dict)
    in_flight: set[asyncio.Task[Answer]] = field(default_factory=set)
    fault: concurrent.futures.Future[Answer] = field(default_factory=concurrent.futures.Future)
    ended: bool = False

    def finish(self, exchange: asyncio.Task[Answer]) -> None:
        """Remove a request that is no longer in flight; its query raises any error."""
        self.in_flight.discard(exchange)
        if not exchange.cancelled():
            exchange.exception()

    def result(self, future: concurrent.futures.Future[Answer]) -> Answer:
        """Wait for an answer, or for a fault of any query."""
        if not future.done():
            concurrent.futures.wait((future, self.fault), return_when=concurrent.futures.FIRST_COMPLETED)
        return (self.fault if self.fault.done() else future).result()


class QueryClient:
    """Query one service; a :class:`~certify.blackbox.types.Client`. May be called from several threads.

    Args:
        send: sender of :mod:`certify.blackbox.client.http` or :mod:`certify.blackbox.client.aws`.
        format: wire format of the service.
        log: open log that records every request and answer.
        budget: maximum number of requests over the log's lifetime; None for no limit.
        limits: limits on concurrency, rate and attempts.
        tell: called with a message if ending a call has to wait for requests in flight.

    Raises:
        UserError: aiolimiter or stamina is not installed, or the budget is negative.
    """

    def __init__(
        self,
        send: Sender,
        format: Format,
        log: Ledger | InMemoryLog,
        *,
        budget: int | None = None,
        limits: QueryLimits | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._limits = limits or QueryLimits()
        try:
            import stamina

            self._rate = RateLimiter(self._limits.rate)
        except ImportError as error:
            raise UserError(
                f"querying a service needs {error.name}, which is not installed; pip install 'certify-toolkit[audit]'"
            ) from None
        if budget is not None and budget < 0:
            raise UserError(f"query budget {budget}: expected a whole number from 0")
        self._retries = stamina.retry_context
        self._send, self._format, self._log, self._budget, self._tell = send, format, log, budget, tell
        self._slots = asyncio.Semaphore(self._limits.concurrency)
        self._claimed = log.spent  # sent, or about to be
        self._answered = False
        self._loop = event_loop()

    @property
    def spent(self) -> int:
        """Requests sent so far, including retries and earlier runs with this log."""
        return self._log.spent

    def __call__(self, queries: Iterable[Query]) -> Iterator[Answer]:
        """Yield the answers in the order of the queries, which are pulled a few ahead of the answers.

        However it ends (by the consumer, Ctrl-C or an error), it waits for requests in flight and logs them.

        Raises:
            BudgetSpent: the budget does not cover the next query or its next attempt. Every answer before it was
                yielded; the query stays open, so that a larger budget resumes there.
            RunFault: the service rejects the key, rejects the URL before any answer, or requests a pause longer than
                ``longest_wait``; the query stays open. Or the log cannot be written.
            UserError: another picture was sent under a query's name, or a name occurs twice at a time.
        """
        call, pending = _Call(), deque[concurrent.futures.Future[Answer]]()
        try:
            for query in queries:
                pending.append(asyncio.run_coroutine_threadsafe(self._settle(query, call), self._loop))
                while len(pending) >= _AHEAD * self._limits.concurrency:
                    yield call.result(pending.popleft())
            while pending:
                yield call.result(pending.popleft())
        finally:
            self._end(call)

    def _end(self, call: _Call) -> None:
        """End a call: send nothing more, and wait for its requests in flight."""
        if on_event_loop():  # the garbage collector may run anywhere
            call.ended = True
            return
        grace = self._limits.grace
        count = run_async(_wind_down(call, min(_SILENT, grace)))
        if count:
            self._tell(f"waiting for requests in flight: {count}, {grace:g} s at most; their answers are kept")
            run_async(_wind_down(call, grace - _SILENT))

    async def _settle(self, query: Query, call: _Call) -> Answer:
        """Return the answer to a query from the log, or query the service."""
        task = asyncio.current_task()
        assert task is not None
        try:
            if any(other.name == query.name for other in call.tasks.values()):
                raise UserError(f"query {query.name!r} occurs twice at a time; expected unique names")
            known = self._log.find(query)
            if known is not None:
                return known
            call.tasks[task] = query
            request = self._loop.run_in_executor(None, self._format.request, query.picture)  # encodes ahead
            async with self._slots:
                return await self._attempts(query, await request, call)
        except (asyncio.CancelledError, BudgetSpent):
            raise
        except BaseException as error:
            call.ended = True
            if not call.fault.done():
                call.fault.set_exception(error)
            raise
        finally:
            call.tasks.pop(task, None)

    async def _attempts(self, query: Query, request: Request, call: _Call) -> Answer:
        """Send a query until it has an answer or its attempts are used up."""
        limits = self._limits
        attempts = max(1, limits.attempts - self._log.attempts(query.name))
        retries = self._retries(
            on=_backoff,
            attempts=attempts,
            timeout=None,
            wait_initial=limits.first_wait,
            wait_max=limits.longest_wait,
            wait_jitter=limits.first_wait,
        )
        async for attempt in retries:
            with attempt:
                await self._rate.acquire()
                if call.ended:
                    raise asyncio.CancelledError
                if self._budget is not None and self._claimed >= self._budget:
                    raise BudgetSpent(self._claimed, self._budget, 1)
                self._claimed += 1
                # A task of its own, which the end of the call does not cancel: the reply to what was sent is logged.
                exchange = asyncio.ensure_future(self._exchange(query, request, last=attempt.num == attempts))
                call.in_flight.add(exchange)
                exchange.add_done_callback(call.finish)
                await asyncio.wait((exchange,))
                return exchange.result()
        raise AssertionError("an attempt returns or raises")

    async def _exchange(self, query: Query, request: Request, *, last: bool) -> Answer:
        """Log and send a request, then parse and log its answer."""
        await self._log.sent(query, request.body)
        ranked, failure, down, start = Ranked(), "", False, time.perf_counter()
        try:
            ranked = self._read(await self._send(request))
        except BadReply as error:
            failure, down = str(error) or "no label", isinstance(error, _ErrorStatus)
        except (OSError, _Retry) as error:
            retry = error if isinstance(error, _Retry) else _Retry(first_line(error))
            if not last:
                self._rate.pause(retry.seconds or 0.0)
                await self._log.refused(query.name, retry.why)
                raise retry from None
            failure, down = retry.why, True
        except _Refused as error:
            await self._log.refused(query.name, error.why)
            raise RunFault(
                f"the service refused a query: {error.why}; {error.remedy}. Requests sent: {self.spent}; earlier "
                "answers are kept, and the same command resumes"
            ) from None
        seconds = time.perf_counter() - start
        answer = Answer(query.name, ranked, failure, seconds, self._log.attempts(query.name), down=down)
        await self._log.answer(answer)
        return answer

    def _read(self, reply: Reply) -> Ranked:
        """Return the labels of a reply.

        Raises:
            BadReply: there are no labels, and a retry would not help.
            _Retry: a retry may succeed.
            _Refused: every query would fail at present.
        """
        if not 200 <= reply.status < 300:
            said = safe_text(reply.body)
            why = f"HTTP {reply.status}" + (f": {said}" if said else "")
            if reply.status in _RETRIED or (reply.status >= 500 and reply.status != 501):
                seconds = retry_after(reply)
                if seconds is not None and seconds > self._limits.longest_wait:
                    raise _Refused(why, f"it asks for a pause of {seconds:,.0f} s: run the command again after it")
                raise _Retry(why, seconds)
            remedy = _remedy(reply)
            if remedy and (reply.status in _KEY_REFUSED or not self._answered):  # otherwise it may concern this picture
                raise _Refused(why, remedy)
            raise _ErrorStatus(why)
        try:
            ranked = self._format.reply(reply)
        except Busy as error:
            raise _Retry(str(error)) from None
        except BadReply as error:
            raise BadReply(quoting(str(error), reply.body)) from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise BadReply(f"a reply that cannot be read ({type(error).__name__})") from None
        if not ranked or any(one.score is not None and not math.isfinite(one.score) for one in ranked):
            raise BadReply("a score that is not a number" if ranked else "an answer without labels")
        self._answered = True
        return ranked


async def _wind_down(call: _Call, seconds: float) -> int:
    """Cancel the queries of a call that are not in flight, wait for the others, and return how many remain."""
    call.ended = True
    for task in call.tasks:
        task.cancel()
    if call.in_flight:
        await asyncio.wait(call.in_flight, timeout=seconds)
    return len(call.in_flight)


def _backoff(error: Exception) -> bool | float:
    """Return whether to retry after this error: True, False, or the wait in seconds."""
    if not isinstance(error, _Retry):
        return False
    return True if error.seconds is None else error.seconds


def _remedy(reply: Reply) -> str:
    """Return advice for a status that every query would get; empty if it may concern only one picture."""
    if reply.status in _KEY_REFUSED:
        return "check the key, the variable that --api-key-env names, and --auth-header"
    if reply.status in (404, 405, 410):
        return "check the endpoint and the protocol"
    if 300 <= reply.status < 400:
        where = next((v for k, v in reply.headers.items() if k.lower() == "location"), "") or "another address"
        return f"it redirects to {where[:200]!r}, which is not followed; if you trust that URL, pass it as endpoint"
    return ""
