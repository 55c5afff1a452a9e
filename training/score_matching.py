"""Denoising score matching: what the networks of ``denoisers.energy`` are trained for.

With x' = x + sigma z, z standard normal, the loss of the score s(x') = h(x') / sigma, weighted by sigma^2, is (Vincent
2011; Song and Ermon 2020)

    1/2 E || sigma s(x') + z ||^2,  summed over pixels.

The networks give the denoised image D = x' + sigma h(x'), and (D - x) / sigma = h(x') + z = sigma s(x') + z: the same
loss is the squared error of D in units of the noise level.

Deviation: Yoon et al. (2021) use geometric ladders from 50 or more down to 0.01, as for generating images. Purifying
starts near an image, so ``--sigma 0.01:1`` is enough (log-uniform: a geometric ladder without rungs).
"""

from __future__ import annotations

from torch import Tensor, nn

from certify.errors import UserError
from training.data import TrainingData
from training.losses import Batch, Objective


def dsm(batch: Batch) -> Tensor:
    """Half the squared error in units of the noise level, summed over pixels; mean over the batch."""
    error = (batch.output - batch.target) / batch.sigma[:, None, None, None]
    return 0.5 * error.pow(2).sum((1, 2, 3)).mean()


def objective() -> Objective:
    """Denoising score matching, for score purification."""
    return Objective(dsm, classifier=False, wrap=_checked, purifier="ebm")


def _checked(net: nn.Module, data: TrainingData, seed: int) -> nn.Module:
    if not hasattr(net, "score"):
        raise UserError(f"--objective dsm needs a network with a score: score or energy; {type(net).__name__} has none")
    return net
