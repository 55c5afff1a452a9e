"""What the blind-spot network of NCIS is trained for, in two readings; from images alone, without labels or noise.

The abstract (Cha, Ko, Yoo, Moon: Neural Contextual Iterative Smoothing, WACV 2024) says that the network learns by
itself to bring back what smoothing takes away; the formulas are our reading.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from certify.errors import UserError
from denoisers.blind_spot import BlindSpot
from denoisers.classical import GaussianSmoothing
from training.data import TrainingData
from training.losses import Objective, Prepared


def context() -> Objective:
    """|| BSN(x) - x ||^2 on clean images: each pixel from its surroundings; the blind spot excludes the identity."""
    return _objective(lambda images: images)


def restore(kernel: int = 5, std: float = 0.5, iterations: int = 2) -> Objective:
    """|| BSN(GS(x)) - x ||^2: the network puts back what Gaussian smoothing took.

    Args:
        kernel: of GS, side of its window in pixels, odd.
        std: of GS, in pixels.
        iterations: of GS.

    Raises:
        UserError: values that make no sense.
    """
    return _objective(GaussianSmoothing(kernel, std, iterations).smooth)


def _objective(change: Callable[[Tensor], Tensor]) -> Objective:
    """The clean image from a changed one, by the squared error's mean over pixels, channels and images."""
    return Objective(
        lambda batch: (batch.output - batch.target).pow(2).mean(),
        classifier=False,
        noise=False,
        prepare=lambda draw: Prepared((change(draw.clean),), draw.clean),
        wrap=blind,
        purifier="ncis",
    )


def blind(net: nn.Module, data: TrainingData, seed: int) -> nn.Module:
    """The network itself, if it is blind to the pixel that it makes; any other would learn to copy its input.

    Raises:
        UserError: another architecture.
    """
    if not isinstance(net, BlindSpot):
        raise UserError(
            f"--objective context and restore need a blind spot: --denoiser blind-spot; {type(net).__name__} has none"
        )
    return net
