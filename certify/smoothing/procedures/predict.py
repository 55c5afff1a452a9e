"""Predict a class without a radius."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from certify.errors import UserError
from certify.smoothing.certificates import check_counts, prediction_from_votes
from certify.smoothing.procedures.base import (
    PREDICTION,
    AnswerKeys,
    ProcedureSettings,
    Prospects,
    RecordedVotes,
    answer_keys,
    assign,
)
from certify.smoothing.rounding import exact
from certify.types import Prediction, Radii


@dataclass(frozen=True)
class Predict:
    """Predict without a radius: PREDICT of Cohen, Rosenfeld and Kolter (2019).

    Args:
        n: samples.
        alpha: failure probability per image, in (0, 1).

    Raises:
        UserError: arguments out of range.
    """

    n: int = 100_000
    alpha: float = 0.001

    kind: ClassVar[str] = "predict"
    sequential: ClassVar[bool] = False
    radii: ClassVar[tuple[float, ...]] = ()
    bound: ClassVar[str] = "binomial test"
    stopping: ClassVar[None] = None

    def __post_init__(self) -> None:
        n, _, alpha = check_counts(self.n, 1, self.alpha)
        assign(self, n=n, alpha=alpha)

    @property
    def stages(self) -> dict[str, int]:
        """Samples."""
        return {PREDICTION: self.n}

    def answer(self, results: Mapping[str, Any], noise: Radii, uniform: float = 1.0) -> Prediction:
        """Return the prediction that the votes prove."""
        return prediction_from_votes(results[PREDICTION], alpha=self.alpha)

    def recompute(self, votes: RecordedVotes, noise: Radii) -> Prediction:
        """Return the prediction again from the recorded votes."""
        return prediction_from_votes(votes.estimation, alpha=self.alpha)

    def record(self, answer: Prediction) -> AnswerKeys:
        """Return the keys of a prediction."""
        return answer_keys(answer.prediction, None, None, answer.votes) | AnswerKeys(p_value=answer.p_value)

    def describe(self) -> str:
        """Describe the sampling plan in one phrase."""
        return f"predict: n = {self.n:,}, alpha = {exact(self.alpha)}"

    def prospects(self, noise: Radii) -> Prospects:
        """Warn where even agreeing votes prove nothing."""
        least = 1 + math.ceil(-math.log2(self.alpha))  # n agreeing votes have a p-value of 2^(1 - n)
        if self.n >= least:
            return Prospects()
        text = f"n = {self.n} can decide nothing at alpha = {exact(self.alpha)}: pass --n {least} or more"
        return Prospects(warnings=(text,))

    def changed(self, alpha: float, bound: str, path: object) -> Predict:
        """Return the procedure at another alpha."""
        if bound != self.bound:
            raise UserError(f"{path} holds predictions, which have no radius: --bound {bound} has nothing to bound")
        return Predict(self.n, alpha)


def from_settings(settings: ProcedureSettings) -> Predict:
    """Return the procedure of a run of predictions."""
    return Predict(settings.n, settings.alpha)
