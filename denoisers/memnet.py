"""MemNet as in denoised smoothing (Tai et al. 2017; Salman et al. 2020): the network predicts the correction.

Submodules are named as in the published checkpoints.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


def _layer(inputs: int, outputs: int, size: int = 3) -> nn.Sequential:
    """Build batch norm, ReLU and a convolution without bias, in this order."""
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(inputs), relu=nn.ReLU(), conv=convolution))


class MemoryBlock(nn.Module):
    """A sequence of residual blocks, and a gate that mixes their outputs with those of all earlier memory blocks.

    Args:
        channels: width.
        residuals: number of residual blocks, of two layers each.
        earlier: number of earlier outputs the gate gets, the first features included.
    """

    def __init__(self, channels: int, residuals: int, earlier: int) -> None:
        super().__init__()
        self.recursive_unit = nn.ModuleList(
            nn.Sequential(OrderedDict(relu_conv1=_layer(channels, channels), relu_conv2=_layer(channels, channels)))
            for _ in range(residuals)
        )
        self.gate_unit = _layer((residuals + earlier) * channels, channels, size=1)

    def forward(self, features: Tensor, memory: list[Tensor]) -> Tensor:
        """Map the last block's output ``(B, C, H, W)``, given all outputs so far, to this block's output."""
        own = []
        for block in self.recursive_unit:
            features = features + block(features)
            own.append(features)
        mixed: Tensor = self.gate_unit(torch.cat(own + memory, dim=1))
        return mixed


class MemNet(nn.Module):
    """Features, memory blocks that each see all earlier ones, and a correction that is added to the input.

    Untrained it is not the identity: the last convolution has torch's default initialisation.

    Args:
        channels: width; the published network has 64 (1,436,678 parameters for RGB).
        blocks: number of memory blocks.
        residuals: residual blocks per memory block.
        image_channels: of the images.
    """

    def __init__(self, channels: int = 64, blocks: int = 3, residuals: int = 6, image_channels: int = 3) -> None:
        super().__init__()
        self.feature_extractor = _layer(image_channels, channels)
        self.dense_memory = nn.ModuleList(MemoryBlock(channels, residuals, 1 + i) for i in range(blocks))
        self.reconstructor = _layer(channels, image_channels)

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Denoise ``(B, C, H, W)``; deterministic, ``sigma`` is not used."""
        features = self.feature_extractor(noisy)
        memory = [features]
        for block in self.dense_memory:
            features = block(features, memory)
            memory.append(features)
        cleaned: Tensor = noisy + self.reconstructor(features)
        return cleaned
