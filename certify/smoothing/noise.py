"""Smoothing distributions: for each, the sampler, the norm and the radius side by side."""

from __future__ import annotations

import inspect
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from certify.errors import UserError, warn
from certify.registry import Registry
from certify.smoothing.numeric import as_float

if TYPE_CHECKING:
    import torch

    from certify.types import Noise

# Relative margin that covers the error of ndtri (2.5 ulp measured), of log1p, and of the products around them.
_OUTWARD = 1e-14
_LOST = 1e-12  # covers the error of ndtr and ndtri as an absolute error of a probability

_SIGMA = "a positive number, in [0, 1] pixels (0.25, not 64 of 255)"

_LARGE = 4.0  # sigma in [0, 1] pixels above which the unit is in doubt; Cohen et al. use at most 1

NOISES = Registry("noise", "certify.noises")


def drawn_scale(scale: float) -> float:
    """Return the scale for the radius: the smaller of ``scale`` and its float32 value, which the sampler uses."""
    (single,) = struct.unpack("<f", struct.pack("<f", scale))
    return min(scale, float(single))


def _probabilities(p_lower: float, p_other: float | None) -> tuple[float, float | None]:
    """Return both arguments of :meth:`certify.types.Radii.radius` as Python floats; refuse impossible ones."""
    lower, other = as_float(p_lower, "p_lower"), None if p_other is None else as_float(p_other, "p_other")
    if lower > 1.0 or (other is not None and other < 0.0):
        raise UserError(f"p_lower = {lower}, p_other = {other}: expected probabilities")
    return lower, other


def _probability_and_radius(p: float, radius: float) -> tuple[float, float]:
    """Return both arguments of :meth:`certify.types.WorstCase.worst_case` as Python floats; refuse impossible ones."""
    p, radius = as_float(p, "p"), as_float(radius, "radius")
    if not (0.0 <= p <= 1.0 and radius >= 0.0):
        raise UserError(f"p = {p}, radius = {radius}: expected a probability and a radius of at least 0")
    return p, radius


def _no_more_than(p: float, value: float, radius: float) -> float:
    """Round a probability within ``radius`` of an image down by more than its floating-point error."""
    return p if radius == 0.0 else min(p, max(0.0, value - _LOST))


