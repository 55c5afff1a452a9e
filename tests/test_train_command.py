"""``certify train``: its files work, and errors are one line."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from command import run
from PIL import Image
from safetensors import safe_open

from certify import load_classifier
from certify.runs.run_file import read_run
from denoisers.defences import build_defence
from denoisers.weights import read_card

UNET = ["train", "--denoiser", "unet", "--option", "channels=[8,16]", "--option", "blocks=1", "--quiet"]
SHORT = ["--data", "digits-train", "--epochs", "0.5", "--validations", "1"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_train_then_certify(capsys: Capture) -> None:
    """The file works as --denoiser, its card is complete, and the same command has nothing left to do."""
    command = [*UNET, *SHORT, "--objective", "stability", "--classifier", "digits", "--sigma", "0.1:1", "--out", "d"]
    run(*command)
    card = read_card("d/denoiser.safetensors")
    assert (card.objective, card.access, card.sigmas, card.continuous) == ("stability", "white-box", (0.1, 1.0), True)
    assert card.classifiers[0]["sha256"] == load_classifier("digits").identity()
    assert "accuracy@0.25" in card.validation
    shown = capsys.readouterr().out
    assert "weights of step 9 of 9, with the lowest share of changed labels (" in shown
    assert "; measured with digits\n" in shown
    before = Path("d/denoiser.safetensors").read_bytes()
    run(*command, "--json")
    assert json.loads(capsys.readouterr().out)["steps"] == 9
    assert Path("d/denoiser.safetensors").read_bytes() == before

    run(*"--model digits --sigma 0.25 --n 100 --n0 10 --max 3 --quiet --out r.jsonl".split(), "--denoiser",
        "d/denoiser.safetensors")  # fmt: skip
    step = read_run("r.jsonl").header["pipeline"][0]
    assert (step["sha256"], step["trained_for"]) == (card.sha256, "0.1 to 1")


@pytest.mark.parametrize(("fast", "expected"), [((), "float32"), (("_is_avx512_bf16_supported",), "bfloat16")])
def test_bfloat16_with_hardware_support(
    fast: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in fast, raising=False)
    run(*[word for word in UNET if word != "--quiet"], *SHORT, *"--sigma 0.5 --max 200 --device cpu --out d".split())
    assert f"on cpu, {expected}" in capsys.readouterr().err


@pytest.mark.slow
def test_surrogates_of_an_objective_without_a_classifier() -> None:
    """They only report accuracy: squared error needs no classifier."""
    run("train", *"--train-classifier digits --sigma 0 --out c --quiet".split(), *SHORT)
    watching = ["--surrogate", "digits=c/classifier.safetensors", "--classifier", "digits"]
    run(*UNET, *SHORT, "--sigma", "0.25", *watching, "--out", "d")
    card = read_card("d/denoiser.safetensors")
    assert (card.access, card.classifiers) == ("none", ())
    assert "accuracy@0.25" in card.validation


def test_the_last_line_names_the_defence_of_a_purifier(capsys: Capture) -> None:
    small = ["--option", "channels=[8,16]", "--option", "blocks=1", "--quiet"]
    run("train", "--denoiser", "score", *small, *SHORT, "--objective", "dsm", "--sigma", "0.01:1", "--out", "e")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("--defences ebm:weights=e/denoiser.safetensors")
    assert build_defence(last.split()[-1], load_classifier("digits")).name == "ebm"


@pytest.mark.slow
def test_fine_tuning_starts_from_the_given_weights() -> None:
    run(*UNET, *SHORT, "--sigma", "0.25", "--out", "a")
    more = ["--classifier", "digits", "--objective", "classification", "--init", "a/denoiser.safetensors"]
    run(*UNET, *SHORT, "--sigma", "0.25", "--rate", "1e-12", *more, "--out", "b")  # a rate that moves nothing
    a, b = read_card("a/denoiser.safetensors"), read_card("b/denoiser.safetensors")
    assert b.started_from is not None
    assert b.started_from["sha256"] == a.sha256
    assert b.validation["psnr@0.25"] == pytest.approx(a.validation["psnr@0.25"], abs=0.3)  # but for batch statistics


def test_missing_options_are_errors_before_the_images_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def reads(*_: object, **__: object) -> None:
        raise AssertionError("the images were read first")

    monkeypatch.setattr("training.data.load_training_data", reads)
    command = [*UNET, *SHORT, "--objective", "stability", "--sigma", "25", "--out", "d"]
    run(*command, code=2)
    err = capsys.readouterr().err
    assert "warning: sigma = 25 is very large for images in [0, 1]; did you mean --sigma 0.098 (25/255)?" in err
    assert "--objective stability needs a frozen classifier" in err


@pytest.mark.slow
def test_a_classifier_under_noise(capsys: Capture) -> None:
    """Under the noise of its training it is more accurate than the shipped classifier."""
    options = "--train-classifier digits --sigma 0.5 --data digits-train --epochs 20 --rate 3e-3 --out c --quiet"
    run("train", *options.split(), "--validations", "2")
    with safe_open("c/classifier.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["card"])["training"]["sigmas"] == [0.5]
    line = "--model digits --sigma 0.5 --n 200 --n0 20 --skip 5 --quiet".split()
    run(*line, "--weights", "c/classifier.safetensors", "--out", "trained.jsonl")
    run(*line, "--out", "shipped.jsonl")
    right = [
        sum(row["prediction"] == row["label"] for row in read_run(f"{name}.jsonl").images)
        for name in ("trained", "shipped")
    ]
    assert right[0] > right[1] + 20  # of the same 100 images


def photos(sizes: list[tuple[int, int]], classes: int = 2) -> str:
    """A zip of class folders with grey pictures of these sizes."""
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for i, (height, width) in enumerate(sizes):
            out = BytesIO()
            Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(out, "PNG")
            archive.writestr(f"class{i % classes}/{i}.png", out.getvalue())
    return "photos.zip"


def test_images_of_any_one_size_without_a_classifier() -> None:
    data = photos([(16, 24)] * 6)
    run(*UNET, "--sigma", "0.25", "--data", data, "--epochs", "1", "--batch-size", "2", "--out", "d")
    assert read_card("d/denoiser.safetensors").image == (3, 16, 24)


D = "train --denoiser unet --data digits-train --out d --sigma "


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("train --denoiser dncn --sigma 0.25 --data digits-train --out d", "nearest: dncnn"),
        (D + "0", "a denoiser needs noise"),
        (D + "x", "'x'; expected levels"),
        ("train --train-classifier digits --sigma 1 --data digits-train --out d --train-only 1", "only belongs to"),
        (D + "1 --option width=3", "'unet' has no option 'width'; its options: channels=[48,96,192], blocks=2"),
        (D.replace("unet", "dncnn-wide") + "1 --option width=3", "its options: channels=128, depth=17, momentum=0.95"),
        (D + "1 --option image_channels=1", "'unet' has no option 'image_channels'"),
        ("train --denoiser unet --sigma 1 --data nothing.zip --out d", "nothing.zip"),
        (D + "1 --held-out 1297", "--held-out 1297 of 1297"),
        (D + "1 --objective stability --classifier digits --surrogate digits", "surrogate 'digits' is the target"),
        ("train --denoiser unet --data digits --out d --sigma 1", "expected --data digits-train"),
        (D + "1 --temperature 4", "--temperature belongs to an objective with a classifier"),
        (D + "1 --queries 5", "--queries belongs to --objective zeroth-order"),
        (D + "1 --sgd-rate 0.1", "--sgd-rate belongs to --optimizer adam-then-sgd"),
        (D + "1 --weights x.pt", "--weights without --classifier"),
        (D + "0.1:0.5:1", "expected levels"),
        (D + "1 --weight-decay -1", "expected a decay from 0"),
        (D + "1 --option channels=[]", "architecture 'unet': list index out of range; its options"),
        (D + "1 --precision float16 --device cpu", "--precision float16 needs an accelerator"),
        (D + "1 --device tpu", "device 'tpu' does not exist"),
        (D + "1 --objective zeroth-order --surrogate digits", "queries the target itself"),
        (D.replace("unet", "dncnn") + "1 --objective mse+classes", "needs a U-Net with a bottleneck"),
        ("train --train-classifier digits --sigma 1 --data digits-train --out d --surrogate digits", "belongs to"),
        ("train --train-classifier digits --objective mse --sigma 1 --data digits-train --out d", "classification"),
        ("train --denoiser unet --sigma 1 --data photos.zip --out d", "class1/1.png is 3x16x20 and the first"),
        ("--model digits --sigma 1 --denoiser a=b/c.safetensors", "unknown architecture 'a'"),
        ("--model digits --sigma 0.25 --denoiser dncnn", "is an architecture without weights"),
        ("--model digits --sigma 0.25 --denoiser nothing.safetensors", "no denoiser file 'nothing.safetensors'"),
        ("--model digits --sigma 3 --denoiser auto --n 100 --max 1", "no shipped denoiser for 1x8x8 images at sigma 3"),
        ("--model digits --sigma 0.25 --denoiser large.safetensors --n 100 --max 1", "channels"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(options: str, words: str, capsys: Capture) -> None:
    import torch

    from denoisers.dncnn import DnCNN
    from denoisers.weights import Card, save_denoiser

    photos([(16, 16), (16, 20)] * 3)
    torch.manual_seed(0)
    options_of = {"channels": 8, "depth": 3}
    card = Card("dncnn", options_of, (3, 32, 32), (0.25,), False, "mse", "none")
    save_denoiser("large.safetensors", DnCNN(**options_of), card)
    run(*options.split(), "--quiet", code=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("certify: ")
    assert words in lines[0]


def test_one_class_is_not_enough_for_labels(capsys: Capture) -> None:
    data = photos([(8, 8)] * 6, classes=1)
    run(
        "train", "--train-classifier", "cifar_resnet20", "--sigma", "0", "--data", data, "--out", "d", "--quiet", code=2
    )
    assert "class" in capsys.readouterr().err


@pytest.mark.slow
def test_a_path_with_an_equals_sign_is_a_path() -> None:
    run(*UNET, *SHORT, "--sigma", "0.25", "--out", "sigma=0.25")
    run(*"--model digits --sigma 0.25 --n 100 --n0 10 --max 2 --quiet --out r.jsonl".split(), "--denoiser",
        "sigma=0.25/denoiser.safetensors")  # fmt: skip


@pytest.mark.slow
def test_the_lineage_of_initial_weights_stays_on_the_card(capsys: Capture) -> None:
    """White-box weights stay white-box after further training, and are refused for query access."""
    own = ["--classifier", "digits", "--objective", "stability", "--sigma", "0.25"]
    run(*UNET, *SHORT, *own, "--out", "white")
    start = ["--init", "white/denoiser.safetensors"]
    run(*UNET, *SHORT, "--sigma", "0.25", *start, "--out", "more")
    card = read_card("more/denoiser.safetensors")
    assert card.access == "white-box"
    assert [c["sha256"] for c in card.classifiers] == [load_classifier("digits").identity()]
    options = "--train-classifier digits --sigma 0 --data digits-train --epochs 0.2 --validations 1 --out c --quiet"
    run("train", *options.split())
    query = ["--surrogate", "digits=c/classifier.safetensors", *own]
    run(*UNET, *SHORT, *query, "--out", "query")
    assert read_card("query/denoiser.safetensors").access == "surrogates"
    capsys.readouterr()
    run(*UNET, *SHORT, *query, *start, "--out", "laundered", code=2)
    assert "--init was trained with the target itself" in capsys.readouterr().err


@pytest.mark.slow
def test_unknown_class_folders_are_accepted_without_labels() -> None:
    data = photos([(32, 32)] * 6)  # class0, class1: not CIFAR's
    common = ["--sigma", "0.25", "--data", data, "--epochs", "1", "--batch-size", "2", "--validations", "1"]
    weights = ["--classifier", "cifar_resnet20", "--weights", "untrained"]
    run(*UNET, *common, *weights, "--objective", "stability", "--out", "d")
    run("train", "--train-classifier", "resnet18", *common, "--out", "c", "--quiet")  # two classes, as the data has
    with safe_open("c/classifier.safetensors", framework="pt") as file:
        assert file.get_tensor("fc.weight").shape[0] == 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_classifier() -> None:
    options = "--train-classifier digits --sigma 0.5 --data digits-train --epochs 0.5 --validations 1 --quiet --out"
    for out in ("a", "b"):
        run("train", *options.split(), out)
    tails = [Path(f"{out}/classifier.safetensors").read_bytes()[-1000:] for out in ("a", "b")]  # numbers, no card
    assert tails[0] == tails[1]
