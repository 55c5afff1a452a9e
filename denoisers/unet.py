"""A small U-Net that is told the noise level, so that one set of weights serves them all.

The plan is Ronneberger et al. 2015; the images are folded two by two into channels first (Shi et al. 2016; FFDNet does
so for speed), the level enters every block as a scale and a shift (Perez et al. 2018), and the output is mixed with the
input by the level's signal-to-noise ratio (Karras et al. 2022, "preconditioning").
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from certify.errors import UserError

MEAN, SPREAD = 0.5, 0.25
"""Centre and standard deviation of natural images' pixels in [0, 1]: the scale of the preconditioning."""

_FOLD = 2
LEVEL_FEATURES = 64


class Modulation(nn.Linear):
    """A scale and a shift of every channel by what is known of the image (Perez et al. 2018); at first neither."""

    def __init__(self, known: int, channels: int) -> None:
        super().__init__(known, 2 * channels)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor, known: Tensor) -> Tensor:  # type: ignore[override]
        """``(B, C, H, W)`` and what is known ``(B, K)`` to ``(B, C, H, W)``."""
        scale, shift = super().forward(known)[:, :, None, None].chunk(2, dim=1)
        return features * (1 + scale) + shift


def level_embedding() -> nn.Sequential:
    """From a level's logarithm ``(B, 1)`` to features ``(B, 64)``."""
    return nn.Sequential(nn.Linear(1, LEVEL_FEATURES), nn.ReLU(), nn.Linear(LEVEL_FEATURES, LEVEL_FEATURES), nn.ReLU())


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut; the level scales and shifts what lies between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.level = Modulation(LEVEL_FEATURES, channels)
        self.act = nn.ReLU()
        nn.init.zeros_(self.norm2.weight)  # every block starts as the identity

    def forward(self, features: Tensor, level: Tensor) -> Tensor:
        """``(B, C, H, W)`` and the level's features ``(B, 64)`` to ``(B, C, H, W)``."""
        inner = self.act(self.level(self.norm1(self.conv1(features)), level))
        out: Tensor = self.act(features + self.norm2(self.conv2(inner)))
        return out


class LevelUNet(nn.Module):
    """The frame of the U-Nets: noisy images and their level to clean images.

    Untrained they are the linear estimate that treats every pixel alone: the input drawn towards mid-grey by its
    signal-to-noise ratio. A subclass has ``step``, what sides are padded to multiples of, and ``bottleneck_channels``,
    of its coarsest features; it looks, and draws.
    """

    step: int
    bottleneck_channels: int

    def __init__(self) -> None:
        super().__init__()
        self.embed = level_embedding()

    def look(self, images: Tensor, level: Tensor) -> list[Tensor]:
        """The features of every scale on the way down, the coarsest last, of images and their levels' features."""
        raise NotImplementedError

    def draw(self, scales: list[Tensor], level: Tensor) -> Tensor:
        """The change ``(B, C, H, W)`` that the way up makes of these features."""
        raise NotImplementedError

    def seen(self, noisy: Tensor, sigma: float | Tensor | None) -> tuple[Tensor, Tensor]:
        """Clean images, and the coarsest features: what the network makes of the picture as a whole."""
        images, level, kept, gain = precondition(noisy, sigma, self.step)
        known = self.embed(level)
        scales = self.look(images, known)
        return add_change(kept, gain, self.draw(scales, known)), scales[-1]

    def forward(
        self, noisy: Tensor, sigma: float | Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """``(B, C, H, W)`` to the same shape; deterministic.

        Args:
            noisy: images plus noise.
            sigma: the noise's standard deviation in [0, 1] pixels: a number, or one per image ``(B,)``.
            generator: not used.

        Raises:
            UserError: no level.
        """
        return self.seen(noisy, sigma)[0]


class UNet(LevelUNet):
    """Residual blocks at every scale, as many on the way up as on the way down.

    Args:
        channels: of the scales, from half the image's size downwards; each further one halves it again.
        blocks: residual blocks at each scale on the way down, and as many on the way up.
        image_channels: of the images.
    """

    def __init__(self, channels: tuple[int, ...] = (48, 96, 192), blocks: int = 2, image_channels: int = 3) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.bottleneck_channels = channels[-1]
        self.step = _FOLD * 2 ** (len(channels) - 1)
        folded = image_channels * _FOLD**2
        self.head = nn.Conv2d(folded, channels[0], 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList(Block(c) for _ in range(blocks)) for c in channels)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(channels))
        self.up = nn.ModuleList(nn.ModuleList(Block(c) for _ in range(blocks)) for c in channels[:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(channels))
        self.tail = nn.Conv2d(channels[0], folded, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def look(self, images: Tensor, level: Tensor) -> list[Tensor]:
        """See :class:`LevelUNet`."""
        features = self.head(pixel_unshuffle(images, _FOLD))
        scales = []
        for i, blocks in enumerate(self.down):
            if i:
                features = self.shrink[i - 1](features)
            for block in blocks:  # type: ignore[attr-defined]
                features = block(features, level)
            scales.append(features)
        return scales

    def draw(self, scales: list[Tensor], level: Tensor) -> Tensor:
        """See :class:`LevelUNet`."""
        *skips, features = scales
        for i in reversed(range(len(self.up))):
            features = self.grow[i](features) + skips[i]
            for block in self.up[i]:  # type: ignore[attr-defined]
                features = block(features, level)
        return pixel_shuffle(self.tail(features), _FOLD)


@fx.wrap
def precondition(noisy: Tensor, sigma: float | Tensor | None, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the network sees, and how its output is mixed with the input.

    Returns:
        The images centred, scaled to unit variance and padded to a multiple of ``step`` pixels; the level's logarithm
        ``(B, 1)``; the part of the input that is kept; the factor on the network's output.
    """
    if sigma is None:
        raise UserError("the U-Net needs the noise level: forward(noisy, sigma)")
    level = torch.as_tensor(sigma, dtype=noisy.dtype, device=noisy.device).clamp_min(1e-3)
    level = level.expand(noisy.shape[0])[:, None, None, None]
    total = level**2 + SPREAD**2
    height, width = noisy.shape[-2:]
    centred = noisy - MEAN
    padded = pad(centred, (0, -width % step, 0, -height % step), mode="replicate")
    return (
        padded / total.sqrt(),
        level[:, :, 0, 0].log(),
        MEAN + SPREAD**2 / total * centred,
        level * SPREAD / total.sqrt(),
    )


@fx.wrap
def add_change(kept: Tensor, gain: Tensor, change: Tensor) -> Tensor:
    """The kept part of the input plus the network's output, cut to the images' size."""
    height, width = kept.shape[-2:]
    return kept + gain * change[..., :height, :width]
