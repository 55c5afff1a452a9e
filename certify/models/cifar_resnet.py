"""ResNets for CIFAR-10 (He, Zhang, Ren and Sun 2016, section 4.2), in the two forms that are in circulation.

Depth 6n + 2, three stages of n blocks at 16, 32, 64 channels. A shortcut that changes shape takes every other pixel and
pads channels with zeros (option A, as published), or is a 1x1 convolution with batch norm (option B: the models that
Cohen et al. 2019 and Salman et al. 2019, 2020 published). The forms differ in names and normalisation, too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from certify.errors import UserError
from certify.models.checkpoints import fit_weights, read_state_dict
from certify.models.classifier import ClassifierSpec, square_input
from certify.models.resolve import UNTRAINED

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
MEAN_B, STD_B = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, projects: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2
        self.downsample: nn.Module | None = None
        if projects and stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride > 1:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(out + x)


class CifarResNet(nn.Module):
    """3x32x32 to 10 logits; ``projects``: option B shortcuts, and ``fc`` for the last layer's name."""

    def __init__(self, depth: int, *, projects: bool = False) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks, projects)
        self.layer2 = _stage(16, 32, 2, blocks, projects)
        self.layer3 = _stage(32, 64, 2, blocks, projects)
        self.last = "fc" if projects else "linear"
        self.add_module(self.last, nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of normalised images ``(B, 3, 32, 32)``."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = getattr(self, self.last)(x.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, stride: int, blocks: int, projects: bool) -> nn.Sequential:
    first = Block(inputs, outputs, stride, projects=projects)
    return nn.Sequential(first, *(Block(outputs, outputs, 1, projects=projects) for _ in range(blocks - 1)))


def build(name: str, weights: str | Path | None) -> ClassifierSpec:
    """``cifar_resnet<depth>`` with a checkpoint's weights, in the form that the checkpoint has."""
    if weights is None:
        raise UserError(f"model {name!r} has no weights of its own; pass a checkpoint: --weights FILE")
    state = None if weights == UNTRAINED else read_state_dict(weights)
    projects = any(".downsample." in key for key in state or ())
    net = CifarResNet(int(name.removeprefix("cifar_resnet")), projects=projects)
    loaded = UNTRAINED if state is None else fit_weights(net, state, weights, name)
    mean, std = (MEAN_B, STD_B) if projects else (MEAN, STD)
    return ClassifierSpec(net, square_input((3, 32, 32), mean, std), CIFAR10_CLASSES, 10, loaded, closed=True)
