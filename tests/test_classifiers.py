"""Frozen classifiers: names, files, settings, checkpoints in common layouts."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock

from certify import SmoothedClassifier, load_classifier
from certify.errors import UserError
from certify.models import resolve as hub
from certify.models.builtin import CifarResNet
from certify.models.checkpoints import read_state_dict
from certify.models.classifier import Classifier
from certify.types import FAILED


def test_name_index_equals_the_libraries_own() -> None:
    import timm
    import torchvision

    assert hub.library_names("timm") == set(timm.list_models())
    assert hub.library_names("torchvision") == set(torchvision.models.list_models(module=torchvision.models))


@pytest.mark.parametrize(
    ("model", "kind", "name"),
    [
        ("digits", "built-in", "digits"),
        ("cifar_resnet110", "built-in", "cifar_resnet110"),
        ("resnet50", "timm", "resnet50"),
        ("resnet50.a1_in1k", "timm", "resnet50.a1_in1k"),
        ("torchvision:resnet50", "torchvision", "resnet50"),
        ("squeezenet1_0", "torchvision", "squeezenet1_0"),
        ("hf-hub:owner/name", "timm", "hf-hub:owner/name"),
        ("package.module:thing", "python", "package.module:thing"),
    ],
)
def test_names_are_resolved_to_sources(model: str, kind: str, name: str) -> None:
    assert hub.find_source(model) == hub.ModelSource(kind, name)


def test_a_checkpoint_that_torchvision_publishes_gets_torchvisions_transform() -> None:
    """ResNet-50's two published recipes resize to 256 and 232, timm's crops 0.95 bicubic: the file's name tells."""
    import torchvision

    for weights in torchvision.models.ResNet50_Weights:
        file = weights.url.rsplit("/", 1)[-1]
        assert hub.find_source("resnet50", file) == hub.ModelSource("torchvision", "resnet50")
    assert hub.find_source("resnet50", "mine.pth") == hub.ModelSource("timm", "resnet50")


def test_published_checkpoint_has_its_own_transform(tmp_path: Path) -> None:
    import torchvision

    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18-f37072fd.pth")
    classifier = load_classifier("resnet18", weights=tmp_path / "resnet18-f37072fd.pth")
    assert classifier.input.steps == "shorter side to 256 (bilinear), centre crop 224"


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_cifar_resnets_have_the_published_size(depth: int) -> None:
    """He et al. 2016, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million parameters."""
    published = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}[depth]
    parameters = sum(p.numel() for p in CifarResNet(depth).parameters()) / 1e6
    assert parameters == pytest.approx(published, rel=0.03)


def test_digits_labels_and_description() -> None:
    classifier = load_classifier("digits")
    assert (classifier.num_classes, classifier.input.size, classifier.training) == (10, (1, 8, 8), False)
    assert not any(p.requires_grad for p in classifier.parameters())
    described = classifier.describe()
    assert len(described["sha256"]) == 64
    assert described["weights"] == "digits.safetensors"
    with pytest.raises(UserError, match="frozen"):
        classifier.train()


def test_shipped_digits_weights_carry_a_card() -> None:
    from safetensors import safe_open

    from certify.models.builtin import SHIPPED

    with safe_open(SHIPPED, "pt") as file:
        card = file.metadata()
    assert card["command"] == "python -m training.digits --seed 0"
    assert SHIPPED.stat().st_size < 1_000_000


@pytest.mark.slow
def test_shipped_digits_weights_come_from_the_script(tmp_path: Path) -> None:
    """The documented command gives weights of the same held-out accuracy (bits differ between processors)."""
    from training.digits import train

    _, accuracy = train(0)
    assert accuracy == pytest.approx(0.948, abs=0.02)


def net() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(20)


def wrapped(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + k: v for k, v in state.items()}


@pytest.mark.parametrize("container", ["", "state_dict", "model", "model_state"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "1.", "1.module."])
def test_checkpoint_layouts_and_prefixes(container: str, prefix: str, tmp_path: Path) -> None:
    own = net()
    state: Any = wrapped(own.state_dict(), prefix)
    path = tmp_path / "checkpoint.th"
    torch.save({container: state, "epoch": 3} if container else state, path)
    classifier = load_classifier("cifar_resnet20", weights=path)
    for key, value in own.state_dict().items():
        assert torch.equal(classifier.net.state_dict()[key], value)
    assert classifier.weights.startswith("checkpoint.th")
    parts = sorted(f"{part}." for part in prefix.split(".") if part)
    assert classifier.weights == "checkpoint.th" + (f" (without {', '.join(parts)} in its names)" if parts else "")


