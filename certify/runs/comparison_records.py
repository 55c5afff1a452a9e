"""The records of comparisons, as :mod:`certify.runs.records` has those of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from certify.runs.records import SEED, Header, Row
from certify.runs.schema import (
    ALPHA,
    AMOUNT,
    CLASS,
    COUNT,
    FLAG,
    OBJECT,
    REQUIRED,
    TEXT,
    Absent,
    JsonRecord,
    Kind,
    object_of,
    one_of,
    record,
)
from certify.smoothing.norms import IN_WORDS


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ConditionRecord(JsonRecord):
    """A condition of a comparison: its name, and its group (``plain``, ``blind``, ``adaptive`` or ``certified``)."""

    name: Annotated[str, TEXT, REQUIRED]
    group: Annotated[str, one_of("plain", "blind", "adaptive", "certified"), REQUIRED]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DefenceRecord(JsonRecord):
    """A defence of a comparison.

    Attributes:
        named: as the user wrote it.
        frozen: True if its classifiers were not trained for the defence.
        passes: network passes per image.
    """

    named: Annotated[str, TEXT, REQUIRED]
    frozen: Annotated[bool, FLAG, REQUIRED]
    passes: Annotated[float | None, Kind("anything", lambda value: True)] = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ComparisonHeader(Header, type_name="comparison"):
    """Header of a comparison. The settings of its attacks are further keys."""

    model: Annotated[str, TEXT]
    data: Annotated[str, TEXT]
    norm: Annotated[str, one_of(*IN_WORDS)]
    eps: Annotated[float, AMOUNT]
    eps_text: Annotated[str, TEXT]
    l2_radius: Annotated[float, AMOUNT]
    repeats: Annotated[int, COUNT]
    seed: Annotated[int, SEED]
    queries: Annotated[int | None, COUNT] = None
    certify_n: Annotated[int, COUNT]
    alpha: Annotated[float, ALPHA]
    conditions: Annotated[Sequence[ConditionRecord], object_of(ConditionRecord, "a name and a group").list()]
    defences: Annotated[Sequence[DefenceRecord], object_of(DefenceRecord, "an object with named and frozen").list()]
    images: Annotated[Mapping[str, Any], record("an object", {}, {"chosen": COUNT})]
    versions: Annotated[Mapping[str, str], OBJECT, Absent({})]
    command: Annotated[str, TEXT, Absent("")]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Crossed(JsonRecord):
    """The smoothed classifier's prediction at an attacked image inside a certified radius."""

    distance: Annotated[float, AMOUNT, REQUIRED]
    prediction: Annotated[int, CLASS, REQUIRED]
    alpha: Annotated[float, ALPHA, REQUIRED]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Outcome(Row, type_name="outcome"):
    """One defence's answers about one image under one condition."""

    image: Annotated[str, TEXT, REQUIRED]
    defence: Annotated[str, TEXT, REQUIRED]
    condition: Annotated[str, TEXT, REQUIRED]
    label: Annotated[int, CLASS, REQUIRED]
    answers: Annotated[Sequence[int], CLASS.list(), REQUIRED]
    l2: Annotated[float | None, AMOUNT] = None
    linf: Annotated[float | None, AMOUNT] = None
    radius: Annotated[float | None, AMOUNT] = None
    outcome: Annotated[str | None, TEXT] = None
    queries: Annotated[float | None, AMOUNT] = None
    note: Annotated[str | None, TEXT] = None
    seconds: Annotated[float | None, AMOUNT] = None
    crossing: Annotated[Crossed | None, object_of(Crossed, "distance, prediction and alpha")] = None

    def fault_in(self, header: ComparisonHeader) -> str:
        """Describe where the outcome contradicts itself; empty where it does not."""
        return "" if self.answers or self.error is not None else "it has neither answers nor an error"
