"""Sequential tests of one image: when the votes so far settle a question. Pure; the sampling is the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from certify.errors import UserError
from certify.smoothing.certificates import (
    certificate_from_votes,
    check_counts,
    decision_from_counts,
    largest_radius,
    needed,
)
from certify.smoothing.numeric import as_float, as_int
from certify.smoothing.rounding import exact
from certify.smoothing.stopping_rules import MEASURING_BOUND, betting_upper, thresholds
from certify.types import ABSTAIN, Certificate, Decision, Radii, Votes

LEAST = 16  # samples of an image's first piece


class SequentialTest(Protocol):
    """The sequential test of one image. It depends on the votes of that image alone."""

    drawn: int
    """Samples labelled so far."""
    pending: int
    """Samples to label next; 0 once the image is settled."""

    def add(self, labels: np.ndarray) -> None:
        """Add the labels of the next samples: int64, failures below 0."""
        ...

    def result(self) -> Any:
        """Return what the votes so far prove."""
        ...


@dataclass(eq=False)
class _Counts:
    """Votes for each class so far; the array grows when a label names a new class."""

    num_classes: int
    by_class: np.ndarray = field(init=False)
    seen: int = 0

    def __post_init__(self) -> None:
        self.by_class = np.zeros(self.num_classes, dtype=np.int64)

    def leading(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, after each of these labels, the largest count so far and its class."""
        self._make_room(labels)
        classes = np.union1d(np.flatnonzero(self.by_class), labels[labels >= 0])
        if not len(classes):
            return np.zeros(len(labels), dtype=np.int64), np.full(len(labels), ABSTAIN)
        counts = self.by_class[classes, None] + np.cumsum(labels[None, :] == classes[:, None], axis=1)
        return counts.max(axis=0), classes[counts.argmax(axis=0)]

    def add(self, labels: np.ndarray) -> None:
        self._make_room(labels)
        self.by_class += np.bincount(labels[labels >= 0], minlength=len(self.by_class))
        self.seen += len(labels)

    def _make_room(self, labels: np.ndarray) -> None:
        more = int(labels.max(initial=-1)) + 1 - len(self.by_class)
        if more > 0:
            self.by_class = np.pad(self.by_class, (0, more))

    def votes(self) -> Votes:
        return Votes(tuple(self.by_class.tolist()), self.seen - int(self.by_class.sum()))


