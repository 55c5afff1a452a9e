"""From a recipe to a denoiser's file with its card."""

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
from certify.models.pipeline import state_digest
from certify.runs.config import versions
from denoisers import ARCHITECTURES
from denoisers.adapters import Adapted
from denoisers.find import find_denoiser
from denoisers.names import build_with
from denoisers.weights import ACCESS, UNNAMED, Card, Trained, save_denoiser
from training.checkpoint import Scores
from training.data import TrainingData
from training.frozen_classifiers import Guides
from training.held_out import scores_to_choose_by
from training.loop import Conduct, Outcome, train
from training.recipe import Recipe

WEIGHTS = f"{UNNAMED}.safetensors"


def train_denoiser(
    architecture: str,
    data: TrainingData,
    recipe: Recipe,
    out: str | Path,
    conduct: Conduct,
    *,
    guides: Guides | None = None,
    watched_by: Sequence[Classifier] = (),
    options: dict[str, Any] | None = None,
    init: str | None = None,
    stored: str = "float32",
    trust_code: bool = False,
) -> Outcome:
    """Train a denoiser; the best weights on held-out images go to ``out/denoiser.safetensors``.

    Args:
        architecture: a name of ``ARCHITECTURES``.
        data: training images.
        recipe: objective, levels, optimizer, seed.
        out: folder for weights, checkpoint and metrics.
        conduct: device, checkpoints, progress, what the card says of command and licence.
        guides: the frozen classifiers that the objective needs.
        watched_by: classifiers that held-out accuracy is measured with, where the objective needs none.
        options: of the architecture.
        init: a denoiser to start from, of the same architecture.
        stored: type of the stored numbers: ``float32``, or ``float16`` for half the size.
        trust_code: run the program in a TorchScript file that ``init`` names.

    Raises:
        UserError: an objective without the classifier or labels it needs; an ``init`` that does not fit.
        RunFault: the loss is no number any more.
    """
    guides = guides or Guides([])
    check_needs(recipe, data, guides)
    net, before = build(architecture, data.image, recipe.seed, options, init, trust_code=trust_code)
    freeze_but(net, recipe.only)
    card = _card(architecture, options, data, recipe, conduct, guides, before)
    for judge in watched_by:
        judge.to(conduct.driver.device)
    judges = guides.working or list(watched_by)
    wrap = recipe.objectives[-1].wrap
    whole = net if wrap is None else wrap(net, data, recipe.seed)

    def keep(scores: Scores, step: int) -> None:
        shaped = {**card.training, "chosen_at_step": step, "of_steps": recipe.steps(len(data.train))}
        save_denoiser(Path(out) / WEIGHTS, net, replace(card, training=shaped, validation=scores, stored=stored))

    outcome = train(
        whole,
        data,
        recipe,
        guides,
        out,
        conduct,
        identity=[architecture, options, before],
        validate=lambda: scores_to_choose_by(net, whole, data, recipe, guides, judges),
        keep=keep,
    )
    if outcome.finished and not (Path(out) / WEIGHTS).is_file():
        raise RunFault(f"{out} holds a finished training without its weights; remove its checkpoint to train again")
    if not guides.unchanged():
        raise AssertionError("a frozen classifier changed while the denoiser was trained")
    return outcome


def _card(
    architecture: str,
    options: dict[str, Any] | None,
    data: TrainingData,
    recipe: Recipe,
    conduct: Conduct,
    guides: Guides,
    before: dict[str, Any] | None,
) -> Card:
    """What a card can say before training."""
    last = recipe.objectives[-1]
    access, classifiers = lineage(guides.access if last.gradients or not len(guides) else "queries", guides, before)
    return Card(
        architecture=architecture,
        options=options or {},
        image=data.image,
        sigmas=tuple(sorted(set(recipe.sigmas))),
        continuous=recipe.continuous,
        objective=recipe.objective,
        access=access,
        classifiers=classifiers,
        data=data.about,
        training={**recipe.describe(), "precision": conduct.precision},
        started_from=before,
        command=conduct.command,
        versions=versions(),
        licence=conduct.licence,
        purifier=last.purifier,
    )


