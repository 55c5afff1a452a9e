"""Bounds and radii against ball arithmetic of 60 digits and more (every comparison is proved), and exact coverage."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flint import arb, ctx
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from certify.errors import UserError
from certify.smoothing.bounds import BOUNDS, Evidence, Interval, clopper_pearson_lower, randomized_lower
from certify.smoothing.certificates import largest_radius
from certify.smoothing.noise import Gaussian, Laplace, Uniform, make_noise


def decide(compare: Callable[[], tuple[arb, arb]]) -> bool:
    """True if left > right, with as many digits as certainty takes."""
    for ctx.prec in (200, 400, 1000, 4000):
        left, right = compare()
        if left > right:
            return True
        if left < right:
            return False
    raise AssertionError("undecided at 1,200 digits")


def exceeds_exact(lower: float, k: int, n: int, alpha: float) -> bool:
    """True if ``lower`` is above the exact bound q, which solves I_q(k, n - k + 1) = alpha; I is increasing."""
    return decide(lambda: (arb(lower).beta_lower(k, n - k + 1, regularized=True), arb(alpha)))


def far_below_exact(lower: float, k: int, n: int, alpha: float) -> bool:
    """True if ``lower`` is more than a relative 1e-9 below the exact bound."""
    higher = arb(lower) * (1 + arb("1e-9"))
    return decide(lambda: (arb(alpha), higher.beta_lower(k, n - k + 1, regularized=True)))


@pytest.mark.parametrize("alpha", [0.9999, 0.05, 0.001, 1e-6, 1e-12, 1e-39])
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


@pytest.mark.parametrize("n", [10**8, 10**9])
def test_bounds_beyond_ten_million(n: int) -> None:
    """Ball arithmetic up to the largest n that is accepted, also where scipy's quantile is off by a factor of two."""
    for alpha in (0.3, 0.001, 1e-39):
        for k in (n, n - 17, round(n * 0.999), n // 2 + n // 50, 1000):
            lower = clopper_pearson_lower(k, n, alpha)
            assert not exceeds_exact(lower, k, n, alpha), (k, n, alpha)
            assert lower < 0.5 or not far_below_exact(lower, k, n, alpha), (k, n, alpha)
        for k in (n - 1, n // 2 + n // 50):
            assert not exceeds_randomized(randomized_lower(k, n, alpha, 0.3), k, n, alpha, 0.3), (k, n, alpha)


@pytest.mark.parametrize("bound", [name for name in BOUNDS if name != "betting"])
def test_more_trials_than_were_checked_are_refused(bound: str) -> None:
    with pytest.raises(UserError, match=r"^1,000,000,001 trials: expected at most 1,000,000,000, up to which .*$"):
        interval(bound, 10**9, 1, 10**9 + 1, 0.001)


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


def interval(name: str, k: int, others: int, n: int, alpha: float, uniform: float = 1.0) -> Interval:
    found: Interval = BOUNDS.get(name)(Evidence(k, others, n, uniform), alpha)
    return found


@pytest.mark.parametrize("name", [name for name in BOUNDS if not BOUNDS.get(name).randomized])  # type: ignore[attr-defined]
@pytest.mark.parametrize("alpha", [0.05, 0.001, pytest.param(0.3, marks=pytest.mark.slow)])
def test_coverage_is_exact_by_enumeration(name: str, alpha: float) -> None:
    """P(bound > p) <= alpha for every p: summed over all counts, no sampling. Worst case just below each bound."""
    for n in range(1, 61):
        found = [interval(name, k, n - k, n, alpha) for k in range(n + 1)]
        lower, upper = np.array([i.lower for i in found]), np.array([i.upper for i in found])
        edges = np.concatenate([lower, 1 - upper])
        grid = np.concatenate([np.linspace(0.001, 0.999, 999), np.nextafter(edges[edges > 0], 0), edges[edges > 0]])
        pmf = stats.binom.pmf(np.arange(n + 1)[:, None], n, grid[None])
        wrong = (lower[:, None] > grid[None]) | (upper[:, None] < 1 - grid[None] - 1e-15)
        error = (pmf * wrong).sum(axis=0)
        assert error.max() <= alpha * (1 + 1e-9), (n, grid[error.argmax()])


@pytest.mark.parametrize("name", [name for name in BOUNDS if not BOUNDS.get(name).randomized])  # type: ignore[attr-defined]
@pytest.mark.parametrize("alpha", [0.3, 0.05])
def test_the_strongest_rival_is_bounded_whichever_it_is(name: str, alpha: float) -> None:
    """Four classes, all multinomial counts of n = 12 enumerated: P(class above or any rival below) <= alpha.

    The rival is the largest count among the votes that bound it, and no share of alpha is paid for there being three.
    """
    n = 12
    counts = np.array([c for c in itertools.product(range(n + 1), repeat=4) if sum(c) == n])
    found = [interval(name, int(c[0]), int(max(c[1:])), n, alpha) for c in counts]
    lower, upper = np.array([i.lower for i in found]), np.array([i.upper for i in found])
    points = [(0.4, 0.3, 0.2, 0.1), (0.4, 0.2, 0.2, 0.2), (0.25, 0.25, 0.25, 0.25), (0.9, 0.05, 0.03, 0.02)]
    points += [(0.1, 0.8, 0.05, 0.05), (0.5, 0.5, 0.0, 0.0), (0.7, 0.28, 0.01, 0.01)]
    points += [tuple(p) for p in np.random.default_rng(0).dirichlet(np.ones(4), 200)]
    worst = 0.0
    for p in points:
        chance = stats.multinomial.pmf(counts, n, np.array(p) / sum(p))
        worst = max(worst, float(chance[(lower > p[0]) | (upper < max(p[1:]))].sum()))
    assert worst <= alpha * (1 + 1e-9)
    assert worst > 0.05 * alpha  # the sum saw errors at all


@pytest.mark.parametrize("alpha", [0.05, *(pytest.param(alpha, marks=pytest.mark.slow) for alpha in (0.3, 0.01))])
def test_randomized_error_is_nearly_alpha_and_never_more(alpha: float) -> None:
    """The chance that the bound exceeds p, over votes and the uniform draw, comes up to alpha, and is never more.

    For each count the draws W that put the bound above p are those below some W*, found by bisection. Where p is so
    near 1 that "all agree" with a tiny W decides, the cap makes it smaller.
    """
    for n in (3, 10, 40):
        for p in (0.05, 0.3, 0.5, 0.8):
            error = 0.0
            for k in range(n + 1):
                low, high = 0.0, 1.0
                for _ in range(45):
                    middle = (low + high) / 2
                    above = randomized_lower(k, n, alpha, max(middle, 1e-16)) > p
                    low, high = (middle, high) if above else (low, middle)
                error += float(stats.binom.pmf(k, n, p)) * low
            assert error <= alpha * (1 + 1e-6), (n, p)
            spared = p**n * min(1.0, 2 * alpha)  # at most what the cap can take away
            assert error >= alpha * (1 - 1e-6) - spared, (n, p)


def test_randomized_is_never_above_the_exact_one() -> None:
    """Ball arithmetic: at the bound, (1 - W) P(B > k) + W P(B >= k) is at most alpha."""
    draw = random.Random(5)
    for _ in range(150):
        n = round(10 ** draw.uniform(0.5, 7))
        k = draw.choice([n, n - 1, max(0, n - draw.randint(0, 40)), draw.randint(0, n)])
        alpha, w = 10 ** draw.uniform(-12, -0.5), draw.choice([draw.random() + 1e-9, 1.0, 1e-6])
        lower = randomized_lower(k, n, alpha, min(w, 1.0))
        assert lower >= clopper_pearson_lower(k, n, alpha)
        assert lower == 0.0 or not exceeds_randomized(lower, k, n, alpha, min(w, 1.0)), (k, n, alpha, w)


def exceeds_randomized(lower: float, k: int, n: int, alpha: float, w: float) -> bool:
    """True if ``lower`` is above the exact randomized bound."""

    def chance() -> arb:
        more = arb(lower).beta_lower(k + 1, n - k, regularized=True) if k < n else arb(0)
        at_least = arb(lower).beta_lower(k, n - k + 1, regularized=True) if k else arb(1)
        return (1 - arb(w)) * more + arb(w) * at_least

    return decide(lambda: (chance(), arb(alpha)))


@pytest.mark.parametrize("alpha", [0.5, 0.9, 0.999999, 1 - 1e-12, 1 - 2.0**-53])
@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_randomized_at_large_alpha(n: int, alpha: float) -> None:
    """Capped where one vote more brings Clopper-Pearson within the margin of 1; never above the exact bound."""
    for k in range(max(0, n - 3), n + 1):
        for w in (1.0, 0.5, 1e-9):
            lower = randomized_lower(k, n, alpha, w)
            assert clopper_pearson_lower(k, n, alpha) <= lower < 1.0
            assert Gaussian(1.0).radius(lower) <= largest_radius(Gaussian(1.0), n, alpha, "randomized")
            assert not exceeds_exact_weight(lower, k, n, alpha, w)


def exceeds_exact_weight(lower: float, k: int, n: int, alpha: float, w: float) -> bool:
    """The same where all votes may agree: the draw is not taken below 2 alpha there."""
    return lower > 0 and exceeds_randomized(lower, k, n, alpha, min(1.0, max(w, 2 * alpha)) if k == n else w)


def test_randomized_bound_keeps_the_radius_finite() -> None:
    radii = [Gaussian(1.0).radius(randomized_lower(1000, 1000, 0.001, w)) for w in (1.0, 0.5, 0.01, 0.002, 1e-9, 1e-16)]
    assert radii == sorted(radii)
    assert radii[-1] == radii[-3] == pytest.approx(stats.norm.ppf(0.5**0.001), rel=1e-9)


def test_best_is_nearly_the_better_of_both() -> None:
    """The precision that the docstring promises, for radii at n = 1,000 and more."""
    noise, alpha = Gaussian(1.0), 0.001
    for n in (1000, 100_000):
        for p, rival in [(0.999, 0.001), (0.99, 0.002), (0.9, 0.1), (0.9, 0.02), (0.7, 0.3), (0.7, 0.05), (0.45, 0.3)]:
            k, others = round(n * p), round(n * rival)
            radius = {}
            for name in ("clopper-pearson", "runner-up", "best"):
                found = interval(name, k, others, n, alpha)
                radius[name] = noise.radius(found.lower, found.upper)
            assert radius["best"] >= 0.996 * radius["clopper-pearson"]
            if p < 0.5:
                assert radius["clopper-pearson"] == 0.0 < radius["best"]
            else:
                assert radius["best"] >= 0.98 * radius["runner-up"]


@pytest.mark.parametrize("name", list(BOUNDS))
def test_bound_is_monotone(name: str) -> None:
    values = [interval(name, k, 200 - k, 200, 0.001, 0.3).lower for k in range(201)]
    assert values == sorted(values)
    assert interval(name, 90, 10, 100, 0.01).lower > interval(name, 90, 10, 100, 0.001).lower


@pytest.mark.parametrize(("k", "n", "alpha"), [(-1, 10, 0.1), (11, 10, 0.1), (0, 0, 0.1)])
def test_counts_out_of_range_are_refused(k: int, n: int, alpha: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= successes <= trials"):
        clopper_pearson_lower(k, n, alpha)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        clopper_pearson_lower(5, 10, alpha)


def exceeds_exact_radius(radius: float, p: float, sigma: float) -> bool:
    """True if ``radius`` is above sigma * Phi^-1(p), which is the same as erf(radius / (sigma * sqrt 2)) > 2 p - 1."""
    return decide(lambda: ((arb(radius) / arb(sigma) / arb(2).sqrt()).erf(), 2 * arb(p) - 1))


def test_radius_is_never_above_the_exact_one() -> None:
    draw = random.Random(0)
    ps = [0.5 + 1e-12, 0.5 + 1e-6, 0.51, 0.9, 0.999, 1 - 1e-9, 1 - 1e-13, 1 - 2.0**-53]
    for p in ps + [draw.uniform(0.5, 1) for _ in range(200)]:
        for sigma in (0.12, 0.25, 1.0, 3.7):
            radius, drawn = Gaussian(sigma).radius(p), min(sigma, float(np.float32(sigma)))
            assert not exceeds_exact_radius(radius, p, drawn), (p, sigma)
            assert exceeds_exact_radius(radius * (1 + 1e-9), p, drawn), (p, sigma)


def grid(draw: random.Random) -> list[float]:
    """Probabilities near 1/2 and near 1, on either side of where formulas change, and between."""
    near_half = [0.5 + 2.0**-53 * j for j in range(1, 40)] + [0.5 + 2.0 ** -draw.uniform(2, 53) for _ in range(400)]
    near_one = [1 - 2.0**-53 * j for j in range(1, 40)] + [1 - 2.0 ** -draw.uniform(2, 53) for _ in range(400)]
    return [*near_half, *near_one, 0.75, *(draw.uniform(0.5, 1) for _ in range(200))]


def rivals(p: float, draw: random.Random) -> list[float | None]:
    """Bounds on the other classes: none, all that is left, a hair below p, and little."""
    return [None, 1.0 - p, min(1.0 - p, math.nextafter(p, 0)), (1.0 - p) * draw.random(), min(1.0 - p, 1e-300)]


@pytest.mark.parametrize("name", ["gaussian", "exact", "uniform", "laplace"])
@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.1])
def test_no_radius_exceeds_the_exact_one_of_the_noise_that_is_drawn(name: str, sigma: float) -> None:
    """For all p near 1/2 and 1: the radius of the scale in the sampler, which is float32, and of the scale as typed."""
    ctx.prec = 400
    noise, draw = make_noise(name, sigma), random.Random(0)
    scales = {sigma} if name == "exact" else {sigma, float(np.float32(sigma))}
    if isinstance(noise, Uniform):
        scales = {math.sqrt(3) * sigma, float(np.float32(math.sqrt(3) * sigma))}
    if isinstance(noise, Laplace):
        scales = {sigma / math.sqrt(2), float(np.float32(sigma / math.sqrt(2)))}
    scale = min(scales)
    for p in grid(draw):
        for other in rivals(p, draw):
            radius, rest = arb(noise.radius(p, other)), arb(1) - arb(p) if other is None else arb(other)
            gap = arb(p) - rest
            if not gap > 0 or not rest > 0:
                continue
            if isinstance(noise, Uniform):
                assert radius <= scale * gap <= radius * (1 + arb("1e-13")), p
            elif isinstance(noise, Laplace):
                exact = scale * max((arb(p) / rest).log() / 2, -(1 - gap).log())
                assert radius <= exact <= radius * (1 + arb("1e-13")), (p, other)
            elif other is None:
                assert not exceeds_exact_radius(float(radius), p, scale), p
            else:
                plain = noise.radius(p)  # the smaller the rival, the larger the radius
                assert float(radius) >= plain * (1 - 1e-12)


def test_sampler_uses_the_scale_in_single_precision() -> None:
    """0.12 is drawn as 0.1199999973, and the radius is stated from that; 0.1 is drawn larger, which is not used."""

    def drawn(name: str, sigma: float) -> torch.Tensor:
        return make_noise(name, sigma).sample((5000,), torch.Generator().manual_seed(1))

    for sigma in (0.12, 0.1, 0.3, 1e-3):
        half_width, b = math.sqrt(3) * sigma, sigma / math.sqrt(2)
        assert torch.equal(drawn("gaussian", sigma), drawn("gaussian", 1.0) * np.float32(sigma))
        assert torch.equal(drawn("laplace", sigma), drawn("laplace", math.sqrt(2)) * np.float32(b))
        assert float(drawn("uniform", sigma).abs().max()) <= np.float32(half_width)
        assert Gaussian(sigma).radius(0.9) <= min(sigma, float(np.float32(sigma))) * stats.norm.ppf(0.9)
        assert Gaussian(sigma).probability(0.05) >= stats.norm.cdf(0.05 / float(np.float32(sigma))) - 1e-16
        assert make_noise("laplace", sigma).scale == sigma  # as typed: run files and denoisers are told this one


def test_laplace_noise_has_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest uniform number gives 36.7 b, not 16.6 b: beyond that lies 1e-16, not one pixel in 16 million."""
    edges = iter([0.0, 1.0])

    def extreme(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor.fill_(next(edges) and 1 - torch.finfo(tensor.dtype).eps / 2)

    monkeypatch.setattr(torch.Tensor, "uniform_", extreme)
    noise = Laplace(math.sqrt(2))
    assert float(noise.sample((1,), torch.Generator()).abs()) == pytest.approx(53 * math.log(2))


@pytest.mark.parametrize("name", ["gaussian", "uniform", "laplace"])
def test_noise_is_drawn_in_single_precision_whatever_surrounds_it(name: str) -> None:
    noise, plain = make_noise(name, 0.25), torch.get_default_dtype()
    expected = noise.sample((100,), torch.Generator().manual_seed(1))
    try:
        torch.set_default_dtype(torch.float16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = noise.sample((100,), torch.Generator().manual_seed(1))
    finally:
        torch.set_default_dtype(plain)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


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
