"""Every registered denoiser: shape, dtype, independence of images, and that it denoises."""

from __future__ import annotations

import pytest
import torch

from certify import SmoothedClassifier, load_classifier
from denoisers import DENOISERS, load_denoiser
from denoisers.dncnn import DnCNN


@pytest.mark.parametrize("name", list(DENOISERS))
@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (3, 3, 32, 32), (2, 3, 17, 23)])
def test_contract(name: str, shape: tuple[int, ...]) -> None:
    noisy = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    denoiser = load_denoiser(name)
    together = denoiser(noisy, 0.25)
    assert together.shape == noisy.shape
    assert together.dtype == noisy.dtype
    alone = torch.cat([denoiser(noisy[i : i + 1], 0.25) for i in range(len(noisy))])
    assert torch.allclose(together, alone, atol=1e-6)
    assert denoiser.describe()["name"] == name


@pytest.mark.parametrize("name", list(DENOISERS))
def test_it_denoises_a_smooth_image(name: str) -> None:
    """A ramp with noise of sigma 0.25 comes out with less than half of the noise's energy."""
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    noise = 0.25 * torch.randn(ramp.shape, generator=torch.Generator().manual_seed(0))
    error = load_denoiser(name)(ramp + noise, 0.25) - ramp
    # expected: 0.41 for the blur (its squared weights add up to that), 0.17 for the median of nine
    assert error.pow(2).mean() < 0.5 * 0.25**2


def test_a_blur_keeps_flat_images() -> None:
    assert torch.allclose(load_denoiser("gaussian")(torch.full((1, 3, 8, 8), 0.3), 0.5), torch.full((1, 3, 8, 8), 0.3))


def test_a_denoiser_is_part_of_the_base_classifier() -> None:
    """f(D(x + e)): the same noise, other votes, and the record names it."""
    classifier = load_classifier("digits")
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = SmoothedClassifier(classifier, 0.25)
    denoised = SmoothedClassifier(classifier, 0.25, denoiser=load_denoiser("median"))
    assert plain.votes(image, 2000, stage="e", image_id="x") != denoised.votes(image, 2000, stage="e", image_id="x")
    assert [step["step"] for step in denoised.base.describe()["steps"]] == ["denoiser", "classifier"]
    x = torch.rand(5, 1, 8, 8)
    assert denoised.base(x).tolist() == classifier(load_denoiser("median")(x, 0.25)).tolist()


@pytest.mark.parametrize("channels", [64, 128])
def test_dncnn_has_the_published_size_and_starts_as_the_identity(channels: int) -> None:
    net = DnCNN(channels).eval()
    assert sum(p.numel() for p in net.parameters()) == {64: 558_400, 128: 2_222_720}[channels]
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(net(images, 0.25), images)