class OptionB(nn.Module):
    """ResNet-20 with 1x1 convolutions in its shortcuts, out of torchvision's blocks: an independent reference."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for i, (before, here) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            shrink = nn.Sequential(nn.Conv2d(before, here, 1, 2, bias=False), nn.BatchNorm2d(here)) if i > 1 else None
            blocks = [BasicBlock(before, here, 1 + (i > 1), shrink), BasicBlock(here, here), BasicBlock(here, here)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.fc(nn.functional.avg_pool2d(x, 8).flatten(1))
        return logits


class Normalise(nn.Module):
    """The layer in front of the published networks: its constants are no buffers, so their files lack them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = torch.tensor((0.4914, 0.4822, 0.4465)), torch.tensor((0.2023, 0.1994, 0.2010))
        return (x - mean[:, None, None]) / std[:, None, None]


def test_published_noise_trained_classifiers_load(tmp_path: Path) -> None:
    """Cohen et al. 2019 saved ``Sequential(normalise, network)`` with option B shortcuts, under ``state_dict``."""
    torch.manual_seed(0)
    theirs = nn.Sequential(Normalise(), nn.DataParallel(OptionB()))
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    theirs.eval()
    state = theirs.state_dict()
    assert {"1.module.layer2.0.downsample.0.weight", "1.module.fc.weight"} <= state.keys()
    torch.save({"epoch": 90, "arch": "cifar_resnet20", "state_dict": state}, tmp_path / "checkpoint.pth.tar")
    classifier = load_classifier("cifar_resnet20", weights=tmp_path / "checkpoint.pth.tar")
    assert classifier.weights == "checkpoint.pth.tar (without 1., module. in its names)"
    images = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(classifier.logits(images), theirs[1].module(theirs[0](images)), atol=1e-5)
    normalised = {**state, "0.mean": torch.zeros(3), "0.std": torch.ones(3)}
    torch.save(normalised, tmp_path / "normalised.pth")
    with pytest.raises(
        UserError, match=r"contains more than cifar_resnet20, whose names begin with 1\. there; select "
    ) as e:
        load_classifier("cifar_resnet20", weights=tmp_path / "normalised.pth")
    network = load_classifier("cifar_resnet20", weights=str(e.value).partition("that part: ")[2].split()[0])
    assert network.identity() == classifier.identity()


def test_safetensors_and_old_checkpoints(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    own = net()
    save_file(own.state_dict(), tmp_path / "weights.bin")  # recognised by content, not by name
    assert load_classifier("cifar_resnet20", weights=tmp_path / "weights.bin").num_classes == 10
    old = {k: v for k, v in own.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert load_classifier("cifar_resnet20", weights=tmp_path / "old.pth").num_classes == 10


def test_nothing_is_loaded_partially(tmp_path: Path) -> None:
    state = net().state_dict()
    state["extra.weight"] = torch.zeros(3)
    del state["linear.bias"]
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"1 missing \(linear.bias\); 1 unexpected \(extra.weight\)"):
        load_classifier("cifar_resnet20", weights=tmp_path / "odd.pth")


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"state_dict": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match=r"asks for .* which can run code: refused"):
        read_state_dict(tmp_path / "hostile.pth")
    assert not (tmp_path / "harm").exists()


