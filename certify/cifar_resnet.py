"""ResNets for CIFAR-10 as published (He, Zhang, Ren and Sun 2016, section 4.2), with option A shortcuts.

Depth 6n + 2, three stages of n blocks at 16, 32, 64 channels. A shortcut that changes shape takes every other pixel and
pads channels with zeros, so it has no parameters. Names of layers follow the checkpoints in circulation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from certify.classifiers import ClassifierSpec, square_input
from certify.errors import UserError
from certify.weights import load_weights

CIFAR10_CLASSES = (
    ("airplane", "plane"),
    ("automobile", "car"),
    ("bird",),
    ("cat",),
    ("deer",),
    ("dog",),
    ("frog",),
    ("horse",),
    ("ship",),
    ("truck",),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(out + x)


class CifarResNet(nn.Module):
    """3x32x32 to 10 logits."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks)
        self.layer2 = _stage(16, 32, 2, blocks)
        self.layer3 = _stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of normalised images ``(B, 3, 32, 32)``."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def build(name: str, weights: str | Path | None) -> ClassifierSpec:
    """``cifar_resnet<depth>`` with a checkpoint's weights."""
    net = CifarResNet(int(name.removeprefix("cifar_resnet")))
    if weights is None:
        raise UserError(f"model {name!r} has no weights of its own; pass a checkpoint: --weights FILE")
    loaded = load_weights(net, weights, name)
    return ClassifierSpec(net, square_input((3, 32, 32), MEAN, STD), CIFAR10_CLASSES, 10, loaded)
