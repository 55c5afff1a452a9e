"""Procedures: one object per question about a smoothed classifier at one image.

A procedure fixes the sampling plan, turns votes into an answer, and writes and reads its own keys of the run file. A
live run, a resumed run, a replayed audit, a shard, a cluster worker and the server call the same object, and none of
them branches on its name. To add a question, add a class here and a branch to :func:`procedure_of`, which reads it
back.

- :class:`Certify`: a class and a radius, from n0 and then n samples;
- :class:`Measure`: the same, stopping once the radius is known to a relative tolerance;
- :class:`Decide`: robust at given radii or not, with as few samples as possible;
- :class:`Predict`: a class without a radius, from n samples.

With probability at least 1 - alpha over the noise draws, the answer about an image is true or an abstention.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypedDict

from certify.errors import UserError
from certify.smoothing.bounds import BOUNDS, Bound
from certify.smoothing.certificates import (
    certificate_from_votes,
    check_counts,
    decision_from_counts,
    largest_radius,
    needed,
    prediction_from_votes,
)
from certify.smoothing.norms import IN_WORDS
from certify.smoothing.numeric import as_float
from certify.smoothing.rounding import ceil_to, exact, times
from certify.smoothing.sequential_tests import FixedSample, RadiusDecision, RadiusEstimate, SequentialTest
from certify.smoothing.stopping_rules import DEFAULT_CAP, DEFAULT_RULE, MEASURING_BOUND, RULES, thresholds
from certify.types import Certificate, Decision, Prediction, Radii, Votes

SELECTION, ESTIMATION, PREDICTION = "selection", "estimation", "prediction"
"""Names of the stages; each draws its own noise."""

USUAL_SAMPLES = 1000
"""Samples per image that a sequential procedure is expected to take, to weigh the cost of preparations."""

Answer = Certificate | Decision | Prediction

_NO_VOTES = Votes(())


@dataclass(frozen=True)
class Prospects:
    """What a procedure can conclude at best, before anything is sampled.

    Attributes:
        largest: the largest radius that can come out, in [0, 1] pixels; 0 if none can, None for predictions.
        earliest: samples that settle the largest radius at the earliest, where that is what is asked.
        lines: the radii in words, one line each.
        warnings: what cannot come out, and the remedy.
    """

    largest: float | None = None
    earliest: int | None = None
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stopping:
    """How images stop early.

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


