"""The smoothed classifier of a plain module or function, on one image and on batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from certify import Classifier, SmoothedClassifier, UserError, load_classifier, load_images


class Halfspace(nn.Module):
    """Class 1 where the mean exceeds 0.5: the true l2 radius is the distance to that plane."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = x.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-score, score], dim=1)


def grey(level: float, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.full((3, height, width), level)


def distance(level: float, values: int = 192) -> float:
    return float(abs(level - 0.5) * values**0.5)


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
def test_a_plain_module_takes_the_size_of_the_first_image(size: tuple[int, int]) -> None:
    g = SmoothedClassifier(Halfspace(), sigma=0.25)
    found = g.certify(grey(0.51, *size), n=2000)
    values = 3 * size[0] * size[1]
    assert found.prediction == 1
    assert 0.5 * distance(0.51, values) < found.radius <= distance(0.51, values)
    with pytest.raises(UserError, match=rf"shape \(3, 5, 5\); expected \(3, {size[0]}, {size[1]}\)"):
        g.certify(grey(0.51, 5, 5), n=10)


def test_a_module_stays_as_it_was() -> None:
    network = nn.Sequential(nn.Dropout(0.5), Halfspace(), nn.Linear(2, 2)).train()
    SmoothedClassifier(network, sigma=0.25).predict(grey(0.6), n=10)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())


def test_before_the_first_image_the_classes_are_unknown() -> None:
    g = SmoothedClassifier(Halfspace(), sigma=0.25)
    with pytest.raises(UserError, match="certify an image first, or pass input_size"):
        _ = g.num_classes
    assert SmoothedClassifier(Halfspace(), sigma=0.25, input_size=(3, 8, 8)).num_classes == 2


def test_a_name_and_options_are_those_of_load_classifier(digits: Classifier) -> None:
    image = load_images("digits", digits, skip=100).load(0)
    by_name = SmoothedClassifier("digits", sigma=0.25).certify(image, n=200)
    assert by_name == SmoothedClassifier(digits, sigma=0.25).certify(image, n=200)
    with pytest.raises(UserError, match="num_classes with a loaded classifier"):
        SmoothedClassifier(digits, sigma=0.25, num_classes=10)
    with pytest.raises(UserError, match="unknown model"):
        SmoothedClassifier("digitz", sigma=0.25)


BATCH = torch.stack([grey(level) for level in (0.3, 0.49, 0.5, 0.7)])


@pytest.mark.parametrize("batch", [BATCH, BATCH.numpy(), list(BATCH), tuple(BATCH.numpy())], ids=type)
def test_a_batch_is_its_images(batch: Any) -> None:
    g = SmoothedClassifier(Halfspace(), sigma=0.25)
    alone = [g.certify(image, n=300) for image in BATCH]
    assert g.certify(batch, n=300) == alone
    assert g.decide(batch, radius=0.3) == [g.decide(image, radius=0.3) for image in BATCH]
    assert g.predict(batch, n=300) == [g.predict(image, n=300) for image in BATCH]
    assert g.certify(batch, tolerance=0.2, n=3000) == [g.certify(image, tolerance=0.2, n=3000) for image in BATCH]


def test_names_of_a_batch_fix_its_noise() -> None:
    g = SmoothedClassifier(Halfspace(), sigma=0.25)
    names = list("abcd")
    assert g.certify(BATCH, n=100, image_id=names)[2] == g.certify(BATCH[2], n=100, image_id="c")
    wrong: Any
    for wrong in ("abcd", ["a", "b"]):
        with pytest.raises(UserError, match="expected one for each of 4 images"):
            g.certify(BATCH, n=100, image_id=wrong)
    for images, wrong in ((BATCH, [1, 2, 3, 4]), (BATCH[0], names)):
        with pytest.raises(UserError, match="expected text"):
            g.certify(images, n=100, image_id=wrong)
    assert g.certify(BATCH[:0], n=100) == []


def test_an_image_of_uint8_is_its_float(digits: Classifier) -> None:
    g = SmoothedClassifier(Halfspace(), sigma=0.25, input_size=(3, 8, 8))
    image = np.full((3, 8, 8), 51, np.uint8)
    assert g.certify(image, n=100) == g.certify(np.float32(image / 255), n=100)


def test_load_classifier_takes_a_size_that_is_not_square() -> None:
    assert load_classifier(Halfspace(), input_size=(3, 4, 12)).num_classes == 2
