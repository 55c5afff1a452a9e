"""Votes, statements, and the protocols of classifiers and noise.

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
"""Prediction of a smoothed classifier that abstains: no class is certain at the required confidence."""

FAILED = -1
"""Label of a failed trial (NaN logits, a failed query), which counts as a trial and votes for no class."""


@runtime_checkable
class BaseClassifier(Protocol):
    """A labelling function of images: label i depends on image i only, and the function is fixed for the whole run.

    Attributes:
        num_classes: number of classes, K.
    """

    num_classes: int

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the labels of images ``(B, C, H, W)``: int64 ``(B,)`` in [0, K), or ``FAILED``."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return everything that determines the function, as JSON for the run file's header."""
        ...


class Radii(Protocol):
    """The relation between probabilities under a smoothing distribution and radii in one norm."""

    @property
    def name(self) -> str:
        """Name in the registry and the run file."""
        ...

    @property
    def scale(self) -> float:
        """Scale of the distribution (sigma for a Gaussian), in [0, 1] pixels."""
        ...

    @property
    def norm(self) -> str:
        """Norm of the radii."""
        ...

    def radius(self, p_lower: float, p_other: float | None = None) -> float:
        """Return the radius if the class has at least ``p_lower`` and every other at most ``p_other`` (or 1 - p_lower).

        It is 0 without a majority, and never rounded up.
        """
        ...

    def probability(self, radius: float) -> float:
        """Return the probability that ``radius`` needs (the inverse of :meth:`radius`); above 1 if out of reach."""
        ...


@runtime_checkable
class WorstCase(Protocol):
    """A smoothing distribution that bounds probabilities of any size near an image, not only those of a majority."""

    def worst_case(self, p: float, radius: float) -> float:
        """Return the least probability of a class within ``radius`` of an image at which it has probability ``p``.

        Defined for p in [0, 1]; convex and nondecreasing in ``p``, nonincreasing in ``radius``, and never rounded up.
        """
        ...


class Noise(Radii, Protocol):
    """A smoothing distribution: its sampler, and its relation between probabilities and radii."""

    @property
    def one_shape(self) -> bool:
        """True if all batches must have one shape, so that an input gets the same label in each of them."""
        ...

    def input(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image ``(C, H, W)`` that is certified: this one, or the nearest one where the noise is defined.

        Raises:
            UserError: the noise is not defined around this image.
        """
        ...

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw a block of noise for :meth:`add`, from ``generator`` alone and on its device."""
        ...

    def add(self, image: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Return noisy copies of the image, float32, on its device; ``drawn`` may be overwritten."""
        ...

    def failed(self, drawn: torch.Tensor) -> torch.Tensor | None:
        """Return the samples of a block that could not be drawn, bool ``(B,)``; None: there are none."""
        ...


@dataclass(frozen=True)
class Votes:
    """Votes of n noisy copies of one image: ``sum(counts) + failures = trials``.

    Attributes:
        counts: votes of each class, K whole numbers from 0.
        failures: trials without a label, which count for no class.

    Raises:
        UserError: counts that are negative or not whole numbers.
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
        """Number of noisy copies."""
        return sum(self.counts) + self.failures

    def leading(self, m: int = 1) -> list[int]:
        """Return the m classes with most votes, in descending order; of equals the lowest class first."""
        return sorted(range(len(self.counts)), key=lambda c: (-self.counts[c], c))[:m]

    @property
    def leader(self) -> int:
        """Class with most votes; ``ABSTAIN`` if no trial gave an answer."""
        return self.leading()[0] if any(self.counts) else ABSTAIN

    def of(self, c: int) -> int:
        """Return the votes of one class; 0 for ``ABSTAIN`` and for classes beyond the counts."""
        return self.counts[c] if 0 <= c < len(self.counts) else 0

    def as_dict(self) -> dict[str, int]:
        """Return the non-zero counts by class, as in JSON."""
        return {str(c): k for c, k in enumerate(self.counts) if k}

    @classmethod
    def from_dict(cls, counts: Mapping[str, int], failures: int = 0) -> Votes:
        """Return the votes of these counts: the inverse of :meth:`as_dict`."""
        dense = [0] * max((int(c) + 1 for c in counts), default=0)
        for c, k in counts.items():
            dense[int(c)] = int(k)
        return cls(tuple(dense), int(failures))


@dataclass(frozen=True)
class Certificate:
    """A certified class and radius for one image, or an abstention.

    With probability at least 1 - alpha over the noise draws, either this is an abstention, or the smoothed classifier
    predicts ``prediction`` at every point whose distance from the image, in ``norm``, is less than ``radius``.
    The statement is about this one image.

    Attributes:
        prediction: class in [0, K), or ``ABSTAIN``.
        radius: certified radius in [0, 1] pixels, 0 for an abstention.
        p_lower: lower confidence bound on the probability of the selected class.
        norm: the radius's norm, such as ``"l2"``.
        alpha: failure probability of the statement.
        selection: votes that chose the class; none if the bound is anytime-valid and needs none.
        estimation: votes that bound its probability.
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
        """True if nothing is claimed."""
        return self.prediction == ABSTAIN

    @property
    def counts(self) -> tuple[int, ...]:
        """Estimation votes by class."""
        return self.estimation.counts


ROBUST, NOT_CERTIFIABLE, UNDECIDED = "robust", "not certifiable", "undecided"
"""Outcomes for one image at one radius."""


@dataclass(frozen=True)
class Decision:
    """Robustness of the smoothed classifier at given radii, decided by a sequential test for one image.

    With probability at least 1 - alpha over the noise draws, all outcomes are true. *Robust*: the smoothed classifier
    predicts ``prediction`` at every point closer than that radius in ``norm``. *Not certifiable*: no class has the
    probability that the radius requires, so more samples would not certify it either (a bound that uses the runner-up
    might); it does not mean that the prediction can be changed within the radius.

    Attributes:
        radii: in [0, 1] pixels, ascending.
        outcomes: ``"robust"``, ``"not certifiable"`` or ``"undecided"`` for each radius.
        prediction: class in [0, K) that is robust at ``radius``, or ``ABSTAIN``.
        radius: the largest radius with outcome robust; 0 if there is none.
        norm: the radii's norm.
        alpha: failure probability of the whole statement.
        rule: name of the stopping rule.
        looks: for each radius the leading class, its votes and all samples when it was decided, or at the end.
        votes: all votes up to the sample that decided the last radius.
        drawn: number of samples that were labelled; those beyond ``votes.trials`` are ignored.
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
        """True: robust at the largest requested radius; False: not certifiable there; None: undecided."""
        return {ROBUST: True, NOT_CERTIFIABLE: False, UNDECIDED: None}[self.outcomes[-1]]


@dataclass(frozen=True)
class Prediction:
    """Result of PREDICT for one image: the smoothed class without a radius, or an abstention.

    With probability at least 1 - alpha over the noise draws, it is the smoothed classifier's prediction or an
    abstention (Cohen, Rosenfeld and Kolter 2019).

    Attributes:
        prediction: class in [0, K), or ``ABSTAIN``.
        p_value: of the two-sided binomial test between the two leading classes, failures included, rounded up.
        votes: of the n noisy copies.
    """

    prediction: int
    p_value: float
    votes: Votes
