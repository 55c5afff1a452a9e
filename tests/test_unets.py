"""The U-Nets conditioned on the noise level: untrained output, image sizes, folding."""

from __future__ import annotations

import pytest
import small_networks
import torch
from torch import nn

from certify.engine.execution import folded_copy
from certify.errors import UserError
from denoisers.unet import MEAN, SPREAD, PooledUNet, UNet

NETS = {
    "unet": lambda channels: UNet((8, 16), 1, channels),
    "pooled-unet": lambda channels: PooledUNet((8, 16), (4, 8), image_channels=channels),
    "pooled-unet, told classes": lambda channels: PooledUNet((8, 16), (4, 8), 3, channels),
}
pytestmark = pytest.mark.parametrize("build", NETS.values(), ids=NETS.keys())


def net(build: object, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return small_networks.trained(build(channels)).eval()  # type: ignore[operator]


def test_untrained_is_the_best_linear_estimate_from_single_pixels(build: object) -> None:
    """Wiener's estimate: the mean plus the deviation of the input times signal / (signal + noise)."""
    noisy = torch.rand(3, 3, 16, 16)
    sigma = torch.tensor([0.1, 0.5, 1.0])
    share = SPREAD**2 / (SPREAD**2 + sigma**2)
    expected = MEAN + share[:, None, None, None] * (noisy - MEAN)
    assert torch.allclose(build(3)(noisy, sigma), expected, atol=1e-6)  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 13, 18), (3, 1, 5)])
def test_any_image_size_is_preserved(build: object, shape: tuple[int, int, int]) -> None:
    found = net(build, shape[0])(torch.rand(2, *shape), 0.25)
    assert found.shape == (2, *shape)
    assert found.isfinite().all()


def test_images_are_independent_of_their_batch(build: object) -> None:
    trained, noisy = net(build), torch.rand(4, 3, 16, 16)
    alone = torch.cat([trained(image[None], 0.5) for image in noisy])
    assert torch.allclose(trained(noisy, 0.5), alone, atol=1e-5)


def test_levels_apply_per_image(build: object) -> None:
    trained, noisy = net(build), torch.rand(2, 3, 16, 16)
    both = trained(noisy, torch.tensor([0.1, 0.9]))
    assert torch.allclose(both[1], trained(noisy, 0.9)[1], atol=1e-5)
    assert not torch.allclose(both[1], trained(noisy, 0.1)[1], atol=1e-3)


def test_a_missing_level_is_an_error(build: object) -> None:
    with pytest.raises(UserError, match=r"needs the noise level: forward\(noisy, sigma\)"):
        net(build)(torch.rand(1, 3, 16, 16))


def test_folding_batch_norms_preserves_the_output(build: object) -> None:
    trained, noisy = net(build), torch.rand(2, 3, 16, 16)
    folded = folded_copy(trained)
    assert folded is not None
    assert torch.allclose(folded(noisy, 0.5), trained(noisy, 0.5), atol=1e-4)
