"""Train a denoiser by a recipe, and save its weights with their card."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from certify.errors import RunFault, UserError
from certify.models.classifier import Classifier
from certify.models.identity import state_digest
from certify.runs.config import versions
from denoisers import ARCHITECTURES
from denoisers.adapters import Adapted
from denoisers.find import find_denoiser
from denoisers.names import build_with
from denoisers.weights import ACCESS, UNNAMED, Card, Trained, save_denoiser
from training.checkpoint import Scores
from training.data import TrainingData
from training.frozen_classifiers import FrozenClassifiers
from training.held_out import selection_scores
from training.loop import TrainerConfig, TrainingResult, train
from training.losses import check_labels
from training.recipe import Recipe

WEIGHTS = f"{UNNAMED}.safetensors"


def train_denoiser(
    architecture: str,
    data: TrainingData,
    recipe: Recipe,
    out: str | Path,
    config: TrainerConfig,
    *,
    classifiers: FrozenClassifiers | None = None,
    evaluators: Sequence[Classifier] = (),
    options: dict[str, Any] | None = None,
    init: str | nn.Module | None = None,
    stored: str = "float32",
    trust_code: bool = False,
) -> TrainingResult:
    """Train a denoiser, and save the weights with the best held-out score to ``out/denoiser.safetensors``.

    Args:
        architecture: a name in ``ARCHITECTURES``.
        data: training images.
        recipe: objective, noise levels, optimizer, seed.
        out: folder for weights, checkpoint and metrics.
        config: device, checkpoints, progress, command and licence for the card.
        classifiers: frozen classifiers for the objective.
        evaluators: classifiers for held-out accuracy, if the objective needs none.
        options: of the architecture.
        init: a denoiser of the same architecture to start from, or its name or file.
        stored: type of the saved numbers: ``float32``, or ``float16`` for half the size.
        trust_code: run the program in a TorchScript file named by ``init``.

    Raises:
        UserError: the objective lacks a classifier or labels, or ``init`` does not fit.
        RunFault: the loss is not finite, or the disk is full.
    """
    classifiers = classifiers or FrozenClassifiers([])
    check_objective(recipe, len(classifiers), surrogates=classifiers.access == "surrogates")
    objective = recipe.objectives[-1]
    if any(one.labels for one in recipe.objectives):
        check_labels(data, recipe.objective)
    net, start = build(architecture, data.image, recipe.seed, options, init, trust_code=trust_code)
    if not objective.accepts(net):
        raise UserError(f"--objective {recipe.objective} needs {objective.network}, not {type(net).__name__}")
    freeze_but(net, recipe.only)
    by_queries = len(classifiers) and not objective.gradients
    access, lineage = merge_lineage("queries" if by_queries else classifiers.access, classifiers, start)
    card = Card(
        architecture=architecture,
        options=options or {},
        image=data.image,
        sigmas=tuple(sorted(set(recipe.sigmas))),
        continuous=recipe.continuous,
        objective=recipe.objective,
        access=access,
        classifiers=lineage,
        data=data.about,
        training={**recipe.describe(), "precision": config.precision},
        started_from=start,
        command=config.command,
        versions=versions(),
        licence=config.licence,
        stored=stored,
        purifier=objective.purifier,
    )
    for classifier in evaluators:
        classifier.to(config.accelerator.device)
    evaluators = classifiers.working or list(evaluators)
    trained = net if objective.wrap is None else objective.wrap(net, data, recipe.seed)

    def save_weights(scores: Scores, step: int) -> None:
        training = {**card.training, "chosen_at_step": step, "of_steps": recipe.steps(len(data.train))}
        save_denoiser(Path(out) / WEIGHTS, net, replace(card, training=training, validation=scores))

    result = train(
        trained,
        data,
        recipe,
        classifiers,
        out,
        config,
        identity=[architecture, options, start],
        validate=lambda: selection_scores(net, trained, data, recipe, classifiers, evaluators),
        save_weights=save_weights,
    )
    if result.finished and not (Path(out) / WEIGHTS).is_file():
        raise RunFault(f"{out} holds a finished training without its weights; remove its checkpoint to train again")
    if not classifiers.unchanged():
        raise AssertionError("a frozen classifier changed during training")
    return result


def check_objective(recipe: Recipe, classifiers: int, *, surrogates: bool = False) -> None:
    """Refuse an objective that is not for denoisers, or that these classifiers do not fit.

    Raises:
        UserError: a classifier is missing, or surrogates are given to an objective that queries the target.
    """
    for objective in recipe.objectives:
        if not objective.for_denoisers:
            raise UserError(f"--objective {recipe.objective} trains a classifier; write --train-classifier MODEL")
        if objective.classifier and not classifiers:
            raise UserError(
                f"--objective {recipe.objective} needs a frozen classifier: --classifier M, or --surrogate M for query "
                "access (mse needs none)"
            )
        if surrogates and recipe.objective == "zeroth-order":
            raise UserError(
                "--objective zeroth-order queries the target itself; leave --surrogate out, or train for stability"
            )


def freeze_but(net: nn.Module, only: Sequence[str]) -> None:
    """Freeze all parameters but those below the named parts; without names, freeze none.

    Raises:
        UserError: a name that fits no parameter.
    """
    names = [name for name, _ in net.named_parameters()]
    parts = {part: {name for name in names if f"{name}.".startswith(f"{part}.")} for part in only}
    for part, matches in parts.items():
        if not matches:
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise UserError(f"--train-only {part}: the network has no such part; expected some of {known}")
    trained = set().union(*parts.values()) if only else set(names)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in trained)


def build(
    architecture: str,
    image: tuple[int, int, int],
    seed: int,
    options: dict[str, Any] | None = None,
    init: str | nn.Module | None = None,
    *,
    trust_code: bool = False,
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Build a network, with the weights of ``init`` if given, and describe these weights for the card.

    ``init`` may lack parts that ``options`` add, if it has a card for the same architecture; a warning names them.

    Raises:
        UserError: options or weights that do not fit.
    """
    torch.manual_seed(seed)
    builder = ARCHITECTURES.get(architecture)
    net: nn.Module = build_with("architecture", architecture, builder, options=options or {}, image_channels=image[0])
    if init is None:
        return net, None
    start: Any = find_denoiser(init, image=image, trust_code=trust_code) if isinstance(init, str) else init
    name = init if isinstance(init, str) else type(init).__name__
    inner = start.net if isinstance(start, Trained) else start.inner if isinstance(start, Adapted) else start
    try:
        missing, unexpected = net.load_state_dict(inner.state_dict(), strict=False)
    except (RuntimeError, AttributeError):
        missing, unexpected = [], [name]
    may_lack = isinstance(start, Trained) and start.card.architecture == architecture
    if unexpected or (missing and not may_lack):
        raise UserError(f"--init {name} is not a {architecture} with these options; expected the same one") from None
    if missing:
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in missing))
        warnings.warn(f"--init {name} lacks {parts}; initialised from seed {seed}", stacklevel=2)
    if not isinstance(start, Trained):
        return net, {"name": name, "sha256": state_digest(net), "access": "none", "classifiers": []}
    card = start.card
    about = {key: getattr(card, key) for key in ("sha256", "objective", "access", "command", "started_from")}
    return net, {**about, "classifiers": list(card.classifiers), **({"new": sorted(missing)} if missing else {})}


def merge_lineage(
    access: str, classifiers: FrozenClassifiers, start: dict[str, Any] | None
) -> tuple[str, tuple[dict[str, Any], ...]]:
    """Combine access and classifiers of this training with those of the weights it starts from.

    Raises:
        UserError: query access to a target that the initial weights were trained with.
    """
    own = classifiers.describe()
    earlier = list(start["classifiers"]) if start else []
    if classifiers.target is not None and any(c.get("sha256") == classifiers.target for c in earlier):
        raise UserError(
            "--init was trained with the target itself, which query access excludes; start from other weights"
        )
    strongest = max(access, start["access"] if start else "none", key=ACCESS.index)
    return strongest, (*own, *(c for c in earlier if c not in own))
