"""All images at once: families of certificates, and an interval that knows that certificates can be wrong.

A certificate is wrong with probability at most alpha; of a thousand, one may well be. From the counts in a run file
each image gets a p-value at a radius r, for "the chosen class has at most the probability p0 that r needs". Rejecting
with Holm's (1979) or Bonferroni's correction, all rejections are right except with probability at most alpha over the
noise: all these images are robust at r with their classes.

One radius or all of them. Bonferroni holds at all radii at once: it is one bound at level alpha / m on each image's
probability, and a bound gives every radius below it. Holm holds at one radius that was chosen without looking; over
several its errors add up, although robust at r implies robust at any smaller radius, because which images can be in
error, and so the level for them, differs from one radius to the next.

When the class is chosen. Selection votes are apart from the votes that count; given them the m hypotheses are fixed, as
Holm's proof demands. Where images stop by themselves the votes that count also choose the class, so which hypotheses
are true is random and may depend on the p-values. Bonferroni does not mind: "false, and its p-value at most a" has
probability at most a for each image. Holm does: right rejections raise the level for wrong ones, and a stopping time
can wait for that (``tests/test_families.py`` has one that errs more than twice as often as alpha). It is refused there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.curves import proportion_interval
from certify.errors import UserError
from certify.runs.image_rows import noise_of
from certify.runs.run_file import Run
from certify.smoothing.bounds import check_alpha, check_trials
from certify.smoothing.numeric import as_float
from certify.smoothing.procedures import votes_of
from certify.smoothing.rounding import exact

CORRECTIONS = {"holm": "Holm", "bonferroni": "Bonferroni"}

_OUTWARD = 1e-9  # relative; exceeds the error of betainc (certify.bounds.tail_error) and of exp
_P0_OUTWARD = 1e-15  # relative; exceeds the error of Noise.probability


def binomial_p(successes: np.ndarray, trials: np.ndarray, p0: float) -> np.ndarray:
    """P(Bin(n, p0) >= k), rounded up: the p-value of "the probability is at most p0" for a class fixed beforehand.

    At most alpha just where the Clopper-Pearson lower bound at alpha reaches p0.
    """
    from scipy.special import betainc

    check_trials(trials)
    k, n, p0 = np.asarray(successes, dtype=float), np.asarray(trials, dtype=float), as_float(p0, "p0")
    if not p0 < 1.0:
        return np.ones_like(k)
    tail = betainc(np.maximum(k, 1.0), n - k + 1.0, p0) * (1.0 + _OUTWARD) + np.finfo(float).tiny  # it may underflow
    return np.where(k > 0, np.fmin(1.0, tail), 1.0)  # fmin: NaN proves nothing


def betting_p(successes: np.ndarray, trials: np.ndarray, p0: float) -> np.ndarray:
    """1 / (p0 W) for the betting wealth W against p0 >= 1/2, rounded up: a p-value at any time, for any class.

    With probability at least 1 - a, at no sample size is it at most a for any class of probability at most p0, however
    many classes there are: where (H - 1)/(T - 1) >= p0 such a class has p_c E_c >= p0 W, and sum_c p_c E_c reaches 1/a
    with probability at most a (:mod:`certify.smoothing.stopping_rules`). 1 elsewhere.
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
    """What the counts of a run say about its m usable images.

    Attributes:
        run: where they come from.
        classes: the class of each image that its p-value is about, ``(m,)``; ``ABSTAIN`` if no sample chose one.
        successes: its votes at each look, ``(m, looks)``: one look, unless the run decided at several radii.
        trials: all samples then; 0 fills up.
        values: C * H * W of each image, ``(m,)``.
        fixed: whether the class was chosen by votes apart from these.
    """

    run: Run
    classes: np.ndarray
    successes: np.ndarray
    trials: np.ndarray
    values: np.ndarray
    fixed: bool

    @property
    def right(self) -> np.ndarray:
        """Which images' class is their label, bool ``(m,)``."""
        return np.array([c == row["label"] for c, row in zip(self.classes.tolist(), self.run.usable, strict=True)])

    def p_values(self, radius: float) -> np.ndarray:
        """For each image the p-value of "its class has at most the probability that ``radius`` needs", ``(m,)``.

        Binomial where the class was fixed; else by the betting wealth, the best of all looks: it holds at all of them,
        whichever rule chose when to look.

        Args:
            radius: in the run's norm, from 0.
        """
        radius = as_float(radius, "radius")
        if not 0.0 <= radius < math.inf:
            raise UserError(f"radius {exact(radius)}; expected a finite number from 0, in [0, 1] pixels")
        found = np.ones(self.successes.shape)
        for values in np.unique(self.values).tolist():
            same = self.values == values
            p0 = noise_of(self.run.header, values or None).probability(radius) * (1.0 + _P0_OUTWARD)
            test = binomial_p if self.fixed else betting_p
            found[same] = test(self.successes[same], self.trials[same], p0)
        return np.asarray(found.min(axis=1, initial=1.0))

    def correction(self, method: str | None = None) -> str:
        """The correction for these images: the one that is asked for, or (None) the sharpest that is valid.

        Raises:
            UserError: an unknown one, or Holm's where the class was chosen by the votes that count.
        """
        if method is None:
            return "holm" if self.fixed else "bonferroni"
        if method not in CORRECTIONS:
            raise UserError(f"correction {method!r}; expected one of {', '.join(CORRECTIONS)}")
        if method == "holm" and not self.fixed:
            raise UserError(
                f"{self.run.path}: the votes that count also chose the classes, where Holm's correction does not hold; "
                "expected bonferroni: pass --correction bonferroni, or none"
            )
        return method

    def certified(self, radius: float, alpha: float | None = None, method: str | None = None) -> np.ndarray:
        """Which images are robust at ``radius`` with their class, all of it at once: see :func:`simultaneous`.

        An unfinished run is corrected for all images that it was to hold: which of them it holds may depend on their
        votes (those that are settled soon come first, and a spent budget ends it), and so must not ease the level.
        """
        alpha = check_alpha(self.run.header["alpha"] if alpha is None else alpha)
        method = self.correction(method)
        if not len(self.classes):
            return np.zeros(0, dtype=bool)
        from statsmodels.stats.multitest import multipletests

        pending = max(0, int(self.run.header["expected"]) - len(self.run.images))
        p = np.concatenate([self.p_values(radius), np.ones(pending)])
        return np.asarray(multipletests(p, alpha=alpha, method=method)[0], dtype=bool)[: len(self.classes)]


