"""Denoisers and purifiers without weights: Gaussian smoothing, the median, bit-depth reduction, total variation.

Edges are reflected; a window that reaches beyond what an image has to reflect is refused, never shrunk in silence, but
for the blur whose width follows the noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, unfold

from certify.errors import UserError


class GaussianBlur(nn.Module):
    """Convolution with an isotropic Gaussian kernel, edges reflected.

    Args:
        width: standard deviation of the kernel in pixels; None takes 2 sigma (half a pixel at sigma = 0.25), a rule of
            thumb that blurs more where there is more noise.
    """

    def __init__(self, width: float | None = None) -> None:
        super().__init__()
        self.width = width

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape; deterministic."""
        width = self.width if self.width is not None else 2.0 * (sigma or 0.0)
        if width <= 0:
            return noisy
        return _convolved(noisy, min(max(1, round(3 * width)), min(noisy.shape[-2:]) - 1), width)

    def describe(self) -> dict[str, Any]:
        """Name and options, for the record."""
        return {"name": "gaussian", "width": self.width if self.width is not None else "2 sigma"}


class GaussianSmoothing(nn.Module):
    """GS: a small Gaussian window applied several times (Cha, Ko, Yoo, Moon: NCIS, WACV 2024).

    ``iterations`` passes of ``std`` are one of std * sqrt(iterations), up to what the window cuts off: a wide smoothing
    out of a small window. The defaults are ours.

    Args:
        kernel: side of the window in pixels, odd.
        std: standard deviation of the Gaussian in pixels.
        iterations: passes.

    Raises:
        UserError: values that make no sense.
    """

    def __init__(self, kernel: int = 5, std: float = 0.5, iterations: int = 2) -> None:
        super().__init__()
        whole("gs", "kernel", kernel, odd=True)
        whole("gs", "iterations", iterations)
        _positive("gs", "std", std)
        self.kernel, self.std, self.iterations = kernel, std, iterations

    def smooth(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape; linear, not clipped.

        Raises:
            UserError: images that are too small for the window.
        """
        _fits("gs", "kernel", self.kernel, images)
        for _ in range(self.iterations):
            images = _convolved(images, self.kernel // 2, self.std)
        return images

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape, clipped to [0, 1] once, at the end; deterministic."""
        return self.smooth(noisy).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Name and options, for the record."""
        return {"name": "gs", "kernel": self.kernel, "std": self.std, "iterations": self.iterations}


class Median(nn.Module):
    """The median of each pixel's neighbourhood, channel by channel, edges reflected.

    Args:
        size: side of the neighbourhood in pixels, odd.

    Raises:
        UserError: a size that makes no sense.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        whole("median", "size", size, odd=True)
        self.size = size

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape; deterministic.

        Raises:
            UserError: images that are too small for the neighbourhood.
        """
        _fits("median", "size", self.size, noisy)
        batch, channels, height, width = noisy.shape
        padded = pad(noisy, (self.size // 2,) * 4, mode="reflect")
        patches = unfold(padded.reshape(batch * channels, 1, *padded.shape[-2:]), self.size)
        return patches.median(dim=1).values.view(batch, channels, height, width)

    def describe(self) -> dict[str, Any]:
        """Name and options, for the record."""
        return {"name": "median", "size": self.size}


class BitDepth(nn.Module):
    """Bit-depth reduction: each value rounded to the nearest of 2^bits levels from 0 to 1 (Xu, Evans, Qi, NDSS 2018).

    Args:
        bits: a value keeps, 1 to 8.

    Raises:
        UserError: another number of bits.
    """

    differentiable = False

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        whole("bits", "bits", bits)
        if bits > 8:
            raise UserError(f"bits:bits={bits}; expected a whole number from 1 to 8, the bits of an image's values")
        self.bits = bits

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape, in [0, 1]; deterministic."""
        most = (1 << self.bits) - 1
        return (noisy.clamp(0, 1) * most).round() / most

    def describe(self) -> dict[str, Any]:
        """Name and options, for the record."""
        return {"name": "bits", "bits": self.bits}


class TotalVariation(nn.Module):
    r"""Total-variation denoising, channel by channel: the u that minimises TV(u) + ||u - x||^2 / (2 weight).

    Rudin, Osher, Fatemi (Physica D 1992), by Chambolle's projection (J. Math. Imaging Vis. 2004): with the gradient g
    of x - div p, p <- (p - g / 4) / (1 + |g| / (4 weight)), from p = 0. A fixed number of steps, so that an image's
    result does not depend on its batch.

    Args:
        weight: the larger, the flatter the result.
        iterations: steps.

    Raises:
        UserError: values that make no sense.
    """

    def __init__(self, weight: float = 0.1, iterations: int = 50) -> None:
        super().__init__()
        _positive("tv", "weight", weight)
        whole("tv", "iterations", iterations)
        self.weight, self.iterations = weight, iterations

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape, clipped to [0, 1]; deterministic."""
        dual = noisy.new_zeros((2, *noisy.shape))
        for _ in range(self.iterations):
            slope = _gradient(noisy - _divergence(dual))
            length = torch.linalg.vector_norm(slope, dim=0)  # its gradient is 0, not NaN, where the image is flat
            dual = (dual - slope / 4) / (1 + length / (4 * self.weight))
        return (noisy - _divergence(dual)).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Name and options, for the record."""
        return {"name": "tv", "weight": self.weight, "iterations": self.iterations}


def _convolved(images: Tensor, radius: int, width: float) -> Tensor:
    """One pass of the normalised Gaussian of standard deviation ``width`` on a window of side 2 radius + 1."""
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / width) ** 2)
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    padded = pad(images, (radius,) * 4, mode="reflect")
    rows = conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def _gradient(images: Tensor) -> Tensor:
    """Forward differences along rows and columns, ``(2, B, C, H, W)``, 0 at the far edge."""
    return torch.stack(
        [pad(images[..., 1:, :] - images[..., :-1, :], (0, 0, 0, 1)), pad(images[..., 1:] - images[..., :-1], (0, 1))]
    )


def _divergence(dual: Tensor) -> Tensor:
    """Of a field ``(2, B, C, H, W)`` whose part beyond the edges counts as 0."""
    down, right = dual[0], dual[1]
    return down - pad(down[..., :-1, :], (0, 0, 1, 0)) + right - pad(right[..., :-1], (1, 0))


def whole(name: str, option: str, value: Any, *, odd: bool = False) -> None:
    """Refuse an option that is no whole number from 1, or, where it is to be odd, from 3."""
    if type(value) is not int or value < (3 if odd else 1) or (odd and value % 2 == 0):
        expected = "an odd number of pixels from 3, such as 5" if odd else "a whole number from 1"
        raise UserError(f"{name}:{option}={value}; expected {expected}")


def _positive(name: str, option: str, value: Any) -> None:
    if isinstance(value, bool | str) or not 0 < value < float("inf"):
        raise UserError(f"{name}:{option}={value}; expected a number above 0")


def _fits(name: str, option: str, side: int, images: Tensor) -> None:
    height, width = images.shape[-2:]
    if side // 2 >= min(height, width):
        raise UserError(
            f"{name}:{option}={side} on images of {height}x{width}: not enough pixels to reflect; expected at most "
            f"{option}={2 * min(height, width) - 1}"
        )
