"""Denoisers from elsewhere: they answer as when called directly, and what would void a certificate is refused."""

from __future__ import annotations

import copy
import hashlib
import sys
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import check_denoiser, trained
from torch import Tensor, nn

from certify.errors import RunFault, UserError
from denoisers import load_denoiser
from denoisers.adapters import Adapted, load_callable, load_deepinv, load_torchscript
from denoisers.diffusion import load_diffusers
from denoisers.memnet import MemNet

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIGMAS = (0.12, 0.25, 0.5, 1.0)


@pytest.mark.parametrize(("library", "load"), [("diffusers", load_diffusers), ("deepinv", load_deepinv)])
def test_a_missing_library_is_named(library: str, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}: pip install 'certify-toolkit\[denoisers\]'$"):
        load("x")


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
    denoiser = load_torchscript(str(path), trust_code=True)
    with torch.no_grad():
        assert torch.allclose(denoiser(IMAGES, 0.25), factor * net.convolution(IMAGES), atol=1e-6)
    code = hashlib.sha256(path.read_bytes()).hexdigest()
    assert denoiser.describe() == {"name": "denoiser.pt", "code_sha256": code}
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    check_denoiser(denoiser, (3, 16, 16), 0.25)
    if factor != 1:
        with pytest.raises(UserError, match=r"denoiser denoiser\.pt needs the noise level"):
            denoiser(IMAGES)


def test_unsuitable_torchscript(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no TorchScript file"):
        load_torchscript(str(tmp_path / "nothing.pt"), trust_code=True)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pt is not a TorchScript file"):
        load_torchscript(str(tmp_path / "text.pt"), trust_code=True)
    torch.save(Blind().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"weights\.pt is not a TorchScript file"):
        load_torchscript(str(tmp_path / "weights.pt"), trust_code=True)
    with pytest.raises(UserError, match=r"also requires steps; expected forward\(noisy\) or forward\(noisy, sigma\)"):
        load_torchscript(str(torchscript(TakesMore(), tmp_path / "more.pt", "script")), trust_code=True)
    with pytest.raises(UserError, match="takes the noise level as str; expected a float or a Tensor"):
        load_torchscript(str(torchscript(TakesText(), tmp_path / "text.pt", "script")), trust_code=True)


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
class Plain(nn.Module):
    def forward(self, x): return x / 6
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
        ("Plain", IMAGES / 6),  # a class that leaves __init__ to its parent
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
    check_denoiser(denoiser, (3, 16, 16), 0.25)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("three", r"also requires steps; expected forward\(noisy\) or forward\(noisy, sigma\)$"),
        ("broken", r":broken failed: RuntimeError: no such file$"),
        ("nothing", r":nothing gave int; expected a module or a function f\(noisy, sigma\)$"),
        ("value", r":value is int; expected a module"),
        ("Needy", r":Needy is a class that needs arguments; expected a function without arguments that builds it$"),
        ("absent", r"has no 'absent'; it has"),
    ],
)
def test_unsuitable_callables(attribute: str, message: str, module: str) -> None:
    with pytest.raises(UserError, match=message):
        load_callable(f"{module}:{attribute}")


def test_the_parts_of_an_adapted_network_are_visible() -> None:
    """Tracing, on which folding rests, goes through the wrapper of a plain network, and copies are independent."""
    adapted = Adapted(trained(MemNet(4, 1, 1)), {"name": "memnet"})
    traced = torch.fx.symbolic_trace(adapted, concrete_args={"sigma": 0.25, "generator": None})
    assert torch.allclose(traced(IMAGES, 0.25, None), adapted(IMAGES, 0.25))
    other = copy.deepcopy(adapted).to(torch.bfloat16)
    assert next(other.parameters()).dtype == torch.bfloat16
    assert next(adapted.parameters()).dtype == torch.float32


# deepinv


