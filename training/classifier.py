"""Classifier training in the same loop: under noise (Cohen et al. 2019), the baseline that may retrain, or on JPEG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import UserError
from certify.models import resolve as hub
from certify.models.classifier import ClassifierSpec
from certify.models.pipeline import state_digest
from certify.runs.config import versions
from denoisers.weights import write_weights
from training.checkpoint import Scores
from training.data import TrainingData
from training.frozen_classifiers import Guides
from training.held_out import classifier_scores
from training.jpeg_noise import coded_scores
from training.loop import Conduct, Outcome, train
from training.recipe import Recipe

WEIGHTS = "classifier.safetensors"


class Normalised(nn.Module):
    """A network with its normalisation in front: noisy images in [0, 1] plus noise to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.net = spec.net
        self.register_buffer("mean", torch.tensor(spec.input.mean or (0.0,)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.input.std or (1.0,)).view(-1, 1, 1), persistent=False)

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Logits ``(B, K)``; the level is not used."""
        scores: Tensor = self.net((noisy - self.mean) / self.std)
        return scores


def architecture(model: str, num_classes: int | None = None, weights: str = hub.UNTRAINED) -> ClassifierSpec:
    """An architecture with fresh weights, or those of a checkpoint to start from.

    Raises:
        UserError: no architecture that can be trained, or a checkpoint that does not fit.
    """
    source = hub.find_source(model, weights)
    if source.kind not in ("built-in", "timm", "torchvision"):
        raise UserError(f"--train-classifier {model!r}: expected an architecture by name, such as cifar_resnet20")
    hub.require_weights(source, weights)
    spec: ClassifierSpec = hub.BUILDERS.get(source.kind)(source.name, weights, num_classes)
    return spec


def train_classifier(
    model: str, spec: ClassifierSpec, data: TrainingData, recipe: Recipe, out: str | Path, conduct: Conduct
) -> Outcome:
    """Train a classifier under noise (or without: sigma 0), or on coded images; to ``out/classifier.safetensors``.

    It is read by ``--model MODEL --weights FILE``. See :func:`training.denoiser.train_denoiser` for the arguments. The
    card of one that starts from a checkpoint says which, and what its figures were before.

    Raises:
        UserError: another objective, no labels, or a single class.
    """
    objective = recipe.objectives[0]
    if not objective.for_classifiers:
        raise UserError(
            f"--train-classifier with --objective {recipe.objective}: expected classification or jpeg-noise"
        )
    if data.labels is None or len(data.labels.unique()) < 2:
        raise UserError(
            f"{data.about['name']} has no labels of at least two classes; a classifier needs them: --data DIR with a "
            "folder a class, or an .npz with x and y"
        )
    net = Normalised(spec).requires_grad_(True).to(conduct.driver.device)
    start: dict[str, Any] | None = (
        None if spec.weights == hub.UNTRAINED else {"weights": spec.weights, "sha256": state_digest(net.net)}
    )
    codecs = objective.codecs
    levels = recipe.levels.checked()

    def validate() -> Scores:
        return coded_scores(net, data, codecs) if codecs else classifier_scores(net, data, levels)

    records = [codec.describe() for codec in codecs]
    identity = model if start is None and not records else [model, dict(start or {}), records]
    if start is not None:
        net.eval()
        start["validation"] = validate()
    card: dict[str, Any] = {
        "architecture": model,
        "started_from": start,
        "codecs": records,
        "data": data.about,
        "training": {**recipe.describe(), "precision": conduct.precision},
        "command": conduct.command,
        "versions": versions(),
        "licence": conduct.licence,
    }

    def keep(scores: Scores, step: int) -> None:
        write_weights(Path(out) / WEIGHTS, net.net, {**card, "validation": scores, "chosen_at_step": step})

    return train(net, data, recipe, Guides([]), out, conduct, identity=identity, validate=validate, keep=keep)
