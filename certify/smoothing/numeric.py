"""Convert scalars of any numeric type to Python's float and int.

Arithmetic takes the type of its arguments, so a single-precision alpha would give a bound in single precision. Every
public function converts its scalars here before any computation; a number keeps the value that it has in its own type.
"""

from __future__ import annotations

import operator
from decimal import Decimal
from numbers import Real
from typing import Any

from certify.errors import UserError


def as_float(value: Any, name: str, expected: str = "a number") -> float:
    """Return a scalar of any real type as a Python float; NaN and infinities pass.

    Args:
        value: a Python or NumPy number, a 0-d array or tensor, a ``Fraction`` or a ``Decimal``.
        name: of the argument, for the error.
        expected: the valid values, for the error.

    Raises:
        UserError: not a real number (text, a bool, a complex number, several numbers), or too large for a float.
    """
    if type(value) is float:
        return value
    item = _item(value)
    if not isinstance(item, bool) and isinstance(item, Real | Decimal):
        try:
            return float(item)
        except (OverflowError, ValueError):
            pass
    raise UserError(f"{name} = {_shown(value)}: expected {expected}")


def as_int(value: Any, name: str, expected: str = "a whole number, such as 1_000") -> int:
    """Return a scalar of any integer type as a Python int.

    Args:
        value: a Python or NumPy integer, or a 0-d array or tensor of integers.
        name: of the argument, for the error.
        expected: the valid values, for the error.

    Raises:
        UserError: not an integer: a float (1e5 too), text, a bool, several numbers.
    """
    if type(value) is int:
        return value
    item = _item(value)
    if not isinstance(item, bool) and getattr(item, "ndim", 0) == 0:
        try:
            return operator.index(item)
        except TypeError:
            pass
    raise UserError(f"{name} = {_shown(value)}: expected {expected}")


def _item(value: Any) -> Any:
    """Return the Python number in a NumPy scalar or a 0-d array or tensor; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _shown(value: Any) -> str:
    """Format a value on one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
