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
from training.losses import Batch, Draw, Objective, Prepared


def context() -> Objective:
    """|| BSN(x) - x ||^2 on clean images: each pixel from its surroundings; the blind spot excludes the identity."""
    return _objective(as_it_is)


def restore(kernel: int = 5, std: float = 0.5, iterations: int = 2) -> Objective:
    """|| BSN(GS(x)) - x ||^2: the network puts back what Gaussian smoothing took.

    Args:
        kernel: of GS, side of its window in pixels, odd.
        std: of GS, in pixels.
        iterations: of GS.

    Raises:
        UserError: values that make no sense.
    """
    smoothing = GaussianSmoothing(kernel, std, iterations)

    def smoothed(draw: Draw) -> Prepared:
        return Prepared((smoothing.smooth(draw.clean),), draw.clean)

    return _objective(smoothed)


def _objective(prepare: Callable[[Draw], Prepared]) -> Objective:
    return Objective(error, classifier=False, noise=False, prepare=prepare, wrap=blind, purifier="ncis")


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


def as_it_is(draw: Draw) -> Prepared:
    """The clean image, to be made again."""
    return Prepared((draw.clean,), draw.clean)


def error(batch: Batch) -> Tensor:
    """Squared error, mean over pixels, channels and images."""
    return (batch.output - batch.target).pow(2).mean()
