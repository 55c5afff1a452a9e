"""Figures on held-out training images: the ones weights are chosen by, and the ones on the card."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from certify.classifiers import Classifier
from certify.streams import block_generator, stream_key
from training.data import TrainingData
from training.losses import OBJECTIVES, Batch

_BATCH = 100
MOST = 500
"""Held-out images that are looked at, at most."""


@torch.no_grad()
def denoiser_scores(
    net: nn.Module,
    data: TrainingData,
    sigmas: Sequence[float],
    objective: str,
    classifiers: Sequence[Classifier],
    seed: int = 0,
) -> dict[str, float]:
    """What a denoiser does to held-out images; the noise is the same in every call.

    Args:
        net: in evaluation mode.
        data: its held-out images are used.
        sigmas: noise levels.
        objective: ``score`` is its loss, averaged over levels and classifiers.
        classifiers: frozen, on the network's device; accuracies are averaged over them.
        seed: of the noise.

    Returns:
        ``score``, and for every level ``psnr@S`` (dB) and, with classifiers and labels, ``accuracy@S``.
    """
    found: dict[str, float] = {}
    scores = []
    loss = OBJECTIVES.get("stability" if objective == "zeroth-order" else objective)()
    for sigma in sigmas:
        losses, errors, hits, count = [], [], 0, 0
        for i, (clean, labels) in enumerate(_batches(data, next(net.parameters()).device)):
            output = net(_noisy(clean, sigma, i, seed), torch.full((len(clean),), sigma, device=clean.device))
            level = torch.full((len(clean),), sigma, device=clean.device)
            for classifier in classifiers or (None,):
                batch = Batch(clean, output, level, labels, classifier, torch.Generator())
                losses.append(float(loss.loss(batch)) * len(clean))
                if classifier is not None and labels is not None:
                    hits += int((classifier(output) == labels).sum())
            errors.append((output - clean).pow(2).mean((1, 2, 3)).clamp_min(1e-12))
            count += len(clean)
        scores.append(sum(losses) / (count * max(1, len(classifiers))))
        found[f"psnr@{sigma:g}"] = round(float(-10 * torch.cat(errors).log10().mean()), 3)
        if classifiers and data.labels is not None:
            found[f"accuracy@{sigma:g}"] = round(hits / (count * len(classifiers)), 4)
    return {"score": sum(scores) / len(scores), **found}


@torch.no_grad()
def classifier_scores(net: nn.Module, data: TrainingData, sigmas: Sequence[float], seed: int = 0) -> dict[str, float]:
    """Cross-entropy (``score``) and accuracy of a noise-trained classifier on noisy held-out images."""
    found: dict[str, float] = {}
    total = 0.0
    for sigma in sigmas:
        hits, loss, count = 0, 0.0, 0
        for i, (clean, labels) in enumerate(_batches(data, next(net.parameters()).device)):
            assert labels is not None
            scores = net(_noisy(clean, sigma, i, seed), torch.full((len(clean),), sigma))
            loss += float(cross_entropy(scores, labels, reduction="sum"))
            hits += int((scores.argmax(1) == labels).sum())
            count += len(clean)
        total += loss / count / len(sigmas)
        found[f"accuracy@{sigma:g}"] = round(hits / count, 4)
    return {"score": total, **found}


def _batches(data: TrainingData, device: torch.device) -> list[tuple[Tensor, Tensor | None]]:
    chosen = data.held_out[:MOST].split(_BATCH)
    return [
        (data.take(i).to(device).float() / 255, data.labels[i].to(device) if data.labels is not None else None)
        for i in chosen
    ]


def _noisy(clean: Tensor, sigma: float, block: int, seed: int) -> Tensor:
    generator = block_generator(stream_key(seed, f"sigma {sigma:g}", "held out"), block)
    return clean + sigma * torch.randn(clean.shape, generator=generator).to(clean.device)
