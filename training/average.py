"""The running average of the weights, which is what is validated and kept where a recipe asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def make_average(net: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential moving average of a network's weights and batch statistics, or None where ``decay`` is 0.

    After step n the old average counts min(decay, (1 + n) / (10 + n)), so that a short training is not mostly its
    beginning; from about 9 / (1 - decay) steps on the decay is the given one.
    """
    if not decay:
        return None

    def blend(averaged: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
        share = torch.clamp((1 + torch.as_tensor(steps)) / (10 + torch.as_tensor(steps)), max=decay)
        return current + (averaged - current) * share.to(averaged.device)

    return AveragedModel(net, avg_fn=blend, use_buffers=True)


@contextmanager
def averaged(net: nn.Module, average: AveragedModel | None) -> Iterator[None]:
    """The network with the averaged weights in place of its own."""
    if average is None:
        yield
        return
    own = {key: value.clone() for key, value in net.state_dict().items()}
    net.load_state_dict(average.module.state_dict())
    try:
        yield
    finally:
        net.load_state_dict(own)
