"""Statements about all images at once: families of certificates, and an interval that allows for wrong certificates.

A certificate is wrong with probability at most alpha; among a thousand, one may well be. From the counts in a run file
each image gets a p-value at a radius r for the hypothesis "the chosen class has at most the probability p0 that r
requires". If hypotheses are rejected with Holm's (1979) or Bonferroni's correction, all rejections are right except
with probability at most alpha over the noise: all these images are robust at r with their classes.

One radius or several. Bonferroni holds at all radii jointly: it is one bound at level alpha / m on each image's
probability, and a bound implies every radius below it. Holm holds at one radius, chosen without seeing the votes. Over
several radii its errors add up, although robustness at r implies robustness at smaller radii, because the images that
can be in error, and so the level for them, differ between radii.

Choice of the class. Selection votes are independent of the votes that count; given them, the m hypotheses are fixed, as
Holm's proof requires. With early stopping the counted votes also choose the class, so the set of true hypotheses is
random and may depend on the p-values. Bonferroni stays valid, because "true, and its p-value at most a" has probability
at most a for each image. Holm does not: correct rejections raise the level for wrong ones, and a stopping time can wait
for that (``tests/test_families.py`` has an example that errs more than twice as often as alpha). It is refused there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.curves import proportion_interval
from certify.errors import UserError
from certify.runs.records import ImageRow
from certify.runs.run_file import Run
from certify.smoothing.bounds import check_alpha, check_trials
from certify.smoothing.numeric import as_float
from certify.smoothing.rounding import exact

CORRECTIONS = {"holm": "Holm", "bonferroni": "Bonferroni"}

_OUTWARD = 1e-9  # relative; exceeds the error of betainc (certify.smoothing.bounds.tail_error) and of exp
_P0_OUTWARD = 1e-15  # relative; exceeds the error of Noise.probability


def binomial_p(successes: np.ndarray, trials: np.ndarray, p0: float) -> np.ndarray:
    """Return P(Bin(n, p0) >= k), rounded up: the p-value of "the probability is at most p0" for a fixed class.

    It is at most alpha exactly if the Clopper-Pearson lower bound at alpha is at least p0.
    """
    from scipy.special import betainc

    check_trials(trials)
    k, n, p0 = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float), as_float(p0, "p0")
    if not p0 < 1.0:
        return np.ones_like(k)
    tail = betainc(np.maximum(k, 1.0), n - k + 1.0, p0) * (1.0 + _OUTWARD) + np.finfo(float).tiny  # it may underflow
    return np.where(k > 0, np.fmin(1.0, tail), 1.0)  # fmin: NaN proves nothing


def betting_p(successes: np.ndarray, trials: np.ndarray, p0: float) -> np.ndarray:
    """Return 1 / (p0 W) for the betting wealth W against p0 >= 1/2, rounded up: an anytime-valid p-value for any class.

    With probability at least 1 - a, at no sample size is it at most a for any class of probability at most p0, however
    many classes there are: where (H - 1)/(T - 1) >= p0 such a class has p_c E_c >= p0 W, and sum_c p_c E_c reaches 1/a
    with probability at most a (:mod:`certify.smoothing.stopping_rules`). Elsewhere it is 1.
    """
    from certify.smoothing.stopping_rules import log_wealth

    check_trials(trials)
    h, t, p0 = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float), as_float(p0, "p0")
    if not p0 < 1.0:
        return np.ones_like(h)
    above = h - 1 >= p0 * (t - 1)  # implies h / t > p0
    log_p = np.where(above, -math.log(p0) - log_wealth(h, t, p0), 0.0)  # log_wealth is rounded down
    return np.asarray(np.exp(np.minimum(log_p, 0.0)) * (1.0 + _OUTWARD) + np.finfo(float).tiny).clip(max=1.0)


@dataclass(frozen=True, eq=False)
class Family:
    """Counts of a run's m usable images, for simultaneous tests.

    Attributes:
        run: the run.
        classes: class tested for each image, ``(m,)``; ``ABSTAIN`` if no sample chose one.
        successes: votes for it at each evaluation, ``(m, evaluations)``; one, unless the run decided at several radii.
        trials: number of samples at each evaluation, padded with 0.
        values: C * H * W of each image, ``(m,)``.
        fixed: True if the class was chosen by votes independent of these.
    """

    run: Run
    classes: np.ndarray
    successes: np.ndarray
    trials: np.ndarray
    values: np.ndarray
    fixed: bool

    @property
    def right(self) -> np.ndarray:
        """Images whose class is their label, bool ``(m,)``."""
        return np.array([c == row.label for c, row in zip(self.classes.tolist(), self.run.usable, strict=True)])

    def p_values(self, radius: float) -> np.ndarray:
        """Return each image's p-value for "its class has at most the probability that ``radius`` requires", ``(m,)``.

        Binomial if the class was fixed; otherwise from the betting wealth, the minimum over all evaluations: it is
        valid at all of them, whichever rule stopped the sampling.

        Args:
            radius: in the run's norm, at least 0.
        """
        radius = as_float(radius, "radius")
        if not 0.0 <= radius < math.inf:
            raise UserError(f"radius {exact(radius)}; expected a finite number of at least 0, in [0, 1] pixels")
        p = np.ones(self.successes.shape)
        for values in np.unique(self.values).tolist():
            same = self.values == values
            p0 = self.run.header.radii_for(values or None).probability(radius) * (1.0 + _P0_OUTWARD)
            test = binomial_p if self.fixed else betting_p
            p[same] = test(self.successes[same], self.trials[same], p0)
        return np.asarray(p.min(axis=1, initial=1.0))

    def correction(self, method: str | None = None) -> str:
        """Return the requested correction, or for None the sharpest that is valid.

        Raises:
            UserError: an unknown one, or Holm's if the counted votes also chose the class.
        """
        if method is None:
            return "holm" if self.fixed else "bonferroni"
        if method not in CORRECTIONS:
            raise UserError(f"correction {method!r}; expected one of {', '.join(CORRECTIONS)}")
        if method == "holm" and not self.fixed:
            raise UserError(
                f"{self.run.path}: the counted votes also chose the classes, for which Holm's correction is not valid; "
                "expected --correction bonferroni, or no --correction"
            )
        return method

    def certified(self, radius: float, alpha: float | None = None, method: str | None = None) -> np.ndarray:
        """Test which images are robust at ``radius`` with their class, jointly; see :func:`simultaneous`.

        An unfinished run is corrected for all its planned images: which of them are finished may depend on their votes
        (those decided early come first, and a spent budget ends the run), so it must not relax the level.
        """
        alpha = check_alpha(self.run.header.alpha if alpha is None else alpha)
        method = self.correction(method)
        if not len(self.classes):
            return np.zeros(0, dtype=bool)
        from statsmodels.stats.multitest import multipletests

        pending = max(0, self.run.header.expected - len(self.run.images))
        p = np.concatenate([self.p_values(radius), np.ones(pending)])
        return np.asarray(multipletests(p, alpha=alpha, method=method)[0], dtype=bool)[: len(self.classes)]


def family(run: Run) -> Family:
    """Return the family of a run's usable images.

    Raises:
        UserError: a run without counts (a published log), or without radii (predictions).
    """
    header, rows = run.header, run.usable
    if not header.has("noise") or not all(row.has("votes") and row.has("selection") for row in rows):
        raise UserError(f"{run.path} holds no noise and votes, like published logs; expected a run file of certify")
    if why := header.without_radii:
        raise UserError(f"{run.path} {why}; expected a run of `certify --model ...`")
    stages = [(row.selection_votes, row.estimation_votes) for row in rows]
    fixed = header.stopping is None and all(selection.trials for selection, _ in stages)
    classes, evaluations = [], []
    for row, (selection, estimation) in zip(rows, stages, strict=True):
        chosen = (selection if fixed else estimation).leader
        if not fixed and not row.abstained:  # the class of the last decision; any class may be tested
            chosen = row.prediction
        classes.append(chosen)
        evaluations.append([(estimation.of(chosen), estimation.trials), *_earlier_votes(row, chosen)])
    width = max(map(len, evaluations), default=1)
    table = np.array([[*pairs, *[(0, 0)] * (width - len(pairs))] for pairs in evaluations]).reshape(-1, width, 2)
    values = np.array([row.size or 0 for row in rows], dtype=np.int64)
    return Family(run, np.array(classes, dtype=np.int64), table[..., 0], table[..., 1], values, fixed)


def _earlier_votes(row: ImageRow, chosen: int) -> list[tuple[int, int]]:
    """Return votes and samples at those decisions of a run with given radii at which the class led."""
    looks = (decision.look for decision in row.outcomes)
    return [(k, n) for leader, k, n in looks if leader == chosen]


def p_values(run: Run, radius: float) -> np.ndarray:
    """Return each usable image's p-value for "the chosen class has at most the probability that ``radius`` requires".

    If the hypothesis is true, P(p-value <= a) <= a for each a in (0, 1). The class is the one that the selection votes
    chose, also if the run abstained; a failure is a trial without a vote. With a fixed n and the Clopper-Pearson bound
    the p-value is at most alpha exactly if the image is certified at ``radius`` (up to a relative error of 1e-9).

    Args:
        run: a run file, not a published log.
        radius: in the run's norm and [0, 1] pixels.

    Raises:
        UserError: no p-values can be computed for this run.
    """
    return family(run).p_values(radius)


def simultaneous(run: Run, radius: float, alpha: float | None = None, method: str | None = None) -> np.ndarray:
    """Return which usable images are jointly robust at ``radius`` with their class, bool ``(m,)``.

    With probability at least 1 - alpha over the noise draws, the smoothed classifier predicts the chosen class on the
    whole ball of this radius around every marked image. For labels see :attr:`Family.right`. Nothing is claimed about
    several runs together.

    With early stopping, sampling ends as soon as an image is decided at the run's alpha, so few images are decided at
    alpha / m: run at alpha / m, and pass alpha here.

    Args:
        run: a run file, not a published log.
        radius: in the run's norm and [0, 1] pixels; for Holm's correction chosen without seeing the votes.
        alpha: maximum probability that any mark is wrong; None: the run's.
        method: ``"holm"`` (Holm 1979: at this radius), ``"bonferroni"`` (at all radii together), or None: Holm's
            if it is valid.

    Raises:
        UserError: no p-values can be computed for this run, or the correction is not valid for it.
    """
    return family(run).certified(radius, alpha, method)


def accuracy_interval(
    successes: int | np.ndarray, total: int, alpha: float, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return an interval for certified accuracy that allows for sampled images and for wrong certificates.

    Let theta be the share, in the population that the images were drawn from, of images whose smoothed classifier is
    correct and truly robust at r, and q the probability that a drawn image is counted. An image outside that share is
    counted only if its certificate is wrong, with probability at most alpha: q <= theta + alpha (1 - theta). The count
    is binomial with q, which Clopper and Pearson (1934) bound. So over images and noise jointly, with probability at
    least ``confidence``, theta is at least the lower end *and* q at most the upper end (half the error for each). The
    upper end is for the certified accuracy q that this n and alpha reach on average. It does not bound theta:
    certificates undercount by an unknown amount.

    Args:
        successes: number of correct images with a radius of at least r.
        total: number of images.
        alpha: maximum error probability of each certificate.
        confidence: joint confidence of both ends.
    """
    alpha = check_alpha(alpha)
    low, high = proportion_interval(np.asarray(successes), total, confidence)
    return np.maximum(0.0, (low - alpha) / (1.0 - alpha)), high
