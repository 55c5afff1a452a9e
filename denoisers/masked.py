"""Purification by completing a randomly masked, noisy image (AToP-style): transforms, network and defence.

The random transforms RT1 to RT3 are those of Lin et al. 2024, "Adversarial Training on Purification" (ICLR): hide a
quarter of an 8x8 grid of blocks, with or without Gaussian noise before, and let a generative network complete the
image. Two choices are ours. The network is a light U-Net at the images' own resolution; the authors enlarge every image
to 256 pixels and use an inpainting GAN. And each image gets its own mask; the authors' code draws one per mini-batch,
so that an image's result depends on its batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.models.defence import Defence, Member
from certify.models.identity import describe_module
from denoisers.defences import trained
from denoisers.randomness import Generators, normal, permutations
from denoisers.unet import UNet

TRANSFORMS = ("rt1", "rt2", "rt3")
"""Hide blocks; add noise, then hide blocks; add noise, then hide each quarter of the blocks in turn."""

GRID = 8
"""Blocks along each side of an image."""

PARTS = 4
"""Number of disjoint masks that cover an image; one mask hides a quarter of the blocks."""

NOISE = 0.25
"""Standard deviation of the noise of RT2 and RT3, in [0, 1] pixels."""

GREY = 0.5
"""Value of hidden pixels: 0 on the [-1, 1] scale."""

_LEVEL = NOISE  # the level given to the U-Net, whatever the transform


def block_masks(images: Tensor, parts: int, generator: Generators) -> Tensor:
    """Draw disjoint masks of 16 random blocks each, independently for each image.

    Args:
        images: ``(B, C, H, W)``; sides are multiples of 8.
        parts: masks per image, 1 to 4; four cover it.
        generator: one for all images, or one per image.

    Returns:
        ``(B, parts, 1, H, W)``: 1 = hidden.

    Raises:
        UserError: sides that are not multiples of 8.
    """
    batch, _, height, width = images.shape
    _check_size(images)
    blocks = GRID**2
    order = permutations(blocks, images, generator).view(batch, PARTS, blocks // PARTS)[:, :parts]
    grid = images.new_zeros(batch, parts, blocks).scatter_(2, order, 1.0).view(batch, parts, 1, GRID, GRID)
    return grid.repeat_interleave(height // GRID, 3).repeat_interleave(width // GRID, 4)


def random_transform(images: Tensor, transform: str, generator: Generators) -> tuple[Tensor, Tensor]:
    """Apply the noise of a transform, and draw its masks.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        transform: one of ``TRANSFORMS``.
        generator: one for all images, or one per image.

    Returns:
        Images ``(B, C, H, W)`` in [0, 1], and masks ``(B, N, 1, H, W)``; N is 4 for ``rt3``, otherwise 1.
    """
    if transform != "rt1":
        images = (images + NOISE * normal(images, generator)).clamp(0, 1)
    return images, block_masks(images, PARTS if transform == "rt3" else 1, generator)


def complete(net: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """Complete images from their visible blocks.

    With one mask the result is the whole output, visible pixels included; with several, each pixel comes from the pass
    in which it was hidden: ``sum_k m_k g((1 - m_k) x, m_k)``. No pixel of the input is pasted in.

    Args:
        net: ``forward(images with grey hidden pixels, mask (B, 1, H, W))``.
        images: ``(B, C, H, W)``.
        masks: ``(B, N, 1, H, W)``, 1 = hidden; several are disjoint and cover the image.
    """
    visible = images.unsqueeze(1).masked_fill(masks.bool(), GREY)
    output: Tensor = net(visible.flatten(0, 1), masks.flatten(0, 1))
    if masks.shape[1] == 1:
        return output
    parts: Tensor = masks * output.unflatten(0, masks.shape[:2])
    return parts.sum(1)


class MaskedUNet(nn.Module):
    """U-Net with the mask as an additional channel, to complete masked images.

    Its skip connection from the input starts visible pixels half-way between input and grey. Our design: the authors
    name a masked autoencoder without details.

    Args:
        channels: see :class:`denoisers.unet.UNet`.
        blocks: see there.
        image_channels: of the images.
    """

    def __init__(self, channels: tuple[int, ...] = (48, 96, 160), blocks: int = 2, image_channels: int = 3) -> None:
        super().__init__()
        self.unet = UNet(channels, blocks, image_channels + 1)

    def forward(self, images: Tensor, mask: Tensor | None = None, *, generator: Generators = None) -> Tensor:
        """Complete ``(B, C, H, W)`` in [0, 1], 0.5 where hidden; not clipped, deterministic.

        Args:
            images: sides are multiples of 8.
            mask: ``(B, 1, H, W)``, 1 = hidden; None: nothing is hidden.
            generator: not used.

        Raises:
            UserError: another size, or a noise level in place of the mask.
        """
        _check_size(images)
        if mask is None:
            mask = torch.zeros_like(images[:, :1])
        elif not isinstance(mask, Tensor) or mask.shape != images[:, :1].shape:
            raise UserError(
                "masked-unet completes masked images and takes no noise level; expected a mask of one channel, such as "
                "the defence atop:weights=FILE draws"
            )
        output: Tensor = self.unet(torch.cat([images, mask], 1), _LEVEL)
        return output[:, :-1]


class RandomTransformPurifier(nn.Module):
    """A random transform and its completion.

    Args:
        net: see :func:`complete`.
        transform: one of ``TRANSFORMS``.

    Raises:
        UserError: an unknown transform.
    """

    random = True

    def __init__(self, net: nn.Module, transform: str = "rt2") -> None:
        super().__init__()
        check_transform(transform)
        self.net, self.transform = net, transform
        self.passes = PARTS if transform == "rt3" else 1

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        """Purify ``(B, C, H, W)`` in [0, 1]; ``sigma`` is not used."""
        return complete(self.net, *random_transform(images, self.transform, generator)).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Return transform and network, for the record."""
        noise = 0.0 if self.transform == "rt1" else NOISE
        about = {"name": "atop", "transform": self.transform, "noise": noise, "missing": 1 / PARTS}
        return {**about, "net": describe_module(self.net)}


