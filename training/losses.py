"""What networks are trained for, objective by objective: what a step shows them, and its loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.registry import Registry
from denoisers.names import build_with
from training.consistency import agreeing_loss, check_draws

if TYPE_CHECKING:
    from denoisers.jpeg import Codec
    from training.data import TrainingData

_SPREAD = 0.25  # standard deviation of natural images' pixels in [0, 1]


@dataclass(frozen=True)
class Draw:
    """What a step's inputs are made of.

    Attributes:
        clean: ``(B, C, H, W)`` in [0, 1], augmented.
        sigma: noise level of each image ``(B,)``; 0 where the objective has none.
        labels: class indices ``(B,)``, or None.
        classifier: the frozen classifier whose turn it is, or None.
        generator: everything random comes from it; on the CPU.
        epoch: passes over the images so far.
    """

    clean: Tensor
    sigma: Tensor
    labels: Tensor | None
    classifier: Classifier | None
    generator: torch.Generator
    epoch: float = 0.0

    def times(self, draws: int) -> Draw:
        """All images as often as noise is to be drawn for each: all once, then all again."""
        labels = None if self.labels is None else self.labels.repeat(draws)
        return replace(self, clean=self.clean.repeat(draws, 1, 1, 1), sigma=self.sigma.repeat(draws), labels=labels)


@dataclass(frozen=True)
class Prepared:
    """What a step shows the network.

    Attributes:
        inputs: its arguments, each with B rows.
        target: the images ``(B, C, H, W)`` that it should make of them.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor


def add_noise(draw: Draw) -> Prepared:
    """Clean images plus Gaussian noise, and the noise level."""
    noise = torch.randn(draw.clean.shape, generator=draw.generator).to(draw.clean.device)
    return Prepared((draw.clean + draw.sigma[:, None, None, None] * noise, draw.sigma), draw.clean)