class RadiusDecision:
    """Sample until every radius is settled as robust or not certifiable (:mod:`certify.smoothing.stopping_rules`).

    Args:
        num_classes: K; for labels without a fixed list of classes, the number known at first (at least 1).
        n: maximum number of samples.
        radii: ascending, in the noise's norm.
        noise: the smoothing distribution.
        alpha: probability that any settled statement is wrong, at most.
        rule: name of the stopping rule.
    """

    def __init__(
        self, num_classes: int, *, n: int, radii: Sequence[float], noise: Radii, alpha: float, rule: str
    ) -> None:
        n, _, alpha = check_counts(n, 1, alpha)
        self._p0s, level = needed(radii, noise, alpha, rule)
        self._tables = [thresholds(rule, p0, level, n) for p0 in self._p0s]
        self._n, self._radii, self._noise, self._alpha, self._rule = n, tuple(radii), noise, alpha, rule
        self._counts = _Counts(num_classes)
        self._checks: list[tuple[int, int, int] | None] = [None] * len(self._p0s)
        self.drawn = 0
        self.pending = self._next()

    def _next(self) -> int:
        """Return the samples that settle an open radius if all agree, between 1/16 and 1/4 of those drawn."""
        seen, most = self._counts.seen, int(self._counts.by_class.max())
        left = self._n - seen
        if None not in self._checks or not left:
            return 0
        if not seen:
            return min(left, LEAST)
        least, reach = max(LEAST // 2, seen // 16), max(2 * LEAST, seen // 4)
        ahead = slice(seen + 1, seen + reach + 1)
        soonest = reach
        for p0, table, check in zip(self._p0s, self._tables, self._checks, strict=True):
            if check is None:
                there, agreeing = table.until(seen + reach), most + np.arange(1, reach + 1)
                settled = agreeing >= there.up[ahead] if most >= p0 * seen else most <= there.low[ahead]
                soonest = min(soonest, int(settled.argmax()) + 1) if settled.any() else soonest
        return min(left, max(least, soonest))

    def add(self, labels: np.ndarray) -> None:
        """Test after every sample; samples after the one that settles the last radius are ignored."""
        self.drawn += len(labels)
        counts, seen = self._counts, self._counts.seen
        largest, leaders = counts.leading(labels)
        for j, table in enumerate(self._tables):
            if self._checks[j] is not None:
                continue
            there = table.until(seen + len(labels))
            span = slice(seen + 1, seen + len(labels) + 1)
            hits = np.flatnonzero((largest >= there.up[span]) | (largest <= there.low[span]))
            if len(hits):
                at = int(hits[0])
                self._checks[j] = int(leaders[at]), int(largest[at]), seen + at + 1
        checks = [check for check in self._checks if check is not None]
        used = max(trials for *_, trials in checks) - seen if len(checks) == len(self._checks) else len(labels)
        counts.add(labels[:used])
        self.pending = self._next()

    def result(self) -> Decision:
        """Return the decision at every radius."""
        votes = self._counts.votes()
        (leader,) = votes.leading()
        last = leader, votes.counts[leader], votes.trials
        return decision_from_counts(
            [check or last for check in self._checks],
            votes,
            radii=self._radii,
            noise=self._noise,
            alpha=self._alpha,
            rule=self._rule,
            drawn=self.drawn,
        )


class RadiusEstimate:
    """Sample until the radius is known to a relative tolerance, or certainly 0.

    The radius follows from the betting rule's lower bound, the largest radius still possible from its upper bound
    and n.

    Args:
        num_classes: as for :class:`RadiusDecision`.
        n: maximum number of samples.
        tolerance: in (0, 1): stop once the radius is at least 1 - tolerance of the largest still possible.
        noise: the smoothing distribution.
        alpha: probability that the radius is wrong, at most.
    """

    def __init__(self, num_classes: int, *, n: int, tolerance: float, noise: Radii, alpha: float) -> None:
        n, _, alpha = check_counts(n, 1, alpha)
        tolerance = as_float(tolerance, "tolerance", "a share between 0 and 1, such as 0.1")
        if not 0 < tolerance < 1:  # NaN is refused too
            raise UserError(f"tolerance {exact(tolerance)}: expected a share between 0 and 1, such as 0.1")
        self._n, self._tolerance, self._noise, self._alpha = n, tolerance, noise, alpha
        self._cap = largest_radius(noise, n, alpha, MEASURING_BOUND, selected=False)
        self._counts = _Counts(num_classes)
        self.drawn = 0
        self.pending = min(n, 4 * LEAST)

    def add(self, labels: np.ndarray) -> None:
        """Count all labels, then test."""
        self.drawn += len(labels)
        self._counts.add(labels)
        more = max(4 * LEAST, self._counts.seen // 8)  # tested after each piece
        self.pending = 0 if self._known() else min(self._n - self._counts.seen, more)

    def _known(self) -> bool:
        upper = betting_upper(int(self._counts.by_class.max()), self._counts.seen, self._alpha / 2)
        if upper <= 0.5:
            return True
        certificate, possible = self.result(), min(self._noise.radius(min(upper, 1 - 1e-15)), self._cap)
        return not certificate.abstained and certificate.radius >= (1.0 - self._tolerance) * possible

    def result(self) -> Certificate:
        """Return the certificate that the votes so far prove."""
        votes = self._counts.votes()
        return certificate_from_votes(Votes(()), votes, noise=self._noise, alpha=self._alpha, bound=MEASURING_BOUND)


class FixedSample:
    """Sample a fixed number of times: for a bound at fixed n among images that come and go.

    Args:
        num_classes: K.
        n: samples, at least 1.
        piece: maximum number of samples to label at a time.
    """

    def __init__(self, num_classes: int, *, n: int, piece: int) -> None:
        self._counts, self._n, self._piece = _Counts(num_classes), as_int(n, "n"), as_int(piece, "piece")
        self.drawn = 0
        self.pending = min(self._n, self._piece)

    def add(self, labels: np.ndarray) -> None:
        """Count all labels."""
        self.drawn += len(labels)
        self._counts.add(labels)
        self.pending = min(self._n - self.drawn, self._piece)

    def result(self) -> Votes:
        """Return the votes so far."""
        return self._counts.votes()
