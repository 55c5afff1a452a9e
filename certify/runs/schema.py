"""Shapes of the JSON in run files and comparisons, checked when they are read.

A key that is there must have a value of its kind; a key that is not there may belong to an older version. Whoever needs
it gets an error of one line (:class:`Record`), not a traceback.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from certify.errors import UserError
from certify.smoothing.norms import IN_WORDS

_LARGEST = 2**53  # counts up to here are exact as floats
_CLASSES = 1_000_000  # class numbers are below: votes become a list over classes


class MissingKey(UserError, KeyError):
    """A record lacks a key that is needed."""

    __str__ = Exception.__str__


class Record(dict[str, Any]):
    """A JSON object from a file; a missing key is an error of one line.

    Args:
        value: of the object.
        where: it stands, for the error: ``run.jsonl, line 3``.
    """

    def __init__(self, value: Mapping[str, Any], where: str) -> None:
        super().__init__(value)
        self.where = where
        for name, inner in value.items():
            if type(inner) is dict:
                self[name] = Record(inner, f"{name!r} of {where}")

    def __missing__(self, key: str) -> Any:
        raise MissingKey(f"{self.where} has no {key!r}, which is needed here; expected a file that certify wrote")


def parse_object(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object in these bytes; None where there is anything else, NaN and infinities included."""
    try:
        value = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> float:
    """NaN and infinities are no JSON, and NaN must never certify."""
    raise ValueError(name)


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        what: in words.
        fits: True for a value of this kind.
    """

    what: str
    fits: Callable[[Any], bool]

    def or_null(self) -> Kind:
        """Return this kind, or null."""
        return Kind(f"{self.what} or null", lambda value: value is None or self.fits(value))

    def list(self) -> Kind:
        """Return lists of this kind."""
        return Kind(f"a list, each {self.what}", lambda value: isinstance(value, list) and all(map(self.fits, value)))

    def by_name(self) -> Kind:
        """Return objects with values of this kind."""
        return Kind(
            f"an object, each value {self.what}", lambda v: isinstance(v, dict) and all(map(self.fits, v.values()))
        )


Fields = Mapping[str, Kind]


def fault(value: Mapping[str, Any], fields: Fields) -> str:
    """Return which key has a value of another kind, in words; empty where none has."""
    for key, kind in fields.items():
        if key in value and not kind.fits(value[key]):
            return f"{key!r} is not {kind.what}"
    return ""


def record(what: str, needed: Fields, optional: Fields = {}) -> Kind:  # noqa: B006
    """Return objects that have the needed keys."""
    fields = {**needed, **optional}
    return Kind(what, lambda v: isinstance(v, dict) and needed.keys() <= v.keys() and not fault(v, fields))


def one_of(*choices: Any) -> Kind:
    """Return the kind of these values."""
    return Kind(f"one of {', '.join(map(str, choices))}", lambda value: value in choices)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300  # of which NaN is neither


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        c.isascii() and c.isdecimal() and len(c) < 10 and int(c) < _CLASSES and COUNT.fits(k) for c, k in value.items()
    )


TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: type(value) is bool)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
INTEGER = Kind("a whole number", lambda value: type(value) is int and abs(value) < _LARGEST)
COUNT = Kind("a whole number from 0", lambda value: type(value) is int and 0 <= value < _LARGEST)
NUMBER = Kind("a number", _is_number)
AMOUNT = Kind("a number from 0", lambda value: _is_number(value) and value >= 0)
POSITIVE = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
ALPHA = Kind("a number between 0 and 1", lambda value: _is_number(value) and 0 < value < 1)
CLASS = Kind(f"a class below {_CLASSES:,}, or -1", lambda value: type(value) is int and -1 <= value < _CLASSES)
COUNTS = Kind("a count for each class", _counts)
_CHOSEN = Kind("true, false or text", lambda value: FLAG.fits(value) or TEXT.fits(value))
_ANYTHING = Kind("anything", lambda value: True)
_LOOK = Kind(
    "class, votes and trials",
    lambda v: isinstance(v, list) and len(v) == 3 and CLASS.fits(v[0]) and COUNT.list().fits(v[1:]) and v[1] <= v[2],
)

RUN_HEADER: Fields = {
    **dict.fromkeys(("procedure", "model", "data", "noise", "bound", "precision", "device", "torch", "stream"), TEXT),
    **dict.fromkeys(("created", "command"), TEXT),
    **dict.fromkeys(("denoiser", "accelerator"), TEXT.or_null()),
    **dict.fromkeys(("schema", "n0", "n", "expected"), COUNT),
    **dict.fromkeys(("versions", "machine", "recomputed"), OBJECT),
    **dict.fromkeys(("compiled", "folded"), _CHOSEN),
    **dict.fromkeys(("rounded", "in_order"), FLAG),
    **dict.fromkeys(("pipeline", "merged"), OBJECT.list()),
    "norm": one_of(*IN_WORDS),
    "sigma": POSITIVE,
    "alpha": ALPHA,
    "stopping": record(
        "an object", {}, {"rule": TEXT, "radii": AMOUNT.list(), "tolerance": POSITIVE.or_null()}
    ).or_null(),
    "seed": Kind("a whole number from 0", lambda value: type(value) is int and value >= 0),
    "images": OBJECT,
    "unread": TEXT.list(),
    "batch_size": Kind("a whole number or text", lambda value: COUNT.fits(value) or TEXT.fits(value)),
    "execution": record("an object", {}, {"why": TEXT.list(), "asked": OBJECT}),
    "shard": record("index, of and images", {"index": COUNT, "of": COUNT, "images": COUNT}),
    "reference": record("labels", {"labels": TEXT}),
    "class_map": TEXT.by_name().or_null(),
}

IMAGE: Fields = {
    **dict.fromkeys(("id", "error"), TEXT),
    **dict.fromkeys(("class", "base_class", "image"), TEXT.or_null()),
    **dict.fromkeys(("prediction",), CLASS),
    **dict.fromkeys(("label", "base"), CLASS.or_null()),
    **dict.fromkeys(("radius", "p_lower", "p_other", "p_value"), AMOUNT.or_null()),
    **dict.fromkeys(("trials", "failures", "selection_failures", "drawn", "place", "outside", "queries"), COUNT),
    **dict.fromkeys(("votes", "selection"), COUNTS),
    "uniform": SHARE,
    "values": COUNT,
    "seconds": AMOUNT,
    "unfinished": FLAG,
    "agreement": Kind("two counts", lambda value: COUNT.list().fits(value) and len(value) == 2),
    "classes": Kind("a name for each class", lambda v: TEXT.by_name().fits(v) and _counts(dict.fromkeys(v, 0))),
    "decisions": record(
        "a radius, an outcome and a look",
        {"radius": AMOUNT, "outcome": one_of("robust", "not certifiable", "undecided"), "look": _LOOK},
    ).list(),
}

COMPARISON_HEADER: Fields = {
    **dict.fromkeys(("model", "data", "eps_text", "command"), TEXT),
    **dict.fromkeys(("schema", "expected", "repeats", "certify_n", "queries"), COUNT),
    **dict.fromkeys(("eps", "l2_radius"), AMOUNT),
    "norm": one_of(*IN_WORDS),
    "alpha": ALPHA,
    "images": record("an object", {}, {"chosen": COUNT}),
    "conditions": record(
        "a name and a group", {"name": TEXT, "group": one_of("plain", "blind", "adaptive", "certified")}
    ).list(),
    "defences": record("an object with named and frozen", {"named": TEXT, "frozen": FLAG}).list(),
}

OUTCOME: Fields = {
    **dict.fromkeys(("id", "image", "defence", "condition", "note", "error", "outcome"), TEXT),
    **dict.fromkeys(("l2", "linf", "queries", "seconds"), AMOUNT),
    "label": CLASS,
    "radius": AMOUNT,
    "answers": CLASS.list(),
    "crossing": record("distance, prediction and alpha", {"distance": AMOUNT, "prediction": CLASS, "alpha": ALPHA}),
}


def header_fault(header: Mapping[str, Any]) -> str:
    """Return what is wrong with the header of a run or a comparison, in words; empty where nothing is."""
    if header.get("type") != "run":
        return fault(header, COMPARISON_HEADER)
    if found := fault(header, RUN_HEADER):
        return found
    stopping = header.get("stopping") or {}
    if header.get("procedure") == "decide" and not stopping.get("radii"):
        return "'stopping' has no radii, at which its images were decided"
    return "'n0' is not 0 although images stopped by themselves" if stopping and header.get("n0") else ""


def image_fault(row: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """Return what is wrong with an image's line of the run with this header, in words; empty where nothing is."""
    if found := fault(row, IMAGE):
        return found
    if row["radius"] is None and header.get("procedure", "certify") in ("certify", "decide"):
        return "'radius' is null in a run of certificates"
    if sum(row["votes"].values()) + row["failures"] != row["trials"]:
        return "'votes' and 'failures' do not add up to 'trials'"
    names = row.get("classes")
    if names is not None and not {*row["votes"], *row["selection"]} <= names.keys():
        return "'classes' does not name all classes of the votes"
    radii = (header.get("stopping") or {}).get("radii", [])
    if "decisions" in row and [decision["radius"] for decision in row["decisions"]] != radii:
        return "'decisions' are not about the radii in the header"
    return ""


def outcome_fault(row: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """Return what is wrong with a line of a comparison, in words; empty where nothing is."""
    return fault(row, OUTCOME) or ("" if row["answers"] or "error" in row else "it has neither answers nor an error")
