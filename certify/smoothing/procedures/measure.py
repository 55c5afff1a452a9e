"""Certify a radius to a relative tolerance, from as few samples as possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from certify.errors import UserError
from certify.smoothing.certificates import certificate_from_votes, check_counts, largest_radius
from certify.smoothing.numeric import as_float
from certify.smoothing.procedures.base import (
    ESTIMATION,
    AnswerKeys,
    Prospects,
    RecordedVotes,
    Stopping,
    assign,
    is_anytime,
)
from certify.smoothing.procedures.certify import Certify, certificate_keys, largest_prospects
from certify.smoothing.rounding import exact, times
from certify.smoothing.sequential_tests import LEAST, VoteCounts
from certify.smoothing.stopping_rules import MEASURING_BOUND, betting_upper
from certify.types import Certificate, Radii, Votes


def check_tolerance(tolerance: float) -> float:
    """Return a relative tolerance as a Python float.

    Raises:
        UserError: outside (0, 1), NaN included.
    """
    expected = "a share between 0 and 1, such as 0.1"
    tolerance = as_float(tolerance, "tolerance", expected)
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance {exact(tolerance)}: expected {expected}")
    return tolerance


@dataclass(frozen=True)
class Measure:
    """Certify a radius to a relative tolerance: stop once it is at least 1 - tolerance of the largest still possible.

    The bound is the betting rule's, which holds whenever sampling stops and needs no selection samples.

    Args:
        tolerance: in (0, 1).
        n: maximum number of samples.
        alpha: failure probability per image, in (0, 1).

    Raises:
        UserError: arguments out of range.
    """

    tolerance: float
    n: int = 100_000
    alpha: float = 0.001

    kind: ClassVar[str] = "certify"
    sequential: ClassVar[bool] = True
    radii: ClassVar[tuple[float, ...]] = ()
    bound: ClassVar[str] = MEASURING_BOUND

    def __post_init__(self) -> None:
        n, _, alpha = check_counts(self.n, 1, self.alpha)
        assign(self, n=n, alpha=alpha, tolerance=check_tolerance(self.tolerance))

    @property
    def stages(self) -> dict[str, int]:
        """Samples, at most."""
        return {ESTIMATION: self.n}

    @property
    def stopping(self) -> Stopping:
        """Rule by which images stop early."""
        return Stopping(MEASURING_BOUND, tolerance=self.tolerance)

    def test(self, num_classes: int, noise: Radii) -> RadiusEstimate:
        """Return the sequential test of one image."""
        return RadiusEstimate(num_classes, n=self.n, tolerance=self.tolerance, noise=noise, alpha=self.alpha)

    def answer(self, results: Mapping[str, Any], noise: Radii, uniform: float = 1.0) -> Certificate:
        """Return the certificate of the sequential test."""
        certificate: Certificate = results[ESTIMATION]
        return certificate

    def recompute(self, votes: RecordedVotes, noise: Radii) -> Certificate:
        """Return the certificate again from the recorded votes."""
        return certificate_from_votes(Votes(()), votes.estimation, noise=noise, alpha=self.alpha, bound=self.bound)

    def record(self, answer: Certificate) -> AnswerKeys:
        """Return the keys of a certificate."""
        return certificate_keys(answer)

    def describe(self) -> str:
        """Describe the sampling plan in one phrase."""
        how = f"until the radius is known to {exact(times(self.tolerance, 100))}%, n = {self.n:,} at most"
        return f"{how}, alpha = {exact(self.alpha)}, {self.bound}"

    def prospects(self, noise: Radii) -> Prospects:
        """Return the largest radius at this n and alpha."""
        return largest_prospects(self.n, self.alpha, self.bound, noise, selected=False)

    def changed(self, alpha: float, bound: str, path: object) -> Measure | Certify:
        """Return the procedure at another alpha; the bound must remain anytime-valid."""
        if not is_anytime(bound):
            raise UserError(
                f"{path} was stopped by looking at its votes (rule {MEASURING_BOUND}): --bound {bound} holds for a "
                "fixed n only, peeking breaks it; expected an anytime-valid bound such as betting"
            )
        return Measure(self.tolerance, self.n, alpha) if bound == self.bound else Certify(0, self.n, alpha, bound)


class RadiusEstimate:
    """Sample until the radius is known to a relative tolerance, or certainly 0.

    The radius follows from the betting rule's lower bound, the largest radius still possible from its upper bound
    and n.

    Args:
        num_classes: as for :class:`RadiusDecision`.
        n: maximum number of samples.
        tolerance: in (0, 1): stop once the radius is at least 1 - tolerance of the largest still possible.
        noise: the smoothing distribution.
        alpha: probability that the radius is wrong, at most.
    """

    def __init__(self, num_classes: int, *, n: int, tolerance: float, noise: Radii, alpha: float) -> None:
        n, _, alpha = check_counts(n, 1, alpha)
        tolerance = check_tolerance(tolerance)
        self._n, self._tolerance, self._noise, self._alpha = n, tolerance, noise, alpha
        self._cap = largest_radius(noise, n, alpha, MEASURING_BOUND, selected=False)
        self._counts = VoteCounts(num_classes)
        self.drawn = 0
        self.pending = min(n, 4 * LEAST)

    def add(self, labels: np.ndarray) -> None:
        """Count all labels, then test."""
        self.drawn += len(labels)
        self._counts.add(labels)
        more = max(4 * LEAST, self._counts.seen // 8)  # tested after each piece
        self.pending = 0 if self._known() else min(self._n - self._counts.seen, more)

    def _known(self) -> bool:
        upper = betting_upper(int(self._counts.by_class.max()), self._counts.seen, self._alpha / 2)
        if upper <= 0.5:
            return True
        certificate, possible = self.result(), min(self._noise.radius(min(upper, 1 - 1e-15)), self._cap)
        return not certificate.abstained and certificate.radius >= (1.0 - self._tolerance) * possible

    def result(self) -> Certificate:
        """Return the certificate that the votes so far prove."""
        votes = self._counts.votes()
        return certificate_from_votes(Votes(()), votes, noise=self._noise, alpha=self._alpha, bound=MEASURING_BOUND)
