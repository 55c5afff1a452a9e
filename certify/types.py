"""What everything hangs on: votes, certificates, and the two protocols they travel between.

Shape letters used in all docstrings: B batch, C channels, H height, W width, K classes, n trials. Images are float32
``(B, C, H, W)``; clean values lie in [0, 1], noisy ones may leave it. sigma, radius and epsilon are in that scale.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from certify.errors import UserError

if TYPE_CHECKING:
    import torch

ABSTAIN = -1
"""Prediction of a smoothed classifier that cannot say anything at the wanted confidence."""

FAILED = -1
"""Label of a trial that gave no answer (NaN logits, a failed query): a trial, and nobody's vote."""


@runtime_checkable
class BaseClassifier(Protocol):
    """Anything that labels images: label i depends on image i only, by a function that is fixed for the whole run."""

    num_classes: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Labels, int64 ``(B,)`` in [0, K) or ``FAILED``, of images ``(B, C, H, W)``."""
        ...

    def describe(self) -> dict[str, Any]:
        """Everything that fixes the function, as JSON: it goes into the run file's header."""
        ...


class Radii(Protocol):
    """What a probability under a smoothing distribution certifies, in one norm."""

    @property
    def name(self) -> str:
        """The name in the registry and in the run file."""
        ...

    @property
    def scale(self) -> float:
        """The distribution's scale (sigma for a Gaussian), in [0, 1] pixels."""
        ...

    @property
    def norm(self) -> str:
        """The norm its radii are measured in."""
        ...

    def radius(self, p_lower: float, p_other: float | None = None) -> float:
        """The radius when the class has at least ``p_lower`` and every other one at most ``p_other`` (1 - p_lower).

        0 without a majority, never rounded up.
        """
        ...

    def probability(self, radius: float) -> float:
        """The probability at which ``radius`` is reached: the inverse of :meth:`radius`; above 1 if it cannot be."""
        ...


