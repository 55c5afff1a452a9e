"""Numbers as text: a guaranteed quantity is never displayed on the unsafe side of its value.

Everything that this package guarantees passes through :func:`floor_to` or :func:`ceil_to` on its way to a reader:
tables, pages, reports, figures, messages. Which side is safe:

- down: certified radii (also their median, largest and average, ACR); lower bounds on probabilities (``p_lower``) and
  lower ends of intervals; certified accuracies, and shares that hold for all images at once;
- up: upper bounds on probabilities (``p_other``), upper ends of intervals, p-values; the largest radius that n samples
  can certify ("at most"); the probability that a radius needs; the accuracy that an attack left, since another may
  leave less, and the distance of an image that it found;
- exact: radii and failure probabilities as the user gave them, sums of these, and confidences (:func:`exact`,
  :func:`times`, :func:`complement`).

Ordinary shares of counts (accuracy without noise, agreement of labels) bound nothing; they are rounded down as well, so
that 0.9998 does not read as 1.000, and their counts stand beside them. Machine-readable output (JSON, CSV) has full
precision and is not rounded.

A double is taken as the shortest decimal that names it: 0.29 is displayed as 0.29, although its binary value is smaller
by 1e-17. So a displayed number that is read back as a double is at most the value it was made from (:func:`floor_to`),
or at least that value (:func:`ceil_to`), without exception.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

_EXACT = Context(prec=1500)  # holds every digit of any double, and of a product or difference of two


def floor_to(value: float, digits: int = 4) -> str:
    """Format a number with ``digits`` decimals, rounded down: for what is guaranteed to be at least this.

    Args:
        value: any real number; infinities and NaN become "inf", "-inf" and "nan".
        digits: decimals, always that many, so that columns align; 0 or more.
    """
    return _rounded(value, digits, ROUND_FLOOR)


def ceil_to(value: float, digits: int = 4) -> str:
    """Format a number with ``digits`` decimals, rounded up: for what is guaranteed to be at most this.

    Args:
        value: any real number; infinities and NaN become "inf", "-inf" and "nan".
        digits: decimals, always that many, so that columns align; 0 or more.
    """
    return _rounded(value, digits, ROUND_CEILING)


def exact(value: float) -> str:
    """Format a number without rounding it: the shortest decimal that is read back as the same double."""
    number = float(value)
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def times(value: float, count: int) -> float:
    """Return ``count * value`` as a reader would multiply the decimals: 3 * 0.1 is 0.3."""
    return float(_EXACT.multiply(_decimal(value), Decimal(count)))


def complement(alpha: float, scale: int = 1) -> str:
    """Format ``scale * (1 - alpha)`` with all its decimals: a confidence of 1 - 1e-12 does not become 1."""
    product = _EXACT.multiply(_EXACT.subtract(Decimal(1), _decimal(alpha)), Decimal(scale))
    return f"{_EXACT.normalize(product):f}"


def _decimal(value: float) -> Decimal:
    return Decimal(repr(float(value)))


def _rounded(value: float, digits: int, direction: str) -> str:
    if not math.isfinite(value):
        return str(float(value))
    rounded = _decimal(value).quantize(Decimal(1).scaleb(-digits), direction, _EXACT)
    return f"{rounded if rounded else abs(rounded):f}"  # no minus zero
