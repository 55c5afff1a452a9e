"""Smoothing distributions: for each, the sampler, the norm and the radius side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from certify.registry import Registry

if TYPE_CHECKING:
    import torch

# Relative margin that covers the error of ndtri (2.5 ulp measured) and of the product with sigma.
_OUTWARD = 1e-14

NOISES = Registry("noise")


@dataclass(frozen=True)
class Gaussian:
    """Isotropic Gaussian noise, which certifies l2 balls (Cohen, Rosenfeld and Kolter 2019, theorem 1).

    Attributes:
        sigma: standard deviation in [0, 1] pixels.
    """

    sigma: float
    name = "gaussian"
    norm = "l2"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(
                f"sigma = {self.sigma}: expected a positive number, in [0, 1] pixels (0.25, not 64 of 255)"
            )

    @property
    def scale(self) -> float:
        """The standard deviation."""
        return self.sigma

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Noise of this shape, float32, drawn on the generator's device."""
        import torch

        noise = torch.empty(shape, device=generator.device, dtype=torch.float32)
        return noise.normal_(0.0, self.sigma, generator=generator)

    def radius(self, p_lower: float) -> float:
        """R = sigma * Phi^-1(p_lower), rounded down; 0 when p_lower <= 1/2 or is NaN."""
        if not p_lower > 0.5:
            return 0.0
        from scipy.special import ndtri

        return self.sigma * float(ndtri(p_lower)) * (1.0 - _OUTWARD)

    def probability(self, radius: float) -> float:
        """Phi(radius / sigma): the probability that is needed for this radius."""
        from scipy.special import ndtr

        return float(ndtr(radius / self.sigma))


NOISES.add("gaussian", Gaussian, "isotropic Gaussian, l2 (default)")
