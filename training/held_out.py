"""Scores on held-out training images, which weights are selected by and which cards report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from certify.models.classifier import Classifier
from certify.smoothing.rng import block_generator, stream_key
from training.checkpoint import Scores
from training.data import TrainingData
from training.frozen_classifiers import FrozenClassifiers
from training.loop import MOST, make_batch
from training.losses import Batch, Draw, Objective, add_noise, mse
from training.recipe import Recipe

_BATCH = 100
_SEED = 0  # the same noise in every training


def selection_scores(
    net: nn.Module,
    trained: nn.Module,
    data: TrainingData,
    recipe: Recipe,
    classifiers: FrozenClassifiers,
    evaluators: Sequence[Classifier],
) -> Scores:
    """Compute the scores that a denoiser's weights are selected by, in evaluation mode.

    With several draws per image ``score`` is the objective's loss, because single draws cannot show whether draws
    agree: weights under which an image keeps its label more often may be right on fewer single draws.

    Args:
        net: the denoiser.
        trained: the module that is trained: ``net``, or what the objective wraps around it.
        data: provides the held-out images.
        recipe: objective and noise levels.
        classifiers: frozen classifiers of the objective.
        evaluators: classifiers for agreement and accuracy.
    """
    objective = recipe.objectives[-1]
    if _has_other_target(objective):
        return loss_scores(trained, data, recipe, objective, classifiers)
    scores = denoiser_scores(net, data, recipe.levels.checked(), objective, evaluators)
    if _needs_its_loss(objective):
        scores["score"] = loss_scores(trained, data, recipe, objective, classifiers)["score"]
    return scores


def _has_other_target(objective: Objective) -> bool:
    """True if the network is not meant to minimise the squared error of a noisy image."""
    return bool(objective.purifier) or objective.prepare is not add_noise


def _needs_its_loss(objective: Objective) -> bool:
    """True if single draws of the denoiser alone do not show what the objective improves."""
    return objective.wrap is not None or objective.draws > 1


def score_name(recipe: Recipe) -> str:
    """Name ``score`` of :func:`selection_scores`, by which weights are chosen; lower is better."""
    objective = recipe.objectives[-1]
    if not objective.for_denoisers:
        return "cross-entropy"
    if _has_other_target(objective) or _needs_its_loss(objective):
        return "loss"
    if not objective.classifier:
        return "squared error"
    return "share of wrong labels" if objective.labels else "share of changed labels"


@torch.no_grad()
def denoiser_scores(
    net: nn.Module, data: TrainingData, sigmas: Sequence[float], objective: Objective, evaluators: Sequence[Classifier]
) -> Scores:
    """Score a denoiser on held-out images; the noise is the same in every call.

    Args:
        net: in evaluation mode.
        data: provides the held-out images.
        sigmas: noise levels.
        objective: defines ``score``, averaged over levels: the squared error if it needs no classifier; else the share
            of denoised images with a wrong label (if it needs labels) or another label than the clean image. Certified
            radii depend on these shares, not on the cross-entropy.
        evaluators: frozen classifiers on the device of ``net``; agreement and accuracy are averaged over them.

    Returns:
        ``score`` and, for each level S, ``psnr@S`` in dB; with classifiers ``agreement@S``, the share of images that
        keep the label of the clean image; with labels also ``accuracy@S``.
    """
    scores: Scores = {}
    selection = []
    batches = _batches(data, next(net.parameters()).device)
    clean_labels = [[classifier(clean) for classifier in evaluators] for clean, _ in batches]
    for sigma in sigmas:
        errors, losses, right, kept = [], [], [], []
        for i, (clean, labels) in enumerate(batches):
            level = torch.full((len(clean),), sigma, device=clean.device)
            output = net(_add_noise(clean, i, sigma), level)
            errors.append((output - clean).pow(2).mean((1, 2, 3)).clamp_min(1e-12))
            losses.append(mse(Batch(clean, level, labels, None, torch.Generator(), output=output)) * len(clean))
            for classifier, before in zip(evaluators, clean_labels[i], strict=True):
                after = classifier(output)
                kept.append(after == before)
                right.extend([] if labels is None else [after == labels])
        scores[f"psnr@{sigma:g}"] = round(float(-10 * torch.cat(errors).log10().mean()), 3)
        for name, hits in (("agreement", kept), ("accuracy", right)):
            if hits:
                scores[f"{name}@{sigma:g}"] = round(float(torch.cat(hits).float().mean()), 4)
        if objective.classifier:
            selection.append(1 - float(torch.cat(right if objective.labels else kept).float().mean()))
        else:
            selection.append(float(sum(losses)) / len(torch.cat(errors)))
    return {"score": sum(selection) / len(selection), **scores}


@torch.no_grad()
def loss_scores(
    net: nn.Module, data: TrainingData, recipe: Recipe, objective: Objective, classifiers: FrozenClassifiers
) -> Scores:
    """Compute the objective's loss on held-out images, with the same random numbers in every call.

    Terms that start at a later epoch are included.

    Args:
        net: the module that is trained, in evaluation mode.
        data: provides the held-out images.
        recipe: noise levels, temperature, epochs.
        objective: provides ``prepare`` and ``loss``.
        classifiers: frozen classifiers of the objective.

    Returns:
        ``score``, the mean loss, and ``psnr`` in dB of the output against the objective's target.
    """
    device = next(net.parameters()).device
    losses, errors = [], []
    for i, (clean, labels) in enumerate(_batches(data, device)):
        generator = block_generator(stream_key(_SEED, "objective", "held out"), i)
        sigma = recipe.levels.draw(len(clean), generator).to(device)
        draw = Draw(clean, sigma, labels, classifiers.at(i), generator, recipe.epochs).repeat(objective.draws)
        prepared = objective.prepare(draw)
        batch = make_batch(draw, prepared, net(*prepared.inputs), recipe)
        losses += [float(objective.loss(batch))] * len(clean)
        errors.append((batch.output - prepared.target).pow(2).mean((1, 2, 3)).clamp_min(1e-12))
    psnr = float(-10 * torch.cat(errors).log10().mean())
    return {"score": sum(losses) / len(losses), "psnr": round(psnr, 3)}


def noisy_scores(net: nn.Module, data: TrainingData, sigmas: Sequence[float]) -> Scores:
    """Score a classifier on noisy held-out images, see :func:`classifier_scores`."""
    return classifier_scores(net, data, {f"{s:g}": functools.partial(_add_noise, sigma=s) for s in sigmas})


@torch.no_grad()
def classifier_scores(
    net: nn.Module, data: TrainingData, transforms: Mapping[str, Callable[[Tensor, int], Tensor]]
) -> Scores:
    """Compute cross-entropy (``score``, averaged over transforms) and ``accuracy@NAME`` on held-out images.

    Args:
        net: ``forward(images, sigma)`` to logits, in evaluation mode.
        data: with labels.
        transforms: by name, functions of clean images and the index of their batch.
    """
    scores: Scores = {}
    total = 0.0
    for name, transform in transforms.items():
        hits, loss, count = 0, 0.0, 0
        for i, (clean, labels) in enumerate(_batches(data, next(net.parameters()).device)):
            assert labels is not None
            logits = net(transform(clean, i), torch.zeros(len(clean)))
            loss += float(cross_entropy(logits, labels, reduction="sum"))
            hits += int((logits.argmax(1) == labels).sum())
            count += len(clean)
        total += loss / count / len(transforms)
        scores[f"accuracy@{name}"] = round(hits / count, 4)
    return {"score": total, **scores}


def _batches(data: TrainingData, device: torch.device) -> list[tuple[Tensor, Tensor | None]]:
    return [
        (data.take(i).to(device).float() / 255, data.labels[i].to(device) if data.labels is not None else None)
        for i in data.held_out[:MOST].split(_BATCH)
    ]


def _add_noise(clean: Tensor, batch: int, sigma: float) -> Tensor:
    generator = block_generator(stream_key(_SEED, f"sigma {sigma:g}", "held out"), batch)
    return clean + sigma * torch.randn(clean.shape, generator=generator).to(clean.device)
