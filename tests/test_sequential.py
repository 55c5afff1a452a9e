"""Stopping rules: the chance of ever being wrong, summed exactly over all paths; where peeking fails, they hold."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from flint import arb, ctx
from scipy import stats

from certify.errors import UserError
from certify.smoothing.bounds import Interval
from certify.smoothing.stopping_rules import (
    RULES,
    Boundary,
    betting_lower,
    betting_upper,
    check_times,
    log_wealth,
    thresholds,
)

P0S = [0.5, 0.8, 0.95, 0.999]


def boundary(rule: str, p0: float, alpha: float, n: int) -> Boundary:
    return RULES.get(rule)(p0, alpha, np.arange(n + 1))  # type: ignore[no-any-return]


def naive(p0: float, alpha: float, n: int) -> Boundary:
    """Peeking: the fixed-n Clopper-Pearson bounds, each side at alpha, looked at after every sample."""
    trials = np.arange(n + 1)
    up = stats.binom.ppf(1 - alpha, trials, p0).astype(int) + 1
    low = stats.binom.ppf(alpha, trials, p0).astype(int) - 1
    up[0], low[0] = 1, -1
    return Boundary(up, low)


def ever_crosses(at: Boundary, p: float, n: int) -> tuple[float, float]:
    """P(settled above), P(settled below) within n samples, where each has probability p: summed over all paths."""
    alive, above, below = np.array([1.0]), 0.0, 0.0
    for t in range(1, n + 1):
        alive = np.convolve(alive, [1 - p, p])
        count = np.arange(t + 1)
        is_up, is_low = count >= at.up[t], count <= at.low[t]
        above, below = above + float(alive[is_up].sum()), below + float(alive[is_low].sum())
        alive[is_up | is_low] = 0.0
    return above, below


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("p0", P0S)
@pytest.mark.parametrize("alpha", [0.1, pytest.param(0.001, marks=pytest.mark.slow)])
def test_the_chance_of_ever_being_wrong_is_at_most_alpha(rule: str, p0: float, alpha: float) -> None:
    n = 1500
    at = boundary(rule, p0, alpha, n)
    above, below = ever_crosses(at, p0, n)
    if rule == "betting":  # both sides from one wealth; of the other rules only one side can be wrong
        assert above + below <= alpha
    assert max(above, below) <= alpha
    for p in (p0 - 0.02, p0 - 0.2):
        assert ever_crosses(at, p, n)[0] <= above
    assert ever_crosses(at, min(p0 + 0.02, 1.0), n)[1] <= below + 1e-15


@pytest.mark.parametrize("p0", P0S)
def test_peeking_with_a_fixed_n_bound_is_wrong_more_often(p0: float) -> None:
    """The same sum for Clopper-Pearson looked at after every sample: far above alpha."""
    n = 1500 if p0 < 0.99 else 10_000  # fewer cannot reject 0.999 at all
    for alpha in (0.1, 0.01):
        assert ever_crosses(naive(p0, alpha, n), p0, n)[0] > 1.5 * alpha


@pytest.mark.parametrize("t", [10**7, 539_382_999, 10**9])
@pytest.mark.parametrize("p0", [0.5, 0.8, 0.99])
def test_wealth_is_never_above_the_exact_one(t: int, p0: float) -> None:
    """Ball arithmetic, up to the most trials that are accepted; and less than 1e-3 is given away."""
    ctx.prec = 300
    for z in (0.0, 3.0, 6.0, 12.0):
        h = round(p0 * t + z * math.sqrt(t * p0 * (1 - p0)))
        exact = (arb(h) + 0.5).lgamma() + (arb(t - h) + 0.5).lgamma() - arb(t + 1).lgamma() - arb.pi().log()
        exact -= h * arb(p0).log() + (t - h) * (1 - arb(p0)).log()
        found = float(log_wealth(np.array(h), np.array(t), p0))
        assert arb(found) < exact < arb(found) + arb("1e-3")


def test_thresholds_that_two_threads_extend_at_once() -> None:
    """While one extends the table another does, too: what comes of it is the boundary, in order."""
    table = thresholds("betting", 0.77, 0.01, 20_000)
    whole = boundary("betting", 0.77, 0.01, 20_000)
    depth = 0

    def meanwhile(p0: float, level: float, trials: np.ndarray) -> Boundary:
        nonlocal depth
        depth += 1
        if depth == 1:
            table.until(5000)
        return RULES.get("betting")(p0, level, trials)  # type: ignore[no-any-return,operator]

    table._rule = meanwhile  # type: ignore[assignment]
    found = table.until(9000)
    assert depth == 2
    assert (found.up[:9001] == whole.up[:9001]).all()
    assert (found.low[:9001] == whole.low[:9001]).all()
    again = table.until(20_000)
    assert (again.up == whole.up).all()


def test_rules_refuse_more_trials_than_were_checked() -> None:
    for rule in RULES:
        with pytest.raises(UserError, match=r"^1,000,000,001 trials: expected at most 1,000,000,000, up to which .*$"):
            RULES.get(rule)(0.7, 0.01, np.array([10**9 + 1]))  # type: ignore[operator]
    for bound in (betting_lower, betting_upper):
        with pytest.raises(UserError, match=r"^1,000,000,001 trials: expected"):
            bound(5 * 10**8, 10**9 + 1, 0.01)
        with pytest.raises(UserError, match="12 successes in 10 trials"):
            bound(12, 10, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("p0", P0S)
def test_simulated_sequences(p0: float) -> None:
    """20,000 sequences of 10,000 votes, alpha = 0.05: errors within alpha for the rules, beyond it for peeking."""
    alpha, n, total = 0.05, 10_000, 20_000
    rng = np.random.default_rng(7)
    at = {rule: boundary(rule, p0, alpha, n) for rule in RULES} | {"peeking": naive(p0, alpha, n)}
    above, either = dict.fromkeys(at, 0), dict.fromkeys(at, 0)
    for _ in range(total // 1000):
        count = np.cumsum(rng.random((1000, n), dtype=np.float32) < p0, axis=1, dtype=np.int32)
        for name, b in at.items():
            up, low = (count >= b.up[1:]).any(axis=1), (count <= b.low[1:]).any(axis=1)
            above[name], either[name] = above[name] + int(up.sum()), either[name] + int((up | low).sum())
    error = 5 * math.sqrt(alpha * (1 - alpha) / total)
    print(f"p = {p0}:", *(f"{name} {above[name] / total:.4f} above, {either[name] / total:.4f} in all;" for name in at))
    assert all(above[rule] / total <= alpha + error for rule in RULES)
    assert either["betting"] / total <= alpha + error
    assert above["peeking"] / total > alpha + error


@pytest.mark.parametrize("p0", [0.5, 0.8413447460685429, 0.9772498680518208, 0.999])
@pytest.mark.parametrize("rule", list(RULES))
def test_boundaries_never_retreat(rule: str, p0: float) -> None:
    """Each further sample moves a threshold by 0 or 1, so what is settled could not be unsettled by agreeing votes."""
    at = boundary(rule, p0, 0.001, 20_000)
    times = np.flatnonzero((at.up <= np.arange(20_001)) | (at.low >= 0))  # where it settles anything
    if rule in ("one-sided", "betting"):
        assert (np.diff(times) == 1).all()
    reachable = times[at.up[times] <= times]
    assert len(reachable)
    assert (np.diff(at.up[reachable]) >= 0).all()
    assert (np.diff(at.low[times]) >= 0).all()
    assert (at.up[reachable] > p0 * reachable).all()
    assert (at.low[times] < p0 * times).all()
    assert ((at.up[reachable] - 1) >= p0 * (reachable - 1)).all()


def test_betting_thresholds_by_brute_force() -> None:
    for p0, alpha in itertools.product((0.5, 0.84, 0.99), (0.1, 0.001)):
        at = boundary("betting", p0, alpha, 120)
        for t in range(1, 121):
            h = np.arange(t + 1)
            out = log_wealth(h, np.full(t + 1, t), p0) > -math.log(alpha)
            up = [k for k in h if out[k] and k > p0 * t and k - 1 >= p0 * (t - 1)]
            low = [k for k in h if out[k] and k < p0 * t]
            assert at.up[t] == (up[0] if up else t + 1)
            assert at.low[t] == (low[-1] if low else -1)


def test_one_sided_thresholds_by_brute_force() -> None:
    for p0, alpha in itertools.product((0.5, 0.84, 0.99), (0.1, 0.001)):
        at = boundary("one-sided", p0, alpha, 120)
        for t in range(1, 121):
            h = np.arange(t + 1)
            above, below = (
                log_wealth(h, np.full(t + 1, t), p0, side) > -math.log(alpha) for side in ("above", "below")
            )
            up = [k for k in h if above[k] and k - 1 >= p0 * (t - 1)]
            low = [k for k in h if below[k]]
            assert at.up[t] == (up[0] if up else t + 1)
            assert at.low[t] == (low[-1] if low else -1)


def test_one_sided_needs_fewer_samples_where_votes_agree() -> None:
    """Against betting with one wealth, at one radius and one alpha: the earliest decision comes sooner."""
    for p0, gain in ((0.8413447, 0.88), (0.9772499, 0.78)):
        first = {
            rule: int(np.argmax(boundary(rule, p0, 0.001 * p0, 1000).up <= np.arange(1001)))
            for rule in ("betting", "one-sided")
        }
        assert first["one-sided"] < gain * first["betting"]


def test_union_thresholds_are_clopper_pearson_at_the_shared_levels() -> None:
    p0, alpha, n = 0.9, 0.01, 5000
    at = boundary("union-bound", p0, alpha, n)
    times = check_times(n)
    assert times[:4] == [3, 4, 5, 6]
    level = [5 * alpha / ((t + 4) * (t + 5)) for t in range(1, len(times) + 1)]
    assert sum(5 / ((t + 4) * (t + 5)) for t in range(1, 100_000)) == pytest.approx(1.0, abs=1e-4)
    for time, share in zip(times, level, strict=True):
        up, low = int(at.up[time]), int(at.low[time])
        if up <= time:
            assert stats.binomtest(up, time, p0, alternative="greater").pvalue <= share
            assert up - 1 < p0 * (time - 1) + 1 or stats.binom.sf(up - 2, time, p0) > share * (1 - 1e-6)
        if low >= 0:
            assert stats.binom.cdf(low, time, p0) <= share < stats.binom.cdf(low + 1, time, p0) * (1 + 1e-6)
    between = np.setdiff1d(np.arange(n + 1), times)
    assert (at.up[between] == between + 1).all()
    assert (at.low[between] == -1).all()


@pytest.mark.parametrize("side", ["both", "above", "below"])
def test_wealth_is_a_martingale_under_p0(side: str) -> None:
    """The mean of the wealth over all counts is 1 at every sample size."""
    for p0, t in itertools.product((0.5, 0.84, 0.999), (1, 7, 100)):
        h = np.arange(t + 1)
        mean = float((stats.binom.pmf(h, t, p0) * np.exp(log_wealth(h, np.full(t + 1, t), p0, side))).sum())
        assert mean == pytest.approx(1.0, abs=5e-6)  # the margin takes a millionth
        assert mean <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("side", ["both", "above", "below"])
def test_log_wealth_is_never_above_the_exact_one(side: str) -> None:
    ctx.prec = 300
    rng = np.random.default_rng(0)
    for _ in range(150):
        t = round(10 ** rng.uniform(0, 7))
        p0 = float(rng.choice([0.5, 0.8413447, 0.999, 1 - 1e-9, 0.5 + 1e-9]))
        h = int(np.clip(round(t * p0 + rng.uniform(-6, 6) * math.sqrt(t * p0 * (1 - p0))), 0, t))
        exact = (arb(h) + arb("0.5")).lgamma() + (arb(t - h) + arb("0.5")).lgamma() - arb(t + 1).lgamma()
        exact -= arb.pi().log() + h * arb(p0).log() + (t - h) * (1 - arb(p0)).log()
        if side != "both":  # regularised incomplete beta functions: P(Beta < p0), or 1 - that
            a, b = (t - h, h) if side == "above" else (h, t - h)
            half = arb("0.5")
            wanted = 1 - arb(p0) if side == "above" else arb(p0)
            mass = wanted.beta_lower(a + half, b + half, regularized=True)
            if not mass > arb("1e-250"):
                continue  # no such count is ever settled
            exact += mass.log() - wanted.beta_lower(half, half, regularized=True).log()
        found = float(log_wealth(np.asarray(h), np.asarray(t), p0, side))
        assert arb(found) < exact
        assert arb(found) > exact - arb("1e-5")


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize(
    ("p", "p0s"),
    [
        ((0.5, 0.5, 0.0), (0.5,)),
        ((0.49, 0.49, 0.02), (0.5,)),
        ((0.36, 0.33, 0.31), (0.5,)),
        ((0.55, 0.45, 0.0), (0.55,)),
        ((0.55, 0.45, 0.0), (0.5, 0.6)),
        ((0.62, 0.2, 0.18), (0.6, 0.65)),
        ((0.8, 0.1, 0.1), (0.8, 0.9)),
    ],
)
def test_all_classes_at_once(rule: str, p: tuple[float, ...], p0s: tuple[float, ...]) -> None:
    """Three classes and several radii, every path of 90 votes summed: P(anything wrong is ever settled) <= alpha.

    A class with exactly p0 counts as wrong on both sides, the worst case.
    """
    alpha, n = 0.1, 90
    level = RULES.get(rule).level(alpha, p0s)  # type: ignore[attr-defined]
    at = [boundary(rule, p0, level, n) for p0 in p0s]
    alive, error = np.zeros((n + 1, n + 1)), 0.0
    alive[0, 0] = 1.0
    first, second = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    for t in range(1, n + 1):
        step = alive * p[2]
        step[1:] += alive[:-1] * p[0]
        step[:, 1:] += alive[:, :-1] * p[1]
        counts = np.stack([first, second, t - first - second])
        wrong = np.zeros_like(step, dtype=bool)
        for p0, b in zip(p0s, at, strict=True):
            for c in range(3):
                wrong |= (p[c] <= p0) & (counts[c] >= b.up[t])
            wrong |= (max(p) >= p0) & (counts.max(axis=0) <= b.low[t])
        wrong &= counts[2] >= 0
        error += float(step[wrong].sum())
        alive = np.where(wrong, 0.0, step)
    assert 0 < error <= alpha


def test_thresholds_are_shared_and_grow() -> None:
    table = thresholds("betting", 0.8, 0.001, 100_000)
    assert thresholds("betting", 0.8, 0.001, 100_000) is table
    whole = boundary("betting", 0.8, 0.001, 9000)
    for t in (10, 5000, 9000):
        there = table.until(t)
        assert (there.up[: t + 1] == whole.up[: t + 1]).all()
        assert (there.low[: t + 1] == whole.low[: t + 1]).all()


@pytest.mark.slow
def test_the_earliest_decision() -> None:
    for rule in RULES:
        for p0 in (0.5, 0.84, 0.999):
            at = boundary(rule, p0, 0.001, 20_000)
            first = int(np.argmax(at.up <= np.arange(20_001)))
            assert thresholds(rule, p0, 0.001, 20_000).earliest() == first > 0
            assert thresholds(rule, p0, 0.001, first).earliest() == first
            assert thresholds(rule, p0, 0.001, first - 1).earliest() is None


def test_betting_interval_is_what_the_wealth_does_not_exclude() -> None:
    for h, t, alpha in [(0, 1, 0.1), (5, 5, 0.1), (90, 100, 0.001), (99_990, 100_000, 0.001), (3, 1000, 0.05)]:
        found = Interval(betting_lower(h, t, alpha), betting_upper(h, t, alpha))
        limit = -math.log(alpha)
        h_, t_ = np.asarray(h), np.asarray(t)
        for edge, outside in ((found.lower, -1e-7), (found.upper, 1e-7)):
            if 0 < edge < 1:
                assert log_wealth(h_, t_, edge) <= limit + 1e-3
                assert log_wealth(h_, t_, edge + outside * edge) > limit or edge < 1e-6 or 1 - edge < 1e-6
        assert found.lower <= h / t <= found.upper
        at = boundary("betting", max(0.5, found.lower), alpha, t) if found.lower > 0.5 else None
        assert at is None or h >= at.up[t] - 1
