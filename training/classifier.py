"""Noise-augmented classifier training (Cohen et al. 2019), in the same loop: the baseline that may retrain."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from certify import hub
from certify.classifiers import BUILDERS, ClassifierSpec
from certify.errors import UserError
from certify.settings import versions
from training.checkpoint import Scores
from training.data import Levels, TrainingData
from training.guides import Guides
from training.held_out import classifier_scores
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


def untrained(model: str, num_classes: int | None = None) -> ClassifierSpec:
    """An architecture with fresh weights.

    Raises:
        UserError: no architecture that can be trained.
    """
    source = hub.find_source(model, hub.UNTRAINED)
    if source.kind not in ("built-in", "timm", "torchvision"):
        raise UserError(f"--train-classifier {model!r}: expected an architecture by name, such as cifar_resnet20")
    spec: ClassifierSpec = BUILDERS.get(source.kind)(source.name, hub.UNTRAINED, num_classes)
    return spec


def train_classifier(
    model: str,
    spec: ClassifierSpec,
    data: TrainingData,
    recipe: Recipe,
    out: str | Path,
    conduct: Conduct,
) -> Outcome:
    """Train a classifier under noise (or without: sigma 0); its weights go to ``out/classifier.safetensors``.

    They are read by ``--model MODEL --weights FILE``. See :func:`training.denoiser.train_denoiser` for the arguments.

    Raises:
        UserError: no labels, or a single class.
    """
    if recipe.objective != "classification":
        raise UserError(f"--train-classifier with --objective {recipe.objective}: expected classification")
    if data.labels is None or len(data.labels.unique()) < 2:
        raise UserError(f"{data.about['name']} has no labels of at least two classes; a classifier needs them")
    net = Normalised(spec).requires_grad_(True)
    card = {
        "architecture": model,
        "data": data.about,
        "training": recipe.describe(),
        "command": conduct.command,
        "versions": versions(),
        "licence": conduct.licence,
    }

    def keep(trained: nn.Module, scores: Scores, step: int) -> None:
        from safetensors.torch import save

        assert isinstance(trained, Normalised)
        tensors = {k: v.detach().cpu().contiguous() for k, v in trained.net.state_dict().items()}
        full = {**card, "validation": scores, "chosen_at_step": step}
        beside = Path(out) / f"{WEIGHTS}.new"
        beside.write_bytes(save(tensors, metadata={"card": json.dumps(full, sort_keys=True)}))
        os.replace(beside, Path(out) / WEIGHTS)

    levels = Levels(recipe.sigmas, recipe.continuous).checked()
    return train(
        net,
        data,
        recipe,
        Guides([]),
        out,
        conduct,
        identity=model,
        validate=lambda trained: classifier_scores(trained, data, levels),
        keep=keep,
    )