def family(run: Run) -> Family:
    """The family of a run's usable images.

    Raises:
        UserError: no counts, as in published logs, or predictions.
    """
    header, rows = run.header, run.usable
    if header.get("noise") is None or any("votes" not in row or "selection" not in row for row in rows):
        raise UserError(f"{run.path} holds no noise and votes, as published logs; expected a run file of certify")
    if header.get("procedure", "certify") == "predict":
        raise UserError(f"{run.path} holds predictions, which have no radius; expected a run of `certify --model ...`")
    stopping = header.get("stopping")
    stages = [votes_of(row) for row in rows]
    fixed = stopping is None and all(selection.trials for selection, _ in stages)
    classes, looks = [], []
    for row, (selection, estimation) in zip(rows, stages, strict=True):
        chosen = (selection if fixed else estimation).leader
        if not fixed and row["prediction"] >= 0:  # what was settled last; any class may be asked about
            chosen = row["prediction"]
        classes.append(chosen)
        looks.append([(estimation.of(chosen), estimation.trials), *_earlier(row, chosen)])
    width = max(map(len, looks), default=1)
    table = np.array([[*found, *[(0, 0)] * (width - len(found))] for found in looks]).reshape(-1, width, 2)
    values = np.array([row.get("values", 0) for row in rows], dtype=np.int64)
    return Family(run, np.array(classes, dtype=np.int64), table[..., 0], table[..., 1], values, fixed)


def _earlier(row: dict[str, Any], chosen: int) -> list[tuple[int, int]]:
    """Votes and samples at the looks at which the class led, where the run decided at given radii."""
    looks = (decision["look"] for decision in row.get("decisions", ()))
    return [(int(k), int(n)) for leader, k, n in looks if leader == chosen]


def p_values(run: Run, radius: float) -> np.ndarray:
    """For each usable image the p-value of "the chosen class has at most the probability that ``radius`` needs".

    P(p-value <= a) <= a for each a in (0, 1) where that is so. The class is the one that the selection votes chose,
    also where the run abstained; a failure is a trial and nobody's vote. With a fixed n and the Clopper-Pearson bound
    it is at most alpha just where the image is certified at ``radius`` (up to a relative 1e-9 in the p-value).

    Args:
        run: a run file, not a published log.
        radius: in the run's norm and [0, 1] pixels.

    Raises:
        UserError: the run has no such p-values.
    """
    return family(run).p_values(radius)


def simultaneous(run: Run, radius: float, alpha: float | None = None, method: str | None = None) -> np.ndarray:
    """Which usable images are robust at ``radius`` with their class, all at once, bool ``(m,)``.

    With probability at least 1 - alpha over the noise draws, the smoothed classifier predicts its chosen class on the
    whole ball of this radius around every image that is marked. For labels see :attr:`Family.right`. Nothing is said
    about several runs together.

    An image that stopped by itself stopped as soon as it was settled at the run's alpha, and so is rarely settled at
    alpha / m: plan for that, run at alpha / m and ask for alpha here.

    Args:
        run: a run file, not a published log.
        radius: in the run's norm and [0, 1] pixels; for Holm's correction chosen without looking at the votes.
        alpha: probability that any of the marks is wrong, at most; None: the run's.
        method: ``"holm"`` (Holm 1979: at this radius), ``"bonferroni"`` (at all radii together), or None for Holm's
            where it is valid.

    Raises:
        UserError: the run has no p-values, or the correction is not valid for it.
    """
    return family(run).certified(radius, alpha, method)


def accuracy_interval(
    successes: int | np.ndarray, total: int, alpha: float, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """An interval for certified accuracy that allows for sampled images and for wrong certificates.

    Let theta be the share, in the population that the images were drawn from, of images whose smoothed classifier is
    right and truly robust at r, and q the chance that a drawn image is counted. An image outside that share is counted
    only if its certificate is wrong, with probability at most alpha: q <= theta + alpha (1 - theta). The count is
    binomial with q, which Clopper and Pearson (1934) bound. So over images and noise jointly, with probability at
    least ``confidence``, theta is at least the lower end *and* q at most the upper end (half the error for each). The
    upper end is for the certified accuracy q that this n and alpha reach on average. It does not bound theta:
    certificates undercount, and the count does not say by how much.

    Args:
        successes: images that are right with a radius of at least r.
        total: images.
        alpha: probability of error of each certificate.
        confidence: of both ends together.
    """
    alpha = check_alpha(alpha)
    low, high = proportion_interval(np.asarray(successes), total, confidence)
    return np.maximum(0.0, (low - alpha) / (1.0 - alpha)), high
