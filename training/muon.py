"""Muon: momentum whose update is made orthogonal, for convolutions; Adam for everything else.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", with what Jordan's CIFAR-10 runs add: a
convolution's weights keep their norm, since a normalisation follows. torch has one of its own from 2.9 on, for matrices
only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.6
ADAM_SHARE = 0.01
"""Adam's rate as a share of the orthogonal updates' rate: these have length 1 in every direction, Adam's in none."""

_STEPS = 3  # of the Newton-Schulz iteration: enough for a direction
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024


class Muon(torch.optim.Adam):
    """Orthogonal updates for convolutions without bias (a normalisation follows) that do not start at zero; else Adam.

    Args:
        net: the network; parameters without gradients are left out.
        rate: of the orthogonal updates at their peak, relative to weights whose filters have norm 1.
        weight_decay: L2 penalty, for what Adam trains.
    """

    def __init__(self, net: nn.Module, rate: float, weight_decay: float) -> None:
        turned = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
        turned = [p for p in turned if p.requires_grad and p.any()]  # one that starts at zero has no norm to keep
        mine = {id(p) for p in turned}
        rest = [p for p in net.parameters() if p.requires_grad and id(p) not in mine]
        groups = [{"params": p, "orthogonal": flag} for p, flag in ((turned, True), (rest, False)) if p]
        super().__init__(groups, lr=rate, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; ``closure`` is not supported."""
        for group in self.param_groups:
            if not group["orthogonal"]:
                group["lr"] *= ADAM_SHARE
                continue
            for weight in group["params"]:
                if weight.grad is not None:
                    self._turn(weight, group["lr"])
                    weight.grad = None  # done: Adam passes it by
        found = super().step()
        for group in self.param_groups:
            if not group["orthogonal"]:
                group["lr"] /= ADAM_SHARE
        return found

    def _turn(self, weight: Tensor, rate: float) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # Adam looks for it in every state that it loads
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].mul_(MOMENTUM).add_(weight.grad)
        weight.mul_(len(weight) ** 0.5 / weight.norm())
        weight.sub_(orthogonal(weight.grad + MOMENTUM * momentum), alpha=rate)


def orthogonal(update: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all near 1 (0.7 to 1.2), rows being the first dimension."""
    a, b, c = _COEFFICIENTS
    flat = update.reshape(len(update), -1)
    flat = flat / (flat.norm() + 1e-7)
    tall = flat.shape[0] > flat.shape[1]
    flat = flat.T if tall else flat
    for _ in range(_STEPS):
        gram = flat @ flat.T
        flat = a * flat + (b * gram + c * gram @ gram) @ flat
    found: Tensor = (flat.T if tall else flat).reshape(update.shape)
    return found
