"""The protocol and registry of procedures, and the keys that they write and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypedDict, runtime_checkable

from certify.registry import Registry
from certify.smoothing.bounds import BOUNDS, Bound
from certify.smoothing.sequential_tests import FixedSample, SequentialTest
from certify.types import Certificate, Decision, Prediction, Radii, Votes

SELECTION, ESTIMATION, PREDICTION = "selection", "estimation", "prediction"
"""Names of the stages; each draws its own noise."""

USUAL_SAMPLES = 1000
"""Samples per image that a sequential procedure is expected to take, to weigh the cost of preparations."""

Answer = Certificate | Decision | Prediction

_NO_VOTES = Votes(())

PROCEDURES = Registry("procedure")
"""By the value of the run file's key ``procedure``: functions of :class:`ProcedureSettings`."""


@dataclass(frozen=True)
class Prospects:
    """The best possible results of a procedure, before anything is sampled.

    Attributes:
        largest: largest possible radius, in [0, 1] pixels; 0 if there is none, None for predictions.
        earliest: fewest samples that settle the largest radius to decide; None for other questions.
        lines: descriptions of the radii to decide, one line each.
        warnings: impossible results, and the remedy.
        statement: what the results say and what not, where they are not one statement for each image.
    """

    largest: float | None = None
    earliest: int | None = None
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    statement: str = ""


@dataclass(frozen=True)
class Stopping:
    """Rule by which images stop early.

    Attributes:
        rule: name of the stopping rule or anytime-valid bound.
        radii: to decide; empty for other questions.
        tolerance: relative tolerance of a measured radius, else None.
    """

    rule: str
    radii: tuple[float, ...] = ()
    tolerance: float | None = None


@dataclass(frozen=True)
class ProcedureSettings:
    """The parameters of a procedure, as the header of a run file holds them.

    Attributes:
        kind: name of the question.
        n0: selection samples; 0 where there are none.
        n: samples of the main stage; the maximum where images stop early.
        alpha: failure probability per image.
        bound: name of the bound, test or stopping rule.
        stopping: how images stop early; None: at n.
    """

    kind: str
    n0: int
    n: int
    alpha: float
    bound: str
    stopping: Stopping | None


@dataclass(frozen=True)
class RecordedVotes:
    """The votes of one image, as its row of a run file holds them.

    Attributes:
        selection: votes that chose the class; of no samples where there were none.
        estimation: votes of the main stage.
        uniform: the draw of a randomized bound.
        looks: for each radius to decide, leading class, its votes and all samples when it was settled.
        drawn: samples that were labelled.
    """

    selection: Votes
    estimation: Votes
    uniform: float = 1.0
    looks: Sequence[tuple[int, int, int]] = ()
    drawn: int = 0


class AnswerKeys(TypedDict, total=False):
    """The keys of an image's row that its answer determines."""

    prediction: int
    radius: float | None
    p_lower: float | None
    p_other: float
    votes: dict[str, int]
    selection: dict[str, int]
    trials: int
    failures: int
    selection_failures: int
    p_value: float
    decisions: list[SettledRadius]
    drawn: int
    uniform: float
    unfinished: bool


class SettledRadius(TypedDict):
    """The outcome at one radius, with the look that settled it."""

    radius: float
    outcome: str
    look: list[int]


def answer_keys(
    prediction: int, radius: float | None, p_lower: float | None, estimation: Votes, selection: Votes = _NO_VOTES
) -> AnswerKeys:
    """Return the keys that the answers of all procedures have."""
    return AnswerKeys(
        prediction=prediction,
        radius=radius,
        p_lower=p_lower,
        votes=estimation.as_dict(),
        selection=selection.as_dict(),
        trials=estimation.trials,
        failures=estimation.failures,
        selection_failures=selection.failures,
    )


