"""Objectives of the purifiers ``ncis`` (context, restore) and ``ebm`` (denoising score matching); they need no labels.

NCIS (Cha, Ko, Yoo, Moon: Neural Contextual Iterative Smoothing, WACV 2024) trains a blind-spot network to restore what
smoothing removes. Its abstract gives no formula; ``context`` and ``restore`` are two readings of it.

Score matching: with x' = x + sigma z, z standard normal, the loss of the score s(x') = h(x') / sigma, weighted by
sigma^2, is 1/2 E || sigma s(x') + z ||^2, summed over pixels (Vincent 2011; Song and Ermon 2020). The networks of
:mod:`denoisers.energy` return the denoised image D = x' + sigma h(x'), and (D - x) / sigma = sigma s(x') + z: the loss
is the squared error of D in units of the noise level. Yoon et al. (2021) use a geometric ladder of levels from 50 or
more down to 0.01, as image generation needs; purification starts near an image, so ``--sigma 0.01:1`` suffices.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from denoisers.blind_spot import BlindSpot
from denoisers.classical import GaussianSmoothing
from training.losses import Batch, Objective, Prepared


def context() -> Objective:
    """|| BSN(x) - x ||^2 on clean images; the blind spot excludes the identity."""
    return _blind_spot(lambda images: images)


def restore(kernel: int = 5, std: float = 0.5, iterations: int = 2) -> Objective:
    """|| BSN(GS(x)) - x ||^2 with Gaussian smoothing GS.

    Args:
        kernel: side of the window of GS in pixels, odd.
        std: standard deviation of GS in pixels.
        iterations: passes of GS.

    Raises:
        UserError: a value out of range.
    """
    return _blind_spot(GaussianSmoothing(kernel, std, iterations).smooth)


def _blind_spot(transform: Callable[[Tensor], Tensor]) -> Objective:
    """Mean squared error between the network's output for a transformed image and the image."""
    return Objective(
        lambda batch: (batch.output - batch.target).pow(2).mean(),
        classifier=False,
        noise=False,
        prepare=lambda draw: Prepared((transform(draw.clean),), draw.clean),
        purifier="ncis",
        accepts=lambda net: isinstance(net, BlindSpot),
        network="a blind-spot network (--denoiser blind-spot)",
    )


def dsm(batch: Batch) -> Tensor:
    """Half the squared error in units of the noise level, summed over pixels, averaged over the batch."""
    error = (batch.output - batch.target) / batch.sigma[:, None, None, None]
    return 0.5 * error.pow(2).sum((1, 2, 3)).mean()


def score_matching() -> Objective:
    """Denoising score matching."""
    return Objective(
        dsm,
        classifier=False,
        purifier="ebm",
        accepts=lambda net: hasattr(net, "score"),
        network="a network with a score (--denoiser score or energy)",
    )
