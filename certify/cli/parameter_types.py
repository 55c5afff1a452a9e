"""Types of option values: text as typed -> checked number, size, distance or list."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:  # generic only since click 8.5
    ParamType = click.ParamType

TYPED_ARGUMENTS = "certify.typed_arguments"
"""Key of ``click.Context.meta`` for the arguments as they were typed."""


def parse_number(text: str) -> float:
    """Parse a number or a fraction such as ``64/255``.

    Raises:
        ValueError: neither.
    """
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ZeroDivisionError, OverflowError):
        raise ValueError(f"{text} is not finite") from None


class Numbers(ParamType):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Convert ``"0,0.25"`` to ``[0.0, 0.25]``."""
        if isinstance(value, list):
            return value
        try:
            return [parse_number(v) for v in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r}; expected numbers separated by commas, such as 0,0.25,0.5", param, ctx)


class Size(ParamType):
    """Channels, height and width."""

    name = "CxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        """Convert ``"3x224x224"`` to ``(3, 224, 224)``."""
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().split("x")
        if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
            self.fail(f"{value!r}; expected channels x height x width, such as 3x224x224", param, ctx)
        return int(parts[0]), int(parts[1]), int(parts[2])


class SingleNumber(ParamType):
    """Exactly one number; the error for several gives the command for the first of them."""

    def parse(self, text: str) -> Any:
        """Parse the number.

        Raises:
            ValueError: not a number in range.
        """
        raise NotImplementedError

    def reject(self, value: Any, expected: str, param: click.Parameter | None, ctx: click.Context | None) -> NoReturn:
        """Raise the error for a value that is not one number in range."""
        parts = str(value).split(",")
        with contextlib.suppress(ValueError, OverflowError):
            if len(parts) > 1 and param is not None and ctx is not None and [self.parse(part) for part in parts]:
                named = any(word.partition("=")[0] == "--out" for word in ctx.meta.get(TYPED_ARGUMENTS, ()))
                also = " and another --out" if named else ""
                self.fail(
                    f"{value!r} are {len(parts)} values; expected one in each run: first run "
                    f"`{_with_value(param, str(value), parts[0], ctx)}`, then the same with {parts[1]}{also}",
                    param,
                    ctx,
                )
        self.fail(f"{value!r}; expected {expected}", param, ctx)


def _with_value(param: click.Parameter, old: str, new: str, ctx: click.Context) -> str:
    """Return the command as typed, with another value of one option."""
    words = ["certify", *ctx.meta.get(TYPED_ARGUMENTS, ())]
    for i, word in enumerate(words):
        name, sign, text = word.partition("=")
        if name in param.opts and sign and text == old:
            words[i] = f"{name}={new}"
        elif word == old and words[i - 1] in param.opts:
            words[i] = new
    return shlex.join(words)


class Count(SingleNumber):
    """An integer from ``least``; accepts 1e5 and 100_000."""

    name = "integer"

    def __init__(self, what: str, least: int = 1) -> None:
        self.what, self.least = what, least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Convert text to an integer in range."""
        with contextlib.suppress(ValueError, OverflowError):
            return self.parse(value)
        self.reject(value, f"{self.what}, a whole number from {self.least}", param, ctx)

    def parse(self, text: str) -> int:
        """Parse an integer in range."""
        try:
            number = int(text)
        except ValueError:  # 1e5, which is exact only as far as floating point is
            number = int(float(text)) if float(text).is_integer() else self.least - 1
        if number < self.least:
            raise ValueError
        return number


class BatchSize(Count):
    """A batch size, or None for ``auto``."""

    name = "auto|integer"

    def __init__(self) -> None:
        super().__init__("auto or a batch size")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert ``auto`` to None, other text to an integer in range."""
        return None if value == "auto" else super().convert(value, param, ctx)


class Positive(SingleNumber):
    """A finite number above 0, and below ``below`` if given."""

    name = "number"

    def __init__(self, expected: str, below: float = float("inf")) -> None:
        self.expected, self.below = expected, below

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Convert text to a number in range."""
        with contextlib.suppress(ValueError):
            return self.parse(str(value))
        self.reject(value, self.expected, param, ctx)

    def parse(self, text: str) -> float:
        """Parse a number in range."""
        number = parse_number(text)
        if not 0.0 < number < self.below:
            raise ValueError
        return number


PROBABILITY = Positive("a probability strictly between 0 and 1, such as 0.001", below=1.0)
SHARE = Positive("a share between 0 and 1, such as 0.1", below=1.0)


@dataclass(frozen=True)
class Distance:
    """A distance in [0, 1] pixels, and its text as typed: 0.0314 and ``8/255``."""

    value: float
    text: str

    def __str__(self) -> str:
        return self.text


class DistanceType(ParamType):
    """A distance: 0.5, or a fraction such as 8/255."""

    name = "number|fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Distance:
        """Convert ``"8/255"`` to ``Distance(0.0313..., "8/255")``."""
        if isinstance(value, Distance):
            return value
        try:
            distance = parse_number(str(value))
            if not 0 < distance < float("inf"):
                raise ValueError
        except ValueError:
            self.fail(f"{value!r}; expected a distance above 0 in [0, 1] pixels, such as 8/255 or 0.5", param, ctx)
        return Distance(distance, str(value))


@dataclass(frozen=True)
class NoiseLevels:
    """Noise levels for training: each of ``values``, or all between two of them if ``continuous``."""

    values: tuple[float, ...] = ()
    continuous: bool = False


class NoiseLevelsType(ParamType):
    """Noise levels: one, several separated by commas, or LOW:HIGH."""

    name = "numbers|LOW:HIGH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> NoiseLevels:
        """Convert ``"0.1:1"`` to ``NoiseLevels((0.1, 1.0), True)``."""
        if isinstance(value, NoiseLevels):
            return value
        continuous = ":" in str(value)
        try:
            levels = tuple(parse_number(v) for v in str(value).split(":" if continuous else ","))
            invalid = continuous and not (len(levels) == 2 and 0 < levels[0] < levels[1])
            if invalid or not all(0 <= v < float("inf") for v in levels):
                raise ValueError
        except ValueError:
            self.fail(f"{value!r}; expected levels in [0, 1] pixels: 0.25, or 0.12,0.25,0.5, or 0.1:1", param, ctx)
        return NoiseLevels(levels, continuous)