def atop(
    classifier: Classifier,
    transform: str | None = None,
    draws: int = 1,
    combine: str = "logits",
    weights: str | None = None,
) -> Defence:
    """Build AToP-style purification before a frozen classifier.

    Args:
        classifier: frozen.
        transform: one of ``TRANSFORMS``; None: that of the weights' training.
        draws: random transforms per answer.
        combine: how their logits are combined, see :data:`certify.models.defence.COMBINE`.
        weights: of ``certify train --objective complete`` or ``atop``; None: the shipped ones.

    Raises:
        UserError: an unknown transform, or no such weights.
    """
    if transform is not None:  # before reading any weights
        check_transform(transform)
    net = trained("atop", classifier.input.size, weights)  # passes its second argument, here the mask, to the network
    settings = net.card.training.get("settings", {})
    purifier = RandomTransformPurifier(net, transform or settings.get("transform", "rt2"))
    about = {"trained_with": settings}
    return Defence("atop", [Member(purifier, classifier)], draws=draws, combine=combine, about=about)


def check_transform(transform: str) -> None:
    """Refuse an unknown transform.

    Raises:
        UserError: with the known ones.
    """
    if transform not in TRANSFORMS:
        raise UserError(f"transform={transform!r}; expected one of {', '.join(TRANSFORMS)}")


def _check_size(images: Tensor) -> None:
    height, width = images.shape[-2:]
    if height % GRID or width % GRID:
        raise UserError(
            f"images of {height}x{width} cannot be cut into {GRID}x{GRID} equal blocks; expected sides that are "
            f"multiples of {GRID}, such as {height + -height % GRID}x{width + -width % GRID}"
        )
