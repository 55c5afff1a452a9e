"""Queries to answers: within the budget, several at a time, at the allowed rate, each recorded before it is used.

A request is taken off the budget before it is sent. What the service declines (429, 5xx) and what gets lost on the way
(resets, timeouts) is sent again after a while, each time as a further request; what stays without a label is a failed
answer. A query that stands in the ledger is never sent again.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial

from certify.blackbox.client.rate_limit import Manners, Rate, retry_after
from certify.blackbox.client.worker_pool import Crew
from certify.blackbox.protocols.parsing import quoting, safe_text
from certify.blackbox.types import Answer, BadReply, Books, Busy, Format, Query, Ranked, Reply, Request, Sender
from certify.errors import CertifyError, RunFault, UserError, first_line

_AGAIN = (408, 425, 429)  # and 5xx but 501: such a request may do better later
_KEY = (401, 403, 407)  # a key that expired or was blocked is about no picture, so no query fails for it
_SILENT = 1.0  # seconds of waiting that need no word
_AHEAD = 2  # queries pulled for each thread: an answer that is late does not leave the others idle

logging.getLogger("stamina").addHandler(logging.NullHandler())  # else each retry is a line on the terminal


class _Again(Exception):
    """An attempt that brought nothing that counts; another may."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.why, self.seconds = why, seconds


class _Unwelcome(Exception):
    """The service refuses key or address, or wants to be left alone for long: so it would refuse every query.

    Args:
        why: what came.
        remedy: what to do.
    """

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.why, self.remedy = why, remedy


class _Declined(BadReply):
    """An error status: a failed trial that says nothing about the picture."""


class _SpentUp(Exception):
    """The budget does not cover another request."""


class _Stopped(Exception):
    """Nothing further is sent."""


