"""A class head on a denoiser's bottleneck, for training only.

Squared error alone teaches a denoiser nothing about classes, and gradients through a frozen classifier cost more than
the denoiser itself. Predicting the label from the denoiser's own coarsest features is nearly free, needs no classifier,
and leaves features that fine-tuning for stability can use. The head is discarded, unless it belongs to the denoiser.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certify.errors import UserError
from denoisers.unet import LevelUNet
from training.data import TrainingData
from training.losses import Batch, Objective, check_draws, consistency_loss, mse

WEIGHT = 0.1
"""Default weight of the cross-entropy (about 1.5) beside the normalised squared error (about 0.2)."""


class WithClassHead(nn.Module):
    """A U-Net and a linear map from the mean of its coarsest features to class scores.

    Args:
        net: the denoiser; a head of its own (``read``) is used in place of a new one.
        classes: K.
    """

    def __init__(self, net: LevelUNet, classes: int) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Linear(net.bottleneck_channels, classes) if getattr(net, "read", None) is None else None

    def forward(self, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return denoised images ``(B, C, H, W)`` and class scores ``(B, K)``."""
        cleaned, features = self.net.denoise_with_features(noisy, sigma)
        head: nn.Module = self.net.read if self.head is None else self.head  # type: ignore[assignment]
        return cleaned, head(features.mean((2, 3)))


def with_class_head(net: nn.Module, data: TrainingData, seed: int) -> WithClassHead:
    """Add a class head, initialised from the seed, for the labels of the data.

    Raises:
        UserError: the network has a head of its own for fewer classes.
    """
    assert isinstance(net, LevelUNet)
    assert data.labels is not None
    classes = int(data.labels.max()) + 1
    own = getattr(net, "read", None)
    if own is not None and own.out_features < classes:
        raise UserError(f"the class head has {own.out_features} classes; expected at least the {classes} of the data")
    torch.manual_seed(seed)
    return WithClassHead(net, classes)


def objective(weight: float = WEIGHT, draws: int = 1, consistency: float = 0.0) -> Objective:
    """Squared error plus the cross-entropy of a class head on the bottleneck.

    Args:
        weight: of the cross-entropy.
        draws: noise draws per image.
        consistency: weight of their agreement, see :func:`training.losses.consistency_loss`.

    Raises:
        UserError: a value out of range.
    """
    check_draws(draws, consistency)
    if not 0 < weight < float("inf"):
        raise UserError(f"--set weight={weight:g}: expected a number above 0")

    def loss(batch: Batch) -> Tensor:
        assert batch.labels is not None
        return mse(batch) + weight * consistency_loss(batch.extra[0], batch.labels, draws, consistency)

    return Objective(
        loss,
        classifier=False,
        labels=True,
        wrap=with_class_head,
        draws=draws,
        accepts=lambda net: isinstance(net, LevelUNet),
        network="a U-Net with a bottleneck (--denoiser unet or pooled-unet)",
    )
