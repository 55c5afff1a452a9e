"""Score and energy networks: the gradient of the log-density of noisy images, for purification by score ascent.

Both learn h, the score times the noise level: s(x) = h(x) / sigma. The level only scales the output and is not an input
of the network, as in NCSNv2 (Song and Ermon 2020), so h is defined where the level is unknown. Called as a denoiser, a
network returns the posterior mean of its score, x + sigma^2 s(x) (Tweedie's formula). The architecture is ours: a light
encoder-decoder with group normalisation in place of NCSNv2's RefineNet.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle, silu

from denoisers.unet import zero_init

_FOLD = 2
_GROUPS = 8


class Block(nn.Module):
    """Two 3x3 convolutions, each after group norm and SiLU, and a shortcut; initialised to the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = math.gcd(_GROUPS, channels)
        self.norm1, self.norm2 = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        inner = self.conv1(silu(self.norm1(features)))
        out: Tensor = features + self.conv2(silu(self.norm2(inner)))
        return out


class Encoder(nn.Module):
    """Images to features at every scale.

    Images are mapped to [-1, 1], padded to multiples of the coarsest pixel, and folded 2x2 into channels.

    Args:
        channels: of the scales, from half the image size downwards; each further scale halves the size again.
        blocks: residual blocks per scale.
        image_channels: of the images.
    """

    def __init__(self, channels: tuple[int, ...], blocks: int, image_channels: int) -> None:
        super().__init__()
        self.step = _FOLD * 2 ** (len(channels) - 1)
        self.head = nn.Conv2d(image_channels * _FOLD**2, channels[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Sequential(*(Block(c) for _ in range(blocks))) for c in channels)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(channels))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map ``(B, C, H, W)`` in [0, 1], or noisy, to one tensor per scale, finest first."""
        height, width = images.shape[-2:]
        padded = pad(2 * images - 1, (0, -width % self.step, 0, -height % self.step), mode="replicate")
        features = [self.down[0](self.head(pixel_unshuffle(padded, _FOLD)))]
        for shrink, blocks in zip(self.shrink, self.down[1:], strict=True):
            features.append(blocks(shrink(features[-1])))
        return features


class _Tweedie(nn.Module):
    """Base of both networks: a denoiser by Tweedie's formula, given a score."""

    def score(self, images: Tensor) -> Tensor:
        """Compute h ``(B, C, H, W)``, the score times the noise level."""
        raise NotImplementedError

    def forward(
        self, noisy: Tensor, sigma: float | Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Compute the posterior mean of the clean images, x + sigma h(x); deterministic.

        Args:
            noisy: ``(B, C, H, W)``, images plus noise.
            sigma: standard deviation of the noise in [0, 1] pixels: a number, or one per image ``(B,)``; None: 0.
            generator: not used.
        """
        level = torch.as_tensor(0.0 if sigma is None else sigma, dtype=noisy.dtype, device=noisy.device)
        return noisy + level.expand(len(noisy))[:, None, None, None] * self.score(noisy)


class ScoreNet(_Tweedie):
    """Encoder and decoder with output h; 1.0 million parameters for RGB, initialised to h = 0.

    With the default channels the receptive field covers a 32x32 image.

    Args:
        channels: of the scales, see :class:`Encoder`.
        blocks: residual blocks per scale in the encoder, and again in the decoder.
        image_channels: of the images.
    """

    def __init__(self, channels: tuple[int, ...] = (64, 128), blocks: int = 2, image_channels: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder(channels, blocks, image_channels)
        self.up = nn.ModuleList(nn.Sequential(*(Block(c) for _ in range(blocks))) for c in channels[:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(channels))
        self.norm = nn.GroupNorm(math.gcd(_GROUPS, channels[0]), channels[0])
        self.tail = zero_init(nn.Conv2d(channels[0], image_channels * _FOLD**2, 3, padding=1))

    def score(self, images: Tensor) -> Tensor:
        """Compute h ``(B, C, H, W)``."""
        *skips, features = self.encoder(images)
        for i in reversed(range(len(skips))):
            features = self.up[i](self.grow[i](features) + skips[i])
        height, width = images.shape[-2:]
        return pixel_shuffle(self.tail(silu(self.norm(features))), _FOLD)[..., :height, :width]


class EnergyNet(_Tweedie):
    """An energy per image whose negative gradient is h; 1.0 million parameters for RGB, initialised to E = 0.

    The energy is a linear function of the encoder's features at all scales; its backward pass takes the place of a
    decoder. h is a true gradient, which that of :class:`ScoreNet` need not be. Training differentiates twice.

    Args:
        channels: of the scales, see :class:`Encoder`.
        blocks: residual blocks per scale.
        image_channels: of the images.
    """

    def __init__(self, channels: tuple[int, ...] = (64, 128), blocks: int = 2, image_channels: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder(channels, blocks, image_channels)
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(_GROUPS, c), c) for c in channels)
        self.read = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for c in channels)
        self.weigh = nn.ModuleList(zero_init(nn.Conv2d(c, 1, 1, bias=False)) for c in channels)

    def energy(self, images: Tensor) -> Tensor:
        """Compute E ``(B,)`` up to a constant; low for likely images."""
        parts = zip(self.encoder(images), self.norms, self.read, self.weigh, strict=True)
        return torch.stack([out(silu(conv(norm(f)))).sum((1, 2, 3)) for f, norm, conv, out in parts]).sum(0)

    def score(self, images: Tensor) -> Tensor:
        """Compute h = -dE/dx ``(B, C, H, W)``; differentiable where gradients are enabled and required."""
        required = images.requires_grad or any(p.requires_grad for p in self.parameters())
        differentiable = torch.is_grad_enabled() and required
        with torch.inference_mode(False), torch.enable_grad():
            inputs = images if differentiable and images.requires_grad else images.detach().clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.energy(inputs).sum(), inputs, create_graph=differentiable)
        return -gradient