class Noise(Radii, Protocol):
    """A smoothing distribution: how to draw it, and what a probability under it certifies."""

    @property
    def one_shape(self) -> bool:
        """True if all batches must have one shape, so that rounding gives an input the same label in each of them."""
        ...

    def input(self, image: torch.Tensor) -> torch.Tensor:
        """The image that is certified, of ``(C, H, W)``: this one, or rounded to where the noise is defined.

        Raises:
            UserError: the noise is not defined around this image.
        """
        ...

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """One block of noise, drawn from ``generator`` alone and on its device; what :meth:`add` takes."""
        ...

    def add(self, image: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Noisy copies of the image, float32, on its device; ``drawn`` may be overwritten."""
        ...

    def failed(self, drawn: torch.Tensor) -> torch.Tensor | None:
        """Which samples of a block were not drawn from the distribution, bool ``(B,)``; None: they all were."""
        ...


@dataclass(frozen=True)
class Votes:
    """What n noisy copies of one image were labelled: ``sum(counts) + failures = trials``.

    Attributes:
        counts: votes for each class, K of them.
        failures: trials that gave no answer. They count as trials and for no class.
    """

    counts: tuple[int, ...]
    failures: int = 0

    def __post_init__(self) -> None:
        try:
            counts, failures = tuple(map(operator.index, self.counts)), operator.index(self.failures)
        except TypeError:
            raise UserError(f"votes {self.counts}, {self.failures} failures: expected whole numbers") from None
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "failures", failures)
        if self.failures < 0 or any(c < 0 for c in self.counts):
            raise UserError(f"votes cannot be negative: {self}")

    @property
    def trials(self) -> int:
        """How many noisy copies were drawn."""
        return sum(self.counts) + self.failures

    def leading(self, m: int = 1) -> list[int]:
        """The m classes with most votes, most first; a tie goes to the lowest class."""
        return sorted(range(len(self.counts)), key=lambda c: (-self.counts[c], c))[:m]

    @property
    def leader(self) -> int:
        """The class with most votes; ``ABSTAIN`` if no trial gave an answer."""
        return self.leading()[0] if any(self.counts) else ABSTAIN

    def of(self, c: int) -> int:
        """Votes of one class; 0 for ``ABSTAIN`` and for classes beyond the counts."""
        return self.counts[c] if 0 <= c < len(self.counts) else 0

    def as_dict(self) -> dict[str, int]:
        """The non-zero counts by class, as JSON writes them."""
        return {str(c): k for c, k in enumerate(self.counts) if k}

    @classmethod
    def from_dict(cls, counts: Mapping[str, int], failures: int = 0) -> Votes:
        """The inverse of :meth:`as_dict`."""
        dense = [0] * max((int(c) + 1 for c in counts), default=0)
        for c, k in counts.items():
            dense[int(c)] = int(k)
        return cls(tuple(dense), int(failures))


@dataclass(frozen=True)
class Certificate:
    """The smoothed classifier's answer for one image.

    With probability at least 1 - alpha over the noise draws, either this is an abstention, or the smoothed classifier
    predicts ``prediction`` at every point whose distance from the image, in ``norm``, is less than ``radius``.
    The statement is about this one image.

    Attributes:
        prediction: class in [0, K), or ``ABSTAIN``.
        radius: certified radius in [0, 1] pixels, 0 for an abstention.
        p_lower: lower confidence bound on the probability of the selected class.
        norm: the radius's norm, such as ``"l2"``.
        alpha: probability that the statement is wrong, at most.
        selection: first-stage votes, which chose the class; none when an anytime-valid bound needs no choice.
        estimation: second-stage votes, which bound its probability.
        p_other: upper confidence bound on the probability of every other class.
    """

    prediction: int
    radius: float
    p_lower: float
    norm: str
    alpha: float
    selection: Votes
    estimation: Votes
    p_other: float

    @property
    def abstained(self) -> bool:
        """Whether nothing is claimed."""
        return self.prediction == ABSTAIN

    @property
    def counts(self) -> tuple[int, ...]:
        """The estimation votes by class."""
        return self.estimation.counts


ROBUST, NOT_CERTIFIABLE, UNDECIDED = "robust", "not certifiable", "undecided"
"""What can be settled about one image at one radius."""


@dataclass(frozen=True)
class Decision:
    """Whether the smoothed classifier is certifiably robust at given radii, with as few samples as that took.

    With probability at least 1 - alpha over the noise draws, all of this is true: where it says robust, the smoothed
    classifier predicts ``prediction`` at every point nearer than that radius in ``norm``; where it says not
    certifiable, no class's probability exceeds what that radius needs of one class, so that more samples would not
    certify it either (a bound that uses the runner-up may; a failed trial is an outcome of its own, no class's). Not
    certifiable does not mean that the smoothed classifier can be changed within the radius. The statement is about
    this one image.

    Attributes:
        radii: in [0, 1] pixels, ascending.
        outcomes: ``"robust"``, ``"not certifiable"`` or ``"undecided"`` for each radius.
        prediction: class in [0, K) that is robust at ``radius``, or ``ABSTAIN``.
        radius: the largest radius with outcome robust; 0 if there is none.
        norm: the radii's norm.
        alpha: probability that any of this is wrong, at most.
        rule: name of the stopping rule.
        looks: for each radius the leading class, its votes and all samples when it was settled, or at the end.
        votes: all votes up to the sample that settled the last radius.
        drawn: samples that were labelled in all; those beyond ``votes.trials`` are ignored.
    """

    radii: tuple[float, ...]
    outcomes: tuple[str, ...]
    prediction: int
    radius: float
    norm: str
    alpha: float
    rule: str
    looks: tuple[tuple[int, int, int], ...]
    votes: Votes
    drawn: int

    @property
    def robust(self) -> bool | None:
        """True: robust at the largest radius that was asked for; False: not certifiable there; None: undecided."""
        return {ROBUST: True, NOT_CERTIFIABLE: False, UNDECIDED: None}[self.outcomes[-1]]


@dataclass(frozen=True)
class Prediction:
    """PREDICT's answer: with probability at least 1 - alpha it is the smoothed classifier's, or an abstention.

    Attributes:
        prediction: class in [0, K), or ``ABSTAIN``.
        p_value: of the two-sided binomial test between the leading class and the second, failures included, rounded up.
        votes: of the n noisy copies.
    """

    prediction: int
    p_value: float
    votes: Votes
