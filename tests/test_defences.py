"""Every registered defence: the same answer in any batch, the same draws from the same keys, one label."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from certify import load_classifier
from certify.defence import Defence, Member, majority
from certify.errors import RunFault, UserError
from certify.streams import stream_key
from certify.types import FAILED
from denoisers import DEFENCES
from denoisers.defences import build_defence

IMAGES = torch.rand((5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
KEYS = [stream_key(0, str(i), "test") for i in range(5)]


@pytest.fixture(scope="module", params=list(DEFENCES))
def defence(request: pytest.FixtureRequest) -> Defence:
    try:
        return build_defence(request.param, load_classifier("digits"))
    except UserError as error:
        if "no shipped weights" not in str(error):
            raise
        pytest.skip(f"{request.param} has no weights for digits")


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


def test_the_majority_by_hand() -> None:
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
    with pytest.raises(RunFault, match=r"defence half made \(5, 1, 8, 4\) of \(5, 1, 8, 8\)"):
        broken(IMAGES, KEYS)


def test_smoothing_as_a_plain_classifier_counts_the_votes_of_its_draws() -> None:
    digits = load_classifier("digits")
    found = build_defence("denoised:sigma=0.5:n=300:denoiser=none", digits)
    votes = found.passes_of(IMAGES, KEYS).argmax(2)
    assert votes.shape == (5, 300)
    assert found(IMAGES, KEYS).tolist() == [int(row.bincount(minlength=10).argmax()) for row in votes]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing-like-it", "unknown"),
        ("denoised:sigmo=1", "has no option 'sigmo'; its options: sigma, n, denoiser"),
        ("denoised:sigma", "expected NAME:KEY=VALUE"),
        ("denoised:sigma=-1", "expected a number above 0"),
        ("gaussian:size=3", "has no option 'size'; its options: width"),
    ],
)
def test_bad_names_and_options(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_defence(text, load_classifier("digits"))