class Procedure(Protocol):
    """A question about one image: its sampling plan, its answer, and its keys of the run file."""

    kind: ClassVar[str]
    """Value of the run file's key ``procedure``."""
    sequential: ClassVar[bool]
    """True if each image stops as soon as its answer is settled."""

    @property
    def radii(self) -> tuple[float, ...]:
        """Radii to decide, ascending; none for other questions."""
        ...

    @property
    def n(self) -> int:
        """Samples of the main stage; the maximum where images stop early."""
        ...

    @property
    def alpha(self) -> float:
        """Failure probability per image."""
        ...

    @property
    def stages(self) -> dict[str, int]:
        """Samples of each stage, at most."""
        ...

    @property
    def bound(self) -> str:
        """Name of the bound, test or stopping rule, for the run file."""
        ...

    @property
    def stopping(self) -> Stopping | None:
        """Rule by which images stop early; None: at n."""
        ...

    def answer(self, results: Mapping[str, Any], noise: Radii, uniform: float = 1.0) -> Answer:
        """Return the answer from the result of each stage.

        Args:
            results: by stage: votes at fixed n, else the result of the sequential test.
            noise: states radii in its norm.
            uniform: a draw from (0, 1] for a randomized bound.
        """
        ...

    def recompute(self, votes: RecordedVotes, noise: Radii) -> Answer:
        """Return the answer from the recorded votes of an image."""
        ...

    def record(self, answer: Any) -> AnswerKeys:
        """Return the keys of an image's row that the answer determines."""
        ...

    def describe(self) -> str:
        """Describe the sampling plan in one phrase."""
        ...

    def prospects(self, noise: Radii) -> Prospects:
        """Return the best possible results at this noise.

        Raises:
            UserError: a radius that this noise cannot certify.
        """
        ...

    def changed(self, alpha: float, bound: str, path: object) -> Procedure:
        """Return the procedure at another alpha and bound, for the same votes.

        Raises:
            UserError: the sampling plan of ``path`` does not support this bound.
        """
        ...


@runtime_checkable
class Sequential(Protocol):
    """A procedure with one stage, in which each image stops as soon as its answer is settled."""

    def test(self, num_classes: int, noise: Radii) -> SequentialTest:
        """Return the sequential test of one image; its result is the answer.

        Args:
            num_classes: K; for labels without a fixed list of classes, the number known at first (at least 1).
            noise: states radii in its norm.
        """
        ...


def stage_tests(procedure: Procedure, num_classes: int, noise: Radii, piece: int) -> dict[str, SequentialTest]:
    """Return a test per stage, to sample any procedure piece by piece.

    Args:
        procedure: any.
        num_classes: as for :meth:`Sequential.test`.
        noise: states radii in its norm.
        piece: largest number of samples at a time, where their number is fixed.
    """
    if isinstance(procedure, Sequential):
        (stage,) = procedure.stages
        return {stage: procedure.test(num_classes, noise)}
    return {stage: FixedSample(num_classes, n=n, piece=piece) for stage, n in procedure.stages.items()}


def needs_fixed_function(procedure: Procedure) -> bool:
    """Return True unless the procedure allows a base classifier whose answers are random (``fixed_function``)."""
    return bool(getattr(procedure, "fixed_function", True))


def draws_once(procedure: Procedure) -> bool:
    """Return True if an image's samples are few and drawn once: exactly n samples, not whole blocks (``once``)."""
    return bool(getattr(procedure, "once", False))


def samples(procedure: Procedure) -> int:
    """Return the samples of one image, at most."""
    return sum(procedure.stages.values())


def expected_samples(procedure: Procedure) -> int:
    """Return the samples of one image, approximately."""
    return min(procedure.n, USUAL_SAMPLES) if procedure.sequential else samples(procedure)


def procedure_of(settings: ProcedureSettings) -> Procedure:
    """Return the procedure with these settings, as a run file's header holds them.

    Raises:
        UserError: an unknown kind, or settings out of range.
    """
    procedure: Procedure = PROCEDURES.get(settings.kind)(settings)
    return procedure


def is_anytime(bound: str) -> bool:
    """Return True if a bound holds at every sample size at once."""
    named = BOUNDS.get(bound)
    assert isinstance(named, Bound)
    return named.anytime


def assign(procedure: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass while it is constructed."""
    for name, value in values.items():
        object.__setattr__(procedure, name, value)


PROCEDURES.add("certify", "certify.smoothing.procedures.certify:from_settings", "a class and a radius (default)")
PROCEDURES.add("decide", "certify.smoothing.procedures.decide:from_settings", "robust at given radii, or not")
PROCEDURES.add("predict", "certify.smoothing.procedures.predict:from_settings", "a class without a radius")
PROCEDURES.add("accuracy", "certify.smoothing.procedures.accuracy:from_settings", "the accuracy of all images together")
