"""A blind-spot network, which does not see the pixel it estimates, and the NCIS-style purifier that iterates it.

The network is FBI-Net (Byun, Cha, Moon: FBI-Denoiser, CVPR 2021) with images as output. NCIS (Cha, Ko, Yoo, Moon:
Neural Contextual Iterative Smoothing, WACV 2024) trains a blind-spot network on natural images and applies it several
times. Its abstract leaves open the objective (``context`` and ``restore`` of :mod:`training.purifiers` are our two
readings), the size of the network and the number of passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.models.defence import Defence, Member
from denoisers.classical import GaussianSmoothing, check_positive_int
from denoisers.defences import trained
from denoisers.randomness import Generators
from denoisers.weights import Trained

SMALLEST = 6
"""Smallest side of an image in pixels, so that every tap outside has a counterpart inside."""

_RING = ((1, 1, 1), (1, 0, 1), (1, 1, 1))
_CORNERS = ((1, 0, 1), (0, 0, 0), (1, 0, 1))
_CROSS = ((1, 0, 1), (0, 1, 0), (1, 0, 1))


class MaskedConv(nn.Module):
    """Dilated 3x3 convolution with a mask on its nine taps, which never reach outside the image.

    A tap beyond the border is reflected at the output pixel to the opposite side, separately for each axis. The masks
    are symmetric, so this is another tap of the same layer: flat images stay flat, and the network is blind at every
    pixel. Zero padding would darken the border; reflection at the border would reveal a copy of the hidden pixel.

    Args:
        inputs: input channels.
        outputs: output channels.
        mask: 3x3, 1 for a tap; symmetric in both axes.
        step: dilation in rows and columns.
        bias: add a bias.
    """

    mask: Tensor

    def __init__(
        self, inputs: int, outputs: int, mask: tuple[tuple[int, ...], ...], step: tuple[int, int], bias: bool = True
    ) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("mask", torch.tensor(mask, dtype=torch.float32), persistent=False)
        taps = int(self.mask.sum())
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3) * (2 / (taps * inputs)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, inputs, H, W)`` to ``(B, outputs, H, W)``."""
        return conv2d(_pad_opposite(features, *self.step), self.weight * self.mask, self.bias, dilation=self.step)


def _pad_opposite(features: Tensor, rows: int, columns: int) -> Tensor:
    """Pad such that a tap beyond the border gets the pixel of the opposite tap."""
    height, width = features.shape[-2:]
    top, bottom = features[:, :, rows : 2 * rows], features[:, :, height - 2 * rows : height - rows]
    features = torch.cat([top, features, bottom], 2)
    left, right = features[..., columns : 2 * columns], features[..., width - 2 * columns : width - columns]
    return torch.cat([left, features, right], 3)


def _prelu(channels: int) -> nn.PReLU:
    """Build a PReLU per channel, initialised to a ReLU."""
    return nn.PReLU(channels, init=0.0)


class Residual(nn.Module):
    """PReLU((a + conv(PReLU(conv(a)))) / 2) with 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(channels, channels, 1), _prelu(channels), nn.Conv2d(channels, channels, 1))
        self.outer = _prelu(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, channels, H, W)`` to the same shape."""
        out: Tensor = self.outer((features + self.inner(features)) / 2)
        return out


