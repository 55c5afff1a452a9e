"""Draw one or a few noisy copies of every image, for a statement about all images together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from certify.errors import UserError
from certify.smoothing.certificates import check_counts
from certify.smoothing.dataset_accuracy import check_list_alpha
from certify.smoothing.procedures.base import (
    ESTIMATION,
    AnswerKeys,
    ProcedureSettings,
    Prospects,
    RecordedVotes,
    answer_keys,
    assign,
)
from certify.smoothing.rounding import exact
from certify.types import ABSTAIN, Prediction, Radii

FIXED_LIST, POPULATION = "fixed-list", "population"
"""Values of the run file's key ``bound``: the statement is about these images, or about their population."""


@dataclass(frozen=True)
class Accuracy:
    """Draw noisy copies of every image for :func:`certify.smoothing.dataset_accuracy.dataset_accuracy`.

    Nothing is stated about a single image: each answer is an abstention.

    Args:
        n: noisy copies of each image.
        alpha: failure probability of the statement about all images and radii, in (0, 1); below 1/4 for a fixed list.
        population: True if the images are a random sample and the statement is about their population.

    Raises:
        UserError: arguments out of range.
    """

    n: int = 1
    alpha: float = 0.001
    population: bool = False

    kind: ClassVar[str] = "accuracy"
    sequential: ClassVar[bool] = False
    radii: ClassVar[tuple[float, ...]] = ()
    stopping: ClassVar[None] = None
    fixed_function: ClassVar[bool] = False  # the bound holds for base classifiers with random answers, too
    once: ClassVar[bool] = True  # a block of 100 noise samples for one copy can take longer than its label

    def __post_init__(self) -> None:
        n, _, alpha = check_counts(self.n, 1, self.alpha)
        assign(self, n=n, alpha=alpha if self.population else check_list_alpha(alpha))

    @property
    def bound(self) -> str:
        """The images that the statement is about."""
        return POPULATION if self.population else FIXED_LIST

    @property
    def stages(self) -> dict[str, int]:
        """Noisy copies."""
        return {ESTIMATION: self.n}

    def answer(self, results: Mapping[str, Any], noise: Radii, uniform: float = 1.0) -> Prediction:
        """Return an abstention with the votes."""
        return Prediction(ABSTAIN, 1.0, results[ESTIMATION])

    def recompute(self, votes: RecordedVotes, noise: Radii) -> Prediction:
        """Return the same from the recorded votes."""
        return Prediction(ABSTAIN, 1.0, votes.estimation)

    def record(self, answer: Prediction) -> AnswerKeys:
        """Return the keys of an abstention with its votes."""
        return answer_keys(ABSTAIN, None, None, answer.votes)

    def describe(self) -> str:
        """Describe the sampling plan in one phrase."""
        copies = "one noisy copy" if self.n == 1 else f"{self.n:,} noisy copies"
        about = "their population" if self.population else "these images together"
        return f"accuracy: {copies} of each image, alpha = {exact(self.alpha)} for {about}, at all radii"

    def prospects(self, noise: Radii) -> Prospects:
        """Return the kind of statement; no image has a radius of its own."""
        about = "the population of these images" if self.population else "these images"
        text = (
            f"the mean accuracy over {about} under any attack of a given size, answering from one fresh noisy copy; "
            "nothing about a single image, nor about the majority vote"
        )
        return Prospects(statement=text)

    def changed(self, alpha: float, bound: str, path: object) -> Accuracy:
        """Return the procedure at another alpha."""
        if bound not in (FIXED_LIST, POPULATION):
            raise UserError(f"{path} has no certificate for each image: --bound {bound} has nothing to bound")
        return Accuracy(self.n, alpha, bound == POPULATION)


def from_settings(settings: ProcedureSettings) -> Accuracy:
    """Return the procedure of a run for the accuracy of all images together."""
    return Accuracy(settings.n, settings.alpha, settings.bound == POPULATION)
