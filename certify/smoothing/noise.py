"""Smoothing distributions: for each, the sampler, the norm and the radius side by side."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from certify.errors import UserError
from certify.registry import Registry

if TYPE_CHECKING:
    import torch

    from certify.types import Noise

# Relative margin that covers the error of ndtri (2.5 ulp measured), of log1p, and of the products around them.
_OUTWARD = 1e-14

NOISES = Registry("noise", "certify.noises")


@dataclass(frozen=True)
class Additive:
    """What the distributions that are added in float32 have in common.

    Attributes:
        sigma: standard deviation of one pixel's noise, in [0, 1] pixels, whatever the distribution.
    """

    sigma: float

    one_shape = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(
                f"sigma = {self.sigma}: expected a positive number, in [0, 1] pixels (0.25, not 64 of 255)"
            )

    @property
    def scale(self) -> float:
        """The standard deviation."""
        return self.sigma

    def input(self, image: torch.Tensor) -> torch.Tensor:
        """The image that is certified: any image will do."""
        return image

    def add(self, image: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Noisy copies, in the noise's own memory."""
        return drawn.add_(image)

    def failed(self, drawn: torch.Tensor) -> torch.Tensor | None:
        """No draw can fail."""
        return None


@dataclass(frozen=True)
class Gaussian(Additive):
    """Isotropic Gaussian noise, which certifies l2 balls (Cohen, Rosenfeld and Kolter 2019, theorem 1)."""

    name = "gaussian"
    norm = "l2"

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Noise of this shape, float32, drawn on the generator's device."""
        import torch

        noise = torch.empty(shape, device=generator.device, dtype=torch.float32)
        return noise.normal_(0.0, self.sigma, generator=generator)

    def radius(self, p_lower: float, p_other: float | None = None) -> float:
        """R = sigma/2 (Phi^-1(p_lower) - Phi^-1(p_other)), rounded down.

        It is sigma Phi^-1(p_lower) for p_other = 1 - p_lower.
        """
        from scipy.special import ndtri

        if not p_lower > (0.5 if p_other is None else p_other):  # nor with NaN
            return 0.0
        above = float(ndtri(p_lower))
        below = -above if p_other is None else float(ndtri(p_other))
        return max(0.0, self.sigma / 2 * (above - below - _OUTWARD * (abs(above) + abs(below))))

    def probability(self, radius: float) -> float:
        """Phi(radius / sigma): the probability that is needed for this radius."""
        from scipy.special import ndtr

        return float(ndtr(radius / self.sigma))


@dataclass(frozen=True)
class Uniform(Additive):
    """Independent uniform noise on [-lambda, lambda], which certifies l1 balls (Yang et al. 2020, theorem 2).

    lambda = sqrt(3) sigma, so that sigma is the standard deviation here too.
    """

    name = "uniform"
    norm = "l1"

    @property
    def half_width(self) -> float:
        """Lambda."""
        return math.sqrt(3.0) * self.sigma

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Noise of this shape, float32, drawn on the generator's device."""
        import torch

        noise = torch.empty(shape, device=generator.device, dtype=torch.float32)
        return noise.uniform_(-self.half_width, self.half_width, generator=generator)

    def radius(self, p_lower: float, p_other: float | None = None) -> float:
        """R = lambda (p_lower - p_other), rounded down: 2 lambda (p_lower - 1/2) for p_other = 1 - p_lower."""
        gap = 2 * (p_lower - 0.5) if p_other is None else p_lower - p_other
        return self.half_width * gap * (1.0 - _OUTWARD) if gap > 0 else 0.0

    def probability(self, radius: float) -> float:
        """1/2 + radius / (2 lambda): above 1 for a radius that this noise cannot certify."""
        return 0.5 + radius / (2 * self.half_width)


@dataclass(frozen=True)
class Laplace(Additive):
    """Independent Laplace noise of scale b, which certifies l1 balls (Lecuyer et al. 2019; Teng, Lee and Yuan 2020).

    b = sigma / sqrt(2), so that sigma is the standard deviation here too.
    """

    name = "laplace"
    norm = "l1"

    @property
    def b(self) -> float:
        """The scale parameter."""
        return self.sigma / math.sqrt(2.0)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Noise of this shape, float32, drawn on the generator's device: the difference of two exponentials."""
        import torch

        first, second = (
            torch.empty(shape, device=generator.device, dtype=torch.float32).exponential_(
                1.0 / self.b, generator=generator
            )
            for _ in range(2)
        )
        return first.sub_(second)

    def radius(self, p_lower: float, p_other: float | None = None) -> float:
        """R = max(b/2 log(p_lower / p_other), -b log(1 - p_lower + p_other)), rounded down.

        It is -b log(2 (1 - p_lower)) for p_other = 1 - p_lower.
        """
        other = 1.0 - p_lower if p_other is None else p_other
        if not p_lower > other:
            return 0.0
        other = max(other, math.ulp(0.0))  # a probability of 0 would certify everything
        ratio = (math.log(p_lower) - math.log(other)) / 2
        total = -math.log((1.0 - p_lower) + other)
        return self.b * (max(ratio, total) * (1.0 - _OUTWARD))

    def probability(self, radius: float) -> float:
        """1 - exp(-radius / b) / 2."""
        return 0.5 - math.expm1(-radius / self.b) / 2


NOISES.add("gaussian", Gaussian, "isotropic Gaussian, l2 (default)")
NOISES.add(
    "exact",
    "certify.smoothing.exact_gaussian:ExactGaussian",
    "Gaussian on the 8-bit grid in integers, l2: survives rounding",
)
NOISES.add("uniform", Uniform, "independent uniform, l1")
NOISES.add("laplace", Laplace, "independent Laplace, l1")


def make_noise(name: str, sigma: float, *, rounded: bool = False) -> Noise:
    """A smoothing distribution by name.

    Args:
        name: in ``NOISES``.
        sigma: standard deviation, in [0, 1] pixels.
        rounded: with ``exact`` only: round images to the 8-bit grid instead of refusing them.

    Raises:
        UserError: an unknown name, sigma out of range, or rounding for a noise that needs none.
    """
    build = NOISES.get(name)
    if rounded and "rounded" not in inspect.signature(build).parameters:
        raise UserError(f"noise {name!r} takes any image; rounding to 8 bits (--round) belongs to noise 'exact' only")
    try:
        noise: Noise = build(sigma, rounded=True) if rounded else build(sigma)
    except ValueError as error:
        raise UserError(str(error)) from None
    return noise
