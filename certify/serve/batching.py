"""One worker thread owns the smoothed classifier and takes pieces of all requests in work together.

Noise hangs on the image and the seed alone (:mod:`certify.smoothing.rng`), and each image has its own watch
(:mod:`certify.engine.adaptive`): an answer depends on the other requests only as far as the last bits of a score
depend on the batch, which batches of one shape exclude (compiled classifiers, exact noise).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from certify.engine.adaptive import Label, Sampling, settle
from certify.engine.noisy_classifier import noise_name
from certify.errors import ContractError, UserError, in_words
from certify.models.query_access import BudgetSpent
from certify.serve.limits import Limits, Refused
from certify.serve.protocol import ABSTAINED, Answer, Wishes
from certify.smoothed_classifier import SmoothedClassifier
from certify.smoothing.certificates import check_counts, needed
from certify.smoothing.numeric import as_float, as_int
from certify.smoothing.procedures import Certify, Decide
from certify.smoothing.rng import stream_key
from certify.smoothing.sequential_tests import SequentialTest
from certify.smoothing.stopping_rules import DEFAULT_RULE
from certify.text import printable
from certify.types import ABSTAIN, Certificate, Decision

_LOG = logging.getLogger(__name__)
_RECOVERY = 30.0  # seconds after a fault until the server calls itself ready again: somebody must try
_WORTH = 100  # images whose work the choice of an engine should pay for


@dataclass(frozen=True)
class Procedure:
    """What is done with an image unless its request says otherwise.

    Attributes:
        n0: selection samples.
        n: estimation samples; the most of them at a radius.
        alpha: probability that the statement about an image is wrong, at most.
        radius: decide at this radius; None: measure it.
        seed: of all noise; by default a secret one.
    """

    n0: int = 100
    n: int = 1000
    alpha: float = 0.001
    radius: float | None = None
    seed: int = field(default_factory=lambda: secrets.randbits(128), repr=False)

    def __post_init__(self) -> None:
        n, n0, alpha = check_counts(self.n, self.n0, self.alpha)
        radius = None if self.radius is None else as_float(self.radius, "radius")
        numbers = {"n": n, "n0": n0, "alpha": alpha, "radius": radius, "seed": as_int(self.seed, "seed")}
        for name, value in numbers.items():
            object.__setattr__(self, name, value)

    def cost(self, wishes: Wishes) -> int:
        """Samples of one image, at most."""
        radius = self.radius if wishes.radius is None else wishes.radius
        return (wishes.samples or self.n) + (self.n0 if radius is None else 0)


def stream_name(name: str, seed: int | None) -> str:
    """The name of an image's noise, with the request's seed if it has one."""
    return name if seed is None else f"{name} | {seed}"


@dataclass(eq=False)
class _Image:
    """One image of a request: its stages that are not settled yet, the votes of the others, and who waits."""

    pixels: np.ndarray
    wishes: Wishes
    answer: Future[Answer]
    open: int = 0
    found: dict[str, Any] = field(default_factory=dict)
    question: Certify | Decide = field(default_factory=Certify)


class _Part:
    """A sequential test that knows its image, and ends early when the request was cancelled."""

    def __init__(self, image: _Image, stage: str, inner: SequentialTest) -> None:
        self.image, self.stage, self._inner = image, stage, inner
        self.drawn, self.pending = inner.drawn, inner.pending

    def add(self, labels: np.ndarray) -> None:
        """Add labels to the test."""
        self._inner.add(labels)
        self.drawn = self._inner.drawn
        self.pending = 0 if self.image.answer.cancelled() else self._inner.pending

    def result(self) -> Any:
        """Return the result of the test."""
        return self._inner.result()


class Service:
    """Answers images in a thread of its own; a context manager that ends when what it accepted is done, or in time.

    Args:
        smoothed: prepared or not; nobody else may use it meanwhile.
        size: (C, H, W) of the images.
        procedure: unless a request says otherwise.
        limits: on the samples of a request.
        names: of the classes.
        on_samples: told the number of samples that were labelled, now and then.
    """

    def __init__(
        self,
        smoothed: SmoothedClassifier,
        size: tuple[int, int, int],
        procedure: Procedure,
        limits: Limits,
        names: Callable[[int], str],
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.smoothed, self.size, self.procedure, self.limits = smoothed, size, procedure, limits
        self.name_of, self._on_samples = names, on_samples
        self._waiting: dict[str, deque[deque[_Image]]] = {}  # requests of each client, the next client first
        self._parts: deque[Sampling] = deque()
        self._work: set[_Part] = set()
        self._changed = threading.Condition()
        self._ending, self._well_again = False, 0.0
        self._real = False  # whether the contract was checked on an image that somebody sent
        self._broken: ContractError | None = None  # for good
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="certify-serve", daemon=True)
        self.stated = smoothed.stated(int(np.prod(size)))
        if procedure.radius is not None:
            needed([procedure.radius], self.stated, procedure.alpha, DEFAULT_RULE)
        if procedure.cost(Wishes()) > limits.budget:
            raise UserError(
                f"an image takes {procedure.cost(Wishes()):,} samples and a request may take {limits.budget:,}: "
                "pass a smaller --n or a larger --samples-per-request"
            )

    def __enter__(self) -> Service:
        self._thread.start()
        self._ready.result()
        return self

    def __exit__(self, *_: object) -> None:
        self.close(self.limits.timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Finish what was accepted, then end the thread; whether it has ended within the timeout, in seconds."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive() and not self._ending

    @property
    def well(self) -> bool:
        """Whether the classifier's last work succeeded, or it is time to try again; not after a spent budget."""
        return time.monotonic() >= self._well_again

    def ask(self, images: np.ndarray, wishes: Wishes, client: str = "") -> list[Future[Answer]]:
        """Return the pending answers about images ``(B, C, H, W)``; cancel them to save the work.

        Args:
            images: float32 in [0, 1], or uint8.
            wishes: for each of them.
            client: who asks. Clients take turns, and so do the requests of each.

        Raises:
            Refused: more samples than a request may take, a radius that cannot be certified, or it is ending.
        """
        cost = len(images) * self.procedure.cost(wishes)
        if cost > self.limits.budget:
            raise Refused(
                400,
                f"{len(images)} images take {cost:,} samples in all; a request may take {self.limits.budget:,}: "
                "ask for fewer 'samples', or about fewer images",
                "budget",
            )
        if wishes.radius is not None:
            try:
                needed([wishes.radius], self.stated, self.procedure.alpha, DEFAULT_RULE)
            except UserError as error:
                raise Refused(400, str(error).split(";")[0]) from None
        asked = deque(_Image(pixels, wishes, Future()) for pixels in images)
        if self._broken is not None:
            raise _fault(self._broken)
        answers = [image.answer for image in asked]
        for image in asked:
            image.answer.add_done_callback(functools.partial(self._forget, client, asked, image))
        with self._changed:
            if not self.alive:
                raise Refused(503, "the server is stopping", "stopping", retry_after=5)
            self._waiting.setdefault(client, deque()).append(asked)
            self._changed.notify()
        return answers

    def _forget(self, client: str, asked: deque[_Image], image: _Image, answer: Future[Answer]) -> None:
        """Keep nothing of an image that waits and that nobody waits for any more."""
        if answer.cancelled():
            with self._changed, contextlib.suppress(ValueError):
                asked.remove(image)
                if not asked:
                    self._waiting[client].remove(asked)
                    if not self._waiting[client]:
                        del self._waiting[client]

    def _first(self) -> _Image:
        """Take the next image of the next request of the next client; all of them go behind the others."""
        client = next(iter(self._waiting))
        requests = self._waiting.pop(client)
        request = requests.popleft()
        image = request.popleft()
        if request:
            requests.append(request)
        if requests:
            self._waiting[client] = requests
        return image

    def _run(self) -> None:
        """The worker: settle images until there is nothing to do any more and nothing will come."""
        samples = _WORTH * self.procedure.cost(Wishes())
        try:
            label, batch_size = self.smoothed.labeller(torch.zeros(self.size), samples, self._on_samples)
        except Exception as error:  # is raised where the service was started
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while not self._ended:
            try:
                self._settle(label, batch_size)
            except Exception as error:  # whatever the classifier raised must not end the server
                self._fail(error)

    def _settle(self, label: Label, batch_size: int) -> None:
        def images() -> Iterator[Sampling | None]:
            while (found := self._next(batch_size)) is not None or not self._ended:
                yield found

        for settled in settle(label, images(), batch_size=batch_size, clean=False):
            assert isinstance(settled.test, _Part)
            self._finish(settled.test)

    @property
    def _ended(self) -> bool:
        return self._ending and not self._work and not self._waiting

    def _next(self, batch_size: int) -> Sampling | None:
        """Return the next part to open, of each client in turn; wait only while nothing is being sampled."""
        while not self._parts:
            with self._changed:
                while not self._waiting:
                    if self._work or self._ending:
                        return None
                    self._changed.wait()
                image = self._first()
            if image.answer.cancelled():
                continue
            try:
                self._open(image, batch_size)
            except Exception as error:
                _deliver(image.answer, _fault(error))
                raise
        part = self._parts.popleft()
        assert isinstance(part.test, _Part)
        self._work.add(part.test)
        return part

    def _open(self, image: _Image, batch_size: int) -> None:
        """Open the parts of an image: a noise stream and a test each."""
        procedure = self.procedure
        try:
            tensor = self.smoothed.check(image.pixels)
        except UserError as error:  # the noise is not defined around this image
            _deliver(image.answer, Refused(400, str(error)))
            return
        if self._broken is not None:
            _deliver(image.answer, _fault(self._broken))
            return
        self.smoothed.check_contract(tensor, again=not self._real)
        self._real = True
        there = tensor.to(self.smoothed.device)
        radius = procedure.radius if image.wishes.radius is None else image.wishes.radius
        n = image.wishes.samples or procedure.n
        question = (
            Certify(procedure.n0, n, procedure.alpha) if radius is None else Decide((radius,), n, procedure.alpha)
        )
        tests = question.tests(self.smoothed.num_classes, self.stated, batch_size)
        image.question, image.open = question, len(tests)
        name = stream_name(noise_name(tensor), image.wishes.seed)
        for stage, test in tests.items():
            self._parts.append(Sampling(there, stream_key(procedure.seed, name, stage), _Part(image, stage, test)))

    def _finish(self, part: _Part) -> None:
        self._work.discard(part)
        image = part.image
        image.found[part.stage] = part.result()
        image.open -= 1
        self._well_again = 0.0
        if not image.open and not image.answer.cancelled():
            _deliver(image.answer, self._answer(image))

    def _answer(self, image: _Image) -> Answer:
        answer = image.question.answer(image.found, self.stated)
        return self._decided(answer) if isinstance(answer, Decision) else self._certified(answer)

    def _certified(self, found: Certificate) -> Answer:
        return Answer(
            label=found.prediction,
            name=self._name(found.prediction),
            radius=found.radius,
            p_lower=found.p_lower,
            outcome=ABSTAINED if found.abstained else "certified",
            samples=found.selection.trials + found.estimation.trials,
            failures=found.selection.failures + found.estimation.failures,
            leading=found.estimation.leader,
            votes=found.estimation.counts,
        )

    def _decided(self, found: Decision) -> Answer:
        robust = found.prediction != ABSTAIN
        return Answer(
            label=found.prediction,
            name=self._name(found.prediction),
            radius=found.radius,
            p_lower=self.stated.probability(found.radius) if robust else 0.0,  # what being robust there means
            outcome=found.outcomes[-1],
            samples=found.drawn,
            failures=found.votes.failures,
            leading=found.votes.leader,
            votes=found.votes.counts,
        )

    def _name(self, label: int) -> str:
        return ABSTAINED if label == ABSTAIN else self.name_of(label)

    def _failed(self, error: Exception) -> None:
        self._broken = error if isinstance(error, ContractError) else None
        for_good = isinstance(error, BudgetSpent | ContractError)
        self._well_again = math.inf if for_good else time.monotonic() + _RECOVERY
        _LOG.error("the classifier failed: %s", printable(in_words(error)))

    def _fail(self, error: Exception) -> None:
        """Everything in work fails with what the classifier failed with; what waits is tried."""
        self._failed(error)
        for part in [*self._work, *(part.test for part in self._parts)]:
            assert isinstance(part, _Part)
            _deliver(part.image.answer, _fault(error))
        self._work.clear()
        self._parts.clear()


def _fault(error: Exception) -> Refused:
    """What clients may know: the rest, such as a service's address or its reply, stands in the log."""
    if isinstance(error, BudgetSpent):
        return Refused(503, "the query budget of this server is spent", "spent")
    if isinstance(error, ContractError):
        return Refused(503, "the classifier is not a fixed function of the image: nothing can be certified", "fault")
    return Refused(500, "the classifier failed", "fault")


def _deliver(answer: Future[Answer], what: Answer | Refused) -> None:
    """Unless nobody waits any more."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(what, Refused):
            answer.set_exception(what)
        else:
            answer.set_result(what)


def class_names(names: Sequence[Sequence[str]] | None) -> Callable[[int], str]:
    """A class's number to its first name; the number where there are none."""
    return lambda label: names[label][0] if names is not None and label < len(names) and names[label] else str(label)
