"""Optimizers, Muon among them, and the exponential moving average of the weights (EMA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from training.recipe import Recipe

MOMENTUM = 0.6
ADAM_SHARE = 0.01
"""Adam's rate as a share of Muon's: an orthogonal update has norm 1 in every direction."""

_NEWTON_SCHULZ_STEPS = 3  # enough for a direction
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024


def make_optimizers(net: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Build the recipe's optimizer, or two for ``adam-then-sgd``, for all trainable parameters."""
    if recipe.optimizer == "muon":
        return [Muon(net, recipe.rate, recipe.weight_decay)]
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.optimizer != "sgd":
        optimizers.append(torch.optim.Adam(parameters, lr=recipe.rate, weight_decay=recipe.weight_decay))
    if recipe.optimizer != "adam":
        sgd = torch.optim.SGD(parameters, lr=recipe.rate, momentum=0.9, weight_decay=recipe.weight_decay)
        optimizers.append(sgd)
    return optimizers


class Muon(torch.optim.Adam):
    """Orthogonalised momentum for convolutions followed by a normalisation; Adam for all other parameters.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". As in Jordan's CIFAR-10 runs, the
    weight of a convolution keeps its norm, because a normalisation follows. torch's own Muon (from 2.9) takes matrices
    only. A convolution without bias counts as one followed by a normalisation, unless it is initialised to zero.

    Args:
        net: the network; frozen parameters are left out.
        rate: peak rate of the orthogonal updates, relative to weights whose filters have norm 1.
        weight_decay: L2 penalty, for the parameters of Adam.
    """

    def __init__(self, net: nn.Module, rate: float, weight_decay: float) -> None:
        weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
        weights = [p for p in weights if p.requires_grad and p.any()]  # zero weights have no norm to keep
        orthogonal = {id(p) for p in weights}
        rest = [p for p in net.parameters() if p.requires_grad and id(p) not in orthogonal]
        groups = [{"params": p, "orthogonal": flag} for p, flag in ((weights, True), (rest, False)) if p]
        super().__init__(groups, lr=rate, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take one step; ``closure`` is not supported."""
        for group in self.param_groups:
            if not group["orthogonal"]:
                group["lr"] *= ADAM_SHARE
                continue
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group["lr"])
                    weight.grad = None  # so that Adam skips it
        result = super().step()
        for group in self.param_groups:
            if not group["orthogonal"]:
                group["lr"] /= ADAM_SHARE
        return result

    def _update(self, weight: Tensor, rate: float) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # Adam expects it in every state it loads
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].mul_(MOMENTUM).add_(weight.grad)
        weight.mul_(len(weight) ** 0.5 / weight.norm())
        weight.sub_(orthogonalise(weight.grad + MOMENTUM * momentum), alpha=rate)


def orthogonalise(update: Tensor) -> Tensor:
    """Move all singular values close to 1 (0.7 to 1.2) by a Newton-Schulz iteration; rows are the first dimension."""
    a, b, c = _COEFFICIENTS
    flat = update.reshape(len(update), -1)
    flat = flat / (flat.norm() + 1e-7)
    tall = flat.shape[0] > flat.shape[1]
    flat = flat.T if tall else flat
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = flat @ flat.T
        flat = a * flat + (b * gram + c * gram @ gram) @ flat
    orthogonal: Tensor = (flat.T if tall else flat).reshape(update.shape)
    return orthogonal


def make_average(net: nn.Module, decay: float) -> AveragedModel | None:
    """Build the EMA of a network's weights and batch statistics; None for decay 0.

    The decay after step n is min(decay, (1 + n) / (10 + n)), so that a short training is not dominated by its start; it
    is ``decay`` from about 9 / (1 - decay) steps on.
    """
    if not decay:
        return None

    def update(average: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
        share = torch.clamp((1 + torch.as_tensor(steps)) / (10 + torch.as_tensor(steps)), max=decay)
        return current + (average - current) * share.to(average.device)

    return AveragedModel(net, avg_fn=update, use_buffers=True)


@contextmanager
def averaged(net: nn.Module, average: AveragedModel | None) -> Iterator[None]:
    """Run the block with the averaged weights in the network, if there is an average."""
    if average is None:
        yield
        return
    own = {key: value.clone() for key, value in net.state_dict().items()}
    net.load_state_dict(average.module.state_dict())
    try:
        yield
    finally:
        net.load_state_dict(own)
