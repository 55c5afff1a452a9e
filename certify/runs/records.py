"""The records of run files and comparisons; each key is spelled here, and nowhere else.

``docs/run-file.md`` explains the keys. Users' scripts rely on them: a key that changes its meaning raises ``SCHEMA``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from certify.errors import UserError
from certify.runs.schema import (
    ALPHA,
    AMOUNT,
    CLASS,
    COUNT,
    COUNTS,
    FLAG,
    OBJECT,
    POSITIVE,
    REQUIRED,
    SHARE,
    TEXT,
    Absent,
    JsonRecord,
    Key,
    Kind,
    object_of,
    one_of,
    record,
)
from certify.smoothing import procedures
from certify.smoothing.noise import make_noise
from certify.smoothing.norms import IN_WORDS, in_norm
from certify.smoothing.procedures import (
    Accuracy,
    AnswerKeys,
    Certify,
    Decide,
    Predict,
    Procedure,
    ProcedureSettings,
    RecordedVotes,
    answer_keys,
    procedure_of,
)
from certify.types import ABSTAIN, NOT_CERTIFIABLE, ROBUST, UNDECIDED, Radii, Votes

SCHEMA = 1

_WITH_RADIUS = (Certify.kind, Decide.kind)  # every image has one, 0 for an abstention
_WITHOUT_RADIUS = {
    Predict.kind: "holds predictions, which have no radius",
    Accuracy.kind: "is about all images together, and none has a radius: see `certify accuracy` or `accuracy_bound()`",
}

_CHOSEN = Kind("true, false or text", lambda value: FLAG.fits(value) or TEXT.fits(value))
SEED = Kind("a whole number from 0", lambda value: type(value) is int and value >= 0)
_SIZE = Kind("a whole number or text", lambda value: COUNT.fits(value) or TEXT.fits(value))
_PAIR = Kind("two counts", lambda value: COUNT.list().fits(value) and len(value) == 2)
_LOOK = Kind(
    "class, votes and trials",
    lambda v: isinstance(v, list) and len(v) == 3 and CLASS.fits(v[0]) and COUNT.list().fits(v[1:]) and v[1] <= v[2],
)
_CLASS_NAMES = Kind("a name for each class", lambda v: TEXT.by_name().fits(v) and COUNTS.fits(dict.fromkeys(v, 0)))
_EXECUTION = record("an object", {}, {"why": TEXT.list(), "asked": OBJECT})


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Header(JsonRecord):
    """First line of a file.

    Attributes:
        schema: version of the format.
        expected: number of lines that follow in a finished file.
    """

    schema: Annotated[int, COUNT, Absent(0)]
    expected: Annotated[int, COUNT, REQUIRED]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Row(JsonRecord):
    """A line after the header.

    Attributes:
        id: unique in the file.
        error: why there is no result; None where there is one.
    """

    id: Annotated[str, TEXT, REQUIRED]
    error: Annotated[str | None, TEXT] = None

    def fault_in(self, header: Any) -> str:
        """Describe where the row contradicts itself or the header; empty where it does not."""
        return ""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Stopping(JsonRecord):
    """Rule by which images stop early.

    Attributes:
        rule: name of the stopping rule or anytime-valid bound.
        radii: radii to decide; empty for other questions.
        tolerance: relative tolerance of a measured radius, else None.
    """

    rule: Annotated[str, TEXT]
    radii: Annotated[Sequence[float], AMOUNT.list(), Absent(())]
    tolerance: Annotated[float | None, POSITIVE.or_null(), Absent(None)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShardPlace(JsonRecord):
    """The place of a shard in its run: part ``index`` (from 1) of ``of``, of a run of ``images`` images."""

    index: Annotated[int, COUNT, REQUIRED]
    of: Annotated[int, COUNT, REQUIRED]
    images: Annotated[int, COUNT, REQUIRED]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Reference(JsonRecord):
    """Source of an audit's reference labels: ``"service"`` or ``"given"``, and the hash of those given."""

    labels: Annotated[str, TEXT, REQUIRED]
    sha256: Annotated[str | None, TEXT.or_null(), Absent(None)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RunHeader(Header, type_name="run"):
    """Header of a run file: everything that shaped the run, and its provenance."""

    model: Annotated[str, TEXT]
    data: Annotated[str, TEXT]
    denoiser: Annotated[str | None, TEXT.or_null(), Absent(None)]
    noise: Annotated[str, TEXT]
    rounded: Annotated[bool, FLAG, Absent(False)]
    norm: Annotated[str, one_of(*IN_WORDS), Absent("l2")]
    sigma: Annotated[float, POSITIVE]
    kind: Annotated[str, TEXT, Key("procedure"), Absent("certify")]
    n0: Annotated[int, COUNT]
    n: Annotated[int, COUNT]
    alpha: Annotated[float, ALPHA]
    bound: Annotated[str, TEXT]
    stopping: Annotated[Stopping | None, object_of(Stopping).or_null(), Absent(None)]
    seed: Annotated[int, SEED]
    precision: Annotated[str, TEXT]
    compiled: Annotated[bool | str, _CHOSEN]
    folded: Annotated[bool | str, _CHOSEN]
    device: Annotated[str, TEXT]
    accelerator: Annotated[str | None, TEXT.or_null(), Absent(None)]
    torch: Annotated[str, TEXT]
    versions: Annotated[Mapping[str, str], OBJECT, Absent({})]
    machine: Annotated[Mapping[str, Any], OBJECT, Absent({})]
    images: Annotated[Mapping[str, Any], OBJECT, Absent({})]
    unread: Annotated[Sequence[str] | None, TEXT.list()] = None
    pipeline: Annotated[Sequence[Mapping[str, Any]], OBJECT.list(), Absent(())]
    stream: Annotated[str, TEXT]
    batch_size: Annotated[int | str, _SIZE]
    execution: Annotated[Mapping[str, Any] | None, _EXECUTION] = None
    created: Annotated[str, TEXT, Absent("")]
    command: Annotated[str, TEXT, Absent("")]
    in_order: Annotated[bool, FLAG] = False
    reference: Annotated[Reference | None, object_of(Reference, "labels")] = None
    class_map: Annotated[Mapping[str, str] | None, TEXT.by_name().or_null()] = None
    shard: Annotated[ShardPlace | None, object_of(ShardPlace, "index, of and images")] = None
    merged: Annotated[Sequence[Mapping[str, Any]] | None, OBJECT.list()] = None
    recomputed: Annotated[Mapping[str, Any] | None, OBJECT] = None

    @property
    def procedure(self) -> Procedure:
        """The procedure of the run.

        Raises:
            UserError: an unknown one, or a header without its parameters.
        """
        early = self.stopping
        stopping = None if early is None else procedures.Stopping(early.rule, tuple(early.radii), early.tolerance)
        return procedure_of(ProcedureSettings(self.kind, self.n0, self.n, self.alpha, self.bound, stopping))

    @property
    def radii(self) -> Sequence[float]:
        """The radii to decide, ascending; empty where the radius itself is certified."""
        return () if self.stopping is None else self.stopping.radii

    @property
    def without_radii(self) -> str:
        """The reason why no image has a radius, after the file's name; empty if all have one."""
        return _WITHOUT_RADIUS.get(self.kind, "")

    def radii_for(self, size: int | None) -> Radii:
        """Return the radii of the noise in the norm of the run, for an image of C * H * W = ``size`` values.

        Raises:
            UserError: an implied norm, and an image whose row does not state its size (None).
        """
        noise = make_noise(self.noise, self.sigma, rounded=self.rounded)
        norm = self.norm if self.has("norm") else noise.norm
        if norm != noise.norm and size is None:
            raise UserError(
                f"a line without `values` in a run whose norm {norm} is implied: its radius cannot be stated"
            )
        return in_norm(noise, norm, size or 1)

    @classmethod
    def fault(cls, value: Mapping[str, Any]) -> str:
        """Describe what is wrong with a header of a run; empty if nothing is."""
        if wrong := super().fault(value):
            return wrong
        header = cls.from_json(value)
        if header.kind == Decide.kind and not header.radii:
            return "'stopping' has no radii, at which its images were decided"
        two_stages = header.has("n0") and header.n0 > 0
        return "'n0' is not 0 although images stopped by themselves" if header.stopping and two_stages else ""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RadiusOutcome(JsonRecord):
    """The outcome at one radius.

    Attributes:
        radius: in [0, 1] pixels.
        outcome: ``"robust"``, ``"not certifiable"`` or ``"undecided"``.
        look: leading class, its votes and all samples when it was settled, or at the end.
    """

    radius: Annotated[float, AMOUNT, REQUIRED]
    outcome: Annotated[str, one_of(ROBUST, NOT_CERTIFIABLE, UNDECIDED), REQUIRED]
    look: Annotated[Sequence[int], _LOOK, REQUIRED]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ImageRow(Row, type_name="image"):
    """One image of a run: its answer, the votes that it follows from, and its provenance."""

    label: Annotated[int | None, CLASS.or_null(), REQUIRED]
    prediction: Annotated[int, CLASS, REQUIRED]
    radius: Annotated[float | None, AMOUNT.or_null(), REQUIRED]
    p_lower: Annotated[float | None, AMOUNT.or_null(), REQUIRED]
    p_other: Annotated[float | None, AMOUNT.or_null()] = None
    votes: Annotated[Mapping[str, int], COUNTS, REQUIRED]
    selection: Annotated[Mapping[str, int], COUNTS, REQUIRED]
    trials: Annotated[int, COUNT, REQUIRED]
    failures: Annotated[int, COUNT, REQUIRED]
    selection_failures: Annotated[int, COUNT, Absent(0)]
    p_value: Annotated[float | None, AMOUNT.or_null()] = None
    decisions: Annotated[
        Sequence[RadiusOutcome] | None, object_of(RadiusOutcome, "a radius, an outcome and a look").list()
    ] = None
    drawn: Annotated[int | None, COUNT] = None
    unfinished: Annotated[bool, FLAG] = False
    uniform: Annotated[float | None, SHARE] = None
    outside: Annotated[int | None, COUNT] = None
    base: Annotated[int | None, CLASS.or_null()]
    alone: Annotated[int | None, CLASS] = None
    class_name: Annotated[str | None, TEXT.or_null(), Key("class"), Absent(None)]
    base_class: Annotated[str | None, TEXT.or_null(), Absent(None)]
    classes: Annotated[Mapping[str, str] | None, _CLASS_NAMES] = None
    image: Annotated[str | None, TEXT.or_null(), Absent(None)]
    size: Annotated[int | None, COUNT.or_null(), Key("values")] = None
    queries: Annotated[int | None, COUNT] = None
    agreement: Annotated[Sequence[int] | None, _PAIR] = None
    place: Annotated[int | None, COUNT] = None
    seconds: Annotated[float, AMOUNT, REQUIRED]

    @property
    def abstained(self) -> bool:
        """True if the smoothed classifier gives no class."""
        return self.prediction < 0

    @property
    def selection_votes(self) -> Votes:
        """Votes of the selection stage; none if there was none."""
        return Votes.from_dict(self.selection, self.selection_failures)

    @property
    def estimation_votes(self) -> Votes:
        """Votes of the estimation stage, or of the only one."""
        return Votes.from_dict(self.votes, self.failures)

    @property
    def outcomes(self) -> Sequence[RadiusOutcome]:
        """The outcome at each radius to decide; empty for other questions."""
        return self.decisions or ()

    @property
    def recorded(self) -> RecordedVotes:
        """The votes that the answer follows from."""
        looks = [(leader, votes, trials) for leader, votes, trials in (outcome.look for outcome in self.outcomes)]
        uniform = 1.0 if self.uniform is None else self.uniform
        return RecordedVotes(self.selection_votes, self.estimation_votes, uniform, looks, self.drawn or 0)

    @classmethod
    def of(cls, image_id: str, label: int | None, answer: AnswerKeys, **others: Any) -> ImageRow:
        """Return the row of an image, with the keys of its answer (``Procedure.record``) and other fields."""
        return cls.from_json({"id": image_id, "label": label, **answer}, f"image {image_id!r}").replace(**others)

    @classmethod
    def unusable(
        cls, procedure: Procedure, image_id: str, label: int | None, reason: str, seconds: float = 0.0
    ) -> ImageRow:
        """Return the row of an image that could not be used, for this reason: an abstention without trials."""
        nothing = 0.0 if procedure.kind in _WITH_RADIUS else None
        answer = answer_keys(ABSTAIN, nothing, nothing, Votes(()))
        return cls.of(image_id, label, answer, base=None, image=None, error=reason, seconds=seconds)

    def recomputed(self, header: RunHeader) -> ImageRow:
        """Return the row with the answer that follows from its votes and the header alone.

        Raises:
            UserError: the procedure needs what the votes do not have.
        """
        procedure = header.procedure
        if len(self.outcomes) != len(procedure.radii):
            raise UserError(f"image {self.id!r} has no decisions at the radii of its run; expected a file of certify")
        answer = procedure.recompute(self.recorded, header.radii_for(self.size))
        return self.updated(procedure.record(answer))

    def fault_in(self, header: RunHeader) -> str:
        """Describe where the row contradicts itself or the header; empty where it does not."""
        if self.radius is None and header.kind in _WITH_RADIUS:
            return "'radius' is null in a run of certificates"
        if sum(self.votes.values()) + self.failures != self.trials:
            return "'votes' and 'failures' do not add up to 'trials'"
        if self.classes is not None and not {*self.votes, *self.selection} <= self.classes.keys():
            return "'classes' does not name all classes of the votes"
        if self.decisions is not None and [decision.radius for decision in self.decisions] != list(header.radii):
            return "'decisions' are not about the radii in the header"
        return ""
