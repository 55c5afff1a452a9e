"""Votes -> certificate or abstention: pure functions, in which live, resumed and replayed runs all end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from certify.bounds import BOUNDS, check_alpha
from certify.errors import UserError
from certify.types import ABSTAIN, Certificate, Noise, Votes


def certificate_from_votes(
    selection: Votes, estimation: Votes, *, noise: Noise, alpha: float, bound: str = "clopper-pearson"
) -> Certificate:
    """CERTIFY of Cohen, Rosenfeld and Kolter (2019): from two stages of votes to a radius or an abstention.

    The class comes from the selection votes alone (a tie goes to the lowest class); its probability is bounded from the
    estimation votes, where failures count as trials. With probability at least 1 - alpha over the draws, a returned
    radius is valid.

    Args:
        selection: votes of n0 noisy copies.
        estimation: votes of n fresh noisy copies.
        noise: the distribution both were drawn from.
        alpha: probability of error, in (0, 1).
        bound: name of a one-sided bound.

    Returns:
        The certificate: an abstention unless the lower bound is above 1/2.
    """
    check_alpha(alpha)
    lower_bound: Callable[[int, int, float], float] = BOUNDS.get(bound)
    chosen = selection.leading()[0] if any(selection.counts) else ABSTAIN  # every selection sample may have failed
    successes = estimation.counts[chosen] if 0 <= chosen < len(estimation.counts) else 0
    p_lower = lower_bound(successes, estimation.trials, alpha)
    certified = p_lower > 0.5  # written so that NaN abstains
    return Certificate(
        prediction=chosen if certified else ABSTAIN,
        radius=noise.radius(p_lower) if certified else 0.0,
        p_lower=p_lower,
        norm=noise.norm,
        alpha=alpha,
        selection=selection,
        estimation=estimation,
    )


@dataclass(frozen=True)
class Prediction:
    """PREDICT's answer: with probability at least 1 - alpha it is the smoothed classifier's, or an abstention.

    Attributes:
        prediction: class in [0, K), or ``ABSTAIN``.
        p_value: of the two-sided binomial test between the two leading classes.
        votes: of the n noisy copies.
    """

    prediction: int
    p_value: float
    votes: Votes


def prediction_from_votes(votes: Votes, *, alpha: float) -> Prediction:
    """PREDICT of Cohen, Rosenfeld and Kolter (2019): the leading class, unless the runner-up may be ahead.

    The test is the two-sided binomial test of 1/2 between the two leading classes (Hung and Fithian 2019); a class is
    returned when its p-value is at most alpha, and then it is the smoothed classifier's prediction with probability at
    least 1 - alpha.
    """
    check_alpha(alpha)
    from scipy.stats import binomtest

    if not any(votes.counts):
        return Prediction(ABSTAIN, 1.0, votes)
    first, *rest = votes.leading(2)
    a, b = votes.counts[first], votes.counts[rest[0]] if rest else 0
    p_value = float(binomtest(a, a + b, 0.5).pvalue)
    return Prediction(first if p_value <= alpha else ABSTAIN, p_value, votes)


def largest_radius(noise: Noise, n: int, alpha: float, bound: str = "clopper-pearson") -> float:
    """The radius when all n votes agree: nothing larger can come out of a run. 0 means that n is too small."""
    return noise.radius(BOUNDS.get(bound)(n, n, alpha))


def check_counts(n: int, n0: int, alpha: float) -> None:
    """Refuse sample counts below 1 and alpha outside (0, 1), as the user's mistakes."""
    if n < 1 or n0 < 1:
        raise UserError(f"n = {n}, n0 = {n0}: expected at least 1 sample in each stage")
    try:
        check_alpha(alpha)
    except ValueError as error:
        raise UserError(str(error)) from None