def certificate_keys(answer: Certificate) -> AnswerKeys:
    """Return the keys of a certificate."""
    keys = answer_keys(answer.prediction, answer.radius, answer.p_lower, answer.estimation, answer.selection)
    return keys | AnswerKeys(p_other=answer.p_other)


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
        """How images stop early; None: at n."""
        ...

    def tests(self, num_classes: int, noise: Radii, piece: int) -> dict[str, SequentialTest]:
        """Return a test per stage, to sample piece by piece: at fixed n at most ``piece`` samples at a time."""
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
        """Return what can come out at this noise.

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


def samples(procedure: Procedure) -> int:
    """Return the samples of one image, at most."""
    return sum(procedure.stages.values())


def expected_samples(procedure: Procedure) -> int:
    """Return the samples of one image, approximately."""
    return min(procedure.n, USUAL_SAMPLES) if procedure.sequential else samples(procedure)


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
        _set(self, n=n, n0=n0 if self.n0 else 0, alpha=alpha)

    @property
    def stages(self) -> dict[str, int]:
        """Samples of each stage."""
        return {SELECTION: self.n0, ESTIMATION: self.n} if self.n0 else {ESTIMATION: self.n}

    def tests(self, num_classes: int, noise: Radii, piece: int) -> dict[str, SequentialTest]:
        """Return a fixed sample per stage."""
        return {stage: FixedSample(num_classes, n=n, piece=piece) for stage, n in self.stages.items()}

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
        return _largest(self, noise, selected=True)

    def changed(self, alpha: float, bound: str, path: object) -> Certify:
        """Return the procedure at another alpha and bound."""
        if not self.n0 and not _is_anytime(bound):
            raise UserError(
                f"{path} has no selection votes (n0 = 0): the class would be chosen by the votes that --bound {bound} "
                "counts; expected an anytime-valid bound such as betting"
            )
        return Certify(self.n0, self.n, alpha, bound)


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
        tolerance = as_float(self.tolerance, "tolerance", "a share between 0 and 1, such as 0.1")
        if not 0 < tolerance < 1:  # NaN is refused too
            raise UserError(f"tolerance {exact(tolerance)}: expected a share between 0 and 1, such as 0.1")
        _set(self, n=n, alpha=alpha, tolerance=tolerance)

    @property
    def stages(self) -> dict[str, int]:
        """Samples, at most."""
        return {ESTIMATION: self.n}

    @property
    def stopping(self) -> Stopping:
        """How images stop early."""
        return Stopping(MEASURING_BOUND, tolerance=self.tolerance)

    def tests(self, num_classes: int, noise: Radii, piece: int) -> dict[str, SequentialTest]:
        """Return the sequential test of the radius."""
        test = RadiusEstimate(num_classes, n=self.n, tolerance=self.tolerance, noise=noise, alpha=self.alpha)
        return {ESTIMATION: test}

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
        return _largest(self, noise, selected=False)

    def changed(self, alpha: float, bound: str, path: object) -> Measure | Certify:
        """Return the procedure at another alpha; the bound must remain anytime-valid."""
        if not _is_anytime(bound):
            raise UserError(
                f"{path} was stopped by looking at its votes (rule {MEASURING_BOUND}): --bound {bound} holds for a "
                "fixed n only, peeking breaks it; expected an anytime-valid bound such as betting"
            )
        return Measure(self.tolerance, self.n, alpha) if bound == self.bound else Certify(0, self.n, alpha, bound)


@dataclass(frozen=True)
class Decide:
    """Decide at given radii: certifiably robust, or not certifiable, with as few samples as possible.

    Args:
        radii: one or several, in [0, 1] pixels and the norm of the run.
        n: maximum number of samples; at n an image remains undecided.
        alpha: probability that any part of an image's decision is wrong, in (0, 1).
        rule: name of a stopping rule (``certify list rules``).

    Raises:
        UserError: no radius, arguments out of range, an unknown rule.
    """

    radii: tuple[float, ...]
    n: int = DEFAULT_CAP
    alpha: float = 0.001
    rule: str = DEFAULT_RULE

    kind: ClassVar[str] = "decide"
    sequential: ClassVar[bool] = True

    def __post_init__(self) -> None:
        n, _, alpha = check_counts(self.n, 1, self.alpha)
        RULES.get(self.rule)
        several: Any = self.radii  # 0-d arrays and tensors are iterable by type, but not in fact
        single = not isinstance(several, Iterable) or isinstance(several, str) or getattr(several, "ndim", 1) == 0
        given: Iterable[float] = [several] if single else several
        radii = sorted({as_float(r, "radius", "one number or several, such as 0.25") + 0.0 for r in given})  # no -0.0
        if not radii:
            raise UserError("no radius: expected one or several, such as 0.25")
        _set(self, n=n, alpha=alpha, radii=tuple(radii))

    @property
    def stages(self) -> dict[str, int]:
        """Samples, at most."""
        return {ESTIMATION: self.n}

    @property
    def bound(self) -> str:
        """Name of the stopping rule, for the run file."""
        return self.rule

    @property
    def stopping(self) -> Stopping:
        """How images stop early."""
        return Stopping(self.rule, self.radii)

    def tests(self, num_classes: int, noise: Radii, piece: int) -> dict[str, SequentialTest]:
        """Return the sequential test at all radii."""
        test = RadiusDecision(num_classes, n=self.n, radii=self.radii, noise=noise, alpha=self.alpha, rule=self.rule)
        return {ESTIMATION: test}

    def answer(self, results: Mapping[str, Any], noise: Radii, uniform: float = 1.0) -> Decision:
        """Return the decision of the sequential test."""
        decision: Decision = results[ESTIMATION]
        return decision

    def recompute(self, votes: RecordedVotes, noise: Radii) -> Decision:
        """Return the decision again from the recorded votes."""
        return decision_from_counts(
            votes.looks,
            votes.estimation,
            radii=self.radii,
            noise=noise,
            alpha=self.alpha,
            rule=self.rule,
            drawn=votes.drawn,
        )

    def record(self, answer: Decision) -> AnswerKeys:
        """Return the keys of a decision; its radius is the largest robust one."""
        settled = [
            SettledRadius(radius=radius, outcome=outcome, look=list(look))
            for radius, outcome, look in zip(answer.radii, answer.outcomes, answer.looks, strict=True)
        ]
        keys = answer_keys(answer.prediction, answer.radius, None, answer.votes)
        return keys | AnswerKeys(decisions=settled, drawn=answer.drawn)

    def describe(self) -> str:
        """Describe the sampling plan in one phrase."""
        most = f"n = {self.n:,} at most, alpha = {exact(self.alpha)} for each image and all radii"
        return f"decide by {self.rule}: {most}"

    def prospects(self, noise: Radii) -> Prospects:
        """Return the probability that each radius needs, and the fewest samples that can settle it."""
        p0s, level = needed(self.radii, noise, self.alpha, self.rule)
        earliest = [thresholds(self.rule, p0, level, self.n).earliest() for p0 in p0s]
        lines, warnings = [], []
        for radius, p0, enough in zip(self.radii, p0s, earliest, strict=True):
            few = f"robust after {enough:,} samples at the earliest" if enough is not None else "out of reach"
            lines.append(f"{exact(radius)} ({IN_WORDS[noise.norm]}) needs a probability of {ceil_to(p0, 5)}: {few}")
            if enough is None:
                at = exact(radius)
                warnings.append(f"no image can be settled as robust at {at} within n = {self.n:,}: pass a larger --n")
        largest = self.radii[-1] if earliest[-1] is not None else None
        return Prospects(largest, earliest[-1], tuple(lines), tuple(warnings))

    def changed(self, alpha: float, bound: str, path: object) -> Decide:
        """Return the procedure at another alpha; the stopping rule stays."""
        if bound != self.rule:
            raise UserError(
                f"{path} was stopped by looking at its votes (rule {self.rule}): --bound {bound} cannot decide at its "
                "radii; leave --bound out, and pass --alpha alone"
            )
        return Decide(self.radii, self.n, alpha, self.rule)


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
        _set(self, n=n, alpha=alpha)

    @property
    def stages(self) -> dict[str, int]:
        """Samples."""
        return {PREDICTION: self.n}

    def tests(self, num_classes: int, noise: Radii, piece: int) -> dict[str, SequentialTest]:
        """Return a fixed sample."""
        return {PREDICTION: FixedSample(num_classes, n=self.n, piece=piece)}

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


def procedure_of(settings: ProcedureSettings) -> Procedure:
    """Return the procedure with these settings."""
    kind, n, alpha, bound, stopping = settings.kind, settings.n, settings.alpha, settings.bound, settings.stopping
    if kind == Predict.kind:
        return Predict(n, alpha)
    if kind == Decide.kind:
        if stopping is None:
            raise UserError("a run of decisions without radii; expected a header with `stopping`")
        return Decide(stopping.radii, n, alpha, stopping.rule)
    if kind != Certify.kind:
        raise UserError(f"procedure {kind!r}; expected one of certify, decide, predict")
    if stopping is not None and bound == MEASURING_BOUND:
        assert stopping.tolerance is not None
        return Measure(stopping.tolerance, n, alpha)
    return Certify(settings.n0, n, alpha, bound)


def _is_anytime(bound: str) -> bool:
    found = BOUNDS.get(bound)
    assert isinstance(found, Bound)
    return found.anytime


def _largest(procedure: Certify | Measure, noise: Radii, *, selected: bool) -> Prospects:
    radius = functools.partial(largest_radius, noise, alpha=procedure.alpha, bound=procedure.bound, selected=selected)
    cap = radius(n=procedure.n)
    if cap > 0:
        return Prospects(cap)
    least = next((n for n in range(1, 10_000) if radius(n=n) > 0), None)
    fix = "" if least is None else f"; pass --n {least} or more"
    text = f"n = {procedure.n} can certify nothing at alpha = {exact(procedure.alpha)}: every image will abstain{fix}"
    return Prospects(0.0, warnings=(text,))


def _set(procedure: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(procedure, name, value)