class BlindSpot(nn.Module):
    """FBI-Net with images as output: an output pixel depends on its surroundings, not on its input pixel.

    Layer 1 sees the 8 neighbours; layer 2 the 8 knight's moves and the centre; each further layer the 4 diagonals at
    distance 3 and the centre. No sum of one such step per layer is zero. The receptive field is a square of side
    2 (3 layers - 3) + 1.

    Args:
        layers: 2 or more; 17 gives a receptive field of side 97, 8 one of 43.
        filters: hidden channels.
        image_channels: of the images.

    Raises:
        ValueError: fewer than 2 layers, or no filters.
    """

    def __init__(self, layers: int = 17, filters: int = 64, image_channels: int = 3) -> None:
        super().__init__()
        if layers < 2 or filters < 1:
            raise ValueError(f"layers={layers} filters={filters}; expected 2 layers or more, and filters")
        self.first = MaskedConv(image_channels, filters, _RING, (1, 1))
        # the knight's moves: one row and two columns, or two rows and one column
        self.flat = MaskedConv(filters, filters, _CROSS, (1, 2))
        self.tall = MaskedConv(filters, filters, _CORNERS, (2, 1), bias=False)
        self.far = nn.ModuleList([MaskedConv(filters, filters, _CROSS, (3, 3)) for _ in range(layers - 2)])
        self.bends = nn.ModuleList([_prelu(filters) for _ in range(layers)])
        self.joins = nn.ModuleList([_prelu(filters) for _ in range(layers - 1)])
        self.residuals = nn.ModuleList([Residual(filters) for _ in range(layers)])
        self.head = nn.Sequential(_prelu(filters), Residual(filters), nn.Conv2d(filters, image_channels, 1))
        tail = self.head[-1]
        assert isinstance(tail, nn.Conv2d)
        assert tail.bias is not None
        nn.init.constant_(tail.bias, 0.5)  # mid-grey

    def forward(
        self, noisy: Tensor, sigma: Tensor | float | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Estimate ``(B, C, H, W)``, not clipped; deterministic, ``sigma`` is not used.

        Raises:
            UserError: images below 6x6.
        """
        if min(noisy.shape[-2:]) < SMALLEST:
            raise UserError(
                f"blind-spot on images of {noisy.shape[-2]}x{noisy.shape[-1]}; expected at least {SMALLEST}x{SMALLEST}"
            )
        images = noisy.contiguous(memory_format=torch.channels_last)  # the fastest layout for these convolutions
        spatial = self.bends[0](self.first(images))
        own = self.residuals[0](spatial)
        total = own
        for k in range(1, len(self.bends)):
            context = self.flat(spatial) + self.tall(spatial) if k == 1 else self.far[k - 2](spatial)
            spatial = self.bends[k](context)
            own = self.residuals[k](self.joins[k - 1]((spatial + own) / 2))
            total = total + own
        estimate: Tensor = self.head(total / len(self.bends))
        return estimate


class Iterated(nn.Module):
    """x <- BSN(x), or x <- BSN(GS(x)), several times; clipped once at the end.

    Only the first pass is blind to a pixel: its neighbours' estimates depend on it.

    Args:
        network: trained blind-spot network BSN.
        iterations: number of passes.
        smoothing: GS, applied before each pass, or None.
    """

    def __init__(self, network: Trained, iterations: int, smoothing: GaussianSmoothing | None = None) -> None:
        super().__init__()
        self.network, self.passes, self.smoothing = network, iterations, smoothing

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        """Purify ``(B, C, H, W)``; the result is in [0, 1], deterministic and differentiable."""
        for _ in range(self.passes):
            images = self.network(images if self.smoothing is None else self.smoothing.smooth(images))
        return images.clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Return name, options and weights, for the record."""
        smoothing = None if self.smoothing is None else self.smoothing.describe()
        return {"name": "ncis", "iterations": self.passes, "smoothing": smoothing, "weights": self.network.describe()}


def ncis(classifier: Classifier, iterations: int = 1, weights: str | None = None) -> Defence:
    """Build NCIS-style purification: a blind-spot network, applied several times.

    Weights trained for ``restore`` are applied after the smoothing of their training, those for ``context`` without.

    Args:
        classifier: frozen.
        iterations: number of passes; the published one was not found, so choose it on validation images.
        weights: a file written by ``certify train``, or a shipped name; None: those shipped for these images.

    Raises:
        UserError: no such weights, or fewer than one pass.
    """
    check_positive_int("ncis", "iterations", iterations)
    network = trained("ncis", classifier.input.size, weights)
    smoothing = None
    if network.card.objective == "restore":
        smoothing = GaussianSmoothing(**network.card.training["settings"])
    return Defence("ncis", [Member(Iterated(network, iterations, smoothing), classifier)])