@pytest.mark.slow
def test_deepinv_networks_get_the_same_call_as_in_deepinv(tmp_path: Path) -> None:
    deepinv = pytest.importorskip("deepinv")
    torch.manual_seed(0)
    own = trained(deepinv.models.DnCNN(pretrained=None)).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in own.state_dict().items()}}, tmp_path / "dncnn.pth")
    denoiser = load_deepinv("DnCNN", str(tmp_path / "dncnn.pth"))
    with torch.no_grad():
        assert torch.equal(denoiser(IMAGES, 0.25), own(IMAGES, 0.25))
    assert denoiser.describe()["weights"] == "dncnn.pth (without module. in its names)"
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
    check_denoiser(denoiser, (3, 16, 16), 0.25)
    assert denoiser.describe()["weights"] == "none"
    with pytest.raises(UserError, match=f"deepinv:{name} has no weights to load .* into; write deepinv:{name}$"):
        load_deepinv(name, __file__)


@pytest.mark.slow
def test_deepinv_total_variation_would_mix_images_without_resets() -> None:
    pytest.importorskip("deepinv")
    mixed = load_callable("deepinv.models:TGVDenoiser")
    mixed.inner.n_it_max = 30
    mixed.inner.crit = 1e-2
    with pytest.raises(
        UserError, match=r"answers differently (alone and in a batch|when called twice on the same batch)"
    ):
        check_denoiser(mixed, (3, 12, 12), 0.25)


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
        (
            Doing(lambda x: x[:, :1]),
            r"returned torch.float32 \(16, 1, 8, 8\) for 16 images of 3x8x8; expected floating-point \(16, 3, 8, 8\)$",
        ),
        (Doing(nn.Upsample(scale_factor=2)), r"returned torch.float32 \(16, 3, 16, 16\) for 16 images of 3x8x8"),
        (
            Doing(lambda x: x.mean(0, keepdim=True).expand(16, -1, -1, -1)),
            r"returned torch.float32 \(16, 3, 8, 8\) for 1 images",
        ),
        (Doing(lambda x: x.round().long()), r"returned torch.int64 \(16, 3, 8, 8\) for 16 images"),
        (Doing(lambda x: (x, x)), "returned tuple for 16 images"),
        (Doing(lambda x: x.log()), "returned NaN or infinity; expected finite pixels$"),
        (Doing(nn.BatchNorm2d(3, track_running_stats=False)), "answers differently alone and in a batch"),
        (Doing(lambda x: x - x.mean()), "answers differently alone and in a batch"),
        (Doing(lambda x: x + 0.01 * torch.randn_like(x)), "answers differently when called twice on the same batch"),
        (Doing(lambda x: x + 1e-3 * (len(x) > 1)), r"answers differently alone and in a batch \(by up to 0.001\)"),
        (Doing(lambda x: x.clamp_(0, 1)), r"writes into the images it is given; work on a copy"),
    ],
)
def test_the_contract_is_checked(denoiser: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_denoiser(denoiser, (3, 8, 8), 0.5)
    assert "\n" not in str(caught.value)


def test_a_stateful_denoiser_is_refused() -> None:
    class Remembers(nn.Module):
        last = torch.zeros(1, 3, 8, 8)

        def forward(self, noisy: Tensor, sigma: float) -> Tensor:
            before, self.last = self.last, noisy
            return noisy + 0.1 * before if before.shape == noisy.shape else noisy

    with pytest.raises(UserError, match="answers differently"):
        check_denoiser(Remembers(), (3, 8, 8), 0.25)


def test_our_denoisers_fulfil_the_contract() -> None:
    kept: list[nn.Module] = [load_denoiser("median"), load_denoiser("gaussian"), trained(MemNet(8, 1, 1)).eval()]
    for denoiser in [*kept, Doing(nn.BatchNorm2d(3)).eval(), Doing(torch.zeros_like)]:
        check_denoiser(denoiser, (3, 17, 8), 0.5)
