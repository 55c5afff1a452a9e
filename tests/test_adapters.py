"""Denoisers from elsewhere: they answer as when called directly, and what would void a certificate is refused.

Also MemNet, and the one-shot diffusion denoiser against its formulas and against diffusers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import sys
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import trained
from torch import Tensor, nn

from certify.errors import RunFault, UserError
from denoisers import load_denoiser
from denoisers.adapters import Adapted, check_contract, load_callable, load_deepinv, load_torchscript
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
    """One block of one residual, every convolution the identity: the answer can be followed with a pencil."""
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
        with pytest.raises(UserError, match=r"beyond this diffusion model: its noise ends at 1\.2"):
            timestep(schedule, beyond)
    with pytest.raises(UserError, match="beyond"):
        timestep([0.9, 0.8, 0.0], 5.0)  # a schedule that ends without any image


class Oracle(nn.Module):
    """A network that knows the image, and answers truthfully for the level it is told."""

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


@pytest.mark.parametrize(("library", "load"), [("diffusers", load_diffusers), ("deepinv", load_deepinv)])
def test_a_missing_library_is_named(library: str, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}: pip install 'certify-toolkit\[denoisers\]'$"):
        load("x")


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
    check_contract(denoiser, (3, 18, 17), 0.25)  # sides that the network does not take by itself
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
def test_diffusers_folders_that_do_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RunFault, match="no folder 'nobody/nothing', and no such model could be fetched"):
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
    with pytest.raises(UserError, match="holds a class-conditional model; expected a UNet2DModel"):
        load_diffusers(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_diffusers(str(tmp_path))


# TorchScript


class Blind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, noisy: Tensor) -> Tensor:
        return self.convolution(noisy)


class TakesNumber(Blind):
    def forward(self, noisy: Tensor, sigma: float) -> Tensor:
        return self.convolution(noisy) * (1 - sigma)


class TakesTensor(Blind):
    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        return self.convolution(noisy) * (1 - level.view(-1, 1, 1, 1))


class TakesMore(Blind):
    def forward(self, noisy: Tensor, sigma: float, steps: int) -> Tensor:
        return self.convolution(noisy) * (1 - sigma) * steps


class TakesText(Blind):
    def forward(self, noisy: Tensor, sigma: str) -> Tensor:
        return self.convolution(noisy)


def torchscript(net: nn.Module, path: Path, how: str) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        example = (IMAGES, torch.tensor(0.25)) if isinstance(net, TakesTensor) else (IMAGES,)
        found = torch.jit.trace(net.eval(), example) if how == "trace" else torch.jit.script(net.eval())
        torch.jit.save(torch.jit.freeze(found) if how == "freeze" else found, str(path))
    return path


@pytest.mark.parametrize(
    ("net", "factor", "how"),
    [
        (Blind(), 1.0, "script"),
        (Blind(), 1.0, "trace"),
        (Blind(), 1.0, "freeze"),
        (TakesNumber(), 0.75, "script"),
        (TakesTensor(), 0.75, "script"),
        (TakesTensor(), 0.75, "trace"),
    ],
)
def test_torchscript(net: Blind, factor: float, how: str, tmp_path: Path) -> None:
    path = torchscript(net, tmp_path / "denoiser.pt", how)
    denoiser = load_torchscript(str(path))
    with torch.no_grad():
        assert torch.allclose(denoiser(IMAGES, 0.25), factor * net.convolution(IMAGES), atol=1e-6)
    code = hashlib.sha256(path.read_bytes()).hexdigest()
    assert denoiser.describe() == {"name": "denoiser.pt", "code_sha256": code}
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    check_contract(denoiser, (3, 16, 16), 0.25)
    if factor != 1:
        with pytest.raises(UserError, match=r"denoiser denoiser\.pt needs the noise level"):
            denoiser(IMAGES)


def test_torchscript_that_does_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no TorchScript file"):
        load_torchscript(str(tmp_path / "nothing.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pt is not a TorchScript file"):
        load_torchscript(str(tmp_path / "text.pt"))
    torch.save(Blind().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt is not a TorchScript file"):
        load_torchscript(str(tmp_path / "weights.pt"))
    with pytest.raises(UserError, match=r"also wants steps; expected forward\(noisy\) or forward\(noisy, sigma\)"):
        load_torchscript(str(torchscript(TakesMore(), tmp_path / "more.pt", "script")))
    with pytest.raises(UserError, match="takes the noise level as str; expected a float or a Tensor"):
        load_torchscript(str(torchscript(TakesText(), tmp_path / "text.pt", "script")))


# Python

MODULE = """
import numpy
import torch
from torch import nn

class Half(nn.Module):
    def __init__(self, by=2):
        super().__init__()
        self.by, self.weight = by, nn.Parameter(torch.ones(()))
    def forward(self, x): return x / self.by
class Level(Half):
    def forward(self, noisy, sigma=None): return noisy - sigma
class Needy(nn.Module):
    def __init__(self, path, strength): super().__init__()
