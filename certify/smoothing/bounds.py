"""Confidence bounds for the votes of one image, rounded outward.

A bound maps the :class:`Evidence` about a class, chosen independently of it, to an :class:`Interval`: with probability
at least 1 - alpha the class has at least probability ``lower`` and every other class at most ``upper``. Floating-point
errors must not void that: scipy's quantile functions exceed the exact value about half the time, and by a factor of two
for 1,000 votes of 10^9. Therefore ``_OUTWARD`` is subtracted, and the result is checked against the tail probability,
which scipy computes to a known relative error (:func:`tail_error`) for up to ``MAX_TRIALS`` trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from certify.errors import UserError
from certify.registry import Registry
from certify.smoothing.numeric import as_float, as_int

MAX_TRIALS = 10**9
"""Largest number of trials for which bounds and rules were compared with ball arithmetic; more are refused."""

_OUTWARD = 1e-12  # costs less than 2e-7 of a radius at sigma = 1
_SMALLEST_ALPHA, _SMALLEST_SHARE = 1e-40, 1e-50  # as given by the user, and after splitting
_OTHERS_SHARE = 0.1  # of alpha in `best`: see best()

BOUNDS = Registry("bound", "certify.bounds")


@dataclass(frozen=True)
class Evidence:
    """The input of a bound.

    Attributes:
        successes: k, votes of the class, 0 <= k <= n.
        others: votes of the strongest other class plus all failures.
        trials: n, from 1 to ``MAX_TRIALS``.
        uniform: a draw from (0, 1], uniform and independent of the votes, for randomized bounds.

    Raises:
        UserError: values out of range.
    """

    successes: int
    others: int
    trials: int
    uniform: float = 1.0

    def __post_init__(self) -> None:
        successes, trials = check_counts(self.successes, self.trials)
        others, _ = check_counts(self.others, self.trials)
        for name, value in (("successes", successes), ("others", others), ("trials", trials)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "uniform", _check_uniform(self.uniform))


@dataclass(frozen=True)
class Interval:
    """Bounds on two probabilities: at least ``lower`` for the class, at most ``upper`` for every other class."""

    lower: float
    upper: float

    @classmethod
    def above(cls, lower: float) -> Interval:
        """Return the interval of a lower bound alone: the other classes share the rest."""
        return cls(lower, 1.0 - lower)


@dataclass(frozen=True)
class Bound:
    """A bound and its assumptions.

    Attributes:
        compute: maps the evidence and alpha to the interval.
        anytime: True if it holds at every sample size at once, so that sampling may stop depending on the votes.
        randomized: True if it uses ``Evidence.uniform``.
    """

    compute: Callable[[Evidence, float], Interval]
    anytime: bool = False
    randomized: bool = False

    def __call__(self, evidence: Evidence, alpha: float) -> Interval:
        """Return the interval; with probability at most alpha one of its ends is wrong."""
        return self.compute(evidence, check_share(alpha))


def check_alpha(alpha: float) -> float:
    """Return alpha as a Python float.

    Raises:
        UserError: outside (0, 1), NaN included, or below 1e-40, where the margin is not known to suffice.
    """
    return _check_level(alpha, _SMALLEST_ALPHA)


def check_share(alpha: float) -> float:
    """Return a part of an accepted alpha, which may be smaller than any alpha, as a Python float."""
    return _check_level(alpha, _SMALLEST_SHARE)


def _check_level(alpha: float, smallest: float) -> float:
    expected = "a number strictly between 0 and 1, such as 0.001 (1e-40 at least)"
    level = as_float(alpha, "alpha", expected)
    if not smallest <= level < 1.0:
        raise UserError(f"alpha = {level}: expected {expected}")
    return level


def check_counts(successes: int, trials: int) -> tuple[int, int]:
    """Return successes and trials as Python ints.

    Raises:
        UserError: not 0 <= successes <= trials, no trials, or more than ``MAX_TRIALS``.
    """
    successes, trials = as_int(successes, "successes"), as_int(trials, "trials")
    if not 0 <= successes <= trials or trials < 1:
        raise UserError(f"{successes} successes in {trials} trials: expected 0 <= successes <= trials and trials >= 1")
    check_trials(trials)
    return successes, trials


def check_trials(trials: int | np.ndarray) -> None:
    """Refuse more than ``MAX_TRIALS`` trials, in one or several counts."""
    if (most := int(np.max(trials, initial=0))) > MAX_TRIALS:
        raise UserError(f"{most:,} trials: expected at most {MAX_TRIALS:,}, up to which the bounds were checked")


def _check_uniform(uniform: float) -> float:
    value = as_float(uniform, "uniform", "a number in (0, 1]")
    if not 0.0 < value <= 1.0:
        raise UserError(f"uniform = {value}: expected a number in (0, 1]")
    return value


def tail_error(trials: int) -> float:
    """Return a relative error bound of scipy's binomial tail probabilities: ten times the largest error observed."""
    return 2e-14 * math.sqrt(trials)


