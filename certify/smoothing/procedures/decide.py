"""Decide robustness at given radii, from as few samples as possible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from certify.errors import UserError
from certify.smoothing.certificates import check_counts, decision_from_counts, needed
from certify.smoothing.norms import IN_WORDS
from certify.smoothing.numeric import as_float
from certify.smoothing.procedures.base import (
    ESTIMATION,
    AnswerKeys,
    ProcedureSettings,
    Prospects,
    RecordedVotes,
    SettledRadius,
    Stopping,
    answer_keys,
    assign,
)
from certify.smoothing.rounding import ceil_to, exact
from certify.smoothing.sequential_tests import LEAST, VoteCounts
from certify.smoothing.stopping_rules import DEFAULT_CAP, DEFAULT_RULE, RULES, thresholds
from certify.types import Decision, Radii

_MOST = 1_000_000  # samples up to which a sufficient number is looked for


@dataclass(frozen=True)
class Decide:
    """Decide at given radii: certifiably robust, or not certifiable, with as few samples as possible.

    Args:
        radii: one or several, in [0, 1] pixels and the norm of the run.
        n: maximum number of samples; at n an image remains undecided.
        alpha: probability that any part of an image's decision is wrong, in (0, 1).
        rule: name of a stopping rule (``certify list rules``).

    Raises:
        UserError: no radius, arguments out of range, an unknown rule.
    """

    radii: tuple[float, ...]
    n: int = DEFAULT_CAP
    alpha: float = 0.001
    rule: str = DEFAULT_RULE

    kind: ClassVar[str] = "decide"
    sequential: ClassVar[bool] = True

    def __post_init__(self) -> None:
        n, _, alpha = check_counts(self.n, 1, self.alpha)
        RULES.get(self.rule)
        several: Any = self.radii  # 0-d arrays and tensors are iterable by type, but not in fact
        single = not isinstance(several, Iterable) or isinstance(several, str) or getattr(several, "ndim", 1) == 0
        given: Iterable[float] = [several] if single else several
        radii = sorted({as_float(r, "radius", "one number or several, such as 0.25") + 0.0 for r in given})  # no -0.0
        if not radii:
            raise UserError("no radius: expected one or several, such as 0.25")
        assign(self, n=n, alpha=alpha, radii=tuple(radii))

    @property
    def stages(self) -> dict[str, int]:
        """Samples, at most."""
        return {ESTIMATION: self.n}

    @property
    def bound(self) -> str:
        """Name of the stopping rule, for the run file."""
        return self.rule

    @property
    def stopping(self) -> Stopping:
        """Rule by which images stop early."""
        return Stopping(self.rule, self.radii)

    def test(self, num_classes: int, noise: Radii) -> RadiusDecision:
        """Return the sequential test of one image at all radii."""
        return RadiusDecision(num_classes, n=self.n, radii=self.radii, noise=noise, alpha=self.alpha, rule=self.rule)

    def answer(self, results: Mapping[str, Any], noise: Radii, uniform: float = 1.0) -> Decision:
        """Return the decision of the sequential test."""
        decision: Decision = results[ESTIMATION]
        return decision

    def recompute(self, votes: RecordedVotes, noise: Radii) -> Decision:
        """Return the decision again from the recorded votes."""
        return decision_from_counts(
            votes.looks,
            votes.estimation,
            radii=self.radii,
            noise=noise,
            alpha=self.alpha,
            rule=self.rule,
            drawn=votes.drawn,
        )

    def record(self, answer: Decision) -> AnswerKeys:
        """Return the keys of a decision; its radius is the largest robust one."""
        settled = [
            SettledRadius(radius=radius, outcome=outcome, look=list(look))
            for radius, outcome, look in zip(answer.radii, answer.outcomes, answer.looks, strict=True)
        ]
        keys = answer_keys(answer.prediction, answer.radius, None, answer.votes)
        return keys | AnswerKeys(decisions=settled, drawn=answer.drawn)

    def describe(self) -> str:
        """Describe the sampling plan in one phrase."""
        most = f"n = {self.n:,} at most, alpha = {exact(self.alpha)} for each image and all radii"
        return f"decide by {self.rule}: {most}"

    def prospects(self, noise: Radii) -> Prospects:
        """Return the probability that each radius needs, and the fewest samples that can settle it."""
        p0s, level = needed(self.radii, noise, self.alpha, self.rule)
        earliest = [thresholds(self.rule, p0, level, self.n).earliest() for p0 in p0s]
        lines, warnings = [], []
        for radius, p0, enough in zip(self.radii, p0s, earliest, strict=True):
            few = f"robust after {enough:,} samples at the earliest" if enough is not None else "out of reach"
            lines.append(f"{exact(radius)} ({IN_WORDS[noise.norm]}) needs a probability of {ceil_to(p0, 5)}: {few}")
            if enough is None:
                least = thresholds(self.rule, p0, level, _MOST).earliest()
                many = f"more than {_MOST:,}" if least is None else f"at least {least:,}"
                at = f"{exact(radius)} within n = {self.n:,}"
                warnings.append(f"no image can be settled as robust at {at}; {many} are needed: pass a larger --n")
        largest = max((r for r, enough in zip(self.radii, earliest, strict=True) if enough is not None), default=0.0)
        return Prospects(largest, earliest[-1], tuple(lines), tuple(warnings))

    def changed(self, alpha: float, bound: str, path: object) -> Decide:
        """Return the procedure at another alpha; the stopping rule stays."""
        if bound != self.rule:
            raise UserError(
                f"{path} was stopped by looking at its votes (rule {self.rule}): --bound {bound} cannot decide at its "
                "radii; leave --bound out, and pass --alpha alone"
            )
        return Decide(self.radii, self.n, alpha, self.rule)


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
        self._counts = VoteCounts(num_classes)
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


def from_settings(settings: ProcedureSettings) -> Decide:
    """Return the procedure of a run of decisions.

    Raises:
        UserError: no radii.
    """
    if settings.stopping is None:
        raise UserError("a run of decisions without radii; expected a header with `stopping`")
    return Decide(settings.stopping.radii, settings.n, settings.alpha, settings.stopping.rule)
