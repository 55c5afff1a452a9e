"""Figures on held-out training images: the ones weights are chosen by, and the ones on the card."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from certify.models.classifier import Classifier
from certify.smoothing.rng import block_generator, stream_key
from training.data import TrainingData
from training.frozen_classifiers import Guides
from training.loop import make_batch
from training.losses import Batch, Draw, Objective, add_noise, mse
from training.recipe import Recipe

_BATCH = 100
_SEED = 0  # of what is drawn: the same in every training
MOST = 500
"""Held-out images that are looked at, at most."""


def scores_to_choose_by(
    net: nn.Module, whole: nn.Module, data: TrainingData, recipe: Recipe, guides: Guides, judges: Sequence[Classifier]
) -> dict[str, float]:
    """The figures of a denoiser by which its weights are chosen, in evaluation mode; less ``score`` is better.

    With several draws of an image ``score`` is the objective's own loss: one draw each cannot show that draws agree,
    and weights under which an image keeps its label more often may be right on fewer single draws.

    Args:
        net: the denoiser.
        whole: the same as it is trained, with what the objective wraps around it.
        data: its held-out images are used.
        recipe: objective, noise levels.
        guides: the frozen classifiers that the objective needs.
        judges: the classifiers that agreement and accuracy are measured with.
    """
    objective = recipe.objectives[-1]
    if objective.purifier or objective.prepare is not add_noise:  # squared error is not what it is for
        return loss_scores(whole, data, recipe, objective, guides)
    found = denoiser_scores(net, data, recipe.levels.checked(), objective, judges)
    if objective.wrap is not None or objective.draws > 1:  # what is shared, and whether draws agree, counts too
        found["score"] = loss_scores(whole, data, recipe, objective, guides)["score"]
    return found


@torch.no_grad()
def denoiser_scores(
    net: nn.Module, data: TrainingData, sigmas: Sequence[float], objective: Objective, classifiers: Sequence[Classifier]
) -> dict[str, float]:
    """What a denoiser does to held-out images; the noise is the same in every call.

    Args:
        net: in evaluation mode.
        data: its held-out images are used.
        sigmas: noise levels.
        objective: what ``score``, averaged over levels, is made of: squared error where the objective needs no
            classifier, else the share of denoised images whose label is wrong (where it needs labels) or not that of
            the clean image, because that share, not the cross-entropy, is what certificates are made of.
        classifiers: frozen, on the network's device; accuracies are averaged over them.

    Returns:
        ``score``, and for every level ``psnr@S`` (dB) and, with classifiers, ``agreement@S`` (the label of the clean
        image is kept) and, with labels too, ``accuracy@S``.
    """
    found: dict[str, float] = {}
    scores = []
    batches = _batches(data, next(net.parameters()).device)
    answers = [[classifier(clean) for classifier in classifiers] for clean, _ in batches]
    for sigma in sigmas:
        errors, losses, right, kept = [], [], [], []
        for i, (clean, labels) in enumerate(batches):
            level = torch.full((len(clean),), sigma, device=clean.device)
            output = net(_noisy(clean, i, sigma), level)
            errors.append((output - clean).pow(2).mean((1, 2, 3)).clamp_min(1e-12))
            losses.append(mse(Batch(clean, level, labels, None, torch.Generator(), output=output)) * len(clean))
            for classifier, undisturbed in zip(classifiers, answers[i], strict=True):
                answer = classifier(output)
                kept.append(answer == undisturbed)
                right.extend([] if labels is None else [answer == labels])
        found[f"psnr@{sigma:g}"] = round(float(-10 * torch.cat(errors).log10().mean()), 3)
        for name, hits in (("agreement", kept), ("accuracy", right)):
            if hits:
                found[f"{name}@{sigma:g}"] = round(float(torch.cat(hits).float().mean()), 4)
        if objective.classifier:
            scores.append(1 - float(torch.cat(right if objective.labels else kept).float().mean()))
        else:
            scores.append(float(sum(losses)) / len(torch.cat(errors)))
    return {"score": sum(scores) / len(scores), **found}


@torch.no_grad()
def loss_scores(
    net: nn.Module, data: TrainingData, recipe: Recipe, objective: Objective, guides: Guides
) -> dict[str, float]:
    """The objective's own loss on held-out images, as ``score``, for one that shows the network something of its own.

    The random numbers are each block's own and the same in every call; classifiers take their turns batch by batch.
    Terms that wait for an epoch count as at the end of training.

    Args:
        net: as it is trained, with what the objective wraps around it; in evaluation mode.
        data: its held-out images are used.
        recipe: noise levels, temperature, epochs.
        objective: whose ``prepare`` and ``loss`` these are.
        guides: the frozen classifiers that it needs.

    Returns:
        ``score``, the mean loss, and ``psnr`` (dB) of the output against the objective's own target.
    """
    device = next(net.parameters()).device
    losses, errors = [], []
    for i, (clean, labels) in enumerate(_batches(data, device)):
        generator = block_generator(stream_key(_SEED, "objective", "held out"), i)
        sigma = recipe.levels.draw(len(clean), generator).to(device)
        draw = Draw(clean, sigma, labels, guides.at(i), generator, recipe.epochs).times(objective.draws)
        prepared = objective.prepare(draw)
        batch = make_batch(draw, prepared, net(*prepared.inputs), recipe)
        losses += [float(objective.loss(batch))] * len(clean)
        errors.append((batch.output - prepared.target).pow(2).mean((1, 2, 3)).clamp_min(1e-12))
    psnr = float(-10 * torch.cat(errors).log10().mean())
    return {"score": sum(losses) / len(losses), "psnr": round(psnr, 3)}


def classifier_scores(net: nn.Module, data: TrainingData, sigmas: Sequence[float]) -> dict[str, float]:
    """Cross-entropy (``score``) and accuracy of a noise-trained classifier on noisy held-out images."""
    return viewed_scores(net, data, {f"{s:g}": functools.partial(_noisy, sigma=s) for s in sigmas})


@torch.no_grad()
def viewed_scores(
    net: nn.Module, data: TrainingData, views: Mapping[str, Callable[[Tensor, int], Tensor]]
) -> dict[str, float]:
    """Cross-entropy (``score``, averaged over views) and ``accuracy@VIEW`` of a classifier on held-out images.

    Args:
        net: ``forward(images, sigma)`` to logits, in evaluation mode.
        data: with labels.
        views: by name, what makes of clean images and their block's number the images that are shown.
    """
    found: dict[str, float] = {}
    total = 0.0
    for name, view in views.items():
        hits, loss, count = 0, 0.0, 0
        for i, (clean, labels) in enumerate(_batches(data, next(net.parameters()).device)):
            assert labels is not None
            scores = net(view(clean, i), torch.zeros(len(clean)))
            loss += float(cross_entropy(scores, labels, reduction="sum"))
            hits += int((scores.argmax(1) == labels).sum())
            count += len(clean)
        total += loss / count / len(views)
        found[f"accuracy@{name}"] = round(hits / count, 4)
    return {"score": total, **found}


def _batches(data: TrainingData, device: torch.device) -> list[tuple[Tensor, Tensor | None]]:
    chosen = data.held_out[:MOST].split(_BATCH)
    return [
        (data.take(i).to(device).float() / 255, data.labels[i].to(device) if data.labels is not None else None)
        for i in chosen
    ]


def _noisy(clean: Tensor, block: int, sigma: float) -> Tensor:
    generator = block_generator(stream_key(_SEED, f"sigma {sigma:g}", "held out"), block)
    return clean + sigma * torch.randn(clean.shape, generator=generator).to(clean.device)
