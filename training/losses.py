"""Training objectives: the inputs of a step, and the loss of the network's output."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.registry import Registry
from certify.types import FAILED
from denoisers.names import build_with
from denoisers.unet import SPREAD

if TYPE_CHECKING:
    from denoisers.jpeg import Codec
    from training.data import TrainingData

ENTROPY = 0.5
"""Weight of the entropy of the mean prediction in :func:`consistency_loss` (Jeong and Shin 2020)."""


@dataclass(frozen=True)
class Draw:
    """The random draw behind one step.

    Attributes:
        clean: augmented images ``(B, C, H, W)`` in [0, 1].
        sigma: noise level of each image ``(B,)``; 0 where the objective adds no noise.
        labels: class indices ``(B,)``, or None.
        classifier: the frozen classifier of this step, or None.
        generator: source of all further random numbers, on the CPU.
        epoch: passes over the training images so far.
    """

    clean: Tensor
    sigma: Tensor
    labels: Tensor | None
    classifier: Classifier | None
    generator: torch.Generator
    epoch: float = 0.0

    def repeat(self, times: int) -> Draw:
        """Repeat the batch, as a whole, for several noise draws per image."""
        labels = None if self.labels is None else self.labels.repeat(times)
        return replace(self, clean=self.clean.repeat(times, 1, 1, 1), sigma=self.sigma.repeat(times), labels=labels)


@dataclass(frozen=True)
class Prepared:
    """Arguments of the network, each with B rows, and the images ``(B, C, H, W)`` it should return."""

    inputs: tuple[Tensor, ...]
    target: Tensor


def add_noise(draw: Draw) -> Prepared:
    """Add Gaussian noise to the clean images; the network also gets the noise level."""
    noise = torch.randn(draw.clean.shape, generator=draw.generator).to(draw.clean.device)
    return Prepared((draw.clean + draw.sigma[:, None, None, None] * noise, draw.sigma), draw.clean)


@dataclass(frozen=True, kw_only=True)
class Batch(Draw):
    """A draw and the network's output for it.

    Attributes:
        output: images of the shape of ``clean``, or logits ``(B, K)``.
        queries: random directions per image, for objectives that estimate gradients.
        temperature: divisor of the classifier's logits before the cross-entropy.
        extra: further outputs of the network, such as class scores ``(B, K)``.
        prepared: inputs and target; None: the target is ``clean``.
    """

    output: Tensor
    queries: int = 20
    temperature: float = 1.0
    extra: tuple[Tensor, ...] = ()
    prepared: Prepared | None = None

    @property
    def target(self) -> Tensor:
        """The images the network should return."""
        return self.clean if self.prepared is None else self.prepared.target

    def logits(self) -> Tensor:
        """Logits ``(B, K)`` of the frozen classifier on the output, divided by the temperature."""
        assert self.classifier is not None
        return self.classifier.logits(self.output) / self.temperature


@dataclass(frozen=True)
class Objective:
    """A loss and its requirements.

    Attributes:
        loss: mean over the batch, differentiable in ``output``.
        classifier: True if it needs a frozen classifier.
        labels: True if it needs labels.
        gradients: True if gradients flow through the classifier.
        noise: True if it trains at the noise levels of ``--sigma``.
        prepare: makes the network's inputs; called without gradients.
        wrap: builds the module that is trained around the network, from the network, the data and the seed; None trains
            the network itself. Only the network is saved.
        purifier: the defence the weights are for; empty for a denoiser.
        draws: noise draws per image and step; the loss gets the whole batch repeated as often.
        for_classifiers: True if a classifier can be trained for it.
        for_denoisers: True if a denoiser or purifier can.
        codecs: codecs for a classifier's held-out images; empty: they get noise.
        accepts: True for the networks it can train.
        network: description of those networks, for the error message.
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
    accepts: Callable[[nn.Module], bool] = lambda net: True
    network: str = ""


def mse(batch: Batch) -> Tensor:
    """Squared error, divided for each image by the error of the best linear estimate from single pixels at its level.

    At one level this is || D(x + e) - x ||^2 (Salman et al. 2020, section 3.1) up to a factor; with several it keeps
    the highest levels from dominating (as in Karras et al. 2022).
    """
    expected = 1 / (1 / batch.sigma**2 + 1 / SPREAD**2)
    return ((batch.output - batch.clean).pow(2).mean((1, 2, 3)) / expected).mean()


def consistency_loss(logits: Tensor, target: Tensor, draws: int = 1, consistency: float = 0.0) -> Tensor:
    """Cross-entropy plus a penalty on noise draws of one image that disagree.

    With p_i the prediction for draw i and p their mean, the penalty is consistency * mean_i KL(p || p_i) + 0.5 H(p),
    averaged over images (Jeong and Shin 2020, equation 9). A certified radius grows with the share of the noise that
    agrees.

    Args:
        logits: ``(draws * B, K)``, the batch repeated as a whole.
        target: class indices ``(draws * B,)``; ``FAILED`` ones do not enter the cross-entropy.
        draws: per image.
        consistency: weight; 0: cross-entropy alone.
    """
    loss = cross_entropy(logits, target, ignore_index=FAILED)
    if not consistency:
        return loss
    log_p = logits.log_softmax(1).unflatten(0, (draws, -1))
    mean = log_p.exp().mean(0)
    log_mean = mean.clamp_min(1e-12).log()
    divergence = (mean * (log_mean - log_p)).sum(-1).mean()
    entropy = -(mean * log_mean).sum(-1).mean()
    total: Tensor = loss + consistency * divergence + ENTROPY * entropy
    return total


