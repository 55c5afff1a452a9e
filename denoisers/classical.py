"""Denoisers and purifiers without weights: Gaussian smoothing, median, bit-depth reduction, total variation.

Images are padded by reflection. A window too large for that is refused, except for the blur whose width follows the
noise, which is truncated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, unfold

from certify.errors import UserError


class GaussianBlur(nn.Module):
    """Convolution with an isotropic Gaussian kernel.

    Args:
        width: standard deviation of the kernel in pixels; None: 2 sigma (half a pixel at sigma = 0.25), a rule of thumb
            that blurs more where there is more noise.
    """

    def __init__(self, width: float | None = None) -> None:
        super().__init__()
        self.width = width

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Blur ``(B, C, H, W)``; deterministic."""
        width = self.width if self.width is not None else 2.0 * (sigma or 0.0)
        if width <= 0:
            return noisy
        return _convolve(noisy, min(max(1, round(3 * width)), min(noisy.shape[-2:]) - 1), width)

    def describe(self) -> dict[str, Any]:
        """Return name and options, for the record."""
        return {"name": "gaussian", "width": self.width if self.width is not None else "2 sigma"}


class GaussianSmoothing(nn.Module):
    """GS: repeated convolution with a small Gaussian window (Cha, Ko, Yoo, Moon: NCIS, WACV 2024).

    ``iterations`` passes of ``std`` equal one of std * sqrt(iterations), up to the truncation of the window. The
    defaults are ours.

    Args:
        kernel: side of the window in pixels, odd.
        std: standard deviation of the Gaussian in pixels.
        iterations: passes.

    Raises:
        UserError: a value out of range.
    """

    def __init__(self, kernel: int = 5, std: float = 0.5, iterations: int = 2) -> None:
        super().__init__()
        check_positive_int("gs", "kernel", kernel, odd=True)
        check_positive_int("gs", "iterations", iterations)
        check_positive("gs", "std", std)
        self.kernel, self.std, self.iterations = kernel, std, iterations

    def smooth(self, images: Tensor) -> Tensor:
        """Smooth ``(B, C, H, W)`` without clipping; linear.

        Raises:
            UserError: images too small for the window.
        """
        _check_fits("gs", "kernel", self.kernel, images)
        for _ in range(self.iterations):
            images = _convolve(images, self.kernel // 2, self.std)
        return images

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Smooth ``(B, C, H, W)``, and clip to [0, 1] once at the end; deterministic."""
        return self.smooth(noisy).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Return name and options, for the record."""
        return {"name": "gs", "kernel": self.kernel, "std": self.std, "iterations": self.iterations}


class Median(nn.Module):
    """Median filter, per channel.

    Args:
        size: side of the window in pixels, odd.

    Raises:
        UserError: an even size, or one below 3.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        check_positive_int("median", "size", size, odd=True)
        self.size = size

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Filter ``(B, C, H, W)``; deterministic.

        Raises:
            UserError: images too small for the window.
        """
        _check_fits("median", "size", self.size, noisy)
        batch, channels, height, width = noisy.shape
        padded = pad(noisy, (self.size // 2,) * 4, mode="reflect")
        patches = unfold(padded.reshape(batch * channels, 1, *padded.shape[-2:]), self.size)
        return patches.median(dim=1).values.view(batch, channels, height, width)

    def describe(self) -> dict[str, Any]:
        """Return name and options, for the record."""
        return {"name": "median", "size": self.size}


class BitDepth(nn.Module):
    """Bit-depth reduction: round values to 2^bits levels from 0 to 1 (Xu, Evans, Qi, NDSS 2018).

    Args:
        bits: 1 to 8.

    Raises:
        UserError: another number of bits.
    """

    differentiable = False

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        check_positive_int("bits", "bits", bits)
        if bits > 8:
            raise UserError(f"bits:bits={bits}; expected a whole number from 1 to 8, the bits of an image's values")
        self.bits = bits

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Round ``(B, C, H, W)`` after clipping to [0, 1]; deterministic."""
        largest = (1 << self.bits) - 1
        return (noisy.clamp(0, 1) * largest).round() / largest

    def describe(self) -> dict[str, Any]:
        """Return name and options, for the record."""
        return {"name": "bits", "bits": self.bits}


class TotalVariation(nn.Module):
    """Total-variation denoising, per channel: the u that minimises TV(u) + ||u - x||^2 / (2 weight).

    Rudin, Osher, Fatemi (Physica D 1992), by Chambolle's projection (J. Math. Imaging Vis. 2004): with g the gradient
    of x - div p, p <- (p - g / 4) / (1 + |g| / (4 weight)), from p = 0. The number of steps is fixed, so that an
    image's result does not depend on its batch.

    Args:
        weight: larger values give flatter images.
        iterations: steps.

    Raises:
        UserError: a value out of range.
    """

    def __init__(self, weight: float = 0.1, iterations: int = 50) -> None:
        super().__init__()
        check_positive("tv", "weight", weight)
        check_positive_int("tv", "iterations", iterations)
        self.weight, self.iterations = weight, iterations

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Denoise ``(B, C, H, W)``, and clip to [0, 1]; deterministic."""
        dual = noisy.new_zeros((2, *noisy.shape))
        for _ in range(self.iterations):
            gradient = _gradient(noisy - _divergence(dual))
            length = torch.linalg.vector_norm(gradient, dim=0)  # has gradient 0, not NaN, where the image is flat
            dual = (dual - gradient / 4) / (1 + length / (4 * self.weight))
        return (noisy - _divergence(dual)).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Return name and options, for the record."""
        return {"name": "tv", "weight": self.weight, "iterations": self.iterations}


def _convolve(images: Tensor, radius: int, width: float) -> Tensor:
    """Convolve with a normalised Gaussian of standard deviation ``width`` on a window of side 2 radius + 1."""
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / width) ** 2)
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    padded = pad(images, (radius,) * 4, mode="reflect")
    rows = conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def _gradient(images: Tensor) -> Tensor:
    """Compute forward differences along both axes, ``(2, B, C, H, W)``, 0 at the far edge."""
    return torch.stack(
        [pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1)), pad(images[..., 1:] - images[..., :-1], (0, 1))]
    )


def _divergence(dual: Tensor) -> Tensor:
    """Compute the divergence of a field ``(2, B, C, H, W)`` that is 0 beyond the edges."""
    down, right = dual[0], dual[1]
    return down - pad(down[..., :-1, :], (0, 0, 1, 0)) + right - pad(right[..., :-1], (1, 0))


def check_positive_int(name: str, option: str, value: Any, *, odd: bool = False) -> None:
    """Refuse an option that is not a whole number from 1, or an odd one from 3."""
    if type(value) is not int or value < (3 if odd else 1) or (odd and value % 2 == 0):
        expected = "an odd number of pixels from 3, such as 5" if odd else "a whole number from 1"
        raise UserError(f"{name}:{option}={value}; expected {expected}")


def check_positive(name: str, option: str, value: Any) -> None:
    """Refuse an option that is not a finite number above 0."""
    if isinstance(value, bool | str) or not 0 < value < float("inf"):
        raise UserError(f"{name}:{option}={value}; expected a number above 0")


def _check_fits(name: str, option: str, side: int, images: Tensor) -> None:
    height, width = images.shape[-2:]
    if side // 2 >= min(height, width):
        raise UserError(
            f"{name}:{option}={side} on images of {height}x{width}: not enough pixels to reflect; expected at most "
            f"{option}={2 * min(height, width) - 1}"
        )
