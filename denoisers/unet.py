"""U-Nets conditioned on the noise level, so that one set of weights serves every level.

The plan is that of Ronneberger et al. 2015. The level modulates every block by a feature-wise scale and shift
(FiLM, Perez et al. 2018), and the output is mixed with the input by the signal-to-noise ratio ("preconditioning",
Karras et al. 2022). :class:`UNet` first folds 2x2 pixels into channels, for speed (Shi et al. 2016; as FFDNet does).
:class:`PooledUNet` spends most of its arithmetic on the encoder, which is a small but accurate image classifier (Jordan
2024, "94% on CIFAR-10 in 3.29 seconds"): what a denoiser is worth to a classifier depends on what it recognises.

The names of the submodules are the keys of published weights, and must stay.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import max_pool2d, pad, pixel_shuffle, pixel_unshuffle

from certify.errors import UserError

MEAN, SPREAD = 0.5, 0.25
"""Mean and standard deviation of the pixels of natural images in [0, 1]: the scale of the preconditioning."""

LEVEL_FEATURES = 64
_FOLD = 2
_Layer = TypeVar("_Layer", bound=nn.Module)


def zero_init(layer: _Layer) -> _Layer:
    """Set all parameters of a layer to zero, in place, and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class FiLM(nn.Linear):
    """Feature-wise scale and shift predicted from a condition (Perez et al. 2018); initialised to the identity."""

    def __init__(self, condition_features: int, channels: int) -> None:
        super().__init__(condition_features, 2 * channels)
        zero_init(self)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        """Modulate features ``(B, C, H, W)`` by a condition ``(B, condition_features)``."""
        scale, shift = super().forward(condition)[:, :, None, None].chunk(2, dim=1)
        return features * (1 + scale) + shift


