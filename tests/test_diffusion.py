"""MemNet by hand; the one-shot diffusion denoiser against its formulas and against diffusers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import check_denoiser, trained
from torch import Tensor, nn

from certify.errors import RunFault, UserError
from denoisers.diffusion import OneShot, load_diffusers, timestep
from denoisers.memnet import MemNet

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIGMAS = (0.12, 0.25, 0.5, 1.0)

# MemNet


def test_memnet_has_the_published_size_and_names() -> None:
    net = MemNet()
    assert sum(p.numel() for p in net.parameters()) == 1_436_678
    gates = [net.state_dict()[f"dense_memory.{i}.gate_unit.conv.weight"].shape[1] for i in range(3)]
    assert gates == [7 * 64, 8 * 64, 9 * 64]
    assert "dense_memory.2.recursive_unit.5.relu_conv2.conv.weight" in net.state_dict()


def test_memnet_by_hand() -> None:
    """One block of one residual with identity convolutions: the output can be computed by hand."""
    net = MemNet(channels=1, blocks=1, residuals=1, image_channels=1).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
                module.weight[:, :, module.kernel_size[0] // 2, module.kernel_size[1] // 2] = 1
            elif isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    x = torch.tensor([[[[1.0, -1.0]]]])
    # features relu(x); the residual block doubles them; the gate adds the features: 3 relu(x); then x is added
    assert torch.allclose(net(x, 0.25), torch.tensor([[[[4.0, -1.0]]]]))


def test_memnet_treats_images_alone() -> None:
    net = trained(MemNet(8, 2, 2)).eval()
    assert torch.allclose(net(IMAGES)[1:], net(IMAGES[1:]), atol=1e-5)


# One-shot diffusion


def linear(steps: int = 1000) -> Tensor:
    return (1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)).cumprod(0)


def cosine(steps: int = 4000) -> Tensor:
    def kept(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - kept((t + 1) / steps) / kept(t / steps), 0.999) for t in range(steps)]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)


@pytest.mark.parametrize(
    ("schedule", "expected", "levels"),
    [
        (cosine(), (573, 1158, 1984, 2809), (0.12012, 0.25012, 0.50031, 1.00001)),
        (linear(), (70, 145, 259, 396), (0.12069, 0.25158, 0.50239, 1.00024)),
    ],
    ids=["cosine", "linear"],
)
def test_timesteps_of_the_published_schedules(
    schedule: Tensor, expected: tuple[int, ...], levels: tuple[float, ...]
) -> None:
    found = [timestep(schedule, sigma) for sigma in SIGMAS]
    assert found == list(expected)
    real = [math.sqrt((1 - schedule[t]) / schedule[t]) / 2 for t in found]
    assert real == pytest.approx(levels, abs=5e-6)


def test_timesteps_are_rounded_up_never_down() -> None:
    schedule = linear(200)
    levels = ((1 - schedule) / schedule).sqrt() / 2
    for sigma in torch.linspace(0.01, float(levels[-1]) * 0.999, 60).tolist():
        t = timestep(schedule, sigma)
        assert levels[t] >= sigma
        assert t == 1 or levels[t - 1] < sigma
    assert timestep(schedule, 0.0) == 1
    for beyond in (float(levels[-1]) * 1.001, float("nan")):
        with pytest.raises(UserError, match=r"this diffusion model covers noise up to 1\.2"):
            timestep(schedule, beyond)
    with pytest.raises(UserError, match="covers noise up to"):
        timestep([0.9, 0.8, 0.0], 5.0)  # a schedule that ends without any image


class Oracle(nn.Module):
    """A network that knows the image, and returns the exact output for its step."""

    def __init__(self, clean: Tensor, prediction: str, schedule: Tensor, junk: int = 0) -> None:
        super().__init__()
        self.clean, self.prediction, self.schedule, self.junk = clean, prediction, schedule, junk
        self.told: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.told += t.tolist()
        kept = self.schedule[t].view(-1, 1, 1, 1)
        clean = 2 * self.clean - 1
        epsilon = (x_t - kept.sqrt() * clean) / (1 - kept).sqrt()
        answers = {
            "epsilon": epsilon,
            "sample": clean,
            "v_prediction": kept.sqrt() * epsilon - (1 - kept).sqrt() * clean,
        }
        answer = answers[self.prediction]
        return torch.cat([answer, torch.full_like(answer, 1e9)[:, : self.junk]], dim=1)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("junk", [0, 3])
def test_a_perfect_network_gives_the_image(prediction: str, sigma: float, junk: int) -> None:
    clean, schedule = IMAGES.double(), linear()
    noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    oracle = Oracle(clean, prediction, schedule, junk)
    denoiser = OneShot(oracle, schedule, prediction)
    assert torch.allclose(denoiser(noisy, sigma), clean, atol=1e-12)
    assert oracle.told == [timestep(schedule, sigma)] * 2


def test_the_noise_the_network_sees_is_the_noise_that_was_added() -> None:
    """x_t carries sqrt(abar) 2 sigma of noise: at most the step's own, and more than the step before has."""
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            seen.append(x_t)
            return x_t

    schedule = linear()
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for sigma in SIGMAS:
        OneShot(Spy(), schedule)(0.5 + sigma * noise, sigma)
        t = timestep(schedule, sigma)
        measured = float(seen[-1].std() / noise.std())
        assert measured == pytest.approx(2 * sigma * math.sqrt(schedule[t]), rel=1e-5)
        assert measured <= math.sqrt(1 - schedule[t])


