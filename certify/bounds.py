"""One-sided confidence bounds on a binomial proportion, rounded outward.

A bound is a function ``(successes, trials, alpha) -> lower`` with P(lower > p) <= alpha for every p. Floating point
must not spoil that: the quantile functions of scipy land above the exact value about half the time, so ``_OUTWARD`` is
subtracted. It exceeds every error found against ball arithmetic up to n = 10^7 and alpha = 10^-12
(``tests/test_bounds.py``) and costs less than 2e-7 of a radius at sigma = 1.
"""

from __future__ import annotations

import math

from certify.registry import Registry

_OUTWARD = 1e-12
_SMALLEST_ALPHA = 1e-50

BOUNDS = Registry("bound")


def check_alpha(alpha: float) -> None:
    """Refuse an alpha outside (0, 1), NaN included, and below 1e-50, where the margin is not known to suffice."""
    if not _SMALLEST_ALPHA <= alpha < 1.0:
        raise ValueError(f"alpha = {alpha}: expected a number strictly between 0 and 1, such as 0.001 (1e-50 at least)")


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
    check_alpha(alpha)
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes in {trials} trials: expected 0 <= successes <= trials and trials >= 1")
    if successes == 0:
        return 0.0
    from scipy.special import betaincinv  # 0.4 s to import: `certify --help` must not pay for it

    quantile = float(betaincinv(successes, trials - successes + 1, alpha))
    return max(0.0, quantile - _OUTWARD) if math.isfinite(quantile) else 0.0


BOUNDS.add("clopper-pearson", clopper_pearson_lower, "exact, one-sided (default)")
