"""The example image of the page."""

from __future__ import annotations

import torch
from torch import Tensor


def digit() -> Tensor:
    """Return a handwritten digit that no digits classifier was trained on, ``(1, 8, 8)`` in [0, 1]."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images[-1]).float()[None] / 16


def landscape(size: tuple[int, int, int]) -> Tensor:
    """Draw a sun over hills: ``size`` (C, H, W), in [0, 1]. Colour if there are three channels, else grey."""
    channels, height, width = size
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")

    def colour(red: float, green: float, blue: float) -> Tensor:
        return torch.tensor([red, green, blue])[:, None, None]

    sky = colour(0.35, 0.6, 0.9) + (colour(0.95, 0.9, 0.8) - colour(0.35, 0.6, 0.9)) * y
    sun = (x - 0.72) ** 2 + (y - 0.25) ** 2 < 0.012
    far, near = y > 0.62 - 0.1 * torch.sin(7 * x), y > 0.75 + 0.08 * torch.sin(5 * x + 2)
    image = torch.where(sun, colour(1.0, 0.85, 0.3), sky)
    image = torch.where(far, colour(0.35, 0.55, 0.4), image)
    image = torch.where(near, colour(0.2, 0.4, 0.2) * (1.4 - 0.5 * y), image)
    return image if channels == 3 else image.mean(0, keepdim=True).expand(channels, -1, -1).contiguous()