instance = Half(4)
def factory(): return Half(5)
def function(noisy, sigma): return noisy + sigma
def positional(noisy, level, /): return noisy + 2 * level
def blind(images): return images / 3
def named(images, *, noise_level): return images + 3 * noise_level
def optional(images, strength=7): return images / strength
def arrays(noisy, sigma): return numpy.sqrt(numpy.abs(noisy.numpy())).astype("float64")
def makes_function(): return function
def three(noisy, sigma, steps): return noisy
def broken(): raise RuntimeError("no such file\\nhere")
def nothing(): return 5
value = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "denoisers_of_somebody"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("instance", IMAGES / 4),
        ("Half", IMAGES / 2),
        ("Level", IMAGES - 0.25),
        ("factory", IMAGES / 5),
        ("makes_function", IMAGES + 0.25),
        ("function", IMAGES + 0.25),
        ("positional", IMAGES + 0.5),
        ("blind", IMAGES / 3),
        ("named", IMAGES + 0.75),
        ("optional", IMAGES / 7),  # another option than the level stays at its default
        ("arrays", IMAGES.sqrt()),
    ],
)
def test_callables(attribute: str, expected: Tensor, module: str, tmp_path: Path) -> None:
    denoiser = load_callable(f"{module}:{attribute}")
    out = denoiser(IMAGES, 0.25)
    assert torch.allclose(out, expected)
    assert out.dtype == IMAGES.dtype
    code = hashlib.sha256((tmp_path / f"{module}.py").read_bytes()).hexdigest()
    assert denoiser.describe() == {"name": f"{module}:{attribute}", "code_sha256": code}
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    check_contract(denoiser, (3, 16, 16), 0.25)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("three", r"also wants steps; expected forward\(noisy\) or forward\(noisy, sigma\)$"),
        ("broken", r":broken failed: RuntimeError: no such file$"),
        ("nothing", r":nothing gave int; expected a module or a function f\(noisy, sigma\)$"),
        ("value", r":value is int; expected a module"),
        ("Needy", r":Needy is a class that needs arguments; write a function without any that returns it built$"),
        ("absent", r"has no 'absent'; it has"),
    ],
)
def test_callables_that_do_not_do(attribute: str, message: str, module: str) -> None:
    with pytest.raises(UserError, match=message):
        load_callable(f"{module}:{attribute}")


def test_an_adapted_network_is_still_seen_through() -> None:
    """Tracing, on which folding rests, goes through the wrapper of a plain network, and copies are independent."""
    adapted = Adapted(trained(MemNet(4, 1, 1)), {"name": "memnet"})
    traced = torch.fx.symbolic_trace(adapted, concrete_args={"sigma": 0.25, "generator": None})
    assert torch.allclose(traced(IMAGES, 0.25, None), adapted(IMAGES, 0.25))
    other = copy.deepcopy(adapted).to(torch.bfloat16)
    assert next(other.parameters()).dtype == torch.bfloat16
    assert next(adapted.parameters()).dtype == torch.float32


# deepinv


