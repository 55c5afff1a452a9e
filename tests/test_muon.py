"""Muon: orthogonal updates, weights of constant norm, Adam for other parameters, exact resumption."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from denoisers.dncnn import DnCNN
from training.optimizers import ADAM_SHARE, MOMENTUM, Muon, orthogonalise


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 16, 2),
    )


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(32, 3, 4, 4, generator=drawn), torch.randint(2, (32,), generator=drawn)
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("shape", [(8, 16, 3, 3), (64, 4, 3, 3), (5, 5)])
def test_updates_have_nearly_equal_singular_values_and_the_same_directions(shape: tuple[int, ...]) -> None:
    """Against the singular value decomposition: U S V to U S' V with all of S' near 1."""
    torch.manual_seed(0)
    update = torch.randn(shape)
    found = orthogonalise(update).flatten(1)
    u, s, v = torch.linalg.svd(update.flatten(1), full_matrices=False)
    turned = u.T @ found @ v.T
    assert turned.diagonal()[s > 0.05 * s.max()].sub(1).abs().max() < 0.4
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-4


def test_convolutions_get_orthogonal_updates_and_the_rest_adam() -> None:
    net, rate = small(), 0.1
    first, hidden, bias = (net[0].weight, net[1].weight, net[4].bias)
    before = [p.detach().clone() for p in (first, hidden, bias)]
    gradients = copy.deepcopy(net)
    optimizer = Muon(net, rate, 0.0)
    step(gradients, torch.optim.SGD(gradients.parameters(), lr=0.0), 1)
    step(net, optimizer, 1)
    scaled = before[1] * 8**0.5 / before[1].norm()
    expected = scaled - rate * orthogonalise((1 + MOMENTUM) * gradients[1].weight.grad)
    assert torch.allclose(hidden, expected, atol=1e-5)
    assert torch.allclose((bias - before[2]).abs(), torch.full((2,), rate * ADAM_SHARE), rtol=1e-3)  # Adam's first step
    assert (first - before[0]).abs().max() <= rate * ADAM_SHARE * 1.001  # has a bias: no normalisation follows
    assert all(group["lr"] == rate for group in optimizer.param_groups)


def test_weights_keep_their_norm() -> None:
    net = small()
    optimizer = Muon(net, 0.05, 0.0)
    for seed in range(20):
        step(net, optimizer, seed)
    assert net[1].weight.norm().item() == pytest.approx(8**0.5, rel=0.1)  # one update away from it


def test_a_convolution_initialised_to_zero_is_trained_by_adam() -> None:
    """The last one of DnCNN has no norm to keep."""
    net = nn.Sequential(DnCNN(4, 3), nn.Flatten(), nn.Linear(3 * 16, 2))
    step(net, Muon(net, 0.05, 0.0), 0)
    last = net[0].dncnn[-1].weight
    assert last.isfinite().all()
    assert 0 < last.abs().max() <= 0.05 * ADAM_SHARE * 1.001


def test_resuming_is_exact() -> None:
    whole = small()
    optimizer = Muon(whole, 0.05, 1e-4)
    for seed in range(4):
        if seed == 2:
            again = copy.deepcopy(whole)
            resumed = Muon(again, 0.05, 1e-4)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(whole, optimizer, seed)
    for seed in (2, 3):
        step(again, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
