"""Denoisers without weights: a Gaussian blur whose width follows the noise, and the 3x3 median."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, unfold


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
        radius = min(max(1, round(3 * width)), min(noisy.shape[-2:]) - 1)
        offsets = torch.arange(-radius, radius + 1, dtype=noisy.dtype, device=noisy.device)
        kernel = torch.exp(-0.5 * (offsets / width) ** 2)
        kernel = kernel / kernel.sum()
        channels = noisy.shape[1]
        padded = pad(noisy, (radius,) * 4, mode="reflect")
        rows = conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
        return conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)

    def describe(self) -> dict[str, Any]:
        """Name and options, for the record."""
        return {"name": "gaussian", "width": self.width if self.width is not None else "2 sigma"}


class Median(nn.Module):
    """The median of each pixel's 3x3 neighbourhood, channel by channel, edges reflected."""

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape; deterministic."""
        batch, channels, height, width = noisy.shape
        padded = pad(noisy, (1, 1, 1, 1), mode="reflect")
        patches = unfold(padded.reshape(batch * channels, 1, height + 2, width + 2), 3)
        return patches.median(dim=1).values.view(batch, channels, height, width)

    def describe(self) -> dict[str, Any]:
        """Name and options, for the record."""
        return {"name": "median", "size": 3}