class Asker:
    """Asks one service; an :class:`~certify.blackbox.types.Asking`.

    Args:
        send: of :mod:`certify.blackbox.client.http` or :mod:`certify.blackbox.client.aws`; called from several
            threads.
        format: how the service is asked and answers.
        ledger: keeps the books: an open :class:`~certify.blackbox.ledger.Ledger`, or what stands in for one.
        budget: requests that may be sent in the ledger's whole life; None for no limit.
        manners: how the service is treated.
        tell: hears that requests under way are waited for, when everything else has stopped.

    Raises:
        UserError: stamina is not installed, or a negative budget.
    """

    def __init__(
        self,
        send: Sender,
        format: Format,
        ledger: Books,
        *,
        budget: int | None = None,
        manners: Manners | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        try:
            import stamina
        except ImportError:
            raise UserError(
                "asking a service needs stamina, which is not installed; pip install 'certify-toolkit[audit]'"
            ) from None
        if budget is not None and budget < 0:
            raise UserError(f"query budget {budget}: expected a whole number from 0")
        self._retries = stamina.retry_context
        self._send, self._format, self._ledger, self._budget = send, format, ledger, budget
        self._manners = manners or Manners()
        self._tell = tell
        self._rate = Rate(self._manners.rate)
        self._change = threading.Condition()  # guards the three below
        self._claimed = ledger.spent  # sent, or about to be
        self._under_way = 0
        self._answered = False

    @property
    def spent(self) -> int:
        """Requests sent so far, retries included, those of earlier runs with this ledger too."""
        return self._ledger.spent

    def __call__(self, queries: Iterable[Query]) -> Iterator[Answer]:
        """Their answers, in the order of the queries, which are pulled a few ahead of the answers.

        Whatever ends it (its consumer, Ctrl-C, a fault), requests under way are waited for and recorded.

        Raises:
            BudgetSpent: the budget does not cover the next query or its next attempt; every answer before it was
                handed out. It stays open: a larger budget goes on there.
            RunFault: the service refuses the key, or the address before it has answered anything, or asks for a pause
                that is longer than ``longest_wait``; the query stays open. Or the disk is full.
            UserError: another picture was sent under a query's name before, or a name comes twice at a time.
        """
        crew, pending = Crew(self._manners.concurrency), deque[Future[Answer]]()
        try:
            for query in queries:
                pending.append(self._begin(query, crew))
                while len(pending) >= _AHEAD * crew.size:
                    yield crew.result(pending.popleft())
            while pending:
                yield crew.result(pending.popleft())
        except _SpentUp:
            raise self._spent_up() from None
        finally:
            self._finish(crew)

    def _begin(self, query: Query, crew: Crew) -> Future[Answer]:
        """Hand a query to the crew, unless the ledger has its answer."""
        with self._change:
            if query.name in crew.names:
                raise UserError(f"query {query.name!r} comes twice at a time; expected names that are unique")
            known = self._ledger.find(query)
            if known is not None:
                future = Future[Answer]()
                future.set_result(known)
                return future
            crew.names.add(query.name)
        return crew.submit(partial(self._ask, query, crew))

    def _spent_up(self) -> CertifyError:
        from certify.models.query_access import BudgetSpent  # which needs torch

        return BudgetSpent(self.spent, self._budget or 0, 1)

    def _finish(self, crew: Crew) -> None:
        with self._change:
            crew.stopped.set()
        crew.dismiss()
        grace = self._manners.grace
        with self._change:
            if self._change.wait_for(lambda: not self._under_way, min(_SILENT, grace)):
                return
            count = self._under_way
        self._tell(f"waiting for requests under way: {count}, {grace:g} s at most; their answers are kept")
        with self._change:
            self._change.wait_for(lambda: not self._under_way, grace - _SILENT)

    def _ask(self, query: Query, crew: Crew) -> Answer:
        """One query, until it is settled."""
        m = self._manners
        more = max(1, m.attempts - self._ledger.attempts(query.name))
        retries = self._retries(
            on=_wait_for,
            attempts=more,
            timeout=None,
            wait_initial=m.first_wait,
            wait_max=m.longest_wait,
            wait_jitter=m.first_wait,
        )
        try:
            request = self._format.request(query.picture)
            for retry in retries:
                with retry:
                    return self._attempt(query, request, crew, last=retry.num == more)
        except (_Stopped, _SpentUp):
            raise
        except BaseException as error:
            crew.stop(error)
            raise
        finally:
            with self._change:
                crew.names.discard(query.name)
        raise AssertionError("an attempt returns or raises")

    def _attempt(self, query: Query, request: Request, crew: Crew, *, last: bool) -> Answer:
        """One request: its time, its budget, its place among those that are waited for."""
        crew.stopped.wait(self._rate.take())
        with self._change:
            if crew.stopped.is_set():
                raise _Stopped
            if self._budget is not None and self._claimed >= self._budget:
                raise _SpentUp
            self._claimed += 1
            self._under_way += 1
        try:
            return self._exchange(query, request, last)
        finally:
            with self._change:
                self._under_way -= 1
                self._change.notify_all()

    def _exchange(self, query: Query, request: Request, last: bool) -> Answer:
        """Recorded, sent, read, recorded."""
        self._ledger.sent(query, request.body)
        ranked, failure, down, start = Ranked(), "", False, time.perf_counter()
        try:
            ranked = self._read(self._reply(request))
        except BadReply as error:
            failure, down = str(error) or "no label", isinstance(error, _Declined)
        except _Again as error:
            if not last:
                self._rate.pause(error.seconds or 0.0)
                self._ledger.refused(query.name, error.why)
                raise
            failure, down = error.why, True
        except _Unwelcome as error:
            self._ledger.refused(query.name, error.why)
            raise RunFault(
                f"the service turned down a query: {error.why}; {error.remedy}. Requests sent: {self.spent}; "
                "what was answered before is kept, the same command goes on"
            ) from None
        seconds = time.perf_counter() - start
        answer = Answer(query.name, ranked, failure, seconds, self._ledger.attempts(query.name), down=down)
        self._ledger.answer(answer)
        return answer

    def _reply(self, request: Request) -> Reply:
        try:
            return self._send(request)
        except OSError as error:
            raise _Again(first_line(error)) from None

    def _read(self, reply: Reply) -> Ranked:
        """The labels of a reply.

        Raises:
            BadReply: there are none, for good.
            _Again: another attempt may bring some.
            _Unwelcome: not before something else has changed.
        """
        if not 200 <= reply.status < 300:
            said = safe_text(reply.body)
            why = f"HTTP {reply.status}" + (f": {said}" if said else "")
            if reply.status in _AGAIN or (reply.status >= 500 and reply.status != 501):
                seconds = retry_after(reply)
                if seconds is not None and seconds > self._manners.longest_wait:
                    raise _Unwelcome(why, f"it asks to be left alone for {seconds:,.0f} s: start again after that time")
                raise _Again(why, seconds)
            remedy = _remedy(reply)
            if remedy and (reply.status in _KEY or not self._answered):  # another address may be about one picture
                raise _Unwelcome(why, remedy)
            raise _Declined(why)
        try:
            ranked = self._format.reply(reply)
        except Busy as error:
            raise _Again(str(error)) from None
        except BadReply as error:
            raise BadReply(quoting(str(error), reply.body)) from None
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise BadReply(f"a reply that cannot be read ({type(error).__name__})") from None
        if not ranked or any(one.score is not None and not math.isfinite(one.score) for one in ranked):
            raise BadReply("a score that is no number" if ranked else "an answer without labels")
        self._answered = True
        return ranked


def _wait_for(error: Exception) -> bool | float:
    """Whether there is another attempt, or the seconds until then."""
    if not isinstance(error, _Again):
        return False
    return True if error.seconds is None else error.seconds


def _remedy(reply: Reply) -> str:
    """What to do about a status that every query would meet; empty where it may be about one picture."""
    if reply.status in _KEY:
        return "check the key, the variable that --api-key-env names, and --auth-header"
    if reply.status in (404, 405, 410):
        return "check --endpoint and --protocol"
    if 300 <= reply.status < 400:
        where = next((v for k, v in reply.headers.items() if k.lower() == "location"), "") or "another address"
        return (
            f"it points to {where[:200]!r}, and redirects are not followed: if you trust that, make it the --endpoint"
        )
    return ""