@dataclass(frozen=True, kw_only=True)
class Batch(Draw):
    """One step's images: what was drawn, and what the trained network made of it.

    Attributes:
        output: what the network made of its inputs: images of the same shape as ``clean``, or logits ``(B, K)``.
        queries: for objectives that estimate gradients: directions an image.
        temperature: what the classifier's logits are divided by before the cross-entropy.
        extra: whatever else the network gave, such as class scores ``(B, K)`` read off its own features.
        prepared: the inputs and the target; None means clean images.
    """

    output: Tensor
    queries: int = 20
    temperature: float = 1.0
    extra: tuple[Tensor, ...] = ()
    prepared: Prepared | None = None

    @property
    def target(self) -> Tensor:
        """The images that the network should make."""
        return self.clean if self.prepared is None else self.prepared.target

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
        noise: whether its images get Gaussian noise, so that ``--sigma`` says how much.
        prepare: what the network is shown; called without gradients of its own.
        wrap: the network as it is trained, from the bare one, the data and the seed: with a head, or a second network;
            None trains the bare one. Only the bare one is kept.
        purifier: the defence that the weights are for, or empty: a denoiser for smoothing.
        draws: of noise for each image of a step; the loss gets all images once, then all again.
        for_classifiers: whether a classifier can be trained for it, being the network itself.
        for_denoisers: whether a denoiser or purifier can.
        codecs: that a classifier's held-out images are shown through; none: they get noise.
    """

    loss: Callable[[Batch], Tensor]
    classifier: bool = True
    labels: bool = False
    gradients: bool = True
    noise: bool = True
    prepare: Callable[[Draw], Prepared] = add_noise
    wrap: Callable[[nn.Module, TrainingData, int], nn.Module] | None = None
    purifier: str = ""
    draws: int = 1
    for_classifiers: bool = False
    for_denoisers: bool = True
    codecs: tuple[Codec, ...] = ()


def mse(batch: Batch) -> Tensor:
    """Squared error, each image's divided by the error of the best guess from one pixel at its level.

    At one level that is a constant factor on || D(x + e) - x ||^2 (Salman et al. 2020, section 3.1); with several it
    keeps the strongest noise from being all that counts (as in Karras et al. 2022).
    """
    expected = 1 / (1 / batch.sigma**2 + 1 / _SPREAD**2)
    return ((batch.output - batch.clean).pow(2).mean((1, 2, 3)) / expected).mean()


def stability(batch: Batch, draws: int = 1, consistency: float = 0.0) -> Tensor:
    """Cross-entropy of f(D(x + e)) against f's own label of the clean image (Salman et al. 2020, equation 4).

    Images that f cannot label are left out. With several draws of each image these should agree
    (:func:`training.consistency.agreeing_loss`).
    """
    assert batch.classifier is not None
    with torch.no_grad(), torch.autocast(batch.clean.device.type, enabled=False):
        target = batch.classifier(batch.clean[: len(batch.clean) // draws]).repeat(draws)
    return agreeing_loss(batch.logits(), target, draws, consistency)


def classification(batch: Batch, draws: int = 1, consistency: float = 0.0) -> Tensor:
    """Cross-entropy against the true label: of f(D(x + e)), or of the network itself where a classifier is trained.

    The first is CLF of Salman et al. 2020, the second the noise augmentation of Cohen et al. 2019. With several draws
    of each image these should agree.
    """
    assert batch.labels is not None
    scores = batch.output if batch.classifier is None else batch.logits()
    return agreeing_loss(scores, batch.labels, draws, consistency)


def _of_draws(loss: Callable[..., Tensor], labels: bool) -> Callable[..., Objective]:
    """The objective of a loss through the classifier, with its settings."""

    def objective(draws: int = 1, consistency: float = 0.0) -> Objective:
        check_draws(draws, consistency)
        through = functools.partial(loss, draws=draws, consistency=consistency)
        return Objective(through, labels=labels, draws=draws, for_classifiers=labels)

    return objective


OBJECTIVES = Registry("objective")
OBJECTIVES.add("mse", lambda: Objective(mse, classifier=False), "squared error; needs nothing from a classifier")
OBJECTIVES.add("stability", _of_draws(stability, labels=False), "f's own label of the clean image; needs no labels")
OBJECTIVES.add("classification", _of_draws(classification, labels=True), "the true label, through f")
OBJECTIVES.add("mse+classes", "training.head:objective", "squared error, and the label read off the own bottleneck")
OBJECTIVES.add("zeroth-order", "training.zeroth_order:objective", "stability by queries alone: gradients estimated")
OBJECTIVES.add("dsm", "training.score_matching:objective", "denoising score matching; for score and energy")
OBJECTIVES.add("context", "training.context:context", "each pixel from its surroundings; for blind-spot, NCIS-style")
OBJECTIVES.add("restore", "training.context:restore", "the same of smoothed images: puts back what smoothing takes")
OBJECTIVES.add("complete", "training.atop:completion", "randomly masked images, completed; AToP-style")
OBJECTIVES.add("atop", "training.atop:fine_tuning", "the same of attacked images, and the true label through f")
OBJECTIVES.add("jpeg-noise", "training.jpeg_noise:objective", "a classifier on coded images; for --train-classifier")


def make_objective(name: str, settings: Mapping[str, Any] | None = None) -> Objective:
    """The objective of this name with its settings.

    Raises:
        UserError: a setting it does not have (with those there are), or a value that does not fit.
    """
    builder = OBJECTIVES.get(name)
    known = inspect.signature(builder).parameters
    for key, value in (settings or {}).items():
        if key in known:
            _check_type(key, value, known[key])
    built: Objective = build_with("objective", name, builder, options=settings or {})
    return built


def _check_type(key: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuse what is not of the default's kind: any text is true, ``False`` of a shell too."""
    default = parameter.default
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"--set {key}={value}: expected true or false")
    elif isinstance(default, int | float):
        takes_words = isinstance(value, str) and "str" in str(parameter.annotation)
        if isinstance(value, bool) or not (isinstance(value, int | float) or takes_words):
            raise UserError(f"--set {key}={value}: expected a number, such as {default:g}")


def default_settings(name: str) -> dict[str, Any]:
    """What the settings of this objective are where none are given."""
    return {key: p.default for key, p in inspect.signature(OBJECTIVES.get(name)).parameters.items()}


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
