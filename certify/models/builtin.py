"""Build the classifiers whose architecture this package defines: the digits network and ResNets for CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from certify.errors import UserError
from certify.models.checkpoints import fit_weights, load_weights, read_state_dict
from certify.models.classifier import ClassifierSpec, square_input
from certify.models.resolve import BUILT_IN, UNTRAINED

SHIPPED = Path(__file__).parent / "data" / "digits.safetensors"
"""Weights of the digits classifier, trained without noise by ``python -m training.digits`` (see the file's card)."""

TRAIN_IMAGES = 1297
"""scikit-learn's first 1,297 digits train the classifier; the last 500, by other writers, are for certification."""


def build(name: str, weights: str | Path | None, num_classes: int | None) -> ClassifierSpec:
    """Build a classifier of this package with its shipped weights or with ``weights``.

    Raises:
        UserError: ``num_classes`` other than 10, or weights that are missing or do not fit.
    """
    if num_classes not in (None, 10):
        raise UserError(f"model {name!r} has 10 classes, not {num_classes}; drop --num-classes")
    spec: ClassifierSpec = BUILT_IN.get(name)(name, weights)
    return spec


def digits_net() -> nn.Sequential:
    """Return a perceptron from 1x8x8 images to 10 logits, with two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def build_digits(name: str, weights: str | Path | None) -> ClassifierSpec:
    """Build the classifier of 8x8 handwritten digits with its shipped weights or with ``weights``."""
    net = digits_net()
    loaded = load_weights(net, weights or SHIPPED, name)
    names = tuple((str(d),) for d in range(10))
    return ClassifierSpec(net, square_input((1, 8, 8)), names, 10, loaded, closed=True)


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
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride > 1:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for CIFAR-10 (He, Zhang, Ren and Sun 2016, section 4.2): 3x32x32 to 10 logits, in both published forms.

    Depth 6n + 2, three stages of n blocks at 16, 32, 64 channels. A shortcut that changes the shape takes every other
    pixel and pads channels with zeros (option A, as published), or is a 1x1 convolution with batch norm (option B: the
    models that Cohen et al. 2019 and Salman et al. 2019, 2020 published). Parameter names and normalisation differ too.

    Args:
        depth: 20, 32, 44, 56 or 110.
        projects: option B shortcuts, and ``fc`` as the last layer's name.
    """

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
        """Return logits ``(B, 10)`` of normalised images ``(B, 3, 32, 32)``."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = getattr(self, self.last)(x.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, outputs: int, stride: int, blocks: int, projects: bool) -> nn.Sequential:
    first = Block(inputs, outputs, stride, projects=projects)
    return nn.Sequential(first, *(Block(outputs, outputs, 1, projects=projects) for _ in range(blocks - 1)))


def build_cifar_resnet(name: str, weights: str | Path | None) -> ClassifierSpec:
    """Build ``cifar_resnet<depth>`` with a checkpoint's weights; the checkpoint decides between options A and B."""
    if weights is None:
        raise UserError(f"model {name!r} has no weights of its own; pass a checkpoint: --weights FILE")
    state = None if weights == UNTRAINED else read_state_dict(weights)
    projects = any(".downsample." in key for key in state or ())
    net = CifarResNet(int(name.removeprefix("cifar_resnet")), projects=projects)
    loaded = UNTRAINED if state is None else fit_weights(net, state, weights, name)
    mean, std = (MEAN_B, STD_B) if projects else (MEAN, STD)
    return ClassifierSpec(net, square_input((3, 32, 32), mean, std), CIFAR10_CLASSES, 10, loaded, closed=True)
