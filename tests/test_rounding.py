"""Numbers as text: the displayed decimal is never on the unsafe side of the value."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from certify.smoothing.rounding import ceil_to, complement, exact, floor_to, times


def samples() -> list[float]:
    """Doubles of every size, and those at and beside the decimals that are displayed."""
    chance = random.Random(0)
    found = [chance.uniform(-4, 4) for _ in range(1000)]
    found += [chance.choice((-1, 1)) * chance.random() * 10.0 ** chance.randint(-320, 300) for _ in range(500)]
    grid = [chance.randint(-(10**6), 10**6) / 10 ** chance.randint(0, 6) for _ in range(1000)]
    found += [at for value in grid for at in (value, math.nextafter(value, 9), math.nextafter(value, -9))]
    found += [k / n for n in (3, 7, 500, 99_999) for k in range(0, n + 1, 1 + n // 100)]
    return [*found, 1e-17, -1e-17, 5e-324, 1 - 2**-53, 0.1 + 0.2, 1.7e308]


def test_displayed_numbers_bound_the_value_from_their_side() -> None:
    """Exactly, as fractions; the one decimal that may lie beyond the binary value is the value's own name (0.29)."""
    for value in samples():
        for digits in (0, 2, 3, 4, 6):
            down, up = floor_to(value, digits), ceil_to(value, digits)
            below, above = Fraction(down), Fraction(up)
            assert below <= Fraction(value) or float(down) == value, (value, down)
            assert above >= Fraction(value) or float(up) == value, (value, up)
            assert float(down) <= value <= float(up)
            assert above - below in (0, Fraction(1, 10**digits)), "no looser than the decimals demand"
            assert [len(text.partition(".")[2]) for text in (down, up)] == [digits, digits], "columns align"
            assert "e" not in down + up


@pytest.mark.parametrize(
    ("value", "digits", "down", "up"),
    [
        (0.29, 2, "0.29", "0.29"),
        (0.9998, 3, "0.999", "1.000"),
        (66_666 / 100_000, 3, "0.666", "0.667"),
        (2 / 3, 4, "0.6666", "0.6667"),
        (1e-17, 4, "0.0000", "0.0001"),
        (-1e-17, 4, "-0.0001", "0.0000"),
        (-0.0, 2, "0.00", "0.00"),
        (-1.5, 0, "-2", "-1"),
        (1.0, 3, "1.000", "1.000"),
        (np.float32(0.1), 4, "0.1000", "0.1001"),  # this float32 is larger than 0.1
        (np.float64(0.5), 3, "0.500", "0.500"),
        (math.inf, 3, "inf", "inf"),
        (-math.inf, 3, "-inf", "-inf"),
        (math.nan, 3, "nan", "nan"),
    ],
)
def test_examples(value: float, digits: int, down: str, up: str) -> None:
    assert (floor_to(value, digits), ceil_to(value, digits)) == (down, up)


def test_settings_are_displayed_as_they_are() -> None:
    for value in samples():
        assert float(exact(value)) == value
    assert [exact(v) for v in (0.25, 1.0, 0.2499999, 0.24999999999, 1e-5)] == [
        "0.25",
        "1",
        "0.2499999",
        "0.24999999999",
        "1e-05",
    ]


def test_sums_of_failure_probabilities_and_confidences() -> None:
    """Computed from the displayed decimals, as a reader does: 36 * 0.001 is 0.036; no confidence below 1 becomes 1."""
    assert 0.001 * 36 != 0.036
    assert (times(0.001, 36), times(0.1, 3), times(0.001, 0)) == (0.036, 0.3, 0.0)
    assert complement(0.001) == "0.999"
    assert complement(0.001, 100) == "99.9"
    assert complement(1e-12, 100) == "99.9999999999"
    assert complement(1e-40).strip("9") == "0."
    assert complement(0.5, 100) == "50"