class Brightness(nn.Module):
    """Two classes by the mean; with a parameter, so that freezing shows."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([self.threshold - mean, mean - self.threshold], dim=1)


def bright(x: torch.Tensor) -> torch.Tensor:
    return (x.mean(dim=(1, 2, 3)) > 0.5).long()


@pytest.mark.parametrize("model", [Brightness(), Brightness, bright, lambda: bright])
def test_python_objects_are_classifiers(model: Any) -> None:
    """A module, a class, a function, a factory: as with ``package.module:name``, and the true radius is known."""
    classifier = load_classifier(model, input_size=(3, 8, 8), num_classes=2)
    g = SmoothedClassifier(classifier, sigma=0.25)
    found = g.certify(torch.full((3, 8, 8), 0.51), n=2000)
    truth = 0.01 * 192**0.5  # the distance to the plane where the mean is 0.5, whatever the noise
    assert (found.prediction, 0.5 * truth < found.radius <= truth) == (1, True)
    if isinstance(model, nn.Module):
        assert all(p.requires_grad for p in model.parameters())  # the user's own is left alone
    with pytest.raises(UserError, match=r"input_size=\(3, 32, 32\)"):
        load_classifier(model)


def test_invalid_objects_have_advice() -> None:
    with pytest.raises(UserError, match="expected a module"):
        load_classifier(3, input_size=(3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a module"):
        SmoothedClassifier(3, sigma=0.25).certify(torch.zeros(3, 8, 8))  # type: ignore[arg-type]


def test_random_function_is_refused() -> None:
    draws = torch.Generator().manual_seed(0)
    classifier = load_classifier(
        lambda x: torch.randint(3, (len(x),), generator=draws), input_size=(1, 8, 8), num_classes=3
    )
    with pytest.raises(UserError, match="answers differently when called twice"):
        SmoothedClassifier(classifier, sigma=0.25).predict(torch.zeros(1, 8, 8), n=100)


@pytest.mark.slow
def test_user_module_named_analysis_can_be_imported(tmp_path: Path) -> None:
    """With -m, and with a model out of it, the current folder comes first."""
    for name in ("analysis", "training", "denoisers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "mine.py").write_text("def label(x):\n    return (x.mean(dim=(1, 2, 3)) > 0.3).long()\n")
    command = [sys.executable, "-m", "certify", "--model", "mine:label", "--input-size", "1x8x8", "--num-classes", "10"]
    command += "--data digits --max 2 --sigma 0.25 --n 100 --denoiser median --out r.jsonl".split()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.png").is_file()


def test_plain_values_beside_the_weights_are_read(tmp_path: Path) -> None:
    """Training scripts save their best accuracy as numpy's number, and their options; torch alone refuses both."""
    beside = {"best": np.float64(0.93), "epoch": np.int64(9), "ema": np.bool_(True), "args": argparse.Namespace(lr=0.1)}
    torch.save({"state_dict": net().state_dict(), **beside}, tmp_path / "best.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "best.pth", weights_only=True)
    assert load_classifier("cifar_resnet20", weights=tmp_path / "best.pth").num_classes == 10
    torch.save({"state_dict": net().state_dict(), "objects": np.array([tmp_path], dtype=object)}, tmp_path / "o.pth")
    with pytest.raises(UserError, match="can run code: refused"):
        load_classifier("cifar_resnet20", weights=tmp_path / "o.pth")


def test_timm_settings_are_the_models_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Size, normalisation and transform agree with timm's own on a photograph."""
    import timm
    from sklearn.datasets import load_sample_image
    from timm.data import create_transform, resolve_data_config

    own = timm.create_model("test_vit", pretrained=False)
    torch.save(own.state_dict(), tmp_path / "vit.pth")
    classifier = load_classifier("test_vit", weights=tmp_path / "vit.pth")
    config = resolve_data_config(pretrained_cfg=own.pretrained_cfg)
    picture = Image.fromarray(load_sample_image("flower.jpg"))
    reference = create_transform(**config, is_training=False)(picture)[None]
    image = classifier.input.transform(picture)[None]
    assert 0 <= image.min() <= image.max() <= 1
    assert torch.allclose((image - classifier.mean) / classifier.std, reference, atol=1e-6)
    assert torch.allclose(classifier.logits(image), own.eval()(reference), atol=1e-4)


def test_torchvision_settings_are_the_models_own(tmp_path: Path) -> None:
    import torchvision
    from sklearn.datasets import load_sample_image

    own = torchvision.models.squeezenet1_0(num_classes=1000).eval()
    torch.save(own.state_dict(), tmp_path / "s.pth")
    classifier = load_classifier("squeezenet1_0", weights=tmp_path / "s.pth")
    picture = Image.fromarray(load_sample_image("china.jpg"))
    reference = torchvision.models.SqueezeNet1_0_Weights.DEFAULT.transforms()(picture)[None]
    image = classifier.input.transform(picture)[None]
    assert torch.allclose((image - classifier.mean) / classifier.std, reference, atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(classifier.logits(image), own(reference), atol=1e-4)
    assert classifier.class_names is not None
    assert classifier.class_names[0][:2] == ("n01440764", "tench")


@pytest.mark.slow
def test_a_published_model_from_the_cache_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's cache, laid out as its client does, serves a machine that is offline (in a process of its own)."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path / "hub" / "models--timm--test_vit.r160_in1k"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), snapshot / "model.safetensors")
    code = "from certify import load_classifier; print(load_classifier('test_vit').weights)"
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.stdout.strip() == "published (timm/test_vit.r160_in1k)", done.stderr[-500:]


def test_torchvisions_files_are_found_in_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name in models.list_models(module=models):
        source = hub.ModelSource("torchvision", name)
        assert not hub.cached(source)
        file = folder / Path(models.get_model_weights(name).DEFAULT.url).name
        file.touch()
        assert hub.cached(source), file
        file.unlink()


@pytest.mark.parametrize("leftover", [pytest.param(False, marks=pytest.mark.slow), True])
def test_command_fails_fast_without_network(leftover: bool, tmp_path: Path) -> None:
    """In a separate process, with an empty cache or the leftovers of a failed download."""
    if leftover:
        (tmp_path / "hub" / "models--timm--resnet50.a1_in1k" / "snapshots").mkdir(parents=True)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "certify", "--model", "resnet50", "--sigma", "0.25"]
    start = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert time.perf_counter() - start < 20  # the hub client's own retries take 47 s
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "could not fetch" in line
    assert "--weights FILE" in line


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, torch.rand(2, 3, 8, 8)), path)
    return path


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()


