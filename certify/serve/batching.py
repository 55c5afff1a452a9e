"""Sample the images of all requests together, in a worker thread that owns the smoothed classifier.

The noise depends only on the image and the seed (:mod:`certify.smoothing.rng`), and each image has its own sequential
test (:mod:`certify.engine.adaptive`). An answer depends on other requests only if the last bits of a score depend on
the batch, which batches of a fixed shape exclude (compiled classifiers, exact noise).
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
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from certify.engine.adaptive import Label, Sampling, settle
from certify.engine.noisy_classifier import noise_name
from certify.errors import BudgetSpent, ContractError, UserError, in_words
from certify.serve.admission import Limits, Refused
from certify.serve.protocol import ABSTAINED, ONE_COPY, Answer, RequestOptions
from certify.smoothed_classifier import SmoothedClassifier
from certify.smoothing.certificates import needed
from certify.smoothing.numeric import as_int
from certify.smoothing.procedures import Accuracy, Certify, Decide, samples, stage_tests
from certify.smoothing.rng import stream_key
from certify.smoothing.sequential_tests import SequentialTest
from certify.text import printable
from certify.types import ABSTAIN, Certificate, Decision, Prediction

Served = Accuracy | Certify | Decide
"""Questions about an image; :class:`Accuracy` answers from one noisy copy, without a certificate."""

_LOG = logging.getLogger(__name__)
_RECOVERY = 30.0  # seconds after a failure until the server reports ready again; only a request can test it
_EXPECTED_IMAGES = 100  # for the execution policy


def requested(default: Served, options: RequestOptions) -> Served:
    """Return the server's procedure with the options of a request applied.

    Raises:
        UserError: number of samples or radius out of range, or options of a server that answers from one noisy copy.
    """
    if isinstance(default, Accuracy):
        if options != RequestOptions():
            raise UserError("radius, samples and seed do not apply to a server that answers from one fresh noisy copy")
        return default
    n = options.samples or default.n
    return replace(default, n=n) if options.radius is None else Decide((options.radius,), n, default.alpha)


def stream_name(name: str, seed: int | None) -> str:
    """Return the name of an image's noise stream, with the request's seed if it has one."""
    return name if seed is None else f"{name} | {seed}"


@dataclass(eq=False)
class _Image:
    """An image of a request: its pending answer, number of unfinished stages, and votes of finished stages."""

    pixels: np.ndarray
    options: RequestOptions
    procedure: Served
    answer: Future[Answer] = field(default_factory=Future)
    unfinished: int = 0
    votes: dict[str, Any] = field(default_factory=dict)


class _StageTest:
    """Sequential test of one stage of an image, which ends early if the request is cancelled."""

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
    """Answer images in a thread of its own.

    A context manager: on exit accepted images are finished, within the time limit of a request.

    Args:
        smoothed: the smoothed classifier, for exclusive use.
        size: (C, H, W) of the images.
        procedure: default procedure; a request may override its options.
        limits: limits of a request.
        class_name: function from class index to name.
        on_samples: called with numbers of labelled samples.
        seed: seed of all noise; None draws a secret one. Not used to answer from one noisy copy, whose noise is never
            repeated.

    Raises:
        UserError: a radius that cannot be certified, or more samples per image than a request may take.
    """

    def __init__(
        self,
        smoothed: SmoothedClassifier,
        size: tuple[int, int, int],
        procedure: Served,
        limits: Limits,
        class_name: Callable[[int], str],
        on_samples: Callable[[int], None] = lambda count: None,
        seed: int | None = None,
    ) -> None:
        self.smoothed, self.size, self.procedure, self.limits = smoothed, size, procedure, limits
        self.class_name, self._on_samples = class_name, on_samples
        self._seed = secrets.randbits(128) if seed is None else as_int(seed, "seed")
        self._waiting: dict[str, deque[deque[_Image]]] = {}  # requests of each client, the next client first
        self._opened: deque[Sampling] = deque()
        self._sampled: set[_StageTest] = set()
        self._changed = threading.Condition()
        self._ending, self._healthy_from = False, 0.0
        self._checked = False  # True once the contract has been checked on an image of a request
        self._broken: ContractError | None = None  # permanently
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="certify-serve", daemon=True)
        self.stated = smoothed.stated(int(np.prod(size)))
        self._check_radii(procedure)
        if (cost := samples(procedure)) > limits.budget:
            raise UserError(
                f"an image takes {cost:,} samples and a request may take {limits.budget:,}: "
                "pass a smaller --n or a larger --samples-per-request"
            )

    def __enter__(self) -> Service:
        self._thread.start()
        self._ready.result()
        return self

    def __exit__(self, *_: object) -> None:
        self.close(self.limits.timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Finish accepted images and end the thread; return True if it ended within the timeout, in seconds."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """True if the thread runs and accepts images."""
        return self._thread.is_alive() and not self._ending

    @property
    def healthy(self) -> bool:
        """True unless the classifier failed recently, is not a fixed function, or has spent its query budget."""
        return time.monotonic() >= self._healthy_from

    def submit(self, images: np.ndarray, options: RequestOptions, client: str = "") -> list[Future[Answer]]:
        """Queue images ``(B, C, H, W)`` and return their pending answers, which may be cancelled.

        Args:
            images: float32 in [0, 1], or uint8.
            options: options for all images.
            client: key of the client; clients take turns, and so do the requests of each.

        Raises:
            Refused: more samples than a request may take, a radius that cannot be certified, or the service is ending.
        """
        try:
            procedure = requested(self.procedure, options)
            self._check_radii(procedure)
        except UserError as error:
            raise Refused(400, str(error).split(";")[0]) from None
        cost = len(images) * samples(procedure)
        if cost > self.limits.budget:
            raise Refused(
                400,
                f"{len(images)} images take {cost:,} samples in all; a request may take {self.limits.budget:,}: "
                "request fewer 'samples' or fewer images",
                "budget",
            )
        request = deque(_Image(pixels, options, procedure) for pixels in images)
        answers = [image.answer for image in request]
        for image in request:
            image.answer.add_done_callback(functools.partial(self._drop_cancelled, client, request, image))
        with self._changed:
            if not self.alive:
                raise Refused(503, "the server is stopping", "stopping", retry_after=5)
            self._waiting.setdefault(client, deque()).append(request)
            self._changed.notify()
        return answers

    def _check_radii(self, procedure: Served) -> None:
        if isinstance(procedure, Decide):
            needed(procedure.radii, self.stated, procedure.alpha, procedure.rule)

    def _drop_cancelled(self, client: str, request: deque[_Image], image: _Image, answer: Future[Answer]) -> None:
        """Remove a waiting image whose answer was cancelled."""
        if answer.cancelled():
            with self._changed, contextlib.suppress(ValueError):
                request.remove(image)
                if not request:
                    self._waiting[client].remove(request)
                    if not self._waiting[client]:
                        del self._waiting[client]

    def _take_first(self) -> _Image:
        """Take the next image of the next request of the next client, and requeue both at the end."""
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
        """Sample images until the service has ended; the thread's main function."""
        try:
            label, batch_size = self.smoothed.labeller(
                torch.zeros(self.size), _EXPECTED_IMAGES * samples(self.procedure), self._on_samples
            )
        except Exception as error:  # raised again in the thread that starts the service
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while not self._ended:
            try:
                self._sample(label, batch_size)
            except Exception as error:  # an error of the classifier must not stop the server
                self._fail(error)

    def _sample(self, label: Label, batch_size: int) -> None:
        def images() -> Iterator[Sampling | None]:
            while (opened := self._next(batch_size)) is not None or not self._ended:
                yield opened

        for settled in settle(label, images(), batch_size=batch_size, clean=False):
            assert isinstance(settled.test, _StageTest)
            self._finish(settled.test)

    @property
    def _ended(self) -> bool:
        return self._ending and not self._sampled and not self._waiting

    def _next(self, batch_size: int) -> Sampling | None:
        """Return the next stage to sample, or None; wait only while nothing is being sampled."""
        while not self._opened:
            with self._changed:
                while not self._waiting:
                    if self._sampled or self._ending:
                        return None
                    self._changed.wait()
                image = self._take_first()
            if image.answer.cancelled():
                continue
            try:
                self._open(image, batch_size)
            except Exception as error:
                _deliver(image.answer, _fault(error))
                raise
        opened = self._opened.popleft()
        assert isinstance(opened.test, _StageTest)
        self._sampled.add(opened.test)
        return opened

    def _open(self, image: _Image, batch_size: int) -> None:
        """Open the stages of an image, each with a noise stream and a test."""
        try:
            tensor = self.smoothed.check(image.pixels)
        except UserError as error:  # the noise is not defined for this image
            _deliver(image.answer, Refused(400, str(error)))
            return
        if self._broken is not None:
            _deliver(image.answer, _fault(self._broken))
            return
        self.smoothed.check_contract(tensor, again=not self._checked)
        self._checked = True
        on_device = tensor.to(self.smoothed.device)
        tests = stage_tests(image.procedure, self.smoothed.num_classes, self.stated, batch_size)
        image.unfinished = len(tests)
        name = stream_name(noise_name(tensor), image.options.seed)
        # An attacker who can repeat the draw of a single noisy copy tries images until it fails: each gets a fresh one.
        once = isinstance(image.procedure, Accuracy)
        for stage, test in tests.items():
            key = stream_key(secrets.randbits(128) if once else self._seed, name, stage)
            self._opened.append(Sampling(on_device, key, _StageTest(image, stage, test), once=once))

    def _finish(self, test: _StageTest) -> None:
        self._sampled.discard(test)
        image = test.image
        image.votes[test.stage] = test.result()
        image.unfinished -= 1
        self._healthy_from = 0.0
        if not image.unfinished and not image.answer.cancelled():
            _deliver(image.answer, self._answer(image.procedure.answer(image.votes, self.stated)))

    def _answer(self, result: Certificate | Decision | Prediction) -> Answer:
        label, radius, p_lower = result.prediction, 0.0, 0.0
        if isinstance(result, Prediction):  # of one noisy copy
            votes, samples, failures = result.votes, result.votes.trials, result.votes.failures
            label, outcome = votes.leader, ONE_COPY if votes.leader != ABSTAIN else ABSTAINED
        elif isinstance(result, Decision):
            radius = result.radius
            p_lower = (
                self.stated.probability(result.radius) if label != ABSTAIN else 0.0
            )  # the bound that robustness at this radius implies
            outcome, samples, failures, votes = result.outcomes[-1], result.drawn, result.votes.failures, result.votes
        else:
            radius, p_lower, votes = result.radius, result.p_lower, result.estimation
            outcome = ABSTAINED if result.abstained else "certified"
            samples, failures = result.selection.trials + votes.trials, result.selection.failures + votes.failures
        name = ABSTAINED if label == ABSTAIN else self.class_name(label)
        return Answer(
            label, name, radius, p_lower, outcome, samples, failures, leading=votes.leader, votes=votes.counts
        )

    def _fail(self, error: Exception) -> None:
        """Fail every image being sampled with the classifier's error; waiting images are still tried."""
        self._broken = error if isinstance(error, ContractError) else None
        permanent = isinstance(error, BudgetSpent | ContractError)
        self._healthy_from = math.inf if permanent else time.monotonic() + _RECOVERY
        _LOG.error("the classifier failed: %s", printable(in_words(error)))
        for test in [*self._sampled, *(opened.test for opened in self._opened)]:
            assert isinstance(test, _StageTest)
            _deliver(test.image.answer, _fault(error))
        self._sampled.clear()
        self._opened.clear()


def _fault(error: Exception) -> Refused:
    """Return the error shown to clients; details such as a service's URL or reply are only logged."""
    if isinstance(error, BudgetSpent):
        return Refused(503, "the query budget of this server is spent", "spent")
    if isinstance(error, ContractError):
        return Refused(503, "the classifier is not a fixed function of the image: nothing can be certified", "fault")
    return Refused(500, "the classifier failed", "fault")


def _deliver(answer: Future[Answer], result: Answer | Refused) -> None:
    """Set the result of an answer unless it is cancelled or already set."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, Refused):
            answer.set_exception(result)
        else:
            answer.set_result(result)


def class_names(names: Sequence[Sequence[str]] | None) -> Callable[[int], str]:
    """Return a function from class index to first name, or to the index as text if it has no name."""
    return lambda label: names[label][0] if names is not None and label < len(names) and names[label] else str(label)
