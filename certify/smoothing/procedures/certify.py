"""Certify a radius from fixed numbers of samples."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from certify.errors import UserError
from certify.smoothing.bounds import BOUNDS
from certify.smoothing.certificates import certificate_from_votes, check_counts, largest_radius
from certify.smoothing.procedures.base import (
    ESTIMATION,
    SELECTION,
    AnswerKeys,
    Procedure,
    ProcedureSettings,
    Prospects,
    RecordedVotes,
    answer_keys,
    assign,
    is_anytime,
)
from certify.smoothing.rounding import exact
from certify.types import Certificate, Radii, Votes


@dataclass(frozen=True)
class Certify:
    """Certify a radius from fixed numbers of samples: CERTIFY of Cohen, Rosenfeld and Kolter (2019).

    Args:
        n0: samples that select the class; 0 only with an anytime-valid bound.
        n: fresh samples that bound its probability.
        alpha: failure probability per image, in (0, 1).
        bound: name of a bound (``certify list bounds``).

    Raises:
        UserError: counts below 1, alpha outside (0, 1), an unknown bound.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    bound: str = "clopper-pearson"

    kind: ClassVar[str] = "certify"
    sequential: ClassVar[bool] = False
    radii: ClassVar[tuple[float, ...]] = ()
    stopping: ClassVar[None] = None

    def __post_init__(self) -> None:
        n, n0, alpha = check_counts(self.n, self.n0 or 1, self.alpha)  # n0 = 0: :func:`certificate_from_votes` refuses
        BOUNDS.get(self.bound)
        assign(self, n=n, n0=n0 if self.n0 else 0, alpha=alpha)

    @property
    def stages(self) -> dict[str, int]:
        """Samples of each stage."""
        return {SELECTION: self.n0, ESTIMATION: self.n} if self.n0 else {ESTIMATION: self.n}

    def answer(self, results: Mapping[str, Any], noise: Radii, uniform: float = 1.0) -> Certificate:
        """Return the certificate that the votes of both stages prove."""
        selection, estimation = results.get(SELECTION, Votes(())), results[ESTIMATION]
        return certificate_from_votes(
            selection, estimation, noise=noise, alpha=self.alpha, bound=self.bound, uniform=uniform
        )

    def recompute(self, votes: RecordedVotes, noise: Radii) -> Certificate:
        """Return the certificate again from the recorded votes."""
        return self.answer({SELECTION: votes.selection, ESTIMATION: votes.estimation}, noise, votes.uniform)

    def record(self, answer: Certificate) -> AnswerKeys:
        """Return the keys of a certificate."""
        return certificate_keys(answer)

    def describe(self) -> str:
        """Describe the sampling plan in one phrase."""
        return f"n0 = {self.n0:,}, n = {self.n:,}, alpha = {exact(self.alpha)}, {self.bound}"

    def prospects(self, noise: Radii) -> Prospects:
        """Return the largest radius at this n and alpha."""
        return largest_prospects(self.n, self.alpha, self.bound, noise, selected=True)

    def changed(self, alpha: float, bound: str, path: object) -> Certify:
        """Return the procedure at another alpha and bound."""
        if not self.n0 and not is_anytime(bound):
            raise UserError(
                f"{path} has no selection votes (n0 = 0): the class would be chosen by the votes that --bound {bound} "
                "counts; expected an anytime-valid bound such as betting"
            )
        return Certify(self.n0, self.n, alpha, bound)


def certificate_keys(answer: Certificate) -> AnswerKeys:
    """Return the keys of a certificate."""
    keys = answer_keys(answer.prediction, answer.radius, answer.p_lower, answer.estimation, answer.selection)
    return keys | AnswerKeys(p_other=answer.p_other)


def largest_prospects(n: int, alpha: float, bound: str, noise: Radii, *, selected: bool) -> Prospects:
    """Return the largest radius that n samples can certify at this noise, or the warning that they certify nothing.

    Args:
        n: samples of the main stage.
        alpha: failure probability per image.
        bound: name of a bound.
        noise: states radii in its norm.
        selected: True if selection votes choose the class.
    """
    radius = functools.partial(largest_radius, noise, alpha=alpha, bound=bound, selected=selected)
    largest = radius(n=n)
    if largest > 0:
        return Prospects(largest)
    least = next((m for m in range(1, 10_000) if radius(n=m) > 0), None)
    fix = "" if least is None else f"; pass --n {least} or more"
    text = f"n = {n} can certify nothing at alpha = {exact(alpha)}: every image will abstain{fix}"
    return Prospects(0.0, warnings=(text,))


def from_settings(settings: ProcedureSettings) -> Procedure:
    """Return the procedure of a run of certificates: at fixed n, or measured to a tolerance."""
    stopping = settings.stopping
    if stopping is not None and stopping.tolerance is not None:
        from certify.smoothing.procedures.measure import Measure

        if settings.bound == Measure.bound:
            return Measure(stopping.tolerance, settings.n, settings.alpha)
    return Certify(settings.n0, settings.n, settings.alpha, settings.bound)
