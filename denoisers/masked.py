"""Purification by completing a randomly masked, noisy image (AToP-style): random transforms, the network, the defence.

The random transforms RT1 to RT3 are those of Lin et al. 2024, "Adversarial Training on Purification" (ICLR): hide a
quarter of an 8 x 8 grid of blocks, after adding Gaussian noise or not, and let a generative network complete the image.
Two things are our design. The network is a light U-Net at the images' own resolution, where the authors enlarge every
image to 256 pixels and use an inpainting GAN. And each image draws a mask of its own, where the authors' code draws one
for a mini-batch: what an image gets must not depend on the batch it is in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.models.defence import Defence, Member
from certify.models.pipeline import in_its_words
from denoisers.defences import trained
from denoisers.randomness import Generators, normal, permutations
from denoisers.unet import UNet

TRANSFORMS = ("rt1", "rt2", "rt3")
"""Hide blocks; noise, then hide blocks; noise, then hide each quarter of the blocks in turn."""

GRID = 8
"""Blocks along each side of the image."""

PARTS = 4
"""One mask hides a quarter of the blocks (missing rate 0.25), so RT3's disjoint masks are four."""

NOISE = 0.25
"""Standard deviation of RT2's and RT3's noise, in [0, 1] pixels."""

GREY = 0.5
"""What stands in hidden places: 0 in the [-1, 1] scale."""

_LEVEL = NOISE  # the U-Net's blocks and its shortcut are told one level, whatever the transform


def block_masks(images: Tensor, parts: int, generator: Generators) -> Tensor:
    """Disjoint masks of 16 random blocks each, drawn for each image.

    Args:
        images: ``(B, C, H, W)``; the sides are multiples of 8.
        parts: masks an image, 1 to 4; four cover it.
        generator: one for all images, or one for each.

    Returns:
        ``(B, parts, 1, H, W)``: 1 = hidden.

    Raises:
        UserError: sides that cannot be cut into 8 equal blocks.
    """
    batch, _, height, width = images.shape
    _check_size(images)
    blocks = GRID**2
    order = permutations(blocks, images, generator).view(batch, PARTS, blocks // PARTS)[:, :parts]
    grid = images.new_zeros(batch, parts, blocks).scatter_(2, order, 1.0).view(batch, parts, 1, GRID, GRID)
    return grid.repeat_interleave(height // GRID, 3).repeat_interleave(width // GRID, 4)


def random_transform(images: Tensor, transform: str, generator: Generators) -> tuple[Tensor, Tensor]:
    """The images, noisy or not, and what is to be hidden of them; see ``TRANSFORMS``.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        transform: one of ``TRANSFORMS``.
        generator: one for all images, or one for each.

    Returns:
        Images ``(B, C, H, W)`` in [0, 1], and masks ``(B, N, 1, H, W)``; N is 4 for ``rt3`` and 1 otherwise.
    """
    if transform != "rt1":
        images = (images + NOISE * normal(images, generator)).clamp(0, 1)
    return images, block_masks(images, PARTS if transform == "rt3" else 1, generator)


def complete(net: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """What ``net`` makes of the images without their hidden blocks.

    With one mask an image that is its whole output, visible places too; with several, each pixel comes from the pass
    in which it was hidden: ``sum_k m_k g((1 - m_k) x, m_k)``. Either way nothing of the input is pasted in.

    Args:
        net: ``forward(images with grey in hidden places, mask (B, 1, H, W))``.
        images: ``(B, C, H, W)``.
        masks: ``(B, N, 1, H, W)``, 1 = hidden; several are disjoint and cover the image.
    """
    shown = images.unsqueeze(1).masked_fill(masks.bool(), GREY)
    made: Tensor = net(shown.flatten(0, 1), masks.flatten(0, 1))
    if masks.shape[1] == 1:
        return made
    parts: Tensor = masks * made.unflatten(0, masks.shape[:2])
    return parts.sum(1)


class MaskedUNet(nn.Module):
    """Images with hidden places, and the mask that says where, to whole images.

    A U-Net with one more channel, the mask; its shortcut starts visible places half-way between input and grey. Our
    design: the authors name a masked autoencoder without its details.

    Args:
        channels: of the scales, from half the image's size downwards; each further one halves it again.
        blocks: residual blocks at each scale on the way down, and as many on the way up.
        image_channels: of the images.
    """

    def __init__(self, channels: tuple[int, ...] = (48, 96, 160), blocks: int = 2, image_channels: int = 3) -> None:
        super().__init__()
        self.unet = UNet(channels, blocks, image_channels + 1)

    def forward(self, images: Tensor, mask: Tensor | None = None, *, generator: Generators = None) -> Tensor:
        """``(B, C, H, W)`` in [0, 1], 0.5 where hidden, to the same shape, not clipped; deterministic.

        Args:
            images: sides are multiples of 8.
            mask: ``(B, 1, H, W)``, 1 = hidden; None where nothing is.
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
        made: Tensor = self.unet(torch.cat([images, mask], 1), _LEVEL)
        return made[:, :-1]


class RandomTransformPurifier(nn.Module):
    """A random transform, then its completion.

    Args:
        net: as for :func:`complete`.
        transform: one of ``TRANSFORMS``.

    Raises:
        UserError: an unknown transform.
    """

    random = True

    def __init__(self, net: nn.Module, transform: str = "rt2") -> None:
        super().__init__()
        self.net, self.transform = net, checked(transform)
        self.passes = PARTS if transform == "rt3" else 1

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] to the same."""
        return complete(self.net, *random_transform(images, self.transform, generator)).clamp(0, 1)

    def describe(self) -> dict[str, Any]:
        """Transform and network, for the record."""
        noise = 0.0 if self.transform == "rt1" else NOISE
        about = {"name": "atop", "transform": self.transform, "noise": noise, "missing": 1 / PARTS}
        return {**about, "net": in_its_words(self.net)}


def atop(
    classifier: Classifier,
    transform: str | None = None,
    draws: int = 1,
    combine: str = "logits",
    weights: str | None = None,
) -> Defence:
    """AToP-style purification before a frozen classifier.

    Args:
        classifier: frozen.
        transform: one of ``TRANSFORMS``; None: the one that the weights were trained with.
        draws: random transforms an answer.
        combine: how their logits become one answer, see :data:`certify.models.defence.COMBINE`.
        weights: of ``certify train --objective complete`` or ``atop``; None: shipped ones.
    """
    if transform is not None:  # before any weights are looked for
        checked(transform)
    net = trained("atop", classifier.input.size, weights)  # hands its second argument, here the mask, to the network
    settings = net.card.training.get("settings", {})
    purifier = RandomTransformPurifier(net, transform or settings.get("transform", "rt2"))
    about = {"trained_with": settings}
    return Defence("atop", [Member(purifier, classifier)], draws=draws, combine=combine, about=about)


def checked(transform: str) -> str:
    """The transform's name.

    Raises:
        UserError: there is none of that name.
    """
    if transform not in TRANSFORMS:
        raise UserError(f"transform={transform!r}; expected one of {', '.join(TRANSFORMS)}")
    return transform


def _check_size(images: Tensor) -> None:
    height, width = images.shape[-2:]
    if height % GRID or width % GRID:
        raise UserError(
            f"images of {height}x{width} cannot be cut into {GRID}x{GRID} equal blocks; expected sides that are "
            f"multiples of {GRID}, such as {height + -height % GRID}x{width + -width % GRID}"
        )
