"""Bounds and radii against ball arithmetic of 60 digits and more (every comparison is proved), and exact coverage."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from flint import arb, ctx
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from certify.bounds import BOUNDS, clopper_pearson_lower
from certify.noise import Gaussian


def decide(compare: Callable[[], tuple[arb, arb]]) -> bool:
    """Whether left > right, with as many digits as it takes to be sure."""
    for ctx.prec in (200, 400, 1000, 4000):
        left, right = compare()
        if left > right:
            return True
        if left < right:
            return False
    raise AssertionError("undecided at 1,200 digits")


def exceeds_exact(lower: float, k: int, n: int, alpha: float) -> bool:
    """Whether ``lower`` is above the exact bound q, which solves I_q(k, n - k + 1) = alpha; I is increasing."""
    return decide(lambda: (arb(lower).beta_lower(k, n - k + 1, regularized=True), arb(alpha)))


def far_below_exact(lower: float, k: int, n: int, alpha: float) -> bool:
    """Whether ``lower`` is more than a relative 1e-9 below the exact bound."""
    higher = arb(lower) * (1 + arb("1e-9"))
    return decide(lambda: (arb(alpha), higher.beta_lower(k, n - k + 1, regularized=True)))


@pytest.mark.parametrize("alpha", [0.05, 0.001, 1e-6, 1e-12])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 37])
def test_lower_bound_of_every_count_for_small_n(n: int, alpha: float) -> None:
    assert clopper_pearson_lower(0, n, alpha) == 0.0
    for k in range(1, n + 1):
        lower = clopper_pearson_lower(k, n, alpha)
        assert 0.0 <= lower < 1.0
        assert not exceeds_exact(lower, k, n, alpha), (k, n, alpha)
        assert lower < 0.5 or not far_below_exact(lower, k, n, alpha), (k, n, alpha)


@pytest.mark.parametrize("n", [100, 1000, 10_000, 100_000, 10_000_000])
def test_lower_bound_for_large_n(n: int) -> None:
    draw = random.Random(n)
    for alpha in (0.05, 0.001, 1e-12):
        near_the_top = [n, n - 1, n - draw.randint(2, 30), round(n * 0.999)]
        for k in {1, *near_the_top, n // 2 + n // 50, draw.randint(1, n)}:
            lower = clopper_pearson_lower(k, n, alpha)
            assert not exceeds_exact(lower, k, n, alpha), (k, n, alpha)
            assert lower < 0.5 or not far_below_exact(lower, k, n, alpha), (k, n, alpha)


@pytest.mark.slow
def test_lower_bound_of_two_thousand_random_cases() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        n = round(10 ** draw.uniform(0, 7))
        alpha = 10 ** draw.uniform(-12, -0.3)
        k = draw.choice([draw.randint(1, n), n - min(n - 1, round(n ** draw.uniform(0, 1)))])
        lower = clopper_pearson_lower(k, n, alpha)
        assert not exceeds_exact(lower, k, n, alpha), (k, n, alpha)
        assert lower < 0.5 or not far_below_exact(lower, k, n, alpha), (k, n, alpha)
        radius = Gaussian(1.0).radius(lower)
        if radius > 0:  # the radius is not above the exact bound's either
            assert not exceeds_exact_radius(radius, lower, 1.0)


def test_all_agree_has_a_closed_form() -> None:
    for n in (10, 100, 12_345, 10_000_000):
        for alpha in (0.05, 0.001, 1e-12):
            lower = clopper_pearson_lower(n, n, alpha)
            assert not exceeds_exact(lower, n, n, alpha)
            assert lower == pytest.approx(math.exp(math.log(alpha) / n), rel=1e-9)


def test_agrees_with_statsmodels_two_sided_at_twice_alpha() -> None:
    for k, n, alpha in ((990, 1000, 0.001), (60, 100, 0.01), (99_000, 100_000, 0.001)):
        reference = proportion_confint(k, n, alpha=2 * alpha, method="beta")[0]
        assert clopper_pearson_lower(k, n, alpha) == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize("name", list(BOUNDS))
@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.001])
def test_coverage_is_exact_by_enumeration(name: str, alpha: float) -> None:
    """P(bound > p) <= alpha for every p: summed over all counts, no sampling. Worst case just below each bound."""
    bound = BOUNDS.get(name)
    for n in range(1, 61):
        lower = np.array([bound(k, n, alpha) for k in range(n + 1)])
        grid = np.concatenate([np.linspace(0.001, 0.999, 999), np.nextafter(lower[lower > 0], 0), lower[lower > 0]])
        pmf = stats.binom.pmf(np.arange(n + 1)[:, None], n, grid[None])
        error = (pmf * (lower[:, None] > grid[None])).sum(axis=0)
        assert error.max() <= alpha * (1 + 1e-9), (n, grid[error.argmax()])


@pytest.mark.parametrize("name", list(BOUNDS))
def test_bound_is_monotone(name: str) -> None:
    bound = BOUNDS.get(name)
    values = [bound(k, 200, 0.001) for k in range(201)]
    assert values == sorted(values)
    assert bound(90, 100, 0.01) > bound(90, 100, 0.001)


@pytest.mark.parametrize(("k", "n", "alpha"), [(-1, 10, 0.1), (11, 10, 0.1), (0, 0, 0.1)])
def test_counts_out_of_range_are_refused(k: int, n: int, alpha: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= successes <= trials"):
        clopper_pearson_lower(k, n, alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        clopper_pearson_lower(5, 10, alpha)


def exceeds_exact_radius(radius: float, p: float, sigma: float) -> bool:
    """Whether ``radius`` is above sigma * Phi^-1(p), which is the same as erf(radius / (sigma * sqrt 2)) > 2 p - 1."""
    return decide(lambda: ((arb(radius) / arb(sigma) / arb(2).sqrt()).erf(), 2 * arb(p) - 1))


def test_radius_is_never_above_the_exact_one() -> None:
    draw = random.Random(0)
    ps = [0.5 + 1e-12, 0.5 + 1e-6, 0.51, 0.9, 0.999, 1 - 1e-9, 1 - 1e-13, 1 - 2.0**-53]
    for p in ps + [draw.uniform(0.5, 1) for _ in range(200)]:
        for sigma in (0.12, 0.25, 1.0, 3.7):
            radius = Gaussian(sigma).radius(p)
            assert not exceeds_exact_radius(radius, p, sigma), (p, sigma)
            assert exceeds_exact_radius(radius * (1 + 1e-9), p, sigma), (p, sigma)


@pytest.mark.parametrize(("n", "cap"), [(100, 1.5005), (1_000, 2.463), (10_000, 3.199), (100_000, 3.811)])
def test_known_radius_caps(n: int, cap: float) -> None:
    """Largest radius over sigma at alpha = 0.001: Phi^-1(0.001^(1/n))."""
    assert Gaussian(1.0).radius(clopper_pearson_lower(n, n, 0.001)) == pytest.approx(cap, abs=6e-4)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, math.nan])
def test_no_radius_without_a_majority(p: float) -> None:
    assert Gaussian(0.25).radius(p) == 0.0


def test_probability_inverts_radius() -> None:
    noise = Gaussian(0.5)
    for p in (0.6, 0.9, 0.999):
        assert noise.probability(noise.radius(p)) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_sigma_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\] pixels"):
        Gaussian(sigma)
