"""DnCNN as in denoised smoothing (Zhang et al. 2017; Salman et al. 2020): the network predicts the noise."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


class DnCNN(nn.Module):
    """The input minus the output of 17 3x3 convolutions with batch norm; initialised to the identity.

    Args:
        channels: width; 64 (558,400 parameters for RGB) or 128 ("wide", 2,222,720).
        depth: number of convolutions.
        image_channels: of the images.
        momentum: of the batch norms; with 0.95, as published, running statistics follow almost only the last batch.
    """

    def __init__(self, channels: int = 64, depth: int = 17, image_channels: int = 3, momentum: float = 0.95) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(image_channels, channels, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels, eps=1e-4, momentum=momentum),
                nn.ReLU(),
            ]
        self.dncnn = nn.Sequential(*layers, nn.Conv2d(channels, image_channels, 3, padding=1, bias=False))
        for module in self.dncnn:
            if isinstance(module, nn.Conv2d):
                nn.init.orthogonal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        last = self.dncnn[-1]
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Denoise ``(B, C, H, W)``; deterministic, ``sigma`` is not used."""
        cleaned: Tensor = noisy - self.dncnn(noisy)
        return cleaned


wide = functools.partial(DnCNN, channels=128)
"""DnCNN with 128 channels (2,222,720 parameters for RGB)."""
