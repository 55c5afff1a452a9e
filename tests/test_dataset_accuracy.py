"""Certified accuracy of a data set: exact coverage by enumeration, convexity, and half-spaces of known probability."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from certify.errors import UserError
from certify.smoothing.bounds import clopper_pearson_lower
from certify.smoothing.dataset_accuracy import bounded_mean_lower, dataset_accuracy, mean_lower
from certify.smoothing.noise import make_noise
from certify.smoothing.norms import in_norm
from certify.types import WorstCase

NAMES = ("gaussian", "exact", "uniform", "laplace")


def poisson_binomial(probabilities: tuple[float, ...]) -> np.ndarray:
    """Return the distribution of the number of successes of independent trials."""
    distribution = np.ones(1)
    for p in probabilities:
        distribution = np.convolve(distribution, [1.0 - p, p])
    return distribution


def failure_probability(bound: list[float], probabilities: tuple[float, ...]) -> float:
    """Return the probability that the bound at the number of successes exceeds the mean."""
    mean = math.fsum(probabilities) / len(probabilities)
    return sum(
        chance
        for chance, lower in zip(poisson_binomial(probabilities), bound, strict=True)
        if lower > mean * (1 + 1e-12)
    )


@pytest.mark.parametrize("alpha", [0.24, 0.05, 0.001])
@pytest.mark.parametrize("trials", [1, 2, 3, 4, 5])
def test_a_fixed_list_is_covered_whatever_its_probabilities(trials: int, alpha: float) -> None:
    bound = [mean_lower(k, trials, alpha) for k in range(trials + 1)]
    assert bound == sorted(bound)
    grid = sorted({*np.linspace(0.0, 1.0, 9), alpha, 1.01 * alpha, math.sqrt(alpha), alpha ** (1 / trials)})
    for probabilities in itertools.combinations_with_replacement(grid, trials):
        assert failure_probability(bound, probabilities) <= alpha * (1 + 1e-9), probabilities


def test_just_below_each_bound_is_where_it_fails_most() -> None:
    """Means a little below each bound, carried by 1 to all of 12 trials: the failure probability is at most alpha."""
    trials, alpha = 12, 0.05
    bound = [mean_lower(k, trials, alpha) for k in range(trials + 1)]
    for lower in bound[1:]:
        total = lower * trials * (1 - 1e-6)
        for share in range(math.ceil(total), trials + 1):
            spread = tuple(total / share if i < share else 0.0 for i in range(trials))
            assert failure_probability(bound, spread) <= alpha * (1 + 1e-9)
            whole = min(math.floor(total), share)  # as many certain successes as possible, and one remainder
            certain = tuple(1.0 if i < whole else total - whole if i == whole else 0.0 for i in range(trials))
            assert failure_probability(bound, certain) <= alpha * (1 + 1e-9)


def test_clopper_pearson_alone_fails_for_one_image_that_carries_the_mean() -> None:
    """The reason for the separate bound at one success."""
    trials, alpha = 10, 0.05
    plain = [clopper_pearson_lower(k, trials, alpha) for k in range(trials + 1)]
    one = (1.02 * alpha, *[0.0] * (trials - 1))
    assert failure_probability(plain, one) > alpha
    assert failure_probability([mean_lower(k, trials, alpha) for k in range(trials + 1)], one) <= alpha


def test_from_two_successes_on_it_is_clopper_pearson_s() -> None:
    assert mean_lower(0, 50, 0.01) == 0.0
    assert [mean_lower(k, 50, 0.01) for k in range(2, 51)] == [clopper_pearson_lower(k, 50, 0.01) for k in range(2, 51)]


@pytest.mark.parametrize("alpha", [0.2, 0.01])
def test_a_population_with_several_draws_per_image_is_covered(alpha: float) -> None:
    """Images of probability 0 or 1 are the most dependent: their shares are those of single draws."""
    images = 30
    for p in (0.05, 0.3, 0.5, 0.9, 0.99):
        wrong = sum(
            float(binom.pmf(k, images, p))
            for k in range(images + 1)
            if dataset_accuracy([7] * k + [0] * (images - k), draws=7, alpha=alpha, population=True).lower > p
        )
        assert wrong <= alpha


@pytest.mark.parametrize("draws", [1, 6])
@pytest.mark.parametrize("shape", [(9.0, 1.0), (0.3, 0.1), (2.0, 2.0), (0.05, 0.95)])
def test_coverage_over_populations_of_known_mean(shape: tuple[float, float], draws: int) -> None:
    """Images of beta-distributed probabilities, 4,000 samples of 60: wrong at most as often as alpha allows (plus four
    standard errors), and not far below the mean.
    """
    images, alpha, repeats, mean = 60, 0.1, 4000, shape[0] / sum(shape)
    generator = np.random.default_rng(7)
    counts = generator.binomial(draws, generator.beta(*shape, size=(repeats, images))).sum(axis=1)

    def lower(total: int) -> float:
        each, rest = divmod(total, images)
        correct = [each + 1] * rest + [each] * (images - rest)
        return dataset_accuracy(correct, draws=draws, alpha=alpha, population=True).lower

    bounds = np.array([lower(total) for total in range(images * draws + 1)])[counts]
    assert np.mean(bounds > mean) <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / repeats)
    assert mean - np.median(bounds) < 0.2


def test_the_bound_of_means_solves_its_equation() -> None:
    lower = bounded_mean_lower(0.7, 100, 0.001)
    divergence = 0.7 * math.log(0.7 / lower) + 0.3 * math.log(0.3 / (1 - lower))
    assert math.exp(-100 * divergence) <= 0.001
    assert math.exp(-100 * divergence) == pytest.approx(0.001, rel=1e-5)
    assert bounded_mean_lower(0.0, 10, 0.01) == 0.0
    assert bounded_mean_lower(1.0, 10, 0.01) == pytest.approx(0.01**0.1, rel=1e-6)  # exp(-n log(1/p)) = alpha


@pytest.mark.parametrize("norm_name", [None, "l1", "l2", "linf"])
@pytest.mark.parametrize("name", NAMES)
def test_the_worst_case_is_convex_and_monotone(name: str, norm_name: str | None) -> None:
    noise = in_norm(make_noise(name, 0.25), norm_name, 48)
    assert isinstance(noise, WorstCase)
    p = np.linspace(0.0, 1.0, 401)
    before = p
    for radius in (0.0, 1e-9, 0.01, 0.1, 0.25, 0.6, 2.0):
        values = np.array([noise.worst_case(float(x), radius) for x in p])
        assert np.all((values >= 0.0) & (values <= p))
        assert np.all(np.diff(values) >= 0.0)
        assert np.all(values <= before)
        assert np.all(values[1:-1] <= (values[:-2] + values[2:]) / 2 + 2e-12)
        before = values
        if radius == 0.0:
            assert np.array_equal(values, p)


@pytest.mark.parametrize("name", NAMES)
def test_the_worst_case_agrees_with_the_radius(name: str) -> None:
    """At the certified radius the probability is one half."""
    noise = make_noise(name, 0.25)
    assert isinstance(noise, WorstCase)
    for p in (0.51, 0.6, 0.75, 0.9, 0.99):
        assert noise.worst_case(p, noise.radius(p)) == pytest.approx(0.5, abs=1e-9)


def test_no_half_space_falls_below_the_worst_case() -> None:
    """Along one pixel, at a margin m, the probability of a half-space is F(m), and F(m - r) after the worst change."""
    true_probability = {
        "gaussian": lambda m: norm.cdf(m / 0.25),
        "uniform": lambda m: np.clip(0.5 + m / (2 * math.sqrt(3) * 0.25), 0.0, 1.0),
        "laplace": lambda m: (
            0.5 * math.exp(m * math.sqrt(2) / 0.25) if m < 0 else 1 - 0.5 * math.exp(-m * math.sqrt(2) / 0.25)
        ),
    }
    for name, probability in true_probability.items():
        noise = make_noise(name, 0.25)
        assert isinstance(noise, WorstCase)
        for margin in np.linspace(-1.0, 1.0, 41):
            for radius in (0.01, 0.1, 0.25, 0.5, 1.0):
                truth, lowest = probability(margin - radius), noise.worst_case(probability(margin), radius)
                assert lowest <= truth + 1e-15, (name, margin, radius)
                tight = not 0 < margin < radius if name == "laplace" else probability(margin) < 1.0
                if tight:
                    assert lowest == pytest.approx(truth, abs=1e-7)  # scales are drawn in float32


@pytest.mark.parametrize("arguments", [(-0.1, 0.1), (1.1, 0.1), (0.5, -1.0), (math.nan, 0.1), (0.5, math.nan)])
def test_impossible_arguments_are_refused(arguments: tuple[float, float]) -> None:
    for name in NAMES:
        noise = make_noise(name, 0.25)
        assert isinstance(noise, WorstCase)
        with pytest.raises(UserError, match="expected a probability"):
            noise.worst_case(*arguments)


@pytest.mark.parametrize(("spread", "gap"), [(0.05, 0.08), (0.3, 0.2)])  # Jensen's inequality loses with the spread
def test_coverage_of_attacked_half_spaces(spread: float, gap: float) -> None:
    """A list of half-spaces with known margins, 400 lists of draws: their attacked accuracy is below the bound at most
    as often as alpha allows (plus four standard errors), and the bound is not far below it.
    """
    generator, sigma, radius, alpha, repeats = torch.Generator().manual_seed(5), 0.25, 0.2, 0.1, 400
    margins = 0.3 + spread * torch.randn(300, generator=generator, dtype=torch.float64)
    noise = make_noise("gaussian", sigma)
    assert isinstance(noise, WorstCase)
    truth = float(norm.cdf((margins.numpy() - radius) / sigma).mean())
    correct = margins + sigma * torch.randn(repeats, 300, generator=generator, dtype=torch.float64) > 0
    bounds = [dataset_accuracy(row.int().tolist(), alpha=alpha).under_attack(radius, noise) for row in correct]
    assert np.mean(np.array(bounds) > truth) <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / repeats)
    assert truth - np.median(bounds) < gap


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"correct": []}, "no images"),
        ({"correct": [2]}, "2 correct answers of draws = 1"),
        ({"correct": [-1]}, "-1 correct answers of draws = 1"),
        ({"correct": [0], "draws": 0}, "draws >= 1"),
        ({"correct": [1], "alpha": 0.3}, "less than 0.25"),
        ({"correct": [1], "alpha": 1.0}, "alpha = 1.0"),
    ],
)
def test_counts_out_of_range(arguments: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        dataset_accuracy(**arguments)  # type: ignore[arg-type]
