"""Fingerprints: answers of a function to fixed probe images, for functions that no hash of a file covers.

A Python callable may read any file, so the hash of its source does not tell a retrained model from the old one; its
answers do. They are stored as they are and compared with a tolerance (``certify.runs.identity.same_answers``). A hash
of rounded answers would change whenever a last bit carries one of them over a rounding boundary, so that another
processor would look like another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROBE = 1
"""Version of the probe images and of what is stored; fingerprints of different versions are not compared."""

_SCORED, _LABELLED = 32, 96  # probe images: a row of scores says much more than a label
_PROJECTIONS = 2  # numbers stored for each probe image
_BATCH = 16
_DIMMED, _SPECKS = 0.97, 0.01


def probe_images(shape: tuple[int, int, int], count: int) -> Tensor:
    """Images ``(count, C, H, W)`` in [0, 1]: colours, waves of a few periods and noise, the same on every machine."""
    channels, height, width = shape
    draws = np.random.Generator(np.random.Philox(key=PROBE))
    rows, columns = np.pi * np.arange(height) / height, np.pi * np.arange(width) / width
    images = np.empty((count, *shape))
    for i in range(count):
        images[i] = draws.random((channels, 1, 1))
        for _ in range(4):
            down, across, phase = draws.random(3) * (8, 8, 2 * np.pi)
            wave = np.outer(np.exp(1j * (down * rows + phase)), np.exp(1j * across * columns)).real
            images[i] += (draws.random((channels, 1, 1)) - 0.5) * wave
        images[i] += 0.5 * draws.random() * (draws.random(shape) - 0.5)
    return torch.from_numpy(images.clip(0, 1)).float()


def classifier_fingerprint(
    answer: Callable[[Tensor], Tensor], shape: tuple[int, int, int], device: torch.device
) -> dict[str, Any] | None:
    """The fingerprint of a function from images ``(B, C, H, W)`` to scores ``(B, K)`` or labels ``(B,)``.

    Scores: two fixed random projections of each probe's scores, which every change of the scores moves. Labels: one for
    each of 96 probes, None where the label of a slightly dimmed copy is another one: it may be another one on another
    processor, too.

    Returns:
        None where the function fails on the probes.
    """
    first = _answers(answer, probe_images(shape, 1), device)
    if first is None or first.ndim not in (1, 2):
        return None
    if first.ndim == 2:
        scores = _answers(answer, probe_images(shape, _SCORED), device)
        return None if scores is None else {"probe": PROBE, "scores": _projected(scores)}
    images = probe_images(shape, _LABELLED)
    specks = torch.from_numpy(np.random.Generator(np.random.Philox(key=PROBE + 1)).random(images.shape)).float()
    labels, again = (_answers(answer, x, device) for x in (images, _DIMMED * images + _SPECKS * specks))
    if labels is None or again is None:
        return None
    pairs = zip(labels.tolist(), again.tolist(), strict=True)
    return {"probe": PROBE, "labels": [int(here) if here == there else None for here, there in pairs]}


def denoiser_fingerprint(
    denoise: Callable[[Tensor, float | None], Tensor],
    shape: tuple[int, int, int],
    sigma: float | None,
    device: torch.device,
) -> dict[str, Any] | None:
    """The fingerprint of a denoiser at one noise level: random projections of what it takes off noisy probe images.

    Returns:
        None where the denoiser fails on the probes.
    """
    clean = probe_images(shape, _SCORED)
    noise = np.random.Generator(np.random.Philox(key=PROBE + 2)).standard_normal(clean.shape)
    noisy = clean + (0.1 if sigma is None else sigma) * torch.from_numpy(noise).float()
    cleaned = _answers(lambda images: denoise(images, sigma), noisy, device)
    if cleaned is None or cleaned.shape != noisy.shape:
        return None
    return {"probe": PROBE, "residuals": _projected((cleaned - noisy).flatten(1))}


def _answers(answer: Callable[[Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor | None:
    """Answers in batches, on the CPU in double precision; None where there are none."""

    def batches() -> Iterator[Tensor]:
        for batch in images.split(_BATCH):
            yield answer(batch.to(device)).detach().cpu().double()

    try:
        with torch.no_grad():
            found = torch.cat(list(batches()))
    except Exception:  # anybody's code: a function that takes no such images fails, or not, on the real ones
        return None
    return found if len(found) == len(images) else None


def _projected(rows: Tensor) -> list[float | None]:
    """Two numbers for each row ``(B, D)``; a constant added to all of a row changes neither."""
    rows = rows - rows.mean(1, keepdim=True)
    draws = np.random.Generator(np.random.Philox(key=PROBE + 3))
    signs = torch.from_numpy(draws.choice([-1.0, 1.0], (rows.shape[1], _PROJECTIONS)))
    numbers = (rows @ signs / rows.shape[1] ** 0.5).flatten().tolist()
    return [float(f"{x:.5g}") if abs(x) < float("inf") else None for x in numbers]
