"""Anytime-valid stopping rules: whether a class probability is above or below p0, tested after every sample.

A rule is a function ``(p0, level, sample sizes) -> Boundary``. With probability at least 1 - level, the boundary
settles the wrong side at no sample size, so the test may run after every sample and stop at once. The boundary depends
on the counts (H of T) alone: it is a table, and a test is a look-up.

All classes at once. A radius needs p0 >= 1/2, so no class has to be selected beforehand: running the rule on every
class at level ``Rule.level(alpha, p0s)`` is wrong with probability at most alpha in all, for any number of classes.
Proof for the betting rule. Let E_c be class c's wealth against its own true p_c; each is a martingale from 1, so
sum_c p_c E_c is one from at most 1, and by Ville's inequality it reaches 1 / alpha with probability at most alpha.
(Above) If class c with p_c <= p0 is settled above p0 at (H, T), its wealth against p0 exceeds 1 / level. The boundary
demands (H - 1)/(T - 1) >= p0, and p^(H-1) (1-p)^(T-H) increases up to there, hence p_c E_c >= p0 / level. (Below)
"Every class is below p0" is wrong only if some p_c >= p0 > H/T; then E_c is at least the wealth against p0, and again
p_c E_c >= p0 / level. So level = alpha p0, with the smallest p0 when there are several. By the one-sided rule E_c is
the wealth that mixes over q > p0 where p_c <= p0, and over q < p0 otherwise; a wealth above 1 already puts H/T on the
right side. The other levels: :func:`betting_level`, :func:`one_sided_level`, :func:`union_level`.

Sources: Voracek (NeurIPS 2024), algorithms 1 and 2; Krichevsky and Trofimov (1981); Ville (1939). The argument for all
classes at once and the one-sided rule are ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from certify.errors import UserError
from certify.registry import Registry
from certify.smoothing.bounds import Bound, Evidence, Interval, check_alpha, check_counts, check_share, check_trials
from certify.smoothing.numeric import as_float, as_int

_LOG_MARGIN, _MARGIN_TRIALS = 1e-6, 1e7  # exceeds the error of log-wealth up to so many trials; beyond, in proportion
_OUTWARD, _TINY = 1e-12, 1e-15
_CHUNK = 4096

RULES = Registry("rule", "certify.rules")
MEASURING_BOUND = "betting"
"""The bound of images that stop once their radius is known to a tolerance."""

DEFAULT_RULE, DEFAULT_CAP = "one-sided", 20_000
"""Defaults. A larger cap settles a few more images in a hundred."""


@dataclass(frozen=True)
class Rule:
    """A stopping rule, and the level at which it may run on every class and every radius at once.

    Attributes:
        boundary: maps p0, level and the sample sizes to the boundary.
        level: maps alpha and all p0 to the level.
    """

    boundary: Callable[[float, float, np.ndarray], Boundary]
    level: Callable[[float, Sequence[float]], float]

    def __call__(self, p0: float, level: float, trials: np.ndarray) -> Boundary:
        """Return the boundary; for one class it is wrong at any sample size with probability at most ``level``."""
        p0, level = _check(p0, level, trials)
        return self.boundary(p0, level, np.asarray(trials, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Boundary:
    """The counts that settle p against p0 after T samples, int64, one entry per T.

    Attributes:
        up: smallest count that settles p >= p0; T + 1 where none does.
        low: largest count that settles p <= p0; -1 where none does.
    """

    up: np.ndarray
    low: np.ndarray


def log_wealth(successes: np.ndarray, trials: np.ndarray, p0: float, side: str = "both") -> np.ndarray:
    """Return the log of the Krichevsky-Trofimov wealth: the Beta(1/2, 1/2) mixture over the Bernoulli(p0) likelihood.

    Under p0 the wealth is a martingale that starts at 1. The log is lowered by a margin for floating-point errors,
    including that of p0.

    Args:
        successes: H, whole numbers from 0 to T.
        trials: T.
        p0: in (0, 1).
        side: the mixture is over all p (``"both"``), or only over those above or below p0 (``"above"``, ``"below"``).
    """
    from scipy.special import betainc, betaincc, betaln

    successes, trials = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float)
    p0, failures = as_float(p0, "p0"), trials - successes
    exact = betaln(successes + 0.5, failures + 0.5) - math.log(math.pi)
    exact = exact - successes * math.log(p0) - failures * math.log1p(-p0)
    if side != "both":
        mass = betaincc if side == "above" else betainc
        with np.errstate(divide="ignore"):
            exact = exact + np.log(mass(successes + 0.5, failures + 0.5, p0)) - math.log(mass(0.5, 0.5, p0))
    margin: np.ndarray = _LOG_MARGIN * np.maximum(1.0, trials / _MARGIN_TRIALS)
    margin = margin + 1e-15 * (successes / p0 + (failures + 1) / (1.0 - p0))
    return np.asarray(exact - margin)


def _never(trials: np.ndarray) -> Boundary:
    return Boundary(trials + 1, np.full_like(trials, -1))


def _bisect(settled: Callable[[np.ndarray], np.ndarray], inner: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """Return for each entry the count nearest to ``inner`` where ``settled`` holds; at ``outer`` it is assumed to."""
    inner, outer = inner.copy(), outer.copy()
    while (np.abs(outer - inner) > 1).any():
        middle = (inner + outer) // 2
        holds = settled(middle)
        moved = np.abs(outer - inner) > 1
        outer = np.where(moved & holds, middle, outer)
        inner = np.where(moved & ~holds, middle, inner)
    return outer


def _boundary(
    settled: Callable[[np.ndarray, np.ndarray, bool], np.ndarray], trials: np.ndarray, p0: float, reach: np.ndarray
) -> Boundary:
    """Find both sides by bisection: ``settled(counts, trials, above)`` is monotone on either side of p0 * trials.

    ``reach`` is a distance from p0 * trials at which counts should be settled, if any are; the results are checked.
    """
    centre, reach = np.floor(p0 * trials).astype(np.int64), np.ceil(reach).astype(np.int64) + 1
    up = _bisect(lambda h: settled(h, trials, True), centre, np.minimum(centre + reach, trials + 1))
    up = np.where(settled(up, trials, True), up, trials + 1)
    up = np.maximum(up, np.ceil(p0 * (trials - 1) * (1 + 1e-15)).astype(np.int64) + 1)  # (H - 1)/(T - 1) >= p0
    low = _bisect(lambda h: settled(h, trials, False), np.minimum(centre + 1, trials), np.maximum(centre - reach, -1))
    return Boundary(np.minimum(up, trials + 1), np.where(settled(low, trials, False), low, -1))


def _check(p0: float, alpha: float, trials: np.ndarray | int) -> tuple[float, float]:
    """Return p0 and alpha as Python floats; refuse values and sample sizes for which the rules are not valid."""
    expected = "a probability from 1/2 to 1"
    level, probability = check_share(alpha), as_float(p0, "p0", expected)
    if not 0.5 <= probability < 1.0:
        raise UserError(f"p0 = {probability}: expected {expected}")
    check_trials(trials)
    return probability, level


def betting_boundary(p0: float, alpha: float, trials: np.ndarray) -> Boundary:
    """Betting (Voracek 2024, algorithm 2): settled once the wealth against p0 exceeds 1 / alpha, tested at every T.

    One wealth serves both sides: P(it ever exceeds 1 / alpha) <= alpha if p = p0, and wherever p0 is excluded, so is
    every value beyond it, because log-wealth is convex in p with its minimum at H/T.
    """
    return _bet(p0, alpha, trials, ("both", "both"))


def one_sided_boundary(p0: float, alpha: float, trials: np.ndarray) -> Boundary:
    """Two one-sided betting martingales, each a mixture over the p on its side of p0.

    p lies on one side of p0, so only the other side can be settled wrongly: each has the whole alpha. No wealth goes
    into bets on the wrong side, which saves up to a quarter of the samples where p is large (``docs/few-samples.md``).
    """
    return _bet(p0, alpha, trials, ("above", "below"))


def _bet(p0: float, alpha: float, trials: np.ndarray, sides: tuple[str, str]) -> Boundary:
    p0, alpha = _check(p0, alpha, trials)
    limit = -math.log(alpha)

    def settled(count: np.ndarray, trials: np.ndarray, above: bool) -> np.ndarray:
        inside = (count >= 0) & (count <= trials)
        wealth = log_wealth(np.clip(count, 0, trials), trials, p0, sides[0] if above else sides[1])
        return np.asarray(inside & (wealth > limit))

    # log-wealth is at least T KL(H/T, p0) - log(T)/2 - 3 on its side, and KL(p, p0) >= 2 (p - p0)^2 (Pinsker)
    reach = np.sqrt(trials * (limit + np.log(trials + 1.0) / 2 + 3) / 2)
    return _boundary(settled, trials, p0, reach)


def check_times(n: int) -> list[int]:
    """Return the sample sizes at which the union-bound rule tests: the first above 1.1^k, k = 11, 12, ..., up to n."""
    times: list[int] = []
    k = 11
    while (time := int(1.1**k) + 1) <= n:
        if not times or time > times[-1]:
            times.append(time)
        k += 1
    return times


def union_boundary(p0: float, alpha: float, trials: np.ndarray) -> Boundary:
    """Union bound (Voracek 2024, algorithm 1): Clopper-Pearson at geometric times, at level 5 alpha/((t+4)(t+5)).

    t is the number of the time; the levels sum to alpha. Between the times nothing is settled.
    """
    from scipy.special import betainc, betaincc

    p0, alpha = _check(p0, alpha, trials)
    found = _never(trials)
    times = np.array(check_times(int(trials.max(initial=0))), dtype=np.int64)
    number = np.searchsorted(times, trials)
    looked = np.zeros(len(trials), dtype=bool)
    looked[number < len(times)] = times[number[number < len(times)]] == trials[number < len(times)]
    if not looked.any():
        return found
    t = number[looked] + 1.0
    level = 5 * alpha / ((t + 4) * (t + 5)) * (1 - 1e-9)  # more than the errors of betainc and p0

    def settled(count: np.ndarray, trials: np.ndarray, above: bool) -> np.ndarray:
        if above:  # P(Bin(T, p0) >= count)
            return np.asarray(
                (count <= trials)
                & (betainc(np.maximum(count, 1), trials - np.minimum(count, trials) + 1, p0) <= level)
                & (count >= 1)
            )
        return np.asarray(
            (count >= 0)
            & (count < trials)
            & (betaincc(np.maximum(count, 0) + 1, np.maximum(trials - count, 1), p0) <= level)
        )

    reach = np.sqrt(trials[looked] * -np.log(level) / 2)  # Hoeffding's inequality
    there = _boundary(settled, trials[looked], p0, reach)
    found.up[looked], found.low[looked] = there.up, there.low
    return found


def betting_level(alpha: float, p0s: Sequence[float]) -> float:
    """Return alpha times the smallest p0: one wealth per class serves all p0 (module docstring)."""
    return check_alpha(alpha) * _least(p0s)


def one_sided_level(alpha: float, p0s: Sequence[float]) -> float:
    """Return alpha p0 for one p0; several share alpha equally, because each has its own wealths."""
    return check_alpha(alpha) * _least(p0s) / len(p0s)


def union_level(alpha: float, p0s: Sequence[float]) -> float:
    """Return alpha p0 for one p0; for several, alpha p0 / (1 + p0) with the smallest.

    At one test with level a: P(Bin(T, p) >= h) is convex in p up to (h - 1)/(T - 1) >= p0 and 0 at p = 0, so class c is
    wrongly settled above p0 with probability at most a p_c / p0. If every class is below p0 these sum to at most
    a / p0; if class c* is above, the others sum to a (1 - p0) / p0 and c* is wrongly settled below with probability a:
    again a / p0. With several p0, c* may lie between two of them and be wrong on either side: a (1 + 1/p0).
    """
    alpha, least = check_alpha(alpha), _least(p0s)
    return alpha * least if len(p0s) == 1 else alpha * least / (1.0 + least)


def _least(p0s: Sequence[float]) -> float:
    return min(as_float(p0, "p0") for p0 in p0s)


RULES.add(
    "one-sided",
    Rule(one_sided_boundary, one_sided_level),
    "two one-sided betting martingales, tested after every sample (default)",
)
RULES.add(
    "betting", Rule(betting_boundary, betting_level), "one betting wealth for both sides, tested after every sample"
)
RULES.add("union-bound", Rule(union_boundary, union_level), "Clopper-Pearson at geometric times, alpha split")


class Thresholds:
    """The boundary of a rule for one p0, computed as far as needed."""

    def __init__(self, rule: str, p0: float, level: float, n: int) -> None:
        self._rule, self._p0, self._level, self._n = RULES.get(rule), p0, level, n
        self._known = _never(np.zeros(1, dtype=np.int64))

    def earliest(self) -> int | None:
        """Return the fewest samples that can settle p >= p0; None if n are too few."""
        size = 64
        while True:
            up = self.until(min(size, self._n)).up[: self._n + 1]
            found = np.flatnonzero(up <= np.arange(len(up)))
            if len(found):
                return int(found[0])
            if len(up) > self._n:
                return None
            size = 2 * len(up)

    def until(self, trials: int) -> Boundary:
        """Return the boundary for T = 0 to ``trials`` or more."""
        known = self._known  # another thread may replace it meanwhile
        size = len(known.up)
        if trials >= size:
            end = min(max(2 * size, trials + 1, _CHUNK), max(self._n, trials) + 1)
            more = self._rule(self._p0, self._level, np.arange(size, end, dtype=np.int64))
            known = Boundary(np.concatenate([known.up, more.up]), np.concatenate([known.low, more.low]))
            self._known = known
        return known


def thresholds(rule: str, p0: float, level: float, n: int) -> Thresholds:
    """Return the thresholds that all images of a run share.

    Raises:
        UserError: arguments out of range.
    """
    n = as_int(n, "n")
    return _thresholds(rule, *_check(p0, level, n), n)


_thresholds = functools.lru_cache(maxsize=64)(Thresholds)


def betting_lower(successes: int, trials: int, alpha: float) -> float:
    """Return the lower end of an anytime-valid interval: of all p against which the wealth is at most 1 / alpha.

    With probability at least 1 - alpha the interval contains the true p at every T at once. Rounded outward.
    """
    alpha, (successes, trials) = check_share(alpha), check_counts(successes, trials)
    if not successes:
        return 0.0
    return max(0.0, _end(successes, trials, alpha, _TINY) - _OUTWARD)


def betting_upper(successes: int, trials: int, alpha: float) -> float:
    """Return the upper end of the interval of :func:`betting_lower`."""
    alpha, (successes, trials) = check_share(alpha), check_counts(successes, trials)
    if successes == trials:
        return 1.0
    return min(1.0, _end(successes, trials, alpha, 1 - _TINY) + _OUTWARD)


def _end(successes: int, trials: int, alpha: float, far: float) -> float:
    """Return the p between H/T and ``far`` at which the wealth reaches 1 / alpha; 0 or 1 if it does not."""
    from scipy.optimize import brentq

    limit, h, t = -math.log(alpha), np.asarray(float(successes)), np.asarray(float(trials))

    def excess(p: float) -> float:
        return float(log_wealth(h, t, p)) - limit

    if excess(far) <= 0:
        return 0.0 if far < 0.5 else 1.0
    mean = min(max(successes / trials, _TINY), 1 - _TINY)
    return float(brentq(excess, min(far, mean), max(far, mean), xtol=1e-15))


def _betting(evidence: Evidence, alpha: float) -> Interval:
    return Interval.above(betting_lower(evidence.successes, evidence.trials, alpha))


BETTING = Bound(_betting, anytime=True)
