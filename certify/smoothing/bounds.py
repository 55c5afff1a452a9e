"""Confidence bounds for the votes of one image, rounded outward.

A bound looks at the :class:`Evidence` for a class that was chosen without it, and answers with an :class:`Interval`:
with probability at least 1 - alpha the class has at least ``lower`` and every other class at most ``upper``. Floating
point must not spoil that: the quantile functions of scipy land above the exact value about half the time, so
``_OUTWARD`` is subtracted. It exceeds every error found against ball arithmetic up to n = 10^7 and alpha = 10^-12
(``tests/test_bounds.py``) and costs less than 2e-7 of a radius at sigma = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from certify.errors import UserError
from certify.registry import Registry

_OUTWARD = 1e-12
_SMALLEST_ALPHA, _SMALLEST_SHARE = 1e-40, 1e-50  # what may be asked for, and what may be left of it to share
_OTHERS_SHARE = 0.1  # of alpha in `best`: see best()

BOUNDS = Registry("bound", "certify.bounds")


@dataclass(frozen=True)
class Evidence:
    """What a bound may look at.

    Attributes:
        successes: k, votes of the class in question.
        others: votes of the strongest other class, whichever that is, and all failures.
        trials: n.
        uniform: a number in (0, 1], drawn uniformly and independently of the votes, for randomized bounds.
    """

    successes: int
    others: int
    trials: int
    uniform: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self.successes, self.trials)
        check_counts(self.others, self.trials)
        if not 0.0 < self.uniform <= 1.0:
            raise ValueError(f"uniform = {self.uniform}: expected a number in (0, 1]")


@dataclass(frozen=True)
class Interval:
    """The class has at least ``lower``, every other class at most ``upper``."""

    lower: float
    upper: float


@dataclass(frozen=True)
class Bound:
    """A bound and what it presupposes.

    Attributes:
        compute: from the evidence and alpha to the interval.
        anytime: whether it holds at every sample size at once, so that votes may be looked at before they stop.
        randomized: whether it uses ``Evidence.uniform``.
    """

    compute: Callable[[Evidence, float], Interval]
    anytime: bool = False
    randomized: bool = False

    def __call__(self, evidence: Evidence, alpha: float) -> Interval:
        """The interval; wrong with probability at most alpha."""
        return self.compute(evidence, alpha)


def check_alpha(alpha: float) -> None:
    """Refuse an alpha outside (0, 1), NaN included, and below 1e-40, where the margin is not known to suffice."""
    if not _SMALLEST_ALPHA <= alpha < 1.0:
        raise UserError(f"alpha = {alpha}: expected a number strictly between 0 and 1, such as 0.001 (1e-40 at least)")


def check_share(alpha: float) -> None:
    """The same for a share of an alpha that was accepted."""
    if not _SMALLEST_SHARE <= alpha < 1.0:
        check_alpha(alpha)


def check_counts(successes: int, trials: int) -> None:
    """Refuse counts that cannot be."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes in {trials} trials: expected 0 <= successes <= trials and trials >= 1")


def clopper_pearson_lower(successes: int, trials: int, alpha: float) -> float:
    """Exact one-sided lower confidence bound on a proportion (Clopper and Pearson 1934).

    If ``successes`` is binomial with ``trials`` and p, then P(result > p) <= alpha, whatever p. The bound is the
    alpha-quantile of Beta(k, n - k + 1), lowered by a margin that covers floating-point error.

    Args:
        successes: k, 0 <= k <= n.
        trials: n >= 1.
        alpha: probability of error, in (0, 1).

    Returns:
        The bound, in [0, 1).

    Raises:
        ValueError: counts or alpha out of range.
    """
    check_share(alpha)
    check_counts(successes, trials)
    if successes == 0:
        return 0.0
    from scipy.special import betaincinv  # 0.4 s to import: `certify --help` must not pay for it

    quantile = float(betaincinv(successes, trials - successes + 1, alpha))
    return max(0.0, quantile - _OUTWARD) if math.isfinite(quantile) else 0.0


def clopper_pearson_upper(successes: int, trials: int, alpha: float) -> float:
    """The upper bound: P(result < p) <= alpha, whatever p; 1 minus the lower bound of the failures."""
    return min(1.0, 1.0 - clopper_pearson_lower(trials - successes, trials, alpha) + math.ulp(1.0))


