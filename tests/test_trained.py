"""Trained denoisers: cards, shipped weights, and the choice of `auto`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run
from safetensors.torch import load_file, save_file

from analysis.curves import curves
from certify import load_classifier
from certify.errors import UserError
from certify.runs.run_file import read_run
from denoisers import SHIPPED, load_denoiser
from denoisers.find import choose, shipped
from denoisers.unet import UNet
from denoisers.weights import Card, Trained, read_card, read_denoiser, save_denoiser

CARD = Card("unet", {"channels": [8, 16], "blocks": 1}, (1, 8, 8), (0.25,), False, "mse", "none")


OWN = "digits-unet-stability"


def small() -> UNet:
    torch.manual_seed(0)
    net = UNet((8, 16), 1, 1)
    torch.nn.init.normal_(net.tail.weight)
    return net.eval()


def test_a_file_keeps_its_card_and_its_function(tmp_path: Path) -> None:
    net, noisy = small(), torch.rand(5, 1, 8, 8)
    written = save_denoiser(tmp_path / "d.safetensors", net, CARD)
    found = read_denoiser(tmp_path / "d.safetensors")
    assert found.card == written == replace(CARD, sha256=written.sha256)
    assert torch.equal(found(noisy, 0.25), net(noisy, 0.25))
    assert found.describe()["sha256"] == written.sha256
    save_denoiser(tmp_path / "half.safetensors", net, replace(CARD, stored="float16"))
    half = read_denoiser(tmp_path / "half.safetensors")
    assert next(half.parameters()).dtype == torch.float32
    # float16 keeps 11 bits: each of some ten layers adds a relative error of about 2^-11
    assert (half(noisy, 0.25) - net(noisy, 0.25)).abs().max() < 0.02 * net(noisy, 0.25).abs().max()


def tampered(path: Path, **changes: Any) -> Path:
    """A file whose card says something else."""
    card = json.loads(json.dumps(asdict(read_card(path)))) | changes
    save_file(load_file(path), path, metadata={"card": json.dumps(card)})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "does not match its tensors"),
        ({"options": {"channels": [8, 32], "blocks": 1}}, "does not match its tensors"),
        ({"options": {"chanels": [8]}}, "does not match its tensors"),
        ({"architecture": "resnet"}, "unknown architecture 'resnet'"),
        ({"format": 7}, "expected format 1"),
        ({"sigmas": [-0.5]}, "cannot be used"),
        ({"image": [3, 32]}, "cannot be used"),
    ],
)
def test_a_card_that_does_not_match_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    save_denoiser(path, small(), CARD)
    with pytest.raises(UserError, match=message):
        read_denoiser(tampered(path, **changes))


def test_tensors_that_were_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    card = save_denoiser(path, small(), CARD)
    tensors = load_file(path)
    tensors["tail.weight"][0, 0, 0, 0] += 1
    save_file(tensors, path, metadata={"card": json.dumps(asdict(card))})
    with pytest.raises(UserError, match="does not match its tensors"):
        read_denoiser(path)


def test_a_file_without_a_card(tmp_path: Path) -> None:
    save_file(small().state_dict(), tmp_path / "d.safetensors")
    with pytest.raises(UserError, match=r"has no card.*write ARCHITECTURE="):
        load_denoiser(str(tmp_path / "d.safetensors"))
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_denoiser(str(tmp_path / "text.safetensors"))


@pytest.mark.parametrize("name", sorted(p.stem for p in SHIPPED.glob("*.safetensors")))
def test_shipped_cards_are_complete(name: str) -> None:
    card = load_denoiser(name).card
    assert isinstance(card, Card)
    assert card.command.startswith("certify train ")
    assert card.licence == "MIT"
    assert len(card.data["sha256"]) == 64
    assert {"torch", "python", "certify-toolkit"} <= card.versions.keys()
    assert card.validation
    assert card.training["seed"] == 0
    assert (card.access == "none") == (not card.classifiers)


def test_the_shipped_weights_are_small() -> None:
    assert sum(p.stat().st_size for p in SHIPPED.glob("*.safetensors")) <= 30e6


def cards() -> dict[str, Card]:
    any_level = replace(CARD, sigmas=(0.1, 1.1), continuous=True)
    mine, yours = ({"name": "f", "sha256": digest * 64} for digest in "ab")
    return {
        "mse": any_level,
        "mse-025": CARD,
        "through-others": replace(any_level, objective="stability", access="surrogates", classifiers=(yours,)),
        "for-mine": replace(any_level, objective="stability", access="white-box", classifiers=(mine,)),
        "large": replace(CARD, image=(3, 32, 32)),
    }


@pytest.mark.parametrize(
    ("sigma", "image", "classifier", "without", "expected"),
    [
        (0.25, (1, 8, 8), "a" * 64, (), "for-mine"),
        (0.25, (1, 8, 8), "c" * 64, (), "through-others"),
        (0.25, (1, 8, 8), "a" * 64, ("for-mine", "through-others"), "mse-025"),
        (0.5, (1, 8, 8), None, ("for-mine", "through-others"), "mse"),
        (0.25, (1, 8, 8), "c" * 64, ("mse", "mse-025", "through-others"), "for-mine"),
        (0.25, (3, 32, 32), None, (), "large"),
    ],
)
def test_auto_chooses(sigma: float, image: Any, classifier: str | None, without: Any, expected: str) -> None:
    offered = {name: card for name, card in cards().items() if name not in without}
    assert choose(offered, sigma, image, classifier) == expected


@pytest.mark.parametrize(
    ("sigma", "image", "message"),
    [
        (3.0, (1, 8, 8), "no shipped denoiser for 1x8x8 images at sigma 3 .*mse for sigma 0.1 to 1.1"),
        (0.25, (3, 224, 224), r"no shipped denoiser for 3x224x224 images at sigma 0.25 \(none of this size\)"),
        (None, (1, 8, 8), "needs the noise level"),
    ],
)
def test_auto_lists_the_available_denoisers(sigma: Any, image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose(cards(), sigma, image, None)


def test_levels_a_card_covers() -> None:
    one, several = CARD, replace(CARD, sigmas=(0.12, 0.5))
    between = replace(CARD, sigmas=(0.1, 1.1), continuous=True)
    assert [one.covers(s) for s in (0.25, 0.251, 0.3)] == [True, True, False]
    assert [several.covers(s) for s in (0.12, 0.25, 0.5)] == [True, False, True]
    assert [between.covers(s) for s in (0.05, 0.25, 1.1, 1.2)] == [False, True, True, False]


def test_another_noise_level_gets_a_warning_with_both_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.safetensors"
    save_denoiser(path, small(), CARD)
    with pytest.warns(UserWarning, match="trained for sigma 0.25 and is used at 0.5"):
        load_denoiser(str(path), sigma=0.5)
    line = ["--model", "digits", "--n", "100", "--n0", "10", "--max", "2", "--denoiser", str(path), "--quiet"]
    run(*line, "--sigma", "0.5", "--out", str(tmp_path / "a.jsonl"))
    assert "trained for sigma 0.25 and is used at 0.5" in capsys.readouterr().err
    run(*line, "--sigma", "0.25", "--out", str(tmp_path / "b.jsonl"))
    assert "trained for" not in capsys.readouterr().err


@pytest.mark.slow
def test_auto_on_the_digits(tmp_path: Path) -> None:
    """The one trained for exactly this classifier, named in the record, and better than none."""
    line = ["--model", "digits", "--sigma", "0.5", "--n", "1000", "--skip", "5", "--quiet", "--out"]
    run(*line, str(tmp_path / "with.jsonl"), "--denoiser", "auto")
    run(*line, str(tmp_path / "without.jsonl"))
    with_it, without = (read_run(tmp_path / f"{name}.jsonl") for name in ("with", "without"))
    assert [c.name for c in curves([with_it, without])] == [f"digits, σ = 0.5, {OWN}", "digits, σ = 0.5"]
    step = with_it.header["pipeline"][0]
    own = load_classifier("digits").identity()
    assert step["name"] == OWN
    assert step["sha256"] == shipped()[step["name"]].sha256
    assert own in [c["sha256"] for c in shipped()[step["name"]].classifiers]
    right = [sum(row["prediction"] == row["label"] for row in r.images) for r in (with_it, without)]
    # the same 100 images: a difference of 15 is more than three standard errors if every tenth image changes sides
    assert right[0] >= right[1] + 15


def test_trained_denoisers_take_other_sizes() -> None:
    for name in shipped():
        denoiser = load_denoiser(name)
        assert isinstance(denoiser, Trained)
        # a mask in place of the level, and a grid of blocks over it
        size, level = ((16, 24), None) if denoiser.card.purifier == "atop" else ((13, 19), 0.25)
        noisy = torch.rand(2, denoiser.card.image[0], *size)
        assert denoiser(noisy, level).shape == noisy.shape