class _TwoConvolutions(nn.Module):
    """The layers of both kinds of blocks: two 3x3 convolutions with batch norm, and FiLM by the embedded level."""

    def __init__(self, channels_in: int, channels_out: int, act: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.level = FiLM(LEVEL_FEATURES, channels_out)
        self.act = act


class ResidualBlock(_TwoConvolutions):
    """Two convolutions and a shortcut around them; initialised to the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, nn.ReLU())
        nn.init.zeros_(self.norm2.weight)

    def forward(self, features: Tensor, level: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` and the embedded level ``(B, 64)`` to ``(B, C, H, W)``."""
        inner = self.act(self.level(self.norm1(self.conv1(features)), level))
        out: Tensor = self.act(features + self.norm2(self.conv2(inner)))
        return out


class PooledStage(_TwoConvolutions):
    """Encoder stage of :class:`PooledUNet`: a convolution, 2x2 max pooling, a second convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, nn.GELU())

    def forward(self, features: Tensor, level: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` and the embedded level ``(B, 64)`` to ``(B, C', H/2, W/2)``."""
        inner = self.level(self.norm1(max_pool2d(self.conv1(features), 2)), level)
        out: Tensor = self.act(self.norm2(self.conv2(self.act(inner))))
        return out


class LevelUNet(nn.Module):
    """Base of the U-Nets: preconditioning around an encoder and a decoder, which a subclass defines.

    Untrained, it is the best linear estimate from each pixel alone: the input shrunk towards mid-grey according to its
    signal-to-noise ratio.

    Attributes:
        step: sides are padded to multiples of it.
        bottleneck_channels: channels of the coarsest features.
    """

    step: int
    bottleneck_channels: int

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(1, LEVEL_FEATURES), nn.ReLU(), nn.Linear(LEVEL_FEATURES, LEVEL_FEATURES), nn.ReLU()
        )

    def encode(self, images: Tensor, level: Tensor) -> list[Tensor]:
        """Compute the features of all scales, coarsest last, from scaled images and the embedded level ``(B, 64)``."""
        raise NotImplementedError

    def decode(self, scales: list[Tensor], level: Tensor) -> Tensor:
        """Compute the correction ``(B, C, H, W)`` of the images from the encoder's features."""
        raise NotImplementedError

    def denoise_with_features(self, noisy: Tensor, sigma: float | Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the denoised images and the coarsest features."""
        images, log_level, base, gain = precondition(noisy, sigma, self.step)
        level = self.embed(log_level)
        scales = self.encode(images, level)
        return add_correction(base, gain, self.decode(scales, level)), scales[-1]

    def forward(
        self, noisy: Tensor, sigma: float | Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Denoise ``(B, C, H, W)``; deterministic.

        Args:
            noisy: images plus noise.
            sigma: standard deviation of the noise in [0, 1] pixels: a number, or one per image ``(B,)``.
            generator: not used.

        Raises:
            UserError: no level.
        """
        return self.denoise_with_features(noisy, sigma)[0]


class UNet(LevelUNet):
    """Residual blocks at every scale, as many in the decoder as in the encoder.

    Args:
        channels: of the scales, from half the image size downwards; each further scale halves the size again.
        blocks: residual blocks per scale in the encoder, and again in the decoder.
        image_channels: of the images.
    """

    def __init__(self, channels: tuple[int, ...] = (48, 96, 192), blocks: int = 2, image_channels: int = 3) -> None:
        super().__init__()
        self.bottleneck_channels = channels[-1]
        self.step = _FOLD * 2 ** (len(channels) - 1)
        folded = image_channels * _FOLD**2
        self.head = nn.Conv2d(folded, channels[0], 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList(ResidualBlock(c) for _ in range(blocks)) for c in channels)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(channels))
        self.up = nn.ModuleList(nn.ModuleList(ResidualBlock(c) for _ in range(blocks)) for c in channels[:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(channels))
        self.tail = zero_init(nn.Conv2d(channels[0], folded, 3, padding=1))

    def encode(self, images: Tensor, level: Tensor) -> list[Tensor]:
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

    def decode(self, scales: list[Tensor], level: Tensor) -> Tensor:
        """See :class:`LevelUNet`."""
        *skips, features = scales
        for i in reversed(range(len(self.up))):
            features = self.grow[i](features) + skips[i]
            for block in self.up[i]:  # type: ignore[attr-defined]
                features = block(features, level)
        return pixel_shuffle(self.tail(features), _FOLD)


class PooledUNet(LevelUNet):
    """The encoder of a classifier and a light decoder, which class probabilities may modulate.

    Args:
        channels: after each halving of the size in the encoder.
        light: channels of the decoder, from full size downwards, one for each halving; the first is also that of the
            first convolution.
        classes: K > 0 adds a class head on the coarsest features (``read``), and FiLM of the decoder by its
            probabilities (``tell``).
        image_channels: of the images.

    Raises:
        ValueError: ``channels`` and ``light`` of different lengths.
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
            raise ValueError(f"channels={channels} light={light}; expected tuples of the same length")
        self.bottleneck_channels = channels[-1]
        self.step = 2 ** len(channels)
        self.act = nn.GELU()
        self.head = nn.Conv2d(image_channels, light[0], 3, padding=1)
        self.down = nn.ModuleList(PooledStage(a, b) for a, b in pairwise((light[0], *channels)))
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in zip((*light[1:], channels[-1]), light, strict=True)
        )
        self.skip = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip((light[0], *channels[:-1]), light, strict=True))
        self.up = nn.ModuleList(ResidualBlock(c) for c in light[1:])
        self.read = nn.Linear(channels[-1], classes) if classes else None
        self.tell = nn.ModuleList(FiLM(classes, c) for c in light) if classes else None
        self.tail = zero_init(nn.Conv2d(light[0], image_channels, 3, padding=1))

    def encode(self, images: Tensor, level: Tensor) -> list[Tensor]:
        """See :class:`LevelUNet`."""
        scales = [self.act(self.head(images))]
        for stage in self.down:
            scales.append(stage(scales[-1], level))
        return scales

    def decode(self, scales: list[Tensor], level: Tensor) -> Tensor:
        """See :class:`LevelUNet`."""
        *skips, features = scales
        probabilities = None if self.read is None else self.read(features.mean((2, 3))).softmax(1)
        for i in reversed(range(len(self.grow))):
            features = self.grow[i](features) + self.skip[i](skips[i])
            if probabilities is not None and self.tell is not None:
                features = self.tell[i](features, probabilities)
            features = self.up[i - 1](features, level) if i else self.act(features)
        correction: Tensor = self.tail(features)
        return correction


@fx.wrap
def precondition(noisy: Tensor, sigma: float | Tensor | None, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale the network's input, and compute how its output is mixed with the noisy images.

    Returns:
        The images, centred, scaled to unit variance and padded to multiples of ``step`` pixels; the logarithm of the
        level ``(B, 1)``; the linear estimate of the clean images; the factor on the network's output.

    Raises:
        UserError: no level.
    """
    if sigma is None:
        raise UserError("the U-Net needs the noise level: forward(noisy, sigma)")
    level = torch.as_tensor(sigma, dtype=noisy.dtype, device=noisy.device).clamp_min(1e-3)
    level = level.expand(noisy.shape[0])[:, None, None, None]
    variance = level**2 + SPREAD**2
    height, width = noisy.shape[-2:]
    centred = noisy - MEAN
    padded = pad(centred, (0, -width % step, 0, -height % step), mode="replicate")
    return (
        padded / variance.sqrt(),
        level[:, :, 0, 0].log(),
        MEAN + SPREAD**2 / variance * centred,
        level * SPREAD / variance.sqrt(),
    )


@fx.wrap
def add_correction(base: Tensor, gain: Tensor, correction: Tensor) -> Tensor:
    """Add the network's output, cropped to the image size, to the linear estimate."""
    height, width = base.shape[-2:]
    return base + gain * correction[..., :height, :width]