def test_diffusion_pads_clips_and_describes() -> None:
    sides: list[tuple[int, ...]] = []

    class Loud(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            sides.append(tuple(x_t.shape[-2:]))
            return 100 * x_t

    denoiser = OneShot(Loud(), linear(), "sample", multiple=8)
    out = denoiser(torch.rand(1, 3, 11, 16), 0.25)
    assert sides == [(16, 16)]
    assert out.shape == (1, 3, 11, 16)
    assert 0 <= out.min() <= out.max() <= 1
    named = denoiser.describe()
    assert named["schedule_sha256"] != OneShot(Loud(), cosine(1000)).describe()["schedule_sha256"]
    assert json.loads(json.dumps(named)) == named
    with pytest.raises(UserError, match="needs the noise level"):
        denoiser(IMAGES)
    with pytest.raises(UserError, match=r"'flow'; expected one of epsilon, sample, v_prediction$"):
        OneShot(Loud(), linear(), "flow")


def test_the_schedule_survives_a_cast() -> None:
    denoiser = OneShot(nn.Identity(), linear()).to(torch.bfloat16)
    assert timestep(denoiser.alphas_cumprod, 0.25) == 145


@pytest.mark.slow
@pytest.mark.parametrize(("prediction", "beside"), [("epsilon", True), ("sample", False), ("v_prediction", False)])
def test_diffusers_agrees(prediction: str, beside: bool, tmp_path: Path) -> None:
    """One step of its own scheduler, from a saved and loaded network, on the same noisy images."""
    diffusers = pytest.importorskip("diffusers")
    net, scheduler = tiny(diffusers), diffusers.DDPMScheduler(prediction_type=prediction)
    net.save_pretrained(tmp_path if beside else tmp_path / "unet")
    scheduler.save_pretrained(tmp_path if beside else tmp_path / "scheduler")
    denoiser = load_diffusers(str(tmp_path))
    noisy = IMAGES + 0.25 * torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(0))
    ours = denoiser(noisy, 0.25)
    t = timestep(scheduler.alphas_cumprod, 0.25)
    assert t == 145
    x_t = scheduler.alphas_cumprod[t].sqrt() * (2 * noisy - 1)
    with torch.no_grad():
        theirs = scheduler.step(net(x_t, t).sample, t, x_t).pred_original_sample
    assert torch.allclose(ours, (theirs + 1) / 2, atol=1e-5)
    assert ours.std() > 0.01  # not all clipped away
    check_denoiser(denoiser, (3, 18, 17), 0.25)  # sides that the network does not take by itself
    assert not any(p.requires_grad for p in denoiser.parameters())


def tiny(diffusers: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
    }
    return diffusers.UNet2DModel(**settings | options).eval()


@pytest.mark.slow
def test_diffusers_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RunFault, match="no folder 'nobody/nothing', and the model could not be fetched"):
        load_diffusers("nobody/nothing")
    with pytest.raises(UserError, match=r"no folder 'nothing'; expected one saved by diffusers"):
        load_diffusers("nothing")
    with pytest.raises(UserError, match=r"no .*config\.json; expected a folder saved by diffusers"):
        load_diffusers(str(tmp_path))
    tiny(diffusers).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no .*scheduler_config\.json"):
        load_diffusers(str(tmp_path))
    diffusers.ScoreSdeVeScheduler().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has a ScoreSdeVeScheduler without beta_schedule"):
        load_diffusers(str(tmp_path))
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    load_diffusers(str(tmp_path))
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    kept = load_file(weights)
    save_file({k: v for k, v in kept.items() if k != "conv_in.bias"}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit its config\.json: missing keys conv_in\.bias"):
        load_diffusers(str(tmp_path))
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"expected diffusion_pytorch_model\.safetensors"):
        load_diffusers(str(tmp_path))
    tiny(diffusers, num_class_embeds=10).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a class-conditional model; expected an unconditional UNet2DModel"):
        load_diffusers(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_diffusers(str(tmp_path))
