"""``certify.train_denoiser``: the weights of ``certify train``, from Python objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command import run
from safetensors.torch import load_file

import certify
from certify import UserError, load_classifier, load_images
from certify.images.dataset import ImageSet

SHORT: dict[str, Any] = {"epochs": 0.05, "batch_size": 16, "held_out": 60, "device": "cpu", "precision": "float32"}
COMMAND = ["--epochs", "0.05", "--batch-size", "16", "--held-out", "60", "--device", "cpu", "--precision", "float32"]
SMALL = {"channels": [4, 8]}


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return load_images("digits-train", load_classifier("digits"))


def tensors(images: ImageSet) -> tuple[torch.Tensor, list[int | None]]:
    return torch.stack([images.load(i) for i in range(len(images))]), list(images.labels)


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("mse", {}),
        ("stability", {"classifier": "digits", "temperature": 2.0, "validations": 1}),
        ("classification", {"surrogates": ["digits"], "validations": 1}),
    ],
)
def test_command_and_python_train_the_same_weights(
    objective: str, options: dict[str, Any], tmp_path: Path, images: ImageSet
) -> None:
    spelled = {"classifier": "--classifier", "temperature": "--temperature", "validations": "--validations"}
    given = [text for name in options if name in spelled for text in (spelled[name], str(options[name]))]
    given += [text for model in options.get("surrogates", ()) for text in ("--surrogate", model)]
    network = ["--denoiser", "unet", "--option", "channels=[4,8]", "--sigma", "0.25,0.5", "--objective", objective]
    run("train", *network, *given, *COMMAND, "--data", "digits-train", "--quiet", "--out", str(tmp_path / "command"))
    common = {"sigma": [0.25, 0.5], "objective": objective, "options": SMALL, "progress": False, **SHORT, **options}
    by_name = certify.train_denoiser("unet", "digits-train", out=tmp_path / "name", **common)
    expected = load_file(tmp_path / "command" / "denoiser.safetensors")
    assert {name: by_name.net.state_dict()[name].tolist() for name in expected} == {
        name: value.tolist() for name, value in expected.items()
    }
    stacked, labels = tensors(images)
    by_tensor = certify.train_denoiser("unet", stacked, labels, out=tmp_path / "tensor", **common)
    for name, value in by_name.state_dict().items():
        assert torch.equal(by_tensor.state_dict()[name], value)
    assert by_tensor.card.objective == objective


def test_a_module_is_the_frozen_classifier_and_the_result_a_denoiser(tmp_path: Path, images: ImageSet) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    before = [value.clone() for value in module.state_dict().values()]
    stacked, labels = tensors(images)
    denoiser = certify.train_denoiser(
        "unet",
        stacked,
        sigma=0.25,
        classifier=module,
        objective="stability",
        out=tmp_path / "out",
        options=SMALL,
        progress=False,
        **SHORT,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, module.state_dict().values(), strict=True))
    assert denoiser.card.access == "white-box"
    run_behind = certify.certify(
        module, stacked[:3], labels[:3], sigma=0.25, n=50, n0=10, denoiser=denoiser, progress=False
    )
    by_file = certify.certify(
        module,
        stacked[:3],
        labels[:3],
        sigma=0.25,
        n=50,
        n0=10,
        denoiser=str(tmp_path / "out" / "denoiser.safetensors"),
        progress=False,
    )
    assert [row.votes for row in run_behind] == [row.votes for row in by_file]


def test_a_finished_training_is_returned_and_another_is_refused(tmp_path: Path, images: ImageSet) -> None:
    stacked, _ = tensors(images)
    common = {"sigma": 0.25, "options": SMALL, "progress": False, **SHORT}
    first = certify.train_denoiser("unet", stacked, out=tmp_path, **common)
    written = (tmp_path / "denoiser.safetensors").stat().st_mtime_ns
    again = certify.train_denoiser("unet", stacked, out=tmp_path, **common)
    assert (tmp_path / "denoiser.safetensors").stat().st_mtime_ns == written
    assert torch.equal(first.net.state_dict()["tail.weight"], again.net.state_dict()["tail.weight"])
    with pytest.raises(UserError, match="another training"):
        certify.train_denoiser("unet", stacked, out=tmp_path, **{**common, "seed": 1})


def test_labels_beside_a_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels = 'labels\.csv' with a name or path of data"):
        certify.train_denoiser("unet", "digits-train", "labels.csv", sigma=0.25, out=tmp_path / "x", **SHORT)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "unets"}, "unknown architecture 'unets'.*unet"),
        ({"sigma": 0.0}, "expected levels above 0"),
        ({"epoch": 1}, "unknown option 'epoch'; nearest: epochs"),
        ({"objective": "stability"}, "needs a frozen classifier"),
        ({"sigma": None}, "objective mse trains under noise: give sigma, such as sigma=0.25"),
        ({"sigma": "high"}, "sigma = 'h': expected a noise level above 0, or several"),
        ({"temperature": 2.0}, "temperature belongs to an objective with a classifier; leave it out here"),
        ({"sgd_rate": 0.1}, "sgd_rate belongs to optimizer adam-then-sgd"),
        ({"objective": "zeroth-order", "surrogates": ["digits"]}, "queries the target itself; leave surrogates out"),
        ({"device": "cuda:1"}, "device cuda:1: expected cuda"),
        ({"objective": "mse+classes"}, "labels"),
        ({"labels": [0, 1]}, "2 labels for 40 images"),
    ],
)
def test_mistakes_are_one_line(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"architecture": "unet", "sigma": 0.25, "progress": False, **SHORT, "held_out": 4, **changed}
    with pytest.raises(UserError, match=message) as refused:
        certify.train_denoiser(given.pop("architecture"), torch.rand(40, 1, 8, 8), out=tmp_path / "x", **given)
    assert "\n" not in str(refused.value)
