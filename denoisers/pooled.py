"""A U-Net whose way down is a good small image classifier: convolution, maximum over 2x2, batch norm, convolution.

A denoiser in front of a classifier is worth as much as it understands of a noisy picture, so most of its arithmetic
goes where classifiers learn fastest: the way down is the network of Jordan 2024 ("94% on CIFAR-10 in 3.29 seconds"),
told the noise level (Perez et al. 2018). The way up is light, and may be told what the picture is likely to show.
Input and output are scaled as in :mod:`denoisers.unet`.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from denoisers.unet import LEVEL_FEATURES, Block, LevelUNet, Modulation


class Stage(nn.Module):
    """Half the size: a convolution, the maximum over 2x2, the level's scale and shift, and a second convolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.level = Modulation(LEVEL_FEATURES, after)
        self.act = nn.GELU()

    def forward(self, features: Tensor, level: Tensor) -> Tensor:
        """``(B, C, H, W)`` and the level's features ``(B, 64)`` to ``(B, C', H/2, W/2)``."""
        inner = self.level(self.norm1(max_pool2d(self.conv1(features), 2)), level)
        out: Tensor = self.act(self.norm2(self.conv2(self.act(inner))))
        return out


class PooledUNet(LevelUNet):
    """A classifier's way down and a light way up.

    Args:
        channels: after each halving of the size on the way down.
        light: channels on the way up, from the full size downwards, one for each halving; the first also of the first
            convolution.
        classes: K above 0: class probabilities are read off the coarsest features, and scale and shift those on the way
            up, which then draws what was recognised.
        image_channels: of the images.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (64, 256, 256),
        light: tuple[int, ...] = (24, 48, 96),
        classes: int = 0,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(channels) != len(light):
            raise ValueError(f"{len(channels)} channels on the way down, {len(light)} on the way up: as many of both")
        self.bottleneck_channels = channels[-1]
        self.step = 2 ** len(channels)
        self.act = nn.GELU()
        self.head = nn.Conv2d(image_channels, light[0], 3, padding=1)
        self.down = nn.ModuleList(Stage(a, b) for a, b in pairwise((light[0], *channels)))
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in zip((*light[1:], channels[-1]), light, strict=True)
        )
        self.skip = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip((light[0], *channels[:-1]), light, strict=True))
        self.up = nn.ModuleList(Block(c) for c in light[1:])
        self.read = nn.Linear(channels[-1], classes) if classes else None
        self.tell = nn.ModuleList(Modulation(classes, c) for c in light) if classes else None
        self.tail = nn.Conv2d(light[0], image_channels, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def look(self, images: Tensor, level: Tensor) -> list[Tensor]:
        """See :class:`denoisers.unet.LevelUNet`."""
        scales = [self.act(self.head(images))]
        for stage in self.down:
            scales.append(stage(scales[-1], level))
        return scales

    def draw(self, scales: list[Tensor], level: Tensor) -> Tensor:
        """See :class:`denoisers.unet.LevelUNet`."""
        *skips, features = scales
        likely = None if self.read is None else self.read(features.mean((2, 3))).softmax(1)
        for i in reversed(range(len(self.grow))):
            features = self.grow[i](features) + self.skip[i](skips[i])
            if likely is not None and self.tell is not None:
                features = self.tell[i](features, likely)
            features = self.up[i - 1](features, level) if i else self.act(features)
        change: Tensor = self.tail(features)
        return change
