"""What adversarial noise looks like: the mean, the asymmetry and the frequencies of x_adv - x, image by image.

Smoothing as a defence (GS and NCIS-style purifiers) rests on the observation that adversarial noise has nearly zero
mean and a symmetric distribution, so that a local average cancels much of it. This measures whether it has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify.errors import UserError


@dataclass(frozen=True)
class NoiseStatistics:
    """Statistics of B noises n = x_adv - x, each over all C * H * W values.

    Attributes:
        mean: ``(B,)``, in [0, 1] pixels.
        std: ``(B,)``, of the population.
        skewness: ``(B,)``, third central moment over std cubed: 0 for a symmetric distribution; NaN where std is 0.
        frequency: ``(F,)``, upper edge of each ring, in cycles a pixel; 0 is the mean, 0.5 the finest along an axis.
        power: ``(B, F)``, the part of |n|^2 that lies in each ring; sums to the squared l2 distance over the rings.
        waves: ``(F,)``, two-dimensional frequencies in each ring; ``power / waves`` is the usual radial spectrum.
    """

    mean: Tensor
    std: Tensor
    skewness: Tensor
    frequency: Tensor
    power: Tensor
    waves: Tensor


def noise_statistics(attacked: Tensor, clean: Tensor, rings: int = 16) -> NoiseStatistics:
    """Measure the noise that an attack added.

    Args:
        attacked: ``(B, C, H, W)``.
        clean: the same images before, ``(B, C, H, W)``.
        rings: of equal width between frequency 0 and the diagonal's 0.707; frequency 0 has one of its own.

    Raises:
        UserError: shapes that differ, no rings.
    """
    if attacked.shape != clean.shape or clean.ndim != 4 or rings < 1:
        raise UserError(
            f"attacked {tuple(attacked.shape)}, clean {tuple(clean.shape)}, {rings} rings; expected (B, C, H, W) "
            "twice, and 1 ring or more"
        )
    noise = (attacked.double() - clean.double()).cpu()
    values = noise.flatten(1)
    mean, std = values.mean(1), values.std(1, correction=0)
    skewness = (values - mean[:, None]).pow(3).mean(1) / std.pow(3)
    height, width = noise.shape[-2:]
    vertical, horizontal = torch.fft.fftfreq(height).double(), torch.fft.fftfreq(width).double()
    radius = torch.hypot(vertical[:, None], horizontal[None, :]).flatten()
    edges = torch.linspace(0, 0.5 * 2**0.5, rings + 1, dtype=torch.float64)
    ring = torch.bucketize(radius - 1e-9, edges)  # the lower edge belongs to the ring before, 0 to itself
    spectrum = torch.fft.fft2(noise).abs().pow(2).sum(1).flatten(1) / (height * width)  # Parseval: sums to |n|^2
    power = torch.zeros(len(noise), rings + 1, dtype=torch.float64).index_add_(1, ring, spectrum)
    return NoiseStatistics(mean, std, skewness, edges, power, torch.bincount(ring, minlength=rings + 1))