def test_torchscript(tmp_path: Path) -> None:
    path = script(small(), tmp_path / "net.pt")
    several = load_classifier(str(path), trust_code=True, input_size=(3, 8, 8), mean=torch.full((3,), 0.5), std=[0.25])
    classifier = load_classifier(str(path), trust_code=True, input_size=(3, 8, 8), mean=0.5, std=0.25)
    assert classifier.identity() == several.identity()
    x = torch.rand(7, 3, 8, 8)
    assert torch.allclose(classifier.logits(x), small()((x - 0.5) / 0.25), atol=1e-5)
    assert (classifier.num_classes, classifier.input.mean) == (5, (0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="input_size"):
        load_classifier(str(path), trust_code=True)


@pytest.mark.parametrize("batch", [None, 4])
def test_onnx(batch: int | None, tmp_path: Path) -> None:
    """A graph y = flatten(x) . W, with an open or a fixed batch size, labels as numpy does."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch or "n", 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch or "n", 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "linear.onnx")
    classifier = load_classifier(str(tmp_path / "linear.onnx"))
    x = torch.rand(7, 3, 2, 2)
    assert classifier(x).tolist() == (x.flatten(1).numpy() @ weight).argmax(1).tolist()
    assert (classifier.num_classes, classifier.input.size) == (5, (3, 2, 2))
    assert len(classifier.describe()["code_sha256"]) == 64


CALLABLES = """
import torch
from torch import nn

def build(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
def labels(images): return (images.mean(dim=(1, 2, 3)) > 0.5).long()
labels.num_classes = 2
labels.input_size = (3, 2, 2)
def logits(images): return images.flatten(1)[:, :3].numpy()
logits.mean, logits.std = [0.5], [2]
module = nn.Flatten()
number = 3
"""


def test_python_callables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(CALLABLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    x = torch.rand(6, 3, 2, 2)
    labels = load_classifier("my_models:labels")
    assert labels(x).tolist() == (x.mean(dim=(1, 2, 3)) > 0.5).long().tolist()
    with pytest.raises(UserError, match="labels only"):
        labels.logits(x)
    assert load_classifier("my_models:build", input_size=(3, 2, 2)).num_classes == 4
    assert (
        load_classifier("my_models:logits", input_size=(3, 2, 2))(x).tolist() == x.flatten(1)[:, :3].argmax(1).tolist()
    )
    assert load_classifier("my_models:logits", input_size=(3, 2, 2)).logits(x).equal(((x - 0.5) / 2).flatten(1)[:, :3])
    assert load_classifier("my_models:module", input_size=(3, 2, 2)).num_classes == 12
    with pytest.raises(UserError, match="has no 'absent'"):
        load_classifier("my_models:absent")
    with pytest.raises(UserError, match="expected a module"):
        load_classifier("my_models:number")


def test_the_code_of_a_callable_is_part_of_its_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = set()
    for name in ("code_one", "code_two"):
        (tmp_path / f"{name}.py").write_text(f"# {name}\n{CALLABLES}")
        digests.add(load_classifier(f"{name}:labels").describe()["code_sha256"])
    assert len(digests) == 2


def test_batch_statistics_are_refused(tmp_path: Path) -> None:
    """A net exported in training mode ties the samples of a batch together: its certificates would be void."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).train()
    path = tmp_path / "train.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, torch.rand(8, 3, 8, 8), check_trace=False), path)
    classifier = load_classifier(str(path), trust_code=True, input_size=(3, 8, 8))
    with pytest.raises(UserError, match="differently alone and in a batch"):
        SmoothedClassifier(classifier, sigma=0.25).predict(torch.zeros(3, 8, 8), n=100)


def test_one_score_per_image_is_refused(tmp_path: Path) -> None:
    path = script(nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), tmp_path / "sigmoid.pt")
    with pytest.raises(UserError, match="one score per image"):
        load_classifier(str(path), trust_code=True, input_size=(3, 8, 8))


def test_duplicate_key_is_refused(tmp_path: Path) -> None:
    state = net().state_dict()
    torch.save({**state, **wrapped(state, "module.")}, tmp_path / "twice.pth")
    with pytest.raises(UserError, match="twice, with and without a wrapper prefix"):
        load_classifier("cifar_resnet20", weights=tmp_path / "twice.pth")


def test_nan_from_a_network_is_a_failed_trial() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = x.flatten(1)[:, :3].clone()
            logits[x.mean(dim=(1, 2, 3)) > 0.5] = torch.nan
            return logits

    from certify.models.classifier import ClassifierSpec, InputSpec

    classifier = Classifier("broken", ClassifierSpec(Broken(), InputSpec((1, 2, 2))))
    bright, dark = torch.full((1, 1, 2, 2), 0.9), torch.full((1, 1, 2, 2), 0.1)
    assert classifier(torch.cat([bright, dark])).tolist() == [FAILED, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "file", "accuracy"), [(56, "resnet56-4bfd9763.th", 0.832)])
