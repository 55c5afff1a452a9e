"""Train classifiers in the same loop: under noise (Cohen et al. 2019, the baseline that may retrain), or on JPEG.

Training on JPEG-coded images makes members of the JPEG ensemble. The idea, compression as augmentation with one
classifier per level, is that of Zhang and Gao (2021, arXiv 2106.13394); shares, rates and levels are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from certify.errors import UserError
from certify.models import resolve as hub
from certify.models.classifier import ClassifierSpec
from certify.models.identity import state_digest
from certify.runs.config import versions
from denoisers.jpeg import Codec, jpeg
from denoisers.quantisation import QUALITIES, read_tables
from denoisers.weights import write_weights
from training.checkpoint import Scores
from training.data import TrainingData
from training.frozen_classifiers import FrozenClassifiers
from training.held_out import classifier_scores, noisy_scores
from training.loop import TrainerConfig, TrainingResult, train
from training.losses import Draw, Objective, Prepared, check_labels, classification
from training.recipe import Recipe

WEIGHTS = "classifier.safetensors"
MIXED = "mixed"


class Normalised(nn.Module):
    """A network with its normalisation in front: images in [0, 1] to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.net = spec.net
        self.register_buffer("mean", torch.tensor(spec.input.mean or (0.0,)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.input.std or (1.0,)).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, sigma: Tensor) -> Tensor:
        """Return logits ``(B, K)``; ``sigma`` is not used."""
        scores: Tensor = self.net((images - self.mean) / self.std)
        return scores


def architecture(model: str, num_classes: int | None = None, weights: str = hub.UNTRAINED) -> ClassifierSpec:
    """Build an architecture with new weights, or those of a checkpoint.

    Raises:
        UserError: not an architecture that can be trained, or a checkpoint that does not fit.
    """
    source = hub.find_source(model, weights)
    if source.kind not in ("built-in", "timm", "torchvision"):
        raise UserError(f"--train-classifier {model!r}: expected an architecture by name, such as cifar_resnet20")
    hub.require_weights(source, weights)
    spec: ClassifierSpec = hub.BUILDERS.get(source.kind)(source.name, weights, num_classes)
    return spec


def train_classifier(
    model: str, spec: ClassifierSpec, data: TrainingData, recipe: Recipe, out: str | Path, config: TrainerConfig
) -> TrainingResult:
    """Train a classifier under noise (sigma 0: without) or on coded images, and save ``out/classifier.safetensors``.

    Load it by ``--model MODEL --weights FILE``. If it starts from a checkpoint, the card names it with its scores. See
    :func:`training.denoiser.train_denoiser` for the arguments.

    Raises:
        UserError: an objective for denoisers, or no labels of at least two classes.
    """
    objective = recipe.objectives[0]
    if not objective.for_classifiers:
        raise UserError(
            f"--train-classifier with --objective {recipe.objective}: expected classification or jpeg-noise"
        )
    check_labels(data, recipe.objective)
    net = Normalised(spec).requires_grad_(True).to(config.accelerator.device)
    start: dict[str, Any] | None = (
        None if spec.weights == hub.UNTRAINED else {"weights": spec.weights, "sha256": state_digest(net.net)}
    )
    codecs = objective.codecs
    levels = recipe.levels.checked()

    def validate() -> Scores:
        return coded_scores(net, data, codecs) if codecs else noisy_scores(net, data, levels)

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
        "training": {**recipe.describe(), "precision": config.precision},
        "command": config.command,
        "versions": versions(),
        "licence": config.licence,
    }

    def save_weights(scores: Scores, step: int) -> None:
        write_weights(Path(out) / WEIGHTS, net.net, {**card, "validation": scores, "chosen_at_step": step})

    none = FrozenClassifiers([])
    return train(net, data, recipe, none, out, config, identity=identity, validate=validate, save_weights=save_weights)


def jpeg_noise(
    level: int | str = 75,
    tables: str | None = None,
    table: str | None = None,
    subsampling: int = 444,
    share: float = 0.8,
) -> Objective:
    """Cross-entropy of the network itself on JPEG-coded images.

    Args:
        level: nominal quality, or ``mixed``: a random one for each image.
        tables: a file written by ``python -m training.coefficients``; None: the standard tables.
        table: kind of the tables, see :func:`denoisers.jpeg.jpeg`.
        subsampling: 444 or 420.
        share: of the images that are coded; the others stay clean.

    Raises:
        UserError: no such level, table or file, or a share out of range.
    """
    if not 0 < share <= 1:
        raise UserError(f"--set share={share}: expected a share of the images above 0, at most 1")
    codecs = make_codecs(level, tables, table, subsampling)
    return Objective(
        classification,
        classifier=False,
        labels=True,
        noise=False,
        prepare=functools.partial(code_images, codecs=codecs, share=share),
        for_classifiers=True,
        for_denoisers=False,
        codecs=codecs,
    )


def make_codecs(
    level: int | str = 75, tables: str | None = None, table: str | None = None, subsampling: int = 444
) -> tuple[Codec, ...]:
    """Build the codec of a level, or one for each level for ``mixed``; see :func:`jpeg_noise`."""
    if type(level) is not int and level != MIXED:
        raise UserError(f"--set level={level}: expected a nominal quality such as 75, or {MIXED}")
    if not isinstance(tables, str | None):
        raise UserError(f"--set tables={tables}: expected a file of `python -m training.coefficients`")
    levels: Sequence[int] = QUALITIES if tables is None else read_tables(tables).levels(table or "nn")
    return tuple(jpeg(q, subsampling, table, tables) for q in (levels if level == MIXED else [int(level)]))


def code_images(draw: Draw, codecs: tuple[Codec, ...], share: float) -> Prepared:
    """Code each image with probability ``share``, by one of the codecs at random."""
    count = len(draw.clean)
    which = torch.randint(len(codecs), (count,), generator=draw.generator)
    which[torch.rand(count, generator=draw.generator) >= share] = -1
    images = draw.clean.clone()
    for i, codec in enumerate(codecs):
        selected = (which == i).nonzero().flatten().to(images.device)
        if len(selected):
            images[selected] = codec.to(images.device)(draw.clean[selected])
    return Prepared((images, draw.sigma), draw.clean)


def coded_scores(net: nn.Module, data: TrainingData, codecs: Sequence[Codec]) -> Scores:
    """Compute ``score`` and ``accuracy@qLEVEL`` on coded held-out images, and ``accuracy@clean``."""
    transforms = {f"q{c.quality}": lambda clean, _, c=c: c.to(clean.device)(clean) for c in codecs}
    clean = classifier_scores(net, data, {"clean": lambda clean, _: clean})
    return {**clean, **classifier_scores(net, data, transforms)}
