"""JSON records as frozen dataclasses: each key is spelled once, as a field with its kind of value.

A key that is there must have a value of its kind. A key that is not there may belong to an older version: where its
value is needed and has no default, the reader gets an error of one line (:class:`MissingKey`), not a traceback.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from certify.errors import UserError

_LARGEST = 2**53  # counts up to here are exact as floats
_CLASSES = 1_000_000  # class numbers are below: votes become a list over classes


class MissingKey(UserError, KeyError):
    """A record lacks a key that is needed."""


def _missing(where: str, key: str) -> MissingKey:
    return MissingKey(f"{where} has no {key!r}, which is needed here; expected a file that certify wrote")


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
    """A kind of JSON value.

    Attributes:
        what: description for error messages.
        fits: True for a value of this kind.
        model: dataclass of an object, or of the objects in a list; None for plain values.
    """

    what: str
    fits: Callable[[Any], bool]
    model: type[JsonRecord] | None = None

    def or_null(self) -> Kind:
        """Return this kind, or null."""
        return Kind(f"{self.what} or null", lambda value: value is None or self.fits(value), self.model)

    def list(self) -> Kind:
        """Return lists of this kind."""
        return Kind(
            f"a list, each {self.what}",
            lambda value: isinstance(value, list) and all(map(self.fits, value)),
            self.model,
        )

    def by_name(self) -> Kind:
        """Return objects with values of this kind."""
        return Kind(
            f"an object, each value {self.what}", lambda v: isinstance(v, dict) and all(map(self.fits, v.values()))
        )


Fields = Mapping[str, Kind]


def fault(value: Mapping[str, Any], fields: Fields) -> str:
    """Describe the first key whose value is of another kind; empty if there is none."""
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


@dataclass(frozen=True)
class Key:
    """The JSON key of a field, where it differs from the field's name."""

    name: str


@dataclass(frozen=True)
class Absent:
    """The value of a field that a file does not have, because an older version wrote it."""

    value: Any


REQUIRED = "required"
"""Mark of a field that every file has: a record without it is damaged."""


@dataclass(frozen=True)
class _Field:
    """A field of a record: its name, kind, marks and default."""

    name: str
    kind: Kind
    required: bool
    absent: Absent | None
    default: Any

    def read(self, value: Any, where: str) -> Any:
        model = self.kind.model
        if model is None or value is None:
            return value
        return [model.from_json(v, where) for v in value] if isinstance(value, list) else model.from_json(value, where)

    def write(self, value: Any) -> Any:
        if self.kind.model is None or value is None:
            return list(value) if isinstance(value, tuple) else value
        return value.to_json() if isinstance(value, JsonRecord) else [v.to_json() for v in value]


class JsonRecord(Mapping[str, Any]):
    """Base of the frozen, keyword-only dataclasses that are JSON objects in a file.

    Fields are ``Annotated`` with their :class:`Kind` and, if need be, :class:`Key`, :class:`Absent` or ``REQUIRED``. A
    field without a default is written by this version; one with a default is written where its value differs from it.
    Keys that no field names are kept. A record can also be read by JSON key, as a mapping: ``row["radius"]``.
    """

    type_name: ClassVar[str] = ""
    """Value of the key ``type``, which is written first; empty for objects that have none."""

    def __init_subclass__(cls, *, type_name: str = "") -> None:
        cls.type_name = type_name

    @classmethod
    def fault(cls, value: Mapping[str, Any]) -> str:
        """Describe what is wrong with a JSON object of this kind; empty if nothing is."""
        fields = _fields(cls)
        lacking = next(
            (f"it has no {key!r}" for key, field in fields.items() if field.required and key not in value), ""
        )
        return lacking or fault(value, {key: field.kind for key, field in fields.items()})

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = "the record") -> Self:
        """Return the record of a JSON object, in which :meth:`fault` finds nothing.

        Args:
            value: the object.
            where: its place, for errors about missing keys: ``run.jsonl, line 3,``.
        """
        made = object.__new__(cls)
        fields, more, content = _fields(cls), {}, vars(made)
        for key, given in value.items():
            field = fields.get(key)
            if field is not None:
                content[field.name] = field.read(given, f"{key!r} of {where}")
            elif key != "type":
                more[key] = given
        content |= {"_where": where} | ({"_more": more} if more else {})
        return made

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        content = vars(self)
        found: dict[str, Any] = {"type": self.type_name} if self.type_name else {}
        for key, field in _fields(type(self)).items():
            if field.name in content and content[field.name] != field.default:
                found[key] = field.write(content[field.name])
        found |= content.get("_more", {})
        return found

    def has(self, name: str) -> bool:
        """Return True if the record has a field of this name, rather than the default of older files."""
        return name in vars(self)

    def replace(self, **values: Any) -> Self:
        """Return a copy with other values of some fields."""
        unknown = values.keys() - {field.name for field in _fields(type(self)).values()}
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        made = object.__new__(type(self))
        vars(made).update(vars(self) | values)
        return made

    def updated(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with other values of some JSON keys."""
        return self.from_json({**self.to_json(), **values}, vars(self).get("_where", "the record"))

    if not typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return the default of older files for a field that the file does not have."""
            for key, field in _fields(type(self)).items():
                if field.name == name:
                    if field.absent is None:
                        raise _missing(vars(self).get("_where", "the record"), key)
                    return field.absent.value
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __getitem__(self, key: str) -> Any:
        content, field = vars(self), _fields(type(self)).get(key)
        if key == "type" and self.type_name:
            return self.type_name
        if field is not None and field.name in content and content[field.name] != field.default:
            return field.write(content[field.name])
        more = content.get("_more", {})
        if key in more:
            return more[key]
        raise _missing(content.get("_where", "the record"), key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_json())

    def __len__(self) -> int:
        return len(self.to_json())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_json()})"


@functools.cache
def _fields(cls: type[JsonRecord]) -> dict[str, _Field]:
    """Return the fields of a record by JSON key."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        marks = hints[field.name].__metadata__
        kind = next(mark for mark in marks if isinstance(mark, Kind))
        key = next((mark.name for mark in marks if isinstance(mark, Key)), field.name)
        absent = next((mark for mark in marks if isinstance(mark, Absent)), None)
        found[key] = _Field(field.name, kind, REQUIRED in marks, absent, field.default)
    return found


def object_of(model: type[JsonRecord], what: str = "an object") -> Kind:
    """Return JSON objects that are records of this class."""
    return Kind(what, lambda value: isinstance(value, dict) and not model.fault(value), model)
