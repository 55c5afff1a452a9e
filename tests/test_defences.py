"""Every registered defence: independence of the batch, reproducible draws, one label."""

from __future__ import annotations

import warnings
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import small_networks
import torch
from torch import Tensor, nn

from certify import load_classifier
from certify.cli.load import denoiser_for
from certify.errors import CertifyWarning, RunFault, UserError
from certify.models.defence import Defence, Member, majority
from certify.smoothing.rng import stream_key
from certify.types import FAILED
from denoisers import ARCHITECTURES, DEFENCES, defences, load_denoiser
from denoisers.classical import Median
from denoisers.defences import build_defence
from denoisers.names import parse_options
from denoisers.weights import Card, read_denoiser, save_denoiser

IMAGES = torch.rand((5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
KEYS = [stream_key(0, str(i), "test") for i in range(5)]


LEARNED: dict[str, tuple[str, dict[str, Any]]] = {
    "ncis": ("blind-spot", {"layers": 3, "filters": 4}),
    "ebm": ("score", {"channels": [8, 16], "blocks": 1}),
    "atop": ("masked-unet", {"channels": [8, 16], "blocks": 1}),
    "": ("unet", {"channels": [8, 16], "blocks": 1}),
}


def weights(folder: Path, purifier: str) -> str:
    """A file of small weights, as if they had been trained for this defence, or for denoising."""
    architecture, options = LEARNED[purifier]
    net = small_networks.trained(ARCHITECTURES.get(architecture)(image_channels=1, **options))
    levels = {"": (0.25,), "ebm": (0.01, 1.0)}.get(purifier, ())
    card = Card(architecture, options, (1, 8, 8), levels, purifier == "ebm", "any", "none", purifier=purifier)
    path = folder / f"{architecture}.safetensors"
    save_denoiser(path, net, card)
    return str(path)


@pytest.fixture(scope="module", params=list(DEFENCES))
def defence(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Defence:
    name = request.param
    text = f"{name}:weights={weights(tmp_path_factory.mktemp(name), name)}" if name in LEARNED else name
    return build_defence(text, load_classifier("digits"))


def test_an_image_gets_the_same_answer_in_any_batch(defence: Defence) -> None:
    together = defence.passes_of(IMAGES, KEYS)
    alone = torch.cat([defence.passes_of(IMAGES[i : i + 1], KEYS[i : i + 1]) for i in range(5)])
    assert together.shape == (5, defence.draws * len(defence.classifiers), 10)
    assert torch.allclose(together, alone, atol=1e-4)
    assert defence(IMAGES, KEYS).tolist() == [int(defence(IMAGES[i : i + 1], KEYS[i : i + 1])) for i in range(5)]


def test_random_numbers_come_from_keys_and_turns(defence: Defence) -> None:
    assert torch.equal(defence.passes_of(IMAGES, KEYS), defence.passes_of(IMAGES, KEYS))
    assert torch.equal(defence.passes_of(IMAGES, KEYS), defence.passes_of(IMAGES, KEYS, turn=1)) != defence.random


def test_scores_are_probabilities_and_the_record_names_every_step(defence: Defence) -> None:
    scores = defence.scores(IMAGES, KEYS)
    assert torch.allclose(scores.sum(1), torch.ones(5))
    assert defence.describe()["name"] == defence.name
    assert len(defence.describe()["members"]) == len(defence.classifiers)
    assert defence.passes >= defence.draws


def _votes(*labels: int, classes: int = 4) -> Tensor:
    return torch.stack([torch.eye(classes)[v] if v >= 0 else torch.full((classes,), float("nan")) for v in labels])[
        None
    ]


def test_majority_vote_and_ties() -> None:
    assert majority(_votes(2, 2, 2)).item() == 2
    assert majority(_votes(1, 3, 1, 2)).item() == 1
    assert majority(_votes(3, -1, -1)).item() == 3
    assert majority(_votes(-1, -1)).item() == FAILED
    tie = _votes(0, 1, 1, 0)
    tie[0, 2, 1] = 5.0  # one of the votes for 1 is surer
    assert all(majority(tie[:, list(order)]).item() == 1 for order in permutations(range(4)))
    outvoted = _votes(0, 0, 1)
    outvoted[0, 2, 1] = 1e4
    assert majority(outvoted).item() == 0


def test_a_purifier_that_changes_the_shape_fails_by_name() -> None:
    class Half(nn.Module):
        def forward(self, images: Tensor, sigma: float | None = None, *, generator: object = None) -> Tensor:
            return images[..., ::2]

    broken = Defence("half", [Member(Half(), load_classifier("digits"))])
    with pytest.raises(RunFault, match=r"defence half turned \(5, 1, 8, 8\) into \(5, 1, 8, 4\)"):
        broken(IMAGES, KEYS)


def test_denoised_smoothing_as_a_defence_counts_votes() -> None:
    digits = load_classifier("digits")
    found = build_defence("denoised:sigma=0.5:n=300:denoiser=none", digits)
    votes = found.passes_of(IMAGES, KEYS).argmax(2)
    assert votes.shape == (5, 300)
    assert found(IMAGES, KEYS).tolist() == [int(row.bincount(minlength=10).argmax()) for row in votes]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing-like-it", "unknown"),
        ("denoised:sigmo=1", "has no option 'sigmo'; its options: sigma=0.25, n=100, denoiser=auto"),
        ("denoised:sigma", "expected NAME:KEY=VALUE"),
        ("denoised:sigma=-1", "expected a number above 0"),
        ("gaussian:size=3", "has no option 'size'; its options: width=null"),
        ("gaussian", "width follows the noise, and none is added here; write gaussian:width=0.5"),
        ("denoised:n=2.5", "denoised:n=2.5; expected a whole number from 1"),
        ("denoised:sigma=x", "sigma=x; expected a number above 0"),
        ("denoised:denoiser=5", "denoiser=5; expected a name or a file"),
        ("ebm:weights=5", "weights=5; expected a file"),
        ("ebm:draws=1.5", "draws=1.5; expected a whole number"),
        ("digits-unet-mse", "write denoised:denoiser=digits-unet-mse:sigma="),
    ],
)
def test_bad_names_and_options(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_defence(text, load_classifier("digits"))


def test_a_value_may_hold_a_colon(monkeypatch: pytest.MonkeyPatch) -> None:
    for denoiser in ("my.mod:fn", "deepinv:DRUNet=F.pth"):
        assert parse_options(f"denoised:denoiser={denoiser}:n=5") == ("denoised", {"denoiser": denoiser, "n": 5})
    asked: list[str] = []
    monkeypatch.setattr(defences, "find_denoiser", lambda text, **given: asked.append(text) or Median())
    assert build_defence("deepinv:DRUNet=F.pth", load_classifier("digits")).name == asked[0] == "deepinv:DRUNet=F.pth"


@pytest.mark.parametrize("purifier", ["ncis", "ebm", "atop"])
def test_weights_of_a_purifier_as_a_denoiser_warn_or_fail(purifier: str, tmp_path: Path) -> None:
    """Used as a defence, they need its name; under noise they give a warning, or an error if they take a mask."""
    digits = load_classifier("digits")
    file = weights(tmp_path, purifier)
    with pytest.raises(UserError, match=f"holds weights for {purifier}; write {purifier}:weights="):
        build_defence(file, digits)
    assert build_defence(f"{purifier}:weights={file}", digits).name == purifier
    assert read_denoiser(file).describe()["purifier"] == purifier
    for load in (lambda s: load_denoiser(file, sigma=s), lambda s: denoiser_for(file, s, (1, 8, 8))):
        if purifier == "atop":
            with pytest.raises(UserError, match="holds weights for atop, which completes masked images"):
                load(0.25)
        elif purifier == "ebm":
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                load(0.25)  # a score is a denoiser at the levels that it was trained for
    if purifier == "ncis":
        with pytest.warns(UserWarning, match="trained for the defence ncis, without noise, and are used at sigma"):
            load_denoiser(file, sigma=0.25)
    if purifier == "ebm":
        with pytest.warns(UserWarning, match="trained for sigma 0.01 to 1 and is used at 2"):
            load_denoiser(file, sigma=2.0)


def test_the_command_warns_of_weights_trained_without_noise(tmp_path: Path) -> None:
    with pytest.warns(CertifyWarning, match="trained for the defence ncis, without noise"):
        denoiser_for(weights(tmp_path, "ncis"), 0.25, (1, 8, 8))


def test_the_record_of_a_denoiser_has_the_known_keys(tmp_path: Path) -> None:
    """It identifies runs: with another key, old run files could not be resumed."""
    file = weights(tmp_path, "")
    names = {"name", "architecture", "objective", "access", "trained_for", "sha256"}
    assert set(read_denoiser(file).describe()) == names
    with pytest.raises(UserError, match=r"no noise is added here: write denoised:denoiser=.*:sigma=0.25"):
        build_defence(file, load_classifier("digits"))
    assert build_defence(f"denoised:denoiser={file}:n=2", load_classifier("digits"))(IMAGES, KEYS).shape == (5,)


@pytest.mark.parametrize("draws", [0, 1.5, True, "2"])
def test_number_of_passes(draws: Any) -> None:
    with pytest.raises(UserError, match="expected a whole number from 1"):
        Defence("x", [Member(None, load_classifier("digits"))], draws=draws)
