"""Certificates, decisions and predictions from votes: pure functions that all live, resumed and replayed runs share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from certify.errors import UserError
from certify.smoothing.bounds import BOUNDS, Bound, Evidence, Interval, check_alpha, check_trials, tail_error
from certify.smoothing.numeric import as_float, as_int
from certify.smoothing.rounding import exact
from certify.smoothing.stopping_rules import RULES, Boundary, Rule
from certify.types import ABSTAIN, NOT_CERTIFIABLE, ROBUST, UNDECIDED, Certificate, Decision, Prediction, Radii, Votes


def certificate_from_votes(
    selection: Votes,
    estimation: Votes,
    *,
    noise: Radii,
    alpha: float,
    bound: str = "clopper-pearson",
    uniform: float = 1.0,
) -> Certificate:
    """Return a radius or an abstention from two stages of votes: CERTIFY of Cohen, Rosenfeld and Kolter (2019).

    The selection votes alone choose the class (the lowest of equals); the estimation votes bound its probability, with
    failures as trials. With probability at least 1 - alpha over the draws, a returned radius is valid. Without
    selection votes, an anytime-valid bound runs on all classes at once at alpha / 2, which covers any number of them
    (:mod:`certify.smoothing.stopping_rules`, p0 = 1/2).

    Args:
        selection: votes of n0 noisy copies; of none if the bound is anytime-valid.
        estimation: votes of n fresh noisy copies.
        noise: the distribution of both stages; it states the radius in its norm.
        alpha: failure probability, in (0, 1).
        bound: name of a bound.
        uniform: for a randomized bound, a draw from (0, 1] that is independent of the votes.

    Returns:
        The certificate: an abstention unless the class's lower bound is above the others' upper bound.

    Raises:
        UserError: no selection votes and a bound that needs them; alpha or counts out of range.
    """
    alpha = check_alpha(alpha)
    compute = BOUNDS.get(bound)
    assert isinstance(compute, Bound)
    selected = selection.trials > 0
    if not selected and not compute.anytime:
        raise UserError(
            f"bound {bound!r} needs a class that was chosen from other votes than those it counts, but there are no "
            "selection votes (n0 = 0); expected an anytime-valid bound such as betting"
        )
    chosen = (selection if selected else estimation).leader  # ABSTAIN where every sample failed
    successes = estimation.of(chosen)
    rivals = (count for c, count in enumerate(estimation.counts) if c != chosen)
    evidence = Evidence(successes, max(rivals, default=0) + estimation.failures, estimation.trials, uniform)
    interval: Interval = compute(evidence, alpha if selected else alpha / 2)
    certified = chosen >= 0 and interval.lower > interval.upper  # written so that NaN abstains
    if not selected:  # required by the proof for all classes at once, at p0 = 1/2
        certified = certified and successes - 1 >= (estimation.trials - 1) / 2
    return Certificate(
        prediction=chosen if certified else ABSTAIN,
        radius=noise.radius(interval.lower, interval.upper) if certified else 0.0,
        p_lower=interval.lower,
        norm=noise.norm,
        alpha=alpha,
        selection=selection,
        estimation=estimation,
        p_other=interval.upper,
    )


def decision_from_counts(
    looks: Sequence[tuple[int, int, int]],
    votes: Votes,
    *,
    radii: Sequence[float],
    noise: Radii,
    alpha: float,
    rule: str,
    drawn: int,
) -> Decision:
    """Return the decision that the counts settle at each radius.

    Args:
        looks: for each radius the leading class, its votes and all samples at the test that settled it, or at the end.
        votes: all votes up to the last of these tests.
        radii: ascending.
        noise: states the radii in its norm.
        alpha: probability that any settled statement is wrong, at most, in (0, 1).
        rule: name of the stopping rule.
        drawn: number of samples that were labelled.
    """
    alpha, radii = check_alpha(alpha), [as_float(radius, "radius") for radius in radii]
    outcomes: list[str] = []
    prediction, largest = ABSTAIN, 0.0
    p0s, level = needed(radii, noise, alpha, rule)
    for radius, p0, (leader, successes, trials) in zip(radii, p0s, looks, strict=True):
        boundary: Boundary = RULES.get(rule)(p0, level, np.array([trials]))
        robust, hopeless = successes >= boundary.up[0], successes <= boundary.low[0]
        outcomes.append(ROBUST if robust else NOT_CERTIFIABLE if hopeless else UNDECIDED)
        if robust:
            prediction, largest = leader, radius
    return Decision(
        tuple(radii), tuple(outcomes), prediction, largest, noise.norm, alpha, rule, tuple(looks), votes, drawn
    )


def needed(radii: Sequence[float], noise: Radii, alpha: float, rule: str) -> tuple[list[float], float]:
    """Return the probability that each radius needs, and the level at which the rule runs on every class.

    Raises:
        UserError: radii that do not ascend, a radius that is not positive, or that this noise cannot certify with any
            number of samples.
    """
    alpha, radii = check_alpha(alpha), [as_float(radius, "radius") for radius in radii]
    if radii != sorted(radii):
        raise UserError(f"radii {', '.join(map(exact, radii))}: expected them in ascending order")
    p0s = [noise.probability(radius) for radius in radii]
    for radius, p0 in zip(radii, p0s, strict=True):
        if not (radius >= 0 and 0.5 <= p0 < 1.0):
            raise UserError(
                f"radius {exact(radius)} ({noise.norm}): expected one from 0 that {noise.name} noise of sigma = "
                f"{noise.scale:g} can certify; pass a smaller radius or a larger --sigma"
            )
    stopping = RULES.get(rule)
    assert isinstance(stopping, Rule)
    return p0s, stopping.level(alpha, p0s)


def prediction_from_votes(votes: Votes, *, alpha: float) -> Prediction:
    """Return the leading class, or an abstention: PREDICT of Cohen, Rosenfeld and Kolter (2019).

    With probability at least 1 - alpha over the noise draws, the result is the smoothed classifier's prediction or an
    abstention. The test is the two-sided binomial test of 1/2 between the two leading classes (Hung and Fithian 2019);
    all failures count for the second one, since they could be votes for any class.

    Args:
        votes: of n noisy copies of one image.
        alpha: failure probability, in (0, 1).

    Returns:
        The leading class if its p-value is at most alpha (of equals the lowest), else ``ABSTAIN``; and the p-value.

    Raises:
        UserError: alpha or the counts out of range.
    """
    alpha = check_alpha(alpha)
    if not any(votes.counts):
        return Prediction(ABSTAIN, 1.0, votes)
    first, *rest = votes.leading(2)
    a, b = votes.counts[first], (votes.counts[rest[0]] if rest else 0) + votes.failures
    from scipy.special import betainc

    check_trials(a + b)
    tail = float(betainc(a, b + 1, 0.5)) * (1.0 + tail_error(a + b))  # P(Bin(a + b, 1/2) >= a), rounded up
    p_value = min(1.0, 2.0 * tail)
    return Prediction(first if p_value <= alpha else ABSTAIN, p_value, votes)


def largest_radius(
    noise: Radii, n: int, alpha: float, bound: str = "clopper-pearson", *, selected: bool = True
) -> float:
    """Return the radius if all n votes agree, the largest of any run; 0 means that n is too small."""
    n, _, alpha = check_counts(n, 1, alpha)
    luckiest = Evidence(n, 0, n, uniform=math.ulp(0.5))
    interval: Interval = BOUNDS.get(bound)(luckiest, alpha if selected else alpha / 2)
    return noise.radius(interval.lower, interval.upper)


def check_counts(n: int, n0: int, alpha: float) -> tuple[int, int, float]:
    """Return both sample counts and alpha as Python numbers.

    Raises:
        UserError: counts below 1 or too large for the bounds; alpha outside (0, 1).
    """
    n, n0 = as_int(n, "n"), as_int(n0, "n0")
    if n < 1 or n0 < 1:
        raise UserError(f"n = {n}, n0 = {n0}: expected at least 1 sample in each stage")
    check_trials(max(n, n0))
    return n, n0, check_alpha(alpha)