def _proved(tail: Callable[[float], float], p: float, floor: float, alpha: float, error: float) -> float:
    """Return ``p`` if the tail there is certainly at most alpha, else the largest value above ``floor`` where it is.

    Args:
        tail: an increasing probability, computed with relative ``error``; at most alpha at ``floor``.
        p: the candidate.
        floor: returned if nothing above it can be proved.
        alpha: the level.
        error: relative error of ``tail``.
    """

    def holds(q: float) -> bool:
        return tail(q) * (1.0 + error) <= alpha

    if not p > floor or holds(p):
        return max(p, floor)
    for _ in range(60):
        middle = (floor + p) / 2
        floor, p = (middle, p) if holds(middle) else (floor, middle)
    return floor


def clopper_pearson_lower(successes: int, trials: int, alpha: float) -> float:
    """Exact one-sided lower confidence bound on a proportion (Clopper and Pearson 1934).

    If ``successes`` is binomial with ``trials`` and p, then P(result > p) <= alpha for every p. The bound is the
    alpha-quantile of Beta(k, n - k + 1), lowered by a margin that covers floating-point error.

    Args:
        successes: k, 0 <= k <= n.
        trials: n >= 1.
        alpha: failure probability, in (0, 1).

    Returns:
        The bound, in [0, 1).

    Raises:
        UserError: counts or alpha out of range.
    """
    alpha, (successes, trials) = check_share(alpha), check_counts(successes, trials)
    if successes == 0:
        return 0.0
    from scipy.special import betainc, betaincinv  # 0.4 s to import: `certify --help` must not pay for it

    def tail(p: float) -> float:
        return float(betainc(successes, trials - successes + 1, p))

    quantile = float(betaincinv(successes, trials - successes + 1, alpha))
    return _proved(tail, quantile - _OUTWARD, 0.0, alpha, tail_error(trials)) if math.isfinite(quantile) else 0.0


def clopper_pearson_upper(successes: int, trials: int, alpha: float) -> float:
    """Exact one-sided upper confidence bound on a proportion (Clopper and Pearson 1934).

    P(result < p) <= alpha for every p. It is 1 minus :func:`clopper_pearson_lower` of the other trials, rounded up;
    arguments and errors as there.
    """
    successes, trials = check_counts(successes, trials)
    return min(1.0, 1.0 - clopper_pearson_lower(trials - successes, trials, alpha) + math.ulp(1.0))