@dataclass(frozen=True)
class Additive:
    """Base of the distributions that are drawn and added in float32.

    The radius follows from the scale that is really drawn (:func:`drawn_scale`): 0.12 is smaller in float32.

    Attributes:
        sigma: standard deviation of one pixel's noise, in [0, 1] pixels, whatever the distribution.
    """

    sigma: float

    one_shape = False
    sigmas = (1e-30, 1e30)  # the scales that follow from these are normal numbers in float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", as_float(self.sigma, "sigma", _SIGMA))
        if not self.sigmas[0] <= self.sigma <= self.sigmas[1]:  # NaN is refused too
            raise UserError(f"sigma = {self.sigma}: expected {_SIGMA}")

    @property
    def scale(self) -> float:
        """Standard deviation."""
        return self.sigma

    def input(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image that is certified: this one."""
        return image

    def add(self, image: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Return noisy copies, in the memory of the noise."""
        return drawn.add_(image)

    def failed(self, drawn: torch.Tensor) -> torch.Tensor | None:
        """Return None: no draw can fail."""
        return None


@dataclass(frozen=True)
class Gaussian(Additive):
    """Isotropic Gaussian noise N(0, sigma^2 I), which certifies l2 balls (Cohen, Rosenfeld and Kolter 2019, theorem 1).

    If under this noise a class has probability at least p > 1/2, the smoothed classifier returns it at every point
    whose l2 distance from the image is less than sigma Phi^-1(p).

    Args:
        sigma: standard deviation of one pixel's noise, in [0, 1] pixels, from 1e-30 to 1e30.

    Raises:
        UserError: sigma is not a number in this range.
    """

    name = "gaussian"
    norm = "l2"

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw noise of this shape, float32, on the generator's device; on a processor none exceeds 5.77 sigma."""
        import torch

        noise = torch.empty(shape, device=generator.device, dtype=torch.float32)
        return noise.normal_(0.0, self.sigma, generator=generator)

    def radius(self, p_lower: float, p_other: float | None = None) -> float:
        """Return R = sigma/2 (Phi^-1(p_lower) - Phi^-1(p_other)), rounded down.

        For p_other = 1 - p_lower this is sigma Phi^-1(p_lower).
        """
        from scipy.special import ndtri

        p_lower, p_other = _probabilities(p_lower, p_other)
        if not p_lower > (0.5 if p_other is None else p_other):  # nor with NaN
            return 0.0
        above = float(ndtri(p_lower))
        below = -above if p_other is None else float(ndtri(p_other))
        return max(0.0, self.drawn_sigma / 2 * (above - below - _OUTWARD * (abs(above) + abs(below))))

    def probability(self, radius: float) -> float:
        """Return Phi(radius / sigma), the probability that this radius needs."""
        from scipy.special import ndtr

        return float(ndtr(as_float(radius, "radius") / self.drawn_sigma))

    def worst_case(self, p: float, radius: float) -> float:
        """Return Phi(Phi^-1(p) - radius / sigma), rounded down."""
        from scipy.special import ndtr, ndtri

        p, radius = _probability_and_radius(p, radius)
        return _no_more_than(p, float(ndtr(ndtri(p) - radius / self.drawn_sigma)), radius)

    @property
    def drawn_sigma(self) -> float:
        """Sigma, as drawn."""
        return drawn_scale(self.sigma)


@dataclass(frozen=True)
class Uniform(Additive):
    """Independent uniform noise on [-lambda, lambda], which certifies l1 balls (Yang et al. 2020, theorem 2).

    lambda = sqrt(3) sigma, so that sigma is the standard deviation here too.
    """

    name = "uniform"
    norm = "l1"

    @property
    def half_width(self) -> float:
        """Lambda, as drawn."""
        return drawn_scale(math.sqrt(3.0) * self.sigma)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw noise of this shape, float32, on the generator's device."""
        import torch

        noise = torch.empty(shape, device=generator.device, dtype=torch.float32)
        return noise.uniform_(-self.half_width, self.half_width, generator=generator)

    def radius(self, p_lower: float, p_other: float | None = None) -> float:
        """Return R = lambda (p_lower - p_other), rounded down; 2 lambda (p_lower - 1/2) for p_other = 1 - p_lower."""
        p_lower, p_other = _probabilities(p_lower, p_other)
        gap = 2 * (p_lower - 0.5) if p_other is None else p_lower - p_other
        return self.half_width * gap * (1.0 - _OUTWARD) if gap > 0 else 0.0

    def probability(self, radius: float) -> float:
        """Return 1/2 + radius / (2 lambda), which exceeds 1 for a radius that this noise cannot certify."""
        return 0.5 + as_float(radius, "radius") / (2 * self.half_width)

    def worst_case(self, p: float, radius: float) -> float:
        """Return p - radius / (2 lambda), rounded down; at least 0."""
        p, radius = _probability_and_radius(p, radius)
        return _no_more_than(p, p - radius / (2 * self.half_width), radius)


@dataclass(frozen=True)
class Laplace(Additive):
    """Independent Laplace noise of scale b, which certifies l1 balls (Lecuyer et al. 2019; Teng, Lee and Yuan 2020).

    b = sigma / sqrt(2), so that sigma is the standard deviation here too.
    """

    name = "laplace"
    norm = "l1"

    @property
    def b(self) -> float:
        """Scale parameter, as drawn."""
        return drawn_scale(self.sigma / math.sqrt(2.0))

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw noise of this shape, float32, on the generator's device: the difference of two exponentials.

        Each is -log(1 - u) of a uniform number of 53 bits. With 24 bits none would exceed 16.7 b, which one pixel in 16
        million should. Torch's own exponentials have 24 bits on a processor, divide by a rounded rate, and with Intel's
        library depend on 32 bits of the generator only, so that blocks would coincide.
        """
        import torch

        first, second = (
            torch.empty(shape, device=generator.device, dtype=torch.float64)
            .uniform_(generator=generator)
            .neg_()
            .log1p_()
            .to(torch.float32)
            for _ in range(2)
        )
        return second.sub_(first).mul_(self.b)

    def radius(self, p_lower: float, p_other: float | None = None) -> float:
        """Return R = max(b/2 log(p_lower / p_other), -b log(1 - p_lower + p_other)), rounded down.

        For p_other = 1 - p_lower this is -b log(2 (1 - p_lower)).
        """
        p_lower, p_other = _probabilities(p_lower, p_other)
        other = 1.0 - p_lower if p_other is None else p_other
        gap = p_lower - other
        if not gap > 0:  # nor with NaN
            return 0.0
        other = max(other, math.ulp(0.0))  # a probability of 0 would certify everything
        # both logarithms follow from the gap where it is small: near 1/2 the plain formulas lose all digits
        ratio = math.log1p(gap / other) if gap < other else math.log(p_lower) - math.log(other)
        total = -math.log1p(-gap) if gap < 0.5 else -math.log((1.0 - p_lower) + other)
        return self.b * (max(ratio / 2, total) * (1.0 - _OUTWARD))

    def probability(self, radius: float) -> float:
        """Return 1 - exp(-radius / b) / 2."""
        return 0.5 - math.expm1(-as_float(radius, "radius") / self.b) / 2

    def worst_case(self, p: float, radius: float) -> float:
        """Return max(1 - exp(radius / b) (1 - p), exp(-radius / b) p), rounded down.

        Both follow from the ratio of the shifted densities, which lies between exp(-radius / b) and exp(radius / b).
        """
        p, radius = _probability_and_radius(p, radius)
        ratio = math.exp(-radius / self.b)
        large = 1.0 - (1.0 - p) / ratio if ratio > 0.0 else 0.0
        return _no_more_than(p, max(large, ratio * p), radius)


NOISES.add("gaussian", Gaussian, "isotropic Gaussian, l2 (default)")
NOISES.add(
    "exact",
    "certify.smoothing.exact_gaussian:ExactGaussian",
    "Gaussian on the 8-bit grid in integers, l2: survives rounding",
)
NOISES.add("uniform", Uniform, "independent uniform, l1")
NOISES.add("laplace", Laplace, "independent Laplace, l1")


def warn_of_units(sigma: float) -> None:
    """Warn of a noise level that is probably meant in pixels of 255."""
    if sigma > _LARGE:
        warn(
            f"sigma = {sigma:g} is very large for images in [0, 1]; did you mean "
            f"--sigma {sigma / 255:.3g} ({sigma:g}/255)?"
        )


def make_noise(name: str, sigma: float, *, rounded: bool = False) -> Noise:
    """Return a smoothing distribution by name.

    Args:
        name: ``"gaussian"`` or ``"exact"`` (l2), ``"uniform"`` or ``"laplace"`` (l1), or another name of ``certify list
            noises``.
        sigma: standard deviation of one pixel's noise, in [0, 1] pixels, positive.
        rounded: round images to the 8-bit grid instead of rejecting others; for ``"exact"`` only.

    Returns:
        The distribution, whose ``radius(p_lower)`` is in [0, 1] pixels and its ``norm``, and never rounded up.

    Raises:
        UserError: an unknown name, sigma out of range, or ``rounded`` for another noise.
    """
    build = NOISES.get(name)
    if rounded and "rounded" not in inspect.signature(build).parameters:
        raise UserError(f"noise {name!r} takes any image; rounding to 8 bits (--round) belongs to noise 'exact' only")
    try:
        noise: Noise = build(sigma, rounded=True) if rounded else build(sigma)
    except ValueError as error:
        raise UserError(str(error)) from None
    return noise