def check_draws(draws: int, consistency: float) -> None:
    """Refuse settings of :func:`consistency_loss` that are out of range or contradict each other.

    Raises:
        UserError: draws outside 1 to 64, a negative weight, or a weight with a single draw.
    """
    if not (isinstance(draws, int) and 1 <= draws <= 64):
        raise UserError(f"--set draws={draws}: expected a whole number from 1 to 64")
    if not 0 <= consistency < float("inf"):
        raise UserError(f"--set consistency={consistency:g}: expected a number from 0")
    if consistency and draws == 1:
        raise UserError(f"--set consistency={consistency:g} needs several draws; add --set draws=2")


def check_labels(data: TrainingData, objective: str) -> None:
    """Refuse data without labels, or with labels of a single class.

    Raises:
        UserError: with the ways to give labels.
    """
    if data.labels is None or len(data.labels.unique()) < 2:
        has = "has none" if data.labels is None else "has one class only"
        raise UserError(
            f"--objective {objective} needs labels of at least two classes, and {data.about['name']} {has}; expected "
            "--data with one folder per class or an .npz with x and y (--objective mse and stability need no labels)"
        )


def stability(batch: Batch, draws: int = 1, consistency: float = 0.0) -> Tensor:
    """Cross-entropy of f(D(x + e)) against f's label of the clean image (Salman et al. 2020, equation 4).

    Images that f cannot label do not count.
    """
    assert batch.classifier is not None
    with torch.no_grad(), torch.autocast(batch.clean.device.type, enabled=False):
        target = batch.classifier(batch.clean[: len(batch.clean) // draws]).repeat(draws)
    return consistency_loss(batch.logits(), target, draws, consistency)


def classification(batch: Batch, draws: int = 1, consistency: float = 0.0) -> Tensor:
    """Cross-entropy against the true label: of f(D(x + e)), or of the network itself if a classifier is trained.

    The former is CLF of Salman et al. 2020, the latter the noise augmentation of Cohen et al. 2019.
    """
    assert batch.labels is not None
    scores = batch.output if batch.classifier is None else batch.logits()
    return consistency_loss(scores, batch.labels, draws, consistency)


def _with_draws(loss: Callable[..., Tensor], labels: bool) -> Callable[..., Objective]:
    """Make the builder of an objective with settings ``draws`` and ``consistency``."""

    def objective(draws: int = 1, consistency: float = 0.0) -> Objective:
        check_draws(draws, consistency)
        with_settings = functools.partial(loss, draws=draws, consistency=consistency)
        return Objective(with_settings, labels=labels, draws=draws, for_classifiers=labels)

    return objective


OBJECTIVES = Registry("objective")
OBJECTIVES.add("mse", lambda: Objective(mse, classifier=False), "squared error; needs no classifier")
OBJECTIVES.add("stability", _with_draws(stability, labels=False), "f's label of the clean image; needs no labels")
OBJECTIVES.add("classification", _with_draws(classification, labels=True), "the true label, through f")
OBJECTIVES.add("mse+classes", "training.class_head:objective", "squared error, and labels from the bottleneck")
OBJECTIVES.add("zeroth-order", "training.zeroth_order:objective", "stability with gradients estimated from queries")
OBJECTIVES.add("dsm", "training.purifiers:score_matching", "denoising score matching; for score and energy")
OBJECTIVES.add("context", "training.purifiers:context", "predict pixels from their surroundings; for blind-spot")
OBJECTIVES.add("restore", "training.purifiers:restore", "restore smoothed images; for blind-spot")
OBJECTIVES.add("complete", "training.atop:completion", "complete randomly masked images; for masked-unet")
OBJECTIVES.add("atop", "training.atop:fine_tuning", "complete attacked images so that f is right; for masked-unet")
OBJECTIVES.add("jpeg-noise", "training.classifier:jpeg_noise", "JPEG-coded images; for --train-classifier")


def make_objective(name: str, settings: Mapping[str, Any] | None = None) -> Objective:
    """Build an objective by name.

    Raises:
        UserError: an unknown setting (the message lists those there are), or a value out of range.
    """
    builder = OBJECTIVES.get(name)
    known = inspect.signature(builder).parameters
    for key, value in (settings or {}).items():
        if key in known:
            _check_type(key, value, known[key])
    built: Objective = build_with("objective", name, builder, options=settings or {})
    return built


def _check_type(key: str, value: Any, parameter: inspect.Parameter) -> None:
    """Refuse a value of another type than the default: any text is truthy, the ``False`` of a shell too."""
    default = parameter.default
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"--set {key}={value}: expected true or false")
    elif isinstance(default, int | float):
        takes_text = isinstance(value, str) and "str" in str(parameter.annotation)
        if isinstance(value, bool) or not (isinstance(value, int | float) or takes_text):
            raise UserError(f"--set {key}={value}: expected a number, such as {default:g}")


def default_settings(name: str) -> dict[str, Any]:
    """Return the settings of an objective with their defaults."""
    return {key: p.default for key, p in inspect.signature(OBJECTIVES.get(name)).parameters.items()}


PHASES = {"mse+stability": ("mse", "stability")}
"""Objectives that run one after the other within one training."""


def phases(objective: str) -> tuple[str, ...]:
    """Return the objectives a training goes through.

    Raises:
        UserError: an unknown objective.
    """
    names = PHASES.get(objective, (objective,))
    for name in names:
        OBJECTIVES.get(name)
    return names