def randomized_lower(successes: int, trials: int, alpha: float, uniform: float) -> float:
    """Randomized Clopper-Pearson lower bound (Voracek 2024): coverage exactly 1 - alpha, never below Clopper-Pearson.

    p such that P(B > k) + W P(B = k) = alpha for B ~ Bin(n, p) and a uniform W, drawn once and independently of the
    votes; W = 1 gives Clopper-Pearson. When all votes agree, a W near alpha would give p = 1 and an infinite radius:
    W is never taken below 2 alpha, which only lowers the bound.

    Args:
        successes: k, 0 <= k <= n.
        trials: n >= 1.
        alpha: probability of error, in (0, 1).
        uniform: W, in (0, 1].
    """
    least = clopper_pearson_lower(successes, trials, alpha)
    if successes == trials:
        weight = min(1.0, max(uniform, 2 * alpha))
        return max(least, math.exp(math.log(alpha / weight) / trials) - _OUTWARD)
    from scipy.optimize import brentq
    from scipy.special import betainc

    def excess(p: float) -> float:
        more = float(betainc(successes + 1, trials - successes, p))
        at_least = float(betainc(successes, trials - successes + 1, p)) if successes else 1.0
        return (1.0 - uniform) * more + uniform * at_least - alpha

    most = clopper_pearson_lower(successes + 1, trials, alpha) + 2 * _OUTWARD
    if excess(least) >= 0 or excess(most) <= 0:  # nothing above the plain bound: k = 0, or margins that meet
        return least
    found = float(brentq(excess, least, most, xtol=1e-15, rtol=1e-15))
    return max(least, found - _OUTWARD) if math.isfinite(found) else least


def _clopper_pearson(evidence: Evidence, alpha: float) -> Interval:
    lower = clopper_pearson_lower(evidence.successes, evidence.trials, alpha)
    return Interval(lower, 1.0 - lower)


def _randomized(evidence: Evidence, alpha: float) -> Interval:
    lower = randomized_lower(evidence.successes, evidence.trials, alpha, evidence.uniform)
    return Interval(lower, 1.0 - lower)


def two_classes(evidence: Evidence, alpha: float, others_share: float) -> Interval:
    """Bounds on the class and on its strongest rival, alpha shared out between them; any number of classes.

    The rival need not be named in advance, and nothing is paid for there being many: let c be the other class with the
    largest probability, a fixed class. The largest count among the others is at least c's, and the upper bound grows
    with the count, so it exceeds p_c whenever c's own bound does: with probability at least 1 - alpha's share. A failed
    trial may have been any class's, so failures count for the rival.
    """
    lower = clopper_pearson_lower(evidence.successes, evidence.trials, alpha * (1.0 - others_share))
    upper = clopper_pearson_upper(evidence.others, evidence.trials, alpha * others_share)
    return Interval(lower, min(upper, 1.0 - lower))


def _runner_up(evidence: Evidence, alpha: float) -> Interval:
    return two_classes(evidence, alpha, 0.5)


def _best(evidence: Evidence, alpha: float) -> Interval:
    """Nine tenths of alpha for the class and one for its rivals; 1 - lower bounds these too, at no price.

    The radius is the larger of the one-class and the two-class radius at these shares. What not having to know costs:
    at n = 1,000 and p = 0.9, 0.2 % of Clopper-Pearson's radius where a rival takes all the rest, and 0.8 % of
    runner-up's where it has 0.02. Where the radius is near 0 the share of it is larger (``benchmarks/bounds.py``).
    """
    return two_classes(evidence, alpha, _OTHERS_SHARE)


BOUNDS.add("clopper-pearson", Bound(_clopper_pearson), "exact, one-sided (default)")
BOUNDS.add("randomized", Bound(_randomized, randomized=True), "randomized Clopper-Pearson: coverage exactly 1 - alpha")
BOUNDS.add("runner-up", Bound(_runner_up), "the class against its strongest rival, alpha shared evenly")
BOUNDS.add("best", Bound(_best), "the larger of both, alpha shared 9 : 1")
BOUNDS.add("betting", "certify.smoothing.stopping_rules:BETTING", "holds at every sample size at once (anytime-valid)")
