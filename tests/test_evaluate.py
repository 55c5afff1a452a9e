"""Evaluation of denoisers: figures that follow from the noise and the denoiser; the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from PIL import Image
from scipy.special import digamma, polygamma
from torch import Tensor, nn

import certify
from analysis.curves import proportion_interval
from analysis.grid import Panel, Row, draw_grid
from certify import load_classifier, load_images
from certify.errors import RunFault, UserError
from certify.smoothing.rounding import ceil_to, floor_to
from denoisers.classical import GaussianBlur, Median
from training import evaluate
from training.evaluate import DenoiserReport, Example, Share, evaluate_denoiser, measure, ssim_window

NATURAL = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SMOOTH = torch.stack([torch.outer(a, b)[None] for a, b in torch.linspace(0, 1, 6 * 2 * 32).view(6, 2, 32)])


class Made(nn.Module):
    """A denoiser from a function."""

    def __init__(self, function: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, noisy: Tensor, sigma: float) -> Tensor:
        return self.function(noisy, sigma)


IDLE = Made(lambda noisy, sigma: noisy)


class Brightness:
    """Four classes by mean brightness."""

    num_classes = 4

    def __call__(self, images: Tensor) -> Tensor:
        return (images.mean(dim=(1, 2, 3)) * 4).long().clamp(0, 3)

    def describe(self) -> dict[str, str]:
        return {"name": "brightness"}


def figures(report: DenoiserReport) -> list[float | None]:
    return [f for q in (report.noisy, report.denoised) for f in (q.psnr, q.mse, q.ssim)]


@pytest.mark.parametrize("sigma", [0.12, 0.5, 1.0])
def test_noisy_psnr_follows_from_sigma(sigma: float) -> None:
    """An image's error is sigma^2 chi^2_d / d, so the mean and the variance of its logarithm are known exactly."""
    d, images = 64, 400
    given = torch.rand(images, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    report = evaluate_denoiser(IDLE, given, sigma)
    in_db = 10 / math.log(10)
    expected = -20 * math.log10(sigma) - in_db * (digamma(d / 2) - math.log(d / 2))
    error = in_db * math.sqrt(polygamma(1, d / 2) / images)
    assert report.noisy.psnr == pytest.approx(expected, abs=4 * error)
    assert report.noisy.mse == pytest.approx(sigma**2, abs=4 * sigma**2 * math.sqrt(2 / (d * images)))
    assert report.noisy.psnr == pytest.approx(-20 * math.log10(sigma), abs=4 * error + 1.1 * in_db / d)


def test_scores_equal_those_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    examples = [Example(str(i), image) for i, image in enumerate(NATURAL)]
    found = list(measure(GaussianBlur(), examples, 0.25))
    report = evaluate_denoiser(GaussianBlur(), NATURAL, 0.25)
    for place, quality in enumerate((report.noisy, report.denoised)):
        pairs = [(o.example.image.numpy(), (o.noisy, o.denoised)[place].numpy()) for o in found]
        ratios = [metrics.peak_signal_noise_ratio(clean, other, data_range=1) for clean, other in pairs]
        similar = [
            metrics.structural_similarity(
                clean,
                other,
                data_range=1,
                channel_axis=0,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for clean, other in pairs
        ]
        assert quality.psnr == pytest.approx(np.mean(ratios), abs=1e-4)
        assert quality.ssim == pytest.approx(np.mean(similar), abs=1e-5)
    assert report.ssim_window == 11


def test_a_perfect_denoiser() -> None:
    """It knows the clean images: no error, full similarity, and every label as without noise."""
    perfect = Made(lambda noisy, sigma: NATURAL[: len(noisy)])
    report = evaluate_denoiser(perfect, NATURAL, 0.5, classifier=Brightness(), labels=Brightness()(NATURAL))
    assert (report.denoised.psnr, report.denoised.mse) == (math.inf, 0.0)
    assert report.denoised.agreement == report.denoised.accuracy == report.clean_accuracy == Share(12, 12)
    if report.ssim_window:
        assert report.denoised.ssim == pytest.approx(1.0, abs=1e-12)


def test_an_idle_denoiser_changes_nothing_and_a_blur_helps_smooth_images() -> None:
    idle = evaluate_denoiser(IDLE, SMOOTH, 0.5, classifier=Brightness(), labels=[0] * len(SMOOTH))
    assert idle.noisy == idle.denoised
    blurred = evaluate_denoiser(GaussianBlur(), SMOOTH, 0.5)
    assert blurred.noisy.mse == idle.noisy.mse
    # the squared weights of a Gaussian of width 1 pixel add up to 1 / (4 pi): 11 dB less noise, and little else
    assert blurred.denoised.psnr - blurred.noisy.psnr == pytest.approx(10 * math.log10(4 * math.pi), abs=1.5)
    if blurred.ssim_window:
        assert (blurred.denoised.ssim or 0) > (blurred.noisy.ssim or 1)


def test_noise_depends_on_seed_and_image_only() -> None:
    """Independent of the batch size; another sigma scales the same draw."""
    known = {"classifier": Brightness(), "labels": Brightness()(NATURAL)}
    whole = evaluate_denoiser(Median(), NATURAL, 0.25, **known)  # type: ignore[arg-type]
    for size in (1, 5):
        again = evaluate_denoiser(Median(), NATURAL, 0.25, batch_size=size, **known)  # type: ignore[arg-type]
        assert figures(again) == pytest.approx(figures(whole), rel=1e-5)
        assert again.denoised.accuracy == whole.denoised.accuracy
    assert evaluate_denoiser(Median(), NATURAL, 0.25, seed=1).noisy.mse != whole.noisy.mse
    assert evaluate_denoiser(Median(), NATURAL, 0.5).noisy.mse == pytest.approx(4 * whole.noisy.mse, rel=1e-5)


def test_images_of_several_sizes_each_get_a_window_that_fits() -> None:
    seeded = torch.Generator().manual_seed(2)
    images = [torch.rand(1, *size, generator=seeded) for size in ((8, 8), (8, 8), (16, 12), (8, 8))]
    report = evaluate_denoiser(Median(), images, 0.25)
    assert report.images == 4
    if evaluate.ssim_installed():
        assert report.ssim_window == 7
        assert [ssim_window(torch.empty(1, s, 20)) for s in (2, 3, 4, 10, 11, 50)] == [0, 3, 3, 9, 11, 11]


def test_without_scikit_image_only_ssim_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "ssim_installed", lambda: False)
    report = evaluate_denoiser(Median(), NATURAL, 0.25)
    assert (report.ssim_window, report.noisy.ssim, report.denoised.ssim) == (None, None, None)
    assert report.denoised.psnr > 0


def test_accuracy_counts_and_its_interval() -> None:
    """A denoiser that paints everything white: class 3 and nothing else."""
    images = torch.tensor([0.1, 0.1, 0.9, 0.6]).view(4, 1, 1, 1).expand(4, 1, 16, 16)
    white = Made(lambda noisy, sigma: torch.ones_like(noisy))
    report = evaluate_denoiser(white, images, 0.01, labels=[0, 3, 3, 3], classifier=Brightness())
    assert (report.clean_accuracy, report.noisy.accuracy) == (Share(2, 4), Share(2, 4))
    assert (report.denoised.accuracy, report.denoised.agreement) == (Share(3, 4), Share(1, 4))
    low, high = proportion_interval(np.array([470]), 500)
    assert Share(470, 500).interval == pytest.approx((low[0], high[0]), abs=1e-9)
    assert evaluate_denoiser(white, images, 0.01, classifier=Brightness()).noisy.accuracy is None


@pytest.mark.parametrize(
    ("function", "kind", "says"),
    [
        (lambda noisy, sigma: noisy[:, :1], UserError, r"returned \(12, 1, 16, 16\) .* expected images of the same"),
        (lambda noisy, sigma: noisy / 0, RunFault, "NaN or infinite"),
        (lambda noisy, sigma: noisy.view(7), RunFault, r"failed on \(12, 3, 16, 16\): RuntimeError"),
    ],
)
def test_denoisers_that_fail(function: Callable[[Tensor, float], Tensor], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        evaluate_denoiser(Made(function), NATURAL, 0.25)


def test_nothing_to_evaluate() -> None:
    with pytest.raises(UserError, match="no images to evaluate the denoiser on"):
        evaluate_denoiser(IDLE, [], 0.25)
    with pytest.raises(UserError, match="expected a positive number"):
        evaluate_denoiser(IDLE, NATURAL, -1.0)


@pytest.mark.usefixtures("users_resolution")
@pytest.mark.parametrize(("size", "channels"), [((8, 8), 1), ((30, 70), 3), ((700, 650), 3)])
def test_the_grid_is_a_picture_of_sensible_size(tmp_path: Path, size: tuple[int, int], channels: int) -> None:
    image = np.linspace(-0.5, 1.5, channels * size[0] * size[1], dtype=np.float32).reshape(channels, *size)
    panels = [Panel(image), Panel(image, "a $label$ of many words", True), Panel(image, "no", False, "9.1 dB")]
    draw_grid(
        [Row("a name", panels)] * 2, ["a", "b", "c"], tmp_path / "new" / "g.png", title="title", caption="c " * 99
    )
    with Image.open(tmp_path / "new" / "g.png") as picture:
        assert picture.format == "PNG"
        assert 600 < picture.width < 2600
        assert 400 < picture.height < 2600
    with pytest.raises(UserError, match="expected a name ending in"):
        draw_grid([Row("a", panels)], ["a", "b", "c"], tmp_path / "g.gif", title="")


# The command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def displayed(share: dict[str, float]) -> str:
    """A share and its interval, rounded outward."""
    return f"{floor_to(share['share'], 3)} [{floor_to(share['low95'], 3)}, {ceil_to(share['high95'], 3)}]"


@pytest.mark.usefixtures("users_resolution")
def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text and JSON agree with the function; the picture is written."""
    options = "evaluate-denoiser --model digits --denoiser median --sigma 0.25,0.5 --max 20".split()
    run(*options, "--images", "4")
    out, err = capsys.readouterr()
    assert "the digits held out from training" in err
    run(*options, "--json", "--images", "0")
    found, err = capsys.readouterr()
    assert err == ""
    result = json.loads(found)
    assert (result["images"], result["available"], result["pictures"], result["certified"]) == (20, 500, None, False)
    lines = out.splitlines()
    assert lines[0] == "median on 20 of 500 images of digits (1x8x8), classifier digits"
    assert "not certificates" in out
    for line in result["results"]:
        (row,) = [text for text in lines if text.split()[:1] == [f"{line['sigma']:g}"]]
        assert f"{line['psnr_noisy']:.2f} -> {line['psnr_denoised']:.2f}" in row
        for kind in ("noisy", "denoised"):
            share = line[f"accuracy_{kind}"]
            assert displayed(share) in row
    clean = result["results"][0]["accuracy_clean"]
    assert f"{displayed(clean)} ({clean['count']} of 20)" in out
    picture = Path("runs/denoiser-median-digits-sigma0.25_0.5.png")
    assert f"picture    {picture}" in out
    with Image.open(picture) as image:
        assert image.width > 1000
        assert image.height > 1000

    classifier = load_classifier("digits")
    images = load_images("digits", classifier)
    examples = [Example(images.items[i].id, images.load(i), images.labels[i]) for i in range(0, 500, 25)]
    report = evaluate.summarise(measure(Median(), examples, 0.25, classifier=classifier), 0.25, 0)
    line = result["results"][0]
    assert line["psnr_denoised"] == pytest.approx(report.denoised.psnr)
    assert report.denoised.accuracy is not None
    assert line["accuracy_denoised"]["count"] == report.denoised.accuracy.count


def test_without_a_classifier_images_keep_their_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("d").mkdir()
    for i, size in enumerate(((20, 12), (9, 9), (9, 9))):
        Image.linear_gradient("L").resize(size).save(f"d/{i}.png")
    Path("d/broken.png").write_bytes(b"no picture")
    options = "evaluate-denoiser --denoiser gaussian --sigma 0.5 --data d --pictures g.svg".split()
    run(*options)
    out, err = capsys.readouterr()
    assert "gaussian on 3 images of d (of 2 sizes)" in out
    assert "broken.png: is not an image" in err
    assert "1 images could not be read" in out
    assert "accuracy" not in out
    assert "<svg" in Path("g.svg").read_text()
    run(*options, "--strict", code=2)
    assert "broken.png" in capsys.readouterr().err


def test_python_and_the_command_measure_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    line = "evaluate-denoiser --model digits --data digits --skip 25 --denoiser median --sigma 0.25 --seed 3"
    run(*line.split(), "--images", "0", "--json")
    (theirs,) = json.loads(capsys.readouterr().out)["results"]
    ours = certify.evaluate_denoiser("median", "digits", skip=25, sigma=0.25, seed=3, model="digits", progress=False)
    for kind, quality in (("noisy", ours.noisy), ("denoised", ours.denoised)):
        shown = {name: theirs[f"{name}_{kind}"] for name in ("psnr", "mse", "ssim")}
        assert shown == {"psnr": quality.psnr, "mse": quality.mse, "ssim": quality.ssim}
        assert quality.accuracy is not None
        assert quality.agreement is not None
        counts = theirs[f"accuracy_{kind}"]["count"], theirs[f"agreement_{kind}"]["count"]
        assert counts == (quality.accuracy.count, quality.agreement.count)
    assert ours.clean_accuracy is not None
    assert theirs["accuracy_clean"]["count"] == ours.clean_accuracy.count


def test_a_function_on_tensors_without_a_model() -> None:
    def half(noisy: Tensor) -> Tensor:
        return noisy / 2

    ours = certify.evaluate_denoiser(half, NATURAL, sigma=0.25, progress=False)
    assert figures(ours) == figures(evaluate_denoiser(Made(lambda noisy, sigma: noisy / 2), NATURAL, 0.25))
    assert ours.clean_accuracy is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denoiser": "medain"}, "unknown denoiser 'medain'"),
        ({"denoiser": "none"}, "denoiser = 'none': expected a denoiser to measure"),
        ({"sigma": -1.0}, "sigma"),
        ({"num_classes": 3}, "num_classes without a model"),
        ({"max_imges": 3}, "max_imges"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"denoiser": "median", "sigma": 0.25, "progress": False} | options
    with pytest.raises(UserError, match=message):
        certify.evaluate_denoiser(images=NATURAL, **given)