def randomized_lower(successes: int, trials: int, alpha: float, uniform: float) -> float:
    """Randomized Clopper-Pearson lower bound (Voracek 2024): never below Clopper-Pearson's.

    p such that P(B > k) + W P(B = k) = alpha for B ~ Bin(n, p) and a uniform W, drawn once and independently of the
    votes; W = 1 gives Clopper-Pearson. Coverage would be exactly 1 - alpha; it is at least that, because the bound is
    rounded down, and because W is at least 2 alpha: if all votes agree, a W near alpha would give p = 1 and an infinite
    radius.

    Args:
        successes: k, 0 <= k <= n.
        trials: n >= 1.
        alpha: failure probability, in (0, 1).
        uniform: W, in (0, 1].

    Raises:
        UserError: as :func:`clopper_pearson_lower`; a ``uniform`` out of range.
    """
    alpha, (successes, trials) = check_share(alpha), check_counts(successes, trials)
    uniform = _check_uniform(uniform)
    least = clopper_pearson_lower(successes, trials, alpha)
    if successes == trials:
        weight = min(1.0, max(uniform, 2 * alpha))
        return max(least, math.exp(math.log(alpha / weight) / trials) - _OUTWARD)
    from scipy.optimize import brentq
    from scipy.special import betainc

    def chance(p: float) -> float:
        more = float(betainc(successes + 1, trials - successes, p))
        at_least = float(betainc(successes, trials - successes + 1, p)) if successes else 1.0
        return (1.0 - uniform) * more + uniform * at_least

    one_more = clopper_pearson_lower(successes + 1, trials, alpha)  # where W = 0 would lead
    most = min(1.0, one_more + 2 * _OUTWARD)
    if not chance(least) < alpha < chance(most):  # nothing above the plain bound: k = 0, or margins that meet
        return least
    root = float(brentq(lambda p: chance(p) - alpha, least, most, xtol=1e-15, rtol=1e-15))
    return _proved(chance, max(least, min(root - _OUTWARD, one_more)), least, alpha, tail_error(trials))


def _clopper_pearson(evidence: Evidence, alpha: float) -> Interval:
    return Interval.above(clopper_pearson_lower(evidence.successes, evidence.trials, alpha))


def _randomized(evidence: Evidence, alpha: float) -> Interval:
    return Interval.above(randomized_lower(evidence.successes, evidence.trials, alpha, evidence.uniform))


def two_classes(evidence: Evidence, alpha: float, others_share: float) -> Interval:
    """Bound the class and its strongest rival, with alpha split between them; for any number of classes.

    The rival need not be named in advance, and the number of classes costs nothing: let c be the other class with the
    largest probability, a fixed class. The largest count among the others is at least c's, and the upper bound grows
    with the count, so it exceeds p_c whenever c's own bound does: with probability at least 1 - alpha's share. A failed
    trial could be a vote for any class, so failures count for the rival.
    """
    alpha, others_share = check_share(alpha), as_float(others_share, "others_share")
    lower = clopper_pearson_lower(evidence.successes, evidence.trials, alpha * (1.0 - others_share))
    upper = clopper_pearson_upper(evidence.others, evidence.trials, alpha * others_share)
    return Interval(lower, min(upper, 1.0 - lower))


def _runner_up(evidence: Evidence, alpha: float) -> Interval:
    return two_classes(evidence, alpha, 0.5)


def _best(evidence: Evidence, alpha: float) -> Interval:
    """Spend nine tenths of alpha on the class and one on its rivals, which 1 - lower bounds too, at no cost.

    The radius is the larger of the one-class and the two-class radius at these levels. The cost of not choosing between
    them in advance: at n = 1,000 and p = 0.9, 0.2 % of Clopper-Pearson's radius where a rival takes all the rest, and
    0.8 % of runner-up's where it has 0.02. Near radius 0 the relative cost is larger (``benchmarks/bounds.py``).
    """
    return two_classes(evidence, alpha, _OTHERS_SHARE)


BOUNDS.add("clopper-pearson", Bound(_clopper_pearson), "exact, one-sided (default)")
BOUNDS.add(
    "randomized",
    Bound(_randomized, randomized=True),
    "randomized Clopper-Pearson: coverage at least 1 - alpha, never below clopper-pearson",
)
BOUNDS.add("runner-up", Bound(_runner_up), "the class against its strongest rival, alpha split evenly")
BOUNDS.add("best", Bound(_best), "the larger of both, alpha split 9 : 1")
BOUNDS.add("betting", "certify.smoothing.stopping_rules:BETTING", "holds at every sample size at once (anytime-valid)")
