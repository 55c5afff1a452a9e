"""Names of norms, and certificates that a certificate in one norm implies in another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from certify.errors import UserError
from certify.smoothing.numeric import as_float, as_int
from certify.types import WorstCase

if TYPE_CHECKING:
    from certify.types import Noise, Radii

ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}
IN_WORDS = {"l1": "l1", "l2": "l2", "linf": "l-infinity"}
IN_TEX = {"l1": r"$\ell_1$", "l2": r"$\ell_2$", "linf": r"$\ell_\infty$"}
DECIMALS = {"l1": 4, "l2": 4, "linf": 6}
"""Decimals of a displayed radius: l-infinity radii are smaller by the square root of the number of values."""


def implied_factor(native: str, wanted: str, values: int) -> float:
    """Return f such that a certified ball of radius R in ``native`` contains the ``wanted`` ball of radius f R.

    For p <= q, ||x||_q <= ||x||_p <= d^(1/p - 1/q) ||x||_q in d dimensions: l2 implies l1 with factor 1 and l-infinity
    with 1/sqrt(d). Rounded down.

    Args:
        native: norm of the certificate.
        wanted: norm of the statement.
        values: d = C * H * W.

    Raises:
        UserError: an unknown norm.
    """
    for name in (native, wanted):
        if name not in ORDERS:
            raise UserError(f"norm {name!r}; expected one of {', '.join(ORDERS)}")
    values = as_int(values, "values")
    loss = 1.0 / ORDERS[native] - 1.0 / ORDERS[wanted]
    return 1.0 if loss <= 0 else float(values) ** -loss * (1.0 - 1e-14)


@dataclass(frozen=True)
class Implied:
    """A noise distribution whose radii are stated in another norm.

    Attributes:
        noise: the distribution.
        norm: of the radii.
        values: d = C * H * W of the images.
    """

    noise: Noise
    norm: str
    values: int

    @property
    def name(self) -> str:
        """Name of the noise."""
        return self.noise.name

    @property
    def scale(self) -> float:
        """Scale of the noise."""
        return self.noise.scale

    def radius(self, p_lower: float, p_other: float | None = None) -> float:
        """Return the radius that the noise's own one implies in the norm."""
        return as_float(self.noise.radius(p_lower, p_other), "radius") * self._factor

    def probability(self, radius: float) -> float:
        """Return the probability that a radius in this norm needs."""
        return self.noise.probability(as_float(radius, "radius") / self._factor)

    def worst_case(self, p: float, radius: float) -> float:
        """Return the least probability within a radius in this norm.

        Raises:
            UserError: the noise does not state it.
        """
        if not isinstance(self.noise, WorstCase):
            raise UserError(f"noise {self.name!r} has no worst_case(p, radius), which this statement needs")
        return self.noise.worst_case(p, as_float(radius, "radius") / self._factor)

    @property
    def _factor(self) -> float:
        return implied_factor(self.noise.norm, self.norm, self.values)


def in_norm(noise: Noise, norm: str | None, values: int) -> Radii:
    """Return the noise with radii stated in ``norm`` (None: its own), for images of this many values."""
    return noise if norm in (None, noise.norm) else Implied(noise, str(norm), values)