@pytest.mark.slow
def test_deepinv_networks_are_called_as_deepinv_does(tmp_path: Path) -> None:
    deepinv = pytest.importorskip("deepinv")
    torch.manual_seed(0)
    own = trained(deepinv.models.DnCNN(pretrained=None)).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in own.state_dict().items()}}, tmp_path / "dncnn.pth")
    denoiser = load_deepinv("DnCNN", str(tmp_path / "dncnn.pth"))
    with torch.no_grad():
        assert torch.equal(denoiser(IMAGES, 0.25), own(IMAGES, 0.25))
    assert denoiser.describe()["weights"] == "dncnn.pth (wrapper prefixes taken off)"
    assert denoiser.describe()["version"] == deepinv.__version__
    with pytest.raises(UserError, match=r"dncnn\.pth does not fit deepinv:DnCNN"):
        load_deepinv("DnCNN", str(tmp_path / "dncnn.pth"), channels=1)
    told = load_deepinv("DRUNet", "untrained")  # in seconds: half a minute of orthogonal weights is left out
    assert not torch.equal(told(IMAGES, 0.1), told(IMAGES, 0.5))
    with pytest.raises(UserError, match="needs the noise level"):
        told(IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MedianFilter", "BilateralFilter", "TVDenoiser"])
def test_deepinv_without_weights(name: str) -> None:
    """Deepinv's own answer to each image alone; its total variation would mix the images of a batch."""
    deepinv = pytest.importorskip("deepinv")
    denoiser = load_deepinv(name)
    with torch.no_grad():
        alone = torch.cat([getattr(deepinv.models, name)()(image[None], 0.25) for image in IMAGES])
    for _ in range(2):
        assert torch.equal(denoiser(IMAGES, 0.25), alone)
    check_contract(denoiser, (3, 16, 16), 0.25)
    assert denoiser.describe()["weights"] == "none"
    with pytest.raises(UserError, match=f"deepinv:{name} has no weights to load .* into; write deepinv:{name}$"):
        load_deepinv(name, __file__)


@pytest.mark.slow
def test_deepinv_total_variation_as_it_is_would_mix_images() -> None:
    pytest.importorskip("deepinv")
    mixed = load_callable("deepinv.models:TGVDenoiser")
    mixed.inner.n_it_max = 30
    mixed.inner.crit = 1e-2
    with pytest.raises(UserError, match="answers differently alone and in a batch"):
        check_contract(mixed, (3, 12, 12), 0.25)


@pytest.mark.slow
def test_deepinv_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepinv")
    with pytest.raises(UserError, match=r"unknown denoiser 'DRUnet'; nearest: DRUNet.*; not in deepinv\.models$"):
        load_deepinv("DRUnet")
    for no_denoiser in ("VarNet", "EquivariantDenoiser", "to_complex_denoiser", "Tensor"):
        with pytest.raises(UserError, match=f"unknown denoiser '{no_denoiser}'"):
            load_deepinv(no_denoiser)
    with pytest.raises(UserError, match=r"no weights file 'nothing\.pth' for deepinv:DRUNet"):
        load_deepinv("DRUNet", "nothing.pth")
    with pytest.raises(UserError, match=r"publishes no weights for UNet; pass them in a file: deepinv:UNet=FILE$"):
        load_deepinv("UNet")

    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(RunFault, match=r"could not fetch the weights of deepinv:DnCNN: .*; pass a file: deepinv:DnCNN"):
        load_deepinv("DnCNN")


@pytest.mark.slow
def test_deepinv_downloads_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A published file that would create another one when unpickled is refused, though deepinv would load it."""
    pytest.importorskip("deepinv")

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "pwned"), "w")

    hostile = tmp_path / "dncnn.pth"
    torch.save({"weight": Hostile()}, hostile)

    def fetch(*_: Any, **__: Any) -> Any:
        return torch.load(hostile, weights_only=False)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    original = nn.init.orthogonal_
    with pytest.raises(UserError, match="cannot build deepinv:DnCNN"):
        load_deepinv("DnCNN")
    assert not (tmp_path / "pwned").exists()
    assert nn.init.orthogonal_ is original


# The contract


class Doing(nn.Module):
    """A denoiser that does something."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, noisy: Tensor, sigma: float | None = None, *, generator: torch.Generator | None = None) -> Any:
        return self.what(noisy)


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (Doing(nn.Conv2d(1, 1, 3, padding=1)), r"fails on images of 3x8x8: .*; does it take that many channels"),
        (Doing(nn.Linear(16, 16)), "fails on images of 3x8x8: .*, and that size"),
        (Doing(lambda x: x[:, :1]), r"returned \(3, 1, 8, 8\) for 3 images of 3x8x8; expected \(3, 3, 8, 8\)$"),
        (Doing(nn.Upsample(scale_factor=2)), r"returned \(3, 3, 16, 16\) for 3 images of 3x8x8"),
        (Doing(lambda x: x.mean(0, keepdim=True).expand(3, -1, -1, -1)), r"returned \(3, 3, 8, 8\) for 1 images"),
        (Doing(lambda x: (x, x)), "returned tuple for 3 images"),
        (Doing(lambda x: x.log()), "returned NaN or infinity at sigma = 0.5; expected finite pixels$"),
        (Doing(nn.BatchNorm2d(3)), "answers differently alone and in a batch"),
        (Doing(lambda x: x - x.mean()), "answers differently alone and in a batch"),
        (
            Doing(lambda x: x + 0.01 * torch.randn_like(x)),
            r"answers differently .* \(left in training mode\? random\?\)",
        ),
        (Doing(lambda x: x + 3e-4 * (len(x) > 1)), "answers differently alone and in a batch, by 0.0003"),
        (Doing(lambda x: x.clamp_(0, 1)), r"writes into the images it is given; work on a copy"),
    ],
)
def test_the_contract_is_checked(denoiser: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_contract(denoiser, (3, 8, 8), 0.5)
    assert "\n" not in str(caught.value)


def test_a_denoiser_that_remembers_is_refused() -> None:
    class Remembers(nn.Module):
        last = torch.zeros(1, 3, 8, 8)

        def forward(self, noisy: Tensor, sigma: float) -> Tensor:
            before, self.last = self.last, noisy
            return noisy + 0.1 * before if before.shape == noisy.shape else noisy

    with pytest.raises(UserError, match="answers differently"):
        check_contract(Remembers(), (3, 8, 8), 0.25)


def test_the_contract_is_kept_by_our_own() -> None:
    kept: list[nn.Module] = [load_denoiser("median"), load_denoiser("gaussian"), trained(MemNet(8, 1, 1)).eval()]
    for denoiser in [*kept, Doing(nn.BatchNorm2d(3)).eval(), Doing(torch.zeros_like)]:
        check_contract(denoiser, (3, 17, 8), 0.5)
