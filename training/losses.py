"""What a denoiser is trained for: one function an objective, from a batch to a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from certify.classifiers import Classifier
from certify.registry import Registry
from certify.types import FAILED

_SPREAD = 0.25  # standard deviation of natural images' pixels in [0, 1]


@dataclass(frozen=True)
class Batch:
    """One step's images.

    Attributes:
        clean: ``(B, C, H, W)`` in [0, 1].
        output: what the trained network made of clean + noise: images of the same shape, or logits ``(B, K)``.
        sigma: noise level of each image ``(B,)``.
        labels: class indices ``(B,)``, or None.
        classifier: the frozen classifier whose turn it is, or None.
        generator: for objectives that draw.
        queries: for objectives that estimate gradients: directions an image.
        temperature: what the classifier's logits are divided by before the cross-entropy.
        scores: class scores ``(B, K)`` read off the network's own features, or None.
    """

    clean: Tensor
    output: Tensor
    sigma: Tensor
    labels: Tensor | None
    classifier: Classifier | None
    generator: torch.Generator
    queries: int = 20
    temperature: float = 1.0
    scores: Tensor | None = None

    def logits(self) -> Tensor:
        """The classifier's logits ``(B, K)`` of the output, at the batch's temperature."""
        assert self.classifier is not None
        return self.classifier.logits(self.output) / self.temperature


@dataclass(frozen=True)
class Objective:
    """A loss and what it needs.

    Attributes:
        loss: mean over the batch, differentiable in ``output``.
        classifier: whether it needs a frozen classifier.
        labels: whether it needs the images' labels.
        gradients: whether it sends gradients through the classifier.
        head: whether it needs class scores from the network's own features.
    """

    loss: Callable[[Batch], Tensor]
    classifier: bool = True
    labels: bool = False
    gradients: bool = True
    head: bool = False


def mse(batch: Batch) -> Tensor:
    """Squared error, each image's divided by the error of the best guess from one pixel at its level.

    At one level that is a constant factor on || D(x + e) - x ||^2 (Salman et al. 2020, section 3.1); with several it
    keeps the strongest noise from being all that counts (as in Karras et al. 2022).
    """
    expected = 1 / (1 / batch.sigma**2 + 1 / _SPREAD**2)
    return ((batch.output - batch.clean).pow(2).mean((1, 2, 3)) / expected).mean()


def stability(batch: Batch) -> Tensor:
    """Cross-entropy of f(D(x + e)) against f's own label of the clean image (Salman et al. 2020, equation 4).

    Images that f cannot label are left out.
    """
    assert batch.classifier is not None
    with torch.no_grad(), torch.autocast(batch.clean.device.type, enabled=False):
        target = batch.classifier(batch.clean)
    return cross_entropy(batch.logits(), target, ignore_index=FAILED)


def classification(batch: Batch) -> Tensor:
    """Cross-entropy against the true label: of f(D(x + e)), or of the network itself where a classifier is trained.

    The first is CLF of Salman et al. 2020, the second the noise augmentation of Cohen et al. 2019.
    """
    assert batch.labels is not None
    scores = batch.output if batch.classifier is None else batch.logits()
    return cross_entropy(scores, batch.labels)


OBJECTIVES = Registry("objective")
OBJECTIVES.add("mse", lambda: Objective(mse, classifier=False), "squared error; needs nothing from a classifier")
OBJECTIVES.add("stability", lambda: Objective(stability), "f's own label of the clean image; needs no labels")
OBJECTIVES.add("classification", lambda: Objective(classification, labels=True), "the true label, through f")
OBJECTIVES.add("mse+classes", "training.head:objective", "squared error, and the label read off the own bottleneck")
OBJECTIVES.add("zeroth-order", "training.zeroth_order:objective", "stability by queries alone: gradients estimated")

PHASES = {"mse+stability": ("mse", "stability")}
"""Objectives one after the other in one training: squared error first, then fine-tuned for stability."""


def phases(objective: str) -> tuple[str, ...]:
    """The objectives that ``objective`` goes through.

    Raises:
        UserError: no such objective.
    """
    found = PHASES.get(objective, (objective,))
    for name in found:
        OBJECTIVES.get(name)
    return found
