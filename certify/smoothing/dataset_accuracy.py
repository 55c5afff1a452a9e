"""Certified accuracy of a whole data set from one noisy query per image.

The statement is about a *randomised* classifier: each request is answered by the base classifier at one fresh noisy
copy of the image, f(x + e). Let p_i be the probability that image i is classified correctly, and p the mean of the p_i.
(f itself may be random, if its answers are independent and their distribution does not change.) An adversary who does
not know the noise of the request changes each image by at most r. Then the expected accuracy is at least c_r(p), where
c_r is the noise's :meth:`~certify.types.WorstCase.worst_case`:

1. Image by image, the probability at the changed image is at least c_r(p_i) (Cohen, Rosenfeld and Kolter 2019 for the
   Gaussian: Phi(Phi^-1(p_i) - r / sigma)).
2. c_r is convex. For the Gaussian, with z = Phi^-1(p) and s = r / sigma, its derivative exp(s z - s^2 / 2) increases
   with p; for the other distributions it is a maximum of affine functions. So the mean of the c_r(p_i) is at least
   c_r(p) (Jensen's inequality).
3. c_r does not decrease, so p may be replaced by a lower bound. One bound on p serves all radii at once.

The lower bound on p comes from S, the number of correct answers among N independent requests:

- The images are a random sample from a population, one request each: S is binomial, and Clopper and Pearson's bound
  (1934) applies. With several requests per image, which are dependent, the bound is that of Hoeffding (1963, theorem 1)
  on the mean of the images' shares: N kl(share, p) = log(1 / alpha).
- The images are a fixed list: S is a sum of independent Bernoulli variables with different p_i. For a whole number
  k >= N p + 1, P(S >= k) <= P(Bin(N, p) >= k) (Hoeffding 1956, theorem 4). Let k be the smallest count whose bound
  exceeds p, so that the bound is wrong if and only if S >= k.
  If k >= 2, the bound is Clopper and Pearson's, so P(Bin(N, p) >= k) < alpha < 1/4. Where p > 1/N, a binomial variable
  reaches its mean with probability above 1/4 (Greenberg and Mohri 2014), so k exceeds the smallest whole number that is
  at least N p, and k >= N p + 1; where p <= 1/N, k >= 2 >= N p + 1. Either way P(S >= k) < alpha.
  If k = 1, the bound is alpha / N > p, and P(S >= 1) <= N p < alpha. (One image may carry all of the mean: Clopper and
  Pearson's bound for one success would be wrong more often than alpha.)

Related: Kumar et al. (2022, arXiv 2201.12440) for distributions, and RCP1 (arXiv 2506.16553).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from certify.errors import UserError
from certify.smoothing.bounds import check_alpha, check_counts, clopper_pearson_lower
from certify.smoothing.numeric import as_int
from certify.types import WorstCase

_MARGIN = 1e-12  # covers the root's and the divergence's floating-point error


@dataclass(frozen=True)
class DatasetAccuracy:
    """A lower bound on the mean accuracy of the randomised classifier over images.

    Attributes:
        images: number of images.
        draws: noisy requests per image.
        correct: correct answers among all requests; a failed request is not correct.
        alpha: failure probability of the bound, and of all statements that follow from it together.
        population: True if the images are a random sample and the statement is about their population; False if it is
            about these images.
        lower: bound on the expected accuracy without an attack, in [0, 1].
    """

    images: int
    draws: int
    correct: int
    alpha: float
    population: bool
    lower: float

    def under_attack(self, radius: float, noise: WorstCase) -> float:
        """Return the lower bound on the expected accuracy if every image is changed by at most ``radius``.

        The adversary may know everything except the noise of the request that is answered.

        Args:
            radius: r >= 0, in the norm of ``noise`` and in [0, 1] pixels.
            noise: distribution of the noise.
        """
        return noise.worst_case(self.lower, radius)


def dataset_accuracy(
    correct: Sequence[int], *, draws: int = 1, alpha: float = 0.001, population: bool = False
) -> DatasetAccuracy:
    """Bound the mean accuracy of the randomised classifier from a few noisy requests per image.

    With probability at least 1 - alpha over the noise (and over the sample of images, for a population), the expected
    accuracy is at least ``lower``, and under any attack within r at least ``under_attack(r, noise)``, for all r at
    once. Nothing is said about a single image.

    Args:
        correct: for each image, the number of correct answers among its requests.
        draws: requests per image, at least 1; the same number for every image, not chosen by looking at the answers.
        alpha: failure probability, in (0, 1); below 1/4 for a fixed list of images.
        population: see :class:`DatasetAccuracy`.

    Raises:
        UserError: no images, counts out of range, or alpha out of range.
    """
    alpha, draws, counts = check_alpha(alpha), as_int(draws, "draws"), [as_int(count, "correct") for count in correct]
    if not counts:
        raise UserError("correct: received no images; expected at least one")
    if draws < 1 or not all(0 <= count <= draws for count in counts):
        wrong = next((count for count in counts if not 0 <= count <= draws), counts[0])
        raise UserError(f"{wrong} correct answers of draws = {draws}: expected 0 <= correct <= draws and draws >= 1")
    successes, images = sum(counts), len(counts)
    if not population:
        lower = mean_lower(successes, images * draws, alpha)
    elif draws == 1:
        lower = clopper_pearson_lower(successes, images, alpha)
    else:
        lower = bounded_mean_lower(successes / (images * draws), images, alpha)
    return DatasetAccuracy(images, draws, successes, alpha, population, lower)


def mean_lower(successes: int, trials: int, alpha: float) -> float:
    """Return a lower confidence bound on the mean of the probabilities of independent trials that may differ.

    P(result > mean) <= alpha for all probabilities of the trials; the proof is at the top of this module.

    Args:
        successes: k, 0 <= k <= n.
        trials: n >= 1.
        alpha: failure probability, in (0, 1/4).

    Raises:
        UserError: counts or alpha out of range.
    """
    successes, trials = check_counts(successes, trials)
    alpha = check_list_alpha(alpha)
    if successes == 1:
        return alpha / trials * (1.0 - _MARGIN)
    return clopper_pearson_lower(successes, trials, alpha)


def check_list_alpha(alpha: float) -> float:
    """Return the failure probability of a statement about a fixed list of images.

    Raises:
        UserError: 1/4 or more, for which the proof does not hold.
    """
    if not alpha < 0.25:
        raise UserError(f"alpha = {alpha}: expected less than 0.25 for a fixed list of images")
    return alpha


def bounded_mean_lower(mean: float, count: int, alpha: float) -> float:
    """Return a lower confidence bound on the mean of independent variables in [0, 1] (Hoeffding 1963, theorem 1).

    P(sample mean >= t) <= exp(-n kl(t, p)) for t > p. The bound is the p at which this is alpha, rounded down.

    Args:
        mean: sample mean, in [0, 1].
        count: n, number of variables.
        alpha: failure probability, in (0, 1).
    """
    from scipy.optimize import brentq
    from scipy.special import rel_entr

    if mean <= 0.0:
        return 0.0
    level = math.log(1.0 / alpha) / count

    def excess(p: float) -> float:
        return float(rel_entr(mean, p) + rel_entr(1.0 - mean, 1.0 - p)) - level

    smallest = 1e-300
    if excess(smallest) <= 0.0:
        return 0.0
    root = float(brentq(excess, smallest, mean, xtol=1e-15, rtol=1e-15))
    return max(0.0, root * (1.0 - 1e-9) - _MARGIN)
