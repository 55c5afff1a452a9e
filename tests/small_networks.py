"""Small networks for tests, as if they had been trained, and one image for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from certify import Gaussian, SmoothedClassifier
from certify.engine.execution import Execution
from certify.engine.monte_carlo import Job, count_votes
from certify.models.classifier import Classifier, ClassifierSpec, square_input
from certify.models.pipeline import Pipeline
from certify.smoothing.rng import stream_key

PLAIN = Execution("float32", False, False, 50)
IMAGE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with weights and batch statistics as if it had been trained: nothing is zero, one or the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
                draw = torch.randn(tensor.shape, generator=generator) * (
                    0.2 if tensor.ndim < 2 else (2 / fan_in) ** 0.5
                )
                tensor.copy_(draw.abs() + 0.5 if name.endswith(("running_var", "bn.weight")) else draw)
    return module


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


class Float32Only(nn.Module):
    """A network that converts its input to float32, so that it cannot be cast."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.float().mean((2, 3)))


def classifier(net: nn.Module | None = None) -> Classifier:
    net = trained(net or network())
    return Classifier("small", ClassifierSpec(net, square_input((3, 16, 16), (0.4,) * 3, (0.3,) * 3)))


def labels(run: Any, base: Pipeline, trials: int = 500, sigma: float = 0.5) -> Tensor:
    job = Job(IMAGE, stream_key(0, "x", "estimation"), trials, keep=trials)
    (tally,) = count_votes(run, Gaussian(sigma), [job], batch_size=50)
    return tally.labels


class Brightness:
    """Class 1 where an image is bright: a base classifier of images of any size."""

    num_classes = 2

    def __call__(self, images: Tensor) -> Tensor:
        return (images.flatten(1).mean(1) > 0.5).long()

    def describe(self) -> dict[str, Any]:
        return {"name": "brightness"}


def check_denoiser(denoiser: Any, shape: tuple[int, int, int], sigma: float) -> None:
    """Check the contract of a denoiser on an image of this shape."""
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    g = SmoothedClassifier(Brightness(), sigma, denoiser=denoiser)
    g.check_contract(g.check(image))
