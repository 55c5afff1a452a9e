"""Classifiers of ten classes and denoisers that are not one fixed function of each image, for 1x8x8 images."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

PRIVATE = torch.Generator().manual_seed(0)
CALLS = itertools.count()


def coin_labels(images: Tensor) -> Tensor:
    """Class 0 or 1 for the whole batch, by one coin of the global generator."""
    return torch.full((len(images),), int(torch.rand(()) < 0.5))


def private_coin(images: Tensor) -> Tensor:
    """The same by a generator that nobody else sees."""
    return torch.full((len(images),), int(torch.rand((), generator=PRIVATE) < 0.5))


def in_turn(images: Tensor) -> Tensor:
    """Class 0 and 1 in turn, from call to call."""
    return torch.full((len(images),), next(CALLS) % 2)


def above_the_batch(images: Tensor) -> Tensor:
    """Labels alone: whether an image is brighter than its batch."""
    return (images.flatten(1).mean(1) > images.mean() + 1e-6).long()


def overwrites(images: Tensor) -> Tensor:
    """Scores, and black where the images were."""
    return images.flatten(1)[:, :10].clone() + 0 * images.zero_().flatten(1)[:, :10]


class SharedDropout(nn.Module):
    """A linear network with one dropout mask for each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10, bias=False)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, images: Tensor) -> Tensor:
        mask = (torch.rand(64) < 0.5).float() * 2
        scores: Tensor = self.layer((images - 0.5).flatten(1) * mask)
        return scores


class CoinDenoiser(nn.Module):
    """All zeros or all ones, by one coin for each call."""

    def forward(self, noisy: Tensor, sigma: float | None = None) -> Tensor:
        return torch.full_like(noisy, float(torch.rand(()) < 0.5))


class BatchStatistics(nn.Module):
    """Normalises by the mean and deviation of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, affine=False, track_running_stats=False)

    def forward(self, noisy: Tensor, sigma: float | None = None) -> Tensor:
        normal: Tensor = self.norm(noisy)
        return normal * 0.3 + 0.3


def batch_maximum(noisy: Tensor) -> Tensor:
    """Divides by the largest value of the whole batch."""
    return noisy / noisy.abs().max()


class Keeps(nn.Module):
    """Mixes in a running mean of everything it has seen."""

    mean = 0.0

    def forward(self, noisy: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * float(noisy.mean())
        return noisy - self.mean


CLASSIFIERS: dict[str, Callable[[], object]] = {
    "coin_labels": lambda: coin_labels,
    "private_coin": lambda: private_coin,
    "in_turn": lambda: in_turn,
    "above_the_batch": lambda: above_the_batch,
    "overwrites": lambda: overwrites,
    "SharedDropout": SharedDropout,
}
DENOISERS: dict[str, Callable[[], object]] = {
    "CoinDenoiser": CoinDenoiser,
    "BatchStatistics": BatchStatistics,
    "batch_maximum": lambda: batch_maximum,
    "Keeps": Keeps,
}