def test_known_accuracy_of_a_third_party_cifar_classifier(
    depth: int, file: str, accuracy: float, shared_data: Path
) -> None:
    """83.2 % of all 10,000 test images, labels by folder name: transform, normalisation, weights, classes at once."""
    from certify.images.dataset import load_images

    classifier = load_classifier(f"cifar_resnet{depth}", weights=shared_data / "classifiers" / file)
    images = load_images(str(shared_data / "cifar10_jpeg_test.zip"), classifier)
    assert len(images) == 10_000
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(images), 100):
            batch = torch.stack([images.load(i) for i in range(start, start + 100)])
            correct += int((classifier(batch) == torch.tensor(images.labels[start : start + 100])).sum())
    assert correct / len(images) == pytest.approx(accuracy, abs=0.0006)


@pytest.mark.slow
def test_known_accuracy_of_a_third_party_imagenet_classifier(shared_data: Path) -> None:
    """59.3 % of 300 photographs of 300 classes; sorted folder order, the classic mistake, is right for almost none."""
    from certify.images.dataset import load_images

    classifier = load_classifier("squeezenet1_0", weights=shared_data / "classifiers" / "squeezenet1_0_imagenet.pth")
    images = load_images(str(shared_data / "imagenet_sample"), classifier)
    assert images.rule == "by name (300 of 1000 classes)"
    with torch.inference_mode():
        found = [int(classifier(images.load(i)[None])) for i in range(len(images))]
    names = sorted({item.name for item in images.items if item.name})
    sorted_order = [names.index(item.name) for item in images.items if item.name]
    assert sum(a == b for a, b in zip(found, images.labels, strict=True)) / 300 == pytest.approx(0.593, abs=0.004)
    assert sum(a == b for a, b in zip(found, sorted_order, strict=True)) < 10
