"""A class head on a denoiser's bottleneck, for training only: squared error teaches pixels, the head teaches classes.

A denoiser trained for squared error knows nothing of what is in the picture, and the gradient through a frozen
classifier costs more than the denoiser itself. Reading the label off the denoiser's own coarsest features is nearly
free, uses no classifier at all, and leaves features that fine-tuning for stability can draw on. The head is thrown
away, unless the denoiser has one of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from certify.errors import UserError
from denoisers.unet import LevelUNet
from training.consistency import agreeing_loss, check_draws
from training.data import TrainingData
from training.losses import Batch, Objective, mse

WEIGHT = 0.1
"""Of the cross-entropy (about 1.5) beside the normalised squared error (about 0.2), unless told."""


class Headed(nn.Module):
    """A denoiser and a linear map from the mean over pixels of its coarsest features to class scores.

    The map is the denoiser's own ``read`` where it has one.

    Args:
        net: a denoiser.
        classes: K.
    """

    def __init__(self, net: LevelUNet, classes: int) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Linear(net.bottleneck_channels, classes) if getattr(net, "read", None) is None else None

    def forward(self, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Denoised images ``(B, C, H, W)`` and class scores ``(B, K)``."""
        cleaned, features = self.net.seen(noisy, sigma)
        read: nn.Module = self.net.read if self.head is None else self.head  # type: ignore[assignment]
        return cleaned, read(features.mean((2, 3)))


def with_head(net: nn.Module, data: TrainingData, seed: int) -> Headed:
    """The denoiser with a fresh head for the labels of these images.

    Raises:
        UserError: an architecture without coarsest features.
    """
    if not isinstance(net, LevelUNet):
        raise UserError(
            f"--objective mse+classes needs a network with a bottleneck, such as unet; {type(net).__name__} has none"
        )
    assert data.labels is not None  # refused before
    classes = int(data.labels.max()) + 1
    read = getattr(net, "read", None)
    if read is not None and read.out_features < classes:
        raise UserError(f"the network reads {read.out_features} classes, the images have {classes}; expected as many")
    torch.manual_seed(seed)
    return Headed(net, classes)


def objective(weight: float = WEIGHT, draws: int = 1, consistency: float = 0.0) -> Objective:
    """Squared error, and the label read off the bottleneck.

    Args:
        weight: of the labels' part beside the squared error.
        draws: of noise for each image.
        consistency: weight of their agreement (:func:`training.consistency.agreeing_loss`).
    """
    check_draws(draws, consistency)
    if not 0 < weight < float("inf"):
        raise UserError(f"--set weight={weight:g}: expected a number above 0")

    def joint(batch: Batch) -> Tensor:
        assert batch.labels is not None
        return mse(batch) + weight * agreeing_loss(batch.extra[0], batch.labels, draws, consistency)

    return Objective(joint, classifier=False, labels=True, wrap=with_head, draws=draws)
