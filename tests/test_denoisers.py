"""Every registered denoiser: shape, dtype, independence of images, and that it denoises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certify import SmoothedClassifier, load_classifier
from certify.errors import UserError
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


@pytest.mark.parametrize("name", [n for n in DENOISERS if n not in ("bits", "jpeg")])  # these only round
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


NOISE = torch.randn((1, 1, 200, 200), generator=torch.Generator().manual_seed(0))


def impulse(side: int = 41) -> Tensor:
    image = torch.zeros(1, 1, side, side)
    image[0, 0, side // 2, side // 2] = 1
    return image


def test_gaussian_smoothing_by_its_formula() -> None:
    """One pass of an impulse is the kernel: exp(-(u^2 + v^2) / (2 std^2)) on the window, divided by its sum."""
    squares = torch.arange(-2, 3) ** 2
    kernel = torch.exp(-(squares[:, None] + squares) / (2 * 0.8**2))
    found = load_denoiser("gs:kernel=5:std=0.8:iterations=1")(impulse(9))[0, 0]
    assert torch.allclose(found[2:7, 2:7], kernel / kernel.sum(), atol=1e-7)
    assert found.sum() == pytest.approx(1, abs=1e-6)
    assert torch.equal(found[[0, 1, 7, 8]], torch.zeros(4, 9))


def test_gaussian_smoothing_keeps_flat_images_and_clips_once() -> None:
    gs = load_denoiser("gs:kernel=7:std=1.5:iterations=4")
    flat = torch.full((2, 3, 8, 8), 0.3)
    assert torch.allclose(gs(flat), flat, atol=1e-6)
    beyond = 0.5 + NOISE  # clipping between passes, or before, would give other values
    assert torch.allclose(gs(beyond), gs.smooth(beyond).clamp(0, 1))
    twice = load_denoiser("gs:kernel=7:std=1.5:iterations=2")
    assert torch.allclose(gs.smooth(beyond), twice.smooth(twice.smooth(beyond)), atol=1e-6)
    assert gs.smooth(5 * NOISE).amin() < 0


def test_passes_add_up_to_a_wider_gaussian() -> None:
    """Four of standard deviation 1 are one of 2, where windows of five of them cut nothing off."""
    several = load_denoiser("gs:kernel=11:std=1:iterations=4")(impulse())
    once = load_denoiser("gs:kernel=21:std=2:iterations=1")(impulse())
    assert torch.allclose(several, once, atol=2e-4 * once.max().item())
    cut_off = load_denoiser("gs:kernel=3:std=2:iterations=4")(impulse())
    assert (cut_off - load_denoiser("gs:kernel=35:std=4:iterations=1")(impulse())).abs().max() > 0.01


def test_smoothing_shrinks_the_variance_of_white_noise_by_the_squares_of_its_kernel() -> None:
    gs = load_denoiser("gs:kernel=5:std=1:iterations=1")
    share = gs.smooth(impulse()).pow(2).sum().item()
    # 40,000 pixels, of which some 1 / share = 11 go together: the standard error of a variance is 0.024 of it
    assert gs.smooth(NOISE).var().item() == pytest.approx(share * NOISE.var().item(), rel=0.1)


def test_bit_depth_by_hand() -> None:
    values = torch.tensor([-0.2, 0.0, 0.1, 0.17, 0.49, 0.51, 0.9, 1.3]).view(1, 1, 2, 4)
    assert load_denoiser("bits:bits=1")(values).flatten().tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert load_denoiser("bits:bits=2")(values).flatten() * 3 == pytest.approx([0, 0, 0, 1, 1, 2, 3, 3], abs=1e-6)
    eight = torch.arange(256).view(1, 1, 16, 16) / 255
    assert torch.equal(load_denoiser("bits:bits=8")(eight), eight)
    assert len(load_denoiser("bits:bits=3")(NOISE).unique()) == 8
    assert not load_denoiser("bits").differentiable


def test_total_variation_is_that_of_scikit_image() -> None:
    restoration = pytest.importorskip("skimage.restoration")
    images = torch.rand((2, 3, 16, 20), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = load_denoiser("tv:weight=0.2:iterations=30")(images)
    for image, own in zip(images, ours, strict=True):  # theirs reads its result before the last update
        theirs = restoration.denoise_tv_chambolle(image.numpy(), weight=0.2, eps=0.0, max_num_iter=31, channel_axis=0)
        assert torch.allclose(own, torch.from_numpy(theirs), atol=1e-10)


def test_total_variation_keeps_flat_images_and_has_gradients_there() -> None:
    flat = torch.full((1, 1, 8, 8), 0.3, requires_grad=True)
    cleaned = load_denoiser("tv")(flat)
    assert torch.equal(cleaned, flat)
    cleaned.sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()
    image = torch.rand((1, 1, 5, 5), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(load_denoiser("tv:iterations=5"), image)


def test_the_median_of_a_larger_window() -> None:
    images = torch.rand((2, 3, 9, 9), generator=torch.Generator().manual_seed(0))
    cleaned = load_denoiser("median:size=5")(images)
    assert torch.equal(cleaned[:, :, 4, 4], images[:, :, 2:7, 2:7].flatten(2).median(2).values)
    assert not torch.equal(cleaned, load_denoiser("median")(images))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gs:kernel=4", "gs:kernel=4; expected an odd number of pixels from 3"),
        ("gs:std=0", "gs:std=0; expected a number above 0"),
        ("gs:std=wide", "gs:std=wide; expected a number above 0"),
        ("gs:iterations=1.5", "gs:iterations=1.5; expected a whole number from 1"),
        ("median:size=2", "median:size=2; expected an odd number"),
        ("bits:bits=0", "bits:bits=0; expected a whole number from 1"),
        ("bits:bits=9", "bits:bits=9; expected a whole number from 1 to 8"),
        ("tv:weight=-1", "tv:weight=-1; expected a number above 0"),
        ("gs:kernel=17", "gs:kernel=17 on images of 8x8: .* expected at most kernel=15"),
        ("median:size=17", "median:size=17 on images of 8x8: .* expected at most size=15"),
    ],
)
def test_options_out_of_range(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_denoiser(text)(torch.rand(1, 1, 8, 8))


def test_the_largest_window_that_fits_is_taken() -> None:
    assert load_denoiser("gs:kernel=15:std=3")(torch.rand(1, 1, 8, 8)).shape == (1, 1, 8, 8)
    assert load_denoiser("median:size=15")(torch.rand(1, 1, 8, 8)).shape == (1, 1, 8, 8)
