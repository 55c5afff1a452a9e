"""A blind-spot network, which never sees the pixel that it estimates, and the NCIS-style purifier that iterates it.

The network is that of FBI-Net (Byun, Cha, Moon: FBI-Denoiser, CVPR 2021) with plain images as output. NCIS (Cha, Ko,
Yoo, Moon: Neural Contextual Iterative Smoothing, WACV 2024) trains a blind-spot network on natural images and applies
it several times. What its abstract leaves open is our reading: objectives ``context`` and ``restore`` of
:mod:`training.context`, the network's size, and how often it is applied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.models.defence import Defence, Member
from denoisers.classical import GaussianSmoothing, whole
from denoisers.defences import trained
from denoisers.randomness import Generators
from denoisers.weights import Trained

SMALLEST = 6
"""Pixels that an image must have each way, so that a tap that falls outside finds a pixel on the other side."""

_RING = ((1, 1, 1), (1, 0, 1), (1, 1, 1))
_CORNERS = ((1, 0, 1), (0, 0, 0), (1, 0, 1))
_CROSS = ((1, 0, 1), (0, 1, 0), (1, 0, 1))


class MaskedConv(nn.Module):
    """A dilated 3x3 convolution with some of its nine taps, whose taps never fall outside.

    A tap beyond the border is reflected at its own pixel, to the opposite side, each axis for itself. The masks are
    symmetric, so that is another tap of the same layer: a flat image stays flat, and the network is blind at every
    pixel. Padding with zeros would darken the border; reflecting the image at its border would put a copy of the hidden
    pixel within sight.

    Args:
        inputs: channels.
        outputs: channels.
        mask: 3x3, 1 for a tap; symmetric in both axes.
        step: rows and columns from the pixel to its taps.
        bias: whether there is one.
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
        """``(B, inputs, H, W)`` to ``(B, outputs, H, W)``."""
        return conv2d(_opposite(features, *self.step), self.weight * self.mask, self.bias, dilation=self.step)


def _opposite(features: Tensor, rows: int, columns: int) -> Tensor:
    """Wider by ``rows`` and ``columns`` at each border: what lies as far on the other side of the pixels there."""
    height, width = features.shape[-2:]
    top, bottom = features[:, :, rows : 2 * rows], features[:, :, height - 2 * rows : height - rows]
    features = torch.cat([top, features, bottom], 2)
    left, right = features[..., columns : 2 * columns], features[..., width - 2 * columns : width - columns]
    return torch.cat([left, features, right], 3)


def _prelu(channels: int) -> nn.PReLU:
    """Sized by its own channels: a size taken from a layer's input does not fit the first one of an RGB network."""
    return nn.PReLU(channels, init=0.0)


class Residual(nn.Module):
    """PReLU((a + conv(PReLU(conv(a)))) / 2), both convolutions 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(channels, channels, 1), _prelu(channels), nn.Conv2d(channels, channels, 1))
        self.outer = _prelu(channels)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to the same shape."""
        found: Tensor = self.outer((features + self.inner(features)) / 2)
        return found


class BlindSpot(nn.Module):
    """FBI-Net with images as output: each pixel out depends on its surroundings, never on the pixel itself.

    Layer 1 sees the 8 neighbours; layer 2 the 8 knight's moves and the centre; each further layer the 4 diagonals at
    distance 3 and the centre. Sums of one such step a layer never come back to the pixel. The surroundings are a square
    of side 2 (3 layers - 3) + 1.

    Args:
        layers: L, 2 or more; 17 gives a square of side 97, 8 one of 43.
        filters: channels inside.
        image_channels: of the images.

    Raises:
        ValueError: fewer layers or filters than there can be.
    """

    def __init__(self, layers: int = 17, filters: int = 64, image_channels: int = 3) -> None:
        super().__init__()
        if layers < 2 or filters < 1:
            raise ValueError(f"layers={layers} filters={filters}; expected 2 layers or more, and filters")
        self.first = MaskedConv(image_channels, filters, _RING, (1, 1))
        # the knight's moves: one row and two columns, two rows and one column
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
        nn.init.constant_(tail.bias, 0.5)  # middle grey, before anything is learnt

    def forward(
        self, noisy: Tensor, sigma: Tensor | float | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``(B, C, H, W)`` to the same shape, not clipped; deterministic, sigma is not used.

        Raises:
            UserError: images that are too small.
        """
        if min(noisy.shape[-2:]) < SMALLEST:
            raise UserError(
                f"blind-spot on images of {noisy.shape[-2]}x{noisy.shape[-1]}; expected at least {SMALLEST}x{SMALLEST}"
            )
        images = noisy.contiguous(memory_format=torch.channels_last)  # the layout these convolutions are fastest in
        spatial = self.bends[0](self.first(images))
        own = self.residuals[0](spatial)
        total = own
        for k in range(1, len(self.bends)):
            seen = self.flat(spatial) + self.tall(spatial) if k == 1 else self.far[k - 2](spatial)
            spatial = self.bends[k](seen)
            own = self.residuals[k](self.joins[k - 1]((spatial + own) / 2))
            total = total + own
        found: Tensor = self.head(total / len(self.bends))
        return found


class Iterated(nn.Module):
    """x <- BSN(x), or x <- BSN(GS(x)), several times; clipped once, at the end.

    After the first pass a pixel is no longer hidden: what its neighbours were made of comes back to it.

    Args:
        network: trained, an image to an image.
        iterations: passes.
        smoothing: GS before each pass, or None.
    """

    def __init__(self, network: Trained, iterations: int, smoothing: GaussianSmoothing | None = None) -> None:
        super().__init__()
        self.network, self.passes, self.smoothing = network, iterations, smoothing

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        """``(B, C, H, W)`` to the same shape, in [0, 1]; deterministic and differentiable."""
        for _ in range(self.passes):
            images = self.network(images if self.smoothing is None else self.smoothing.smooth(images))
        return images.clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Name, options and weights, for the record."""
        smoothing = None if self.smoothing is None else self.smoothing.describe()
        return {"name": "ncis", "iterations": self.passes, "smoothing": smoothing, "weights": self.network.describe()}


def ncis(classifier: Classifier, iterations: int = 1, weights: str | None = None) -> Defence:
    """NCIS-style purification: a blind-spot network, applied several times.

    The weights' card says how they are used: ``context`` as they are, ``restore`` after the smoothing they were trained
    with.

    Args:
        classifier: frozen.
        iterations: passes; the published number was not found, so it is to be chosen on validation images.
        weights: a file of ``certify train``, or a shipped name; None takes what is shipped for these images.

    Raises:
        UserError: no such weights, or no such number of passes.
    """
    whole("ncis", "iterations", iterations)
    network = trained("ncis", classifier.input.size, weights)
    smoothing = None
    if network.card.objective == "restore":
        smoothing = GaussianSmoothing(**network.card.training["settings"])
    return Defence("ncis", [Member(Iterated(network, iterations, smoothing), classifier)])
