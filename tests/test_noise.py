"""Noise: its moments, that blocks never repeat, and that nothing but its address decides it."""

from __future__ import annotations

import math

import pytest
import torch

from certify.noise import NOISES, Gaussian
from certify.streams import block_generator, stream_key


def draw(image_id: str = "0", stage: str = "estimation", block: int = 0, seed: int = 0, size: int = 64) -> torch.Tensor:
    return torch.randn(size, generator=block_generator(stream_key(seed, image_id, stage), block))


@pytest.mark.parametrize("name", list(NOISES))
def test_moments(name: str) -> None:
    """Mean, deviation and fourth moment of 20 blocks, within five standard errors; pixels uncorrelated."""
    noise = NOISES.get(name)(0.25)
    key = stream_key(1, "moments", "estimation")
    sample = torch.cat([noise.sample((100, 3, 16, 16), block_generator(key, b)) for b in range(20)]).double()
    n = sample.numel()
    assert abs(sample.mean()) < 5 * 0.25 / math.sqrt(n)
    assert abs(sample.var() / 0.25**2 - 1) < 5 * math.sqrt(2 / n)
    assert abs((sample / 0.25).pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    left, right = sample[..., :-1], sample[..., 1:]
    assert abs((left * right).mean()) < 5 * 0.25**2 / math.sqrt(left.numel())


def test_no_two_blocks_are_alike() -> None:
    """Other images, stages, seeds and block numbers (neighbours, and 2^32 apart) all give other noise."""
    addresses = [
        {"image_id": i, "stage": s, "block": b, "seed": seed}
        for i in ("0", "1", "cat/0001.jpg")
        for s in ("selection", "estimation", "prediction")
        for b in (0, 1, 2, 2**32)
        for seed in (0, 1, 2**32)
    ]
    first = {tuple(draw(**a).tolist()) for a in addresses}
    assert len(first) == len(addresses)


def test_plain_seeding_would_repeat() -> None:
    """Why streams write the whole state: a CPU generator forgets all but 32 bits of its seed. Ours do not collide."""
    plain = [torch.randn(8, generator=torch.Generator().manual_seed(5 + k * 2**32)) for k in (0, 1)]
    assert (plain[0] == plain[1]).all()
    seen = {draw(image_id=str(i), block=b, size=16).numpy().tobytes() for i in range(50) for b in range(100)}
    assert len(seen) == 5000


def test_the_same_address_gives_the_same_noise() -> None:
    assert (draw() == draw()).all()


def test_values_are_pinned() -> None:
    """A change of the stream silently changes every published run: it must be noticed, and named in the header."""
    noise = draw(image_id="airplane/0001.jpg", size=16)
    again = Gaussian(2.0).sample((16,), block_generator(stream_key(0, "airplane/0001.jpg", "estimation"), 0))
    assert torch.equal(again, noise * 2.0)
    assert noise[:3].tolist() == pytest.approx(PINNED, abs=1e-5)


PINNED = [1.406721, 0.657634, 0.988937]
