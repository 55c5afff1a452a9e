"""The perturbations of attacks, measured and drawn by one command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run as command

from analysis.adversarial_noise import _spectrum, median, noise_statistics, smoothing_factor, summarise_noise
from analysis.comparison.runner import randomly_moved
from certify.images.dataset import load_images
from certify.models.classifier import Classifier


def test_smoothing_reduces_white_noise_as_its_window_predicts() -> None:
    offsets = torch.arange(-2, 3, dtype=torch.float64)
    row = torch.exp(-(offsets**2) / 2)
    row /= row.sum()
    kept = float(row.pow(2).sum())  # of the variance along each axis: the window is a product
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    # reflected borders keep a little more of the outermost two of 64 rows; the sampling error is below 1 %
    assert smoothing_factor(noise).numpy() == pytest.approx(kept, rel=0.05)
    assert smoothing_factor(torch.ones(1, 3, 16, 16)).item() == pytest.approx(1, abs=1e-5)
    assert math.isnan(smoothing_factor(torch.zeros(1, 3, 16, 16)).item())


def test_unchanged_images_do_not_count() -> None:
    clean = torch.full((3, 1, 16, 16), 0.5)
    moved = clean.clone()
    moved[0] += 2 / 255 * torch.tensor([1.0, -1.0]).repeat(8)  # stripes of one pixel: all power at half a cycle
    line = summarise_noise("stripes", noise_statistics(moved, clean), smoothing_factor(moved - clean))
    assert line.changed == 1
    assert line.std == pytest.approx(2, rel=1e-4)
    assert line.mean == pytest.approx(0, abs=1e-4)
    assert line.low_frequencies == pytest.approx(0, abs=1e-6)
    assert summarise_noise("nothing", noise_statistics(clean, clean), smoothing_factor(clean - clean)).changed == 0


def test_medians_lie_between_the_middle_two_and_json_has_no_nan() -> None:
    assert median(torch.tensor([4.0, 1.0, 3.0, 2.0])) == 2.5
    assert median(torch.tensor([math.nan, 5.0])) == 5.0
    assert median(torch.tensor([math.nan])) is None
    flat = torch.full((2, 1, 8, 8), 0.5)
    same = summarise_noise("none", noise_statistics(flat, flat), smoothing_factor(flat - flat))
    assert (same.changed, same.mean) == (0, None)


def test_unused_defences_are_not_built(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    built: list[str] = []

    def build(name: str, defence: str, classifier: Classifier, **given: Any) -> str:
        built.append(defence)
        return "not needed"

    monkeypatch.setattr("analysis.comparison.plan.build_defence", build)
    wanted = ["--model", "digits", "--max", "2", "--attacks", "blind-pgd", "--steps", "1", "--defences", "gs,median"]
    command("inspect", *wanted)
    assert built == ["none"]


def test_the_spectrum_of_white_noise_is_flat() -> None:
    noise = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    frequencies, spectrum = _spectrum(noise_statistics(noise, torch.zeros_like(noise)))
    assert (frequencies > 0).all()
    # 1,023 waves share the power; a ring of w waves, 48 samples each, has relative error 1 / sqrt(48 w / 2)
    assert spectrum == pytest.approx(1 / 1023, rel=5 / math.sqrt(24 * 4))


@pytest.mark.slow
def test_the_command(
    digits: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = ["--model", "digits", "--max", "6", "--attacks", "blind-pgd", "--steps", "3", "--eps", "0.2"]
    drawn = ["--figure", "noise.svg", "--pictures", "seen.png", "--images", "2", "--defences", "none,gs,bits"]
    command("inspect", *wanted, *drawn, "--json")
    random, attacked = json.loads(capsys.readouterr().out)["noises"]
    assert (random["noise"], attacked["noise"], attacked["changed"]) == ("random noise", "blind-pgd", 6)
    images = load_images("digits", digits, max_images=6)
    clean = torch.stack([images.load(i) for i in range(6)])
    moved = randomly_moved(clean, [item.id for item in images.items], 0.2, "linf", 0)
    own = noise_statistics(moved, clean)
    assert random["mean"] == pytest.approx(255 * float(own.mean.abs().quantile(0.5)))
    assert random["skewness"] == pytest.approx(float(own.skewness.abs().quantile(0.5)))
    assert (tmp_path / "noise.svg").stat().st_size > 5000
    assert (tmp_path / "seen.png").stat().st_size > 5000
    command("inspect", *wanted, "--figure", "again.svg")
    shown = capsys.readouterr()
    assert "left by smoothing" in shown.out
    assert "not counted" not in shown.out
    assert shown.err == "wrote again.svg\n"


def test_unchanged_images_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    command("inspect", "--model", "digits", "--max", "2", "--attacks", "square", "--eps", "0.001", "--queries", "5")
    assert "Images for which an attack found no change that helps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--attacks", "none"], "nothing to measure"),
        (["--attacks", "transfer"], "needs surrogates"),
        (["--figure", "noise.txt"], "ending in .png, .svg, .pdf"),
        (["--defences", "gss"], "nearest: gs"),
    ],
)
def test_bad_input(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    command("inspect", "--model", "digits", *options, code=2)
    assert said in capsys.readouterr().err
