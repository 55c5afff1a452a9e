"""Consistency over noise draws: the published formula, and its use in training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.types import FAILED
from denoisers.unet import UNet
from training.data import load_training_data
from training.frozen_classifiers import FrozenClassifiers
from training.held_out import loss_scores, selection_scores
from training.loop import draw_batch
from training.losses import Batch, consistency_loss, make_objective
from training.recipe import Recipe


def test_it_is_the_published_loss() -> None:
    """Jeong and Shin 2020, equation 9, written out in double precision for each image and draw."""
    torch.manual_seed(0)
    draws, images, weight = 3, 4, 7.0
    logits = torch.randn(draws * images, 5, dtype=torch.float64)
    target = torch.randint(5, (images,)).repeat(draws)
    expected = cross_entropy(logits, target).item()
    for image in range(images):
        each = [logits[image + draw * images].softmax(0).tolist() for draw in range(draws)]
        mean = [sum(p) / draws for p in zip(*each, strict=True)]
        for p in each:
            divergence = sum(m * math.log(m / q) for m, q in zip(mean, p, strict=True))
            expected += weight * divergence / draws / images
        expected -= 0.5 * sum(m * math.log(m) for m in mean) / images
    assert consistency_loss(logits, target, draws, weight).item() == pytest.approx(expected, rel=1e-9)


def test_without_a_weight_it_is_the_cross_entropy_and_failures_do_not_count() -> None:
    logits, target = torch.randn(6, 3), torch.tensor([0, 1, FAILED, 0, 1, FAILED])
    kept = [0, 1, 3, 4]
    assert torch.allclose(consistency_loss(logits, target, 2), cross_entropy(logits[kept], target[kept]))


def test_draws_of_one_image_differ_in_noise_alone(digits: Classifier) -> None:
    data = load_training_data("digits-train", digits, held_out=400)
    recipe = Recipe("stability", (0.2, 0.7), settings={"draws": 3})
    objective = make_objective("stability", recipe.settings)
    drawn = torch.Generator().manual_seed(1)
    draw = draw_batch(data, data.train[:5], recipe, drawn, digits, 0, torch.device("cpu")).repeat(objective.draws)
    shown = objective.prepare(draw)
    assert torch.equal(draw.clean[:5], draw.clean[10:])
    assert torch.equal(draw.sigma[:5], draw.sigma[5:10])
    assert draw.labels is not None
    assert draw.labels.tolist() == data.labels[data.train[:5]].tolist() * 3  # type: ignore[index]
    assert not torch.equal(shown.inputs[0][:5], shown.inputs[0][5:10])


@pytest.mark.parametrize("name", ["stability", "classification"])
def test_objectives_use_it(digits: Classifier, name: str) -> None:
    """Through the classifier, at its temperature, with the labels of the clean images."""
    torch.manual_seed(0)
    clean, output = torch.rand(4, 1, 8, 8).repeat(2, 1, 1, 1), torch.rand(8, 1, 8, 8)
    labels = torch.tensor([1, 2, 3, 4] * 2)
    level = torch.full((8,), 0.5)
    batch = Batch(clean, level, labels, digits, torch.Generator(), output=output, temperature=2.0)
    found = make_objective(name, {"draws": 2, "consistency": 5.0}).loss(batch)
    target = labels if name == "classification" else digits(clean)
    assert torch.allclose(found, consistency_loss(digits.logits(output) / 2, target, 2, 5.0))


def test_weights_are_selected_by_the_loss_with_several_draws(digits: Classifier) -> None:
    """Single draws cannot show agreement; the loss does."""
    torch.manual_seed(0)
    data, net = load_training_data("digits-train", digits, held_out=60), UNet((8, 16), 1, image_channels=1).eval()
    frozen = FrozenClassifiers([digits])
    for settings in ({}, {"draws": 2, "consistency": 5.0}):
        recipe = Recipe("stability", (0.5,), settings=settings)
        found = selection_scores(net, net, data, recipe, frozen, [digits])
        own = loss_scores(net, data, recipe, make_objective("stability", settings), frozen)["score"]
        assert found["score"] == pytest.approx(own if settings else 1 - found["agreement@0.5"], abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"draws": 0}, "settings draws=0: expected a whole number from 1 to 64"),
        ({"draws": 1.5}, "settings draws=1.5: expected a whole number"),
        ({"consistency": 3}, "needs several draws; add settings draws=2"),
        ({"draws": 2, "consistency": -1}, "settings consistency=-1: expected a number from 0"),
        (
            {"draws": 2, "weight": 3},
            "objective 'stability' has no option 'weight'; its options: draws=1, consistency=0.0",
        ),
    ],
)
def test_settings_out_of_range_are_errors(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_objective("stability", settings)