def check_guided(recipe: Recipe, guides: int) -> None:
    """Refuse an objective that is not for denoisers, or that needs a classifier, if there are none."""
    for objective in recipe.objectives:
        if not objective.for_denoisers:
            raise UserError(
                f"--objective {recipe.objective} trains a classifier, no denoiser; write --train-classifier MODEL"
            )
        if objective.classifier and not guides:
            raise UserError(
                f"--objective {recipe.objective} needs a frozen classifier: --classifier M, or --surrogate M for query "
                "access (mse needs none)"
            )


def check_needs(recipe: Recipe, data: TrainingData, guides: Guides) -> None:
    """Refuse an objective that is not for denoisers, or whose classifier, labels or classes are missing."""
    check_guided(recipe, len(guides))
    for objective in recipe.objectives:
        if objective.labels and (data.labels is None or len(data.labels.unique()) < 2):
            has = "has none" if data.labels is None else "holds one class only"
            raise UserError(
                f"--objective {recipe.objective} needs labels of at least two classes, and {data.about['name']} {has}; "
                "write --data DIR with a folder a class, or --objective stability or mse, which need no labels"
            )


def freeze_but(net: nn.Module, only: Sequence[str]) -> None:
    """Leave only parameters trainable whose names begin with one of these; all, where there are none.

    Raises:
        UserError: a beginning that fits no parameter.
    """
    names = [name for name, _ in net.named_parameters()]
    chosen = {part: {name for name in names if f"{name}.".startswith(f"{part}.")} for part in only}
    for part, found in chosen.items():
        if not found:
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise UserError(f"--train-only {part}: the network has no such part; expected some of {parts}")
    trained = set().union(*chosen.values()) if only else set(names)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in trained)


def build(
    architecture: str,
    image: tuple[int, int, int],
    seed: int,
    options: dict[str, Any] | None = None,
    init: str | None = None,
    *,
    trust_code: bool = False,
) -> tuple[nn.Module, dict[str, Any] | None]:
    """An untrained network, or one with the weights of ``init``; and what the card says about those.

    Weights of the same architecture may lack parts that ``options`` add; a warning names them.
    """
    torch.manual_seed(seed)
    builder = ARCHITECTURES.get(architecture)
    net: nn.Module = build_with("architecture", architecture, builder, options=options or {}, image_channels=image[0])
    if init is None:
        return net, None
    start = find_denoiser(init, image=image, trust_code=trust_code)
    inner = start.net if isinstance(start, Trained) else start.inner if isinstance(start, Adapted) else start
    try:
        missing, unexpected = net.load_state_dict(inner.state_dict(), strict=False)
    except (RuntimeError, AttributeError):
        missing, unexpected = [], [init]
    own = isinstance(start, Trained) and start.card.architecture == architecture  # parts that it lacks may be new
    if unexpected or (missing and not own):
        raise UserError(f"--init {init} is not a {architecture} with these options; expected the same one") from None
    if missing:
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in missing))
        warnings.warn(f"--init {init} lacks {parts}: new there, from seed {seed}", stacklevel=2)
    if not isinstance(start, Trained):
        return net, {"name": init, "sha256": state_digest(net), "access": "none", "classifiers": []}
    card = start.card
    about = {key: getattr(card, key) for key in ("sha256", "objective", "access", "command", "started_from")}
    return net, {**about, "classifiers": list(card.classifiers), **({"new": sorted(missing)} if missing else {})}


def lineage(access: str, guides: Guides, before: dict[str, Any] | None) -> tuple[str, tuple[dict[str, Any], ...]]:
    """The access and the classifiers of a card: those of this training, and of the weights it starts from.

    Raises:
        UserError: weights that were made with the target itself, as a start for query access to it.
    """
    own = guides.describe()
    earlier = list(before["classifiers"]) if before else []
    if guides.target is not None and any(c.get("sha256") == guides.target for c in earlier):
        raise UserError(
            "--init was trained with the target itself, which query access excludes; start from other weights"
        )
    strongest = max(access, before["access"] if before else "none", key=ACCESS.index)
    return strongest, (*own, *(c for c in earlier if c not in own))
