"""Hashes and fingerprints that identify classifiers, denoisers and purifiers in the run file.

A fingerprint is a function's outputs for fixed probe images; it is used for functions that no file hash covers. A
Python callable may read any file, so the hash of its source does not distinguish a retrained model from the old one;
its outputs do. They are stored unrounded and compared with a tolerance (``certify.runs.identity.same_answers``): a hash
of rounded outputs would change whenever the last bit moves one across a rounding boundary, so that another processor
would look like another model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PROBE = 1
"""Version of the probe images and the stored values; fingerprints of different versions are not compared."""

_SCORED, _LABELLED = 32, 96  # probe images: a row of scores holds much more information than a label
_PROJECTIONS = 2  # numbers stored for each probe image
_BATCH = 16
_DIMMED, _SPECKS = 0.97, 0.01


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_digest(module: nn.Module) -> str | None:
    """Return the SHA-256 of names, shapes and values of all parameters and buffers; None if there are none."""
    tensors = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    return tensors_digest(tensors) if tensors else None


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' names, shapes, dtypes and values."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        total.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return total.hexdigest()


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Return a module's own ``describe()``, or else the name of its class."""
    own = getattr(module, "describe", None)
    return dict(own()) if callable(own) else {"name": type(module).__name__}


def record_module(module: nn.Module, sigma: float | None, shape: tuple[int, int, int] | None) -> dict[str, Any]:
    """Return a denoiser's or purifier's description, with the hash of its tensors or a fingerprint.

    Args:
        module: ``forward(images, sigma)``.
        sigma: noise level passed to it, or None.
        shape: (C, H, W) of the probe images; None for no fingerprint.
    """
    record = describe_module(module)
    if not _has_hash(record) and (digest := state_digest(module)) is not None:
        record["sha256"] = digest
    if not _is_closed(module):
        device = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
        record["fingerprint"] = shape and denoiser_fingerprint(module, shape, sigma, device)
    return record


def _has_hash(description: Mapping[str, Any]) -> bool:
    return any(
        _has_hash(value) if isinstance(value, Mapping) else bool(value) and key.endswith("sha256")
        for key, value in description.items()
    )


def _is_closed(module: nn.Module) -> bool:
    """True if hashes cover everything that a module depends on: no foreign code, no random draws."""
    own = getattr(module, "closed", None)
    if own is not None:
        return bool(own)
    return getattr(module, "random", False) or type(module).__module__.partition(".")[0] in ("certify", "denoisers")


def probe_images(shape: tuple[int, int, int], count: int) -> Tensor:
    """Return images ``(count, C, H, W)`` in [0, 1]: colours, waves and noise, the same on every machine."""
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
    """Return the fingerprint of a function from images ``(B, C, H, W)`` to scores ``(B, K)`` or labels ``(B,)``.

    For scores it stores two fixed random projections per probe, which change with any change of the scores. For labels
    it stores the label of each of 96 probes, or None if a slightly perturbed copy gets another label, because then
    another processor may differ, too.

    Returns:
        None if the function fails on the probes.
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
    """Return the fingerprint of a denoiser at one noise level: random projections of its residuals on noisy probes.

    Returns:
        None if the denoiser fails on the probes.
    """
    clean = probe_images(shape, _SCORED)
    noise = np.random.Generator(np.random.Philox(key=PROBE + 2)).standard_normal(clean.shape)
    noisy = clean + (0.1 if sigma is None else sigma) * torch.from_numpy(noise).float()
    cleaned = _answers(lambda images: denoise(images, sigma), noisy, device)
    if cleaned is None or cleaned.shape != noisy.shape:
        return None
    return {"probe": PROBE, "residuals": _projected((cleaned - noisy).flatten(1))}


def _answers(answer: Callable[[Tensor], Tensor], images: Tensor, device: torch.device) -> Tensor | None:
    """Return a function's outputs for images, on the CPU in double precision; None if it fails."""

    def batches() -> Iterator[Tensor]:
        for batch in images.split(_BATCH):
            yield answer(batch.to(device)).detach().cpu().double()

    try:
        with torch.no_grad():
            answers = torch.cat(list(batches()))
    except Exception:  # third-party code; if it fails on real images too, that is reported there
        return None
    return answers if len(answers) == len(images) else None


def _projected(rows: Tensor) -> list[float | None]:
    """Return two random projections per row ``(B, D)``, invariant to adding a constant to a row."""
    rows = rows - rows.mean(1, keepdim=True)
    draws = np.random.Generator(np.random.Philox(key=PROBE + 3))
    signs = torch.from_numpy(draws.choice([-1.0, 1.0], (rows.shape[1], _PROJECTIONS)))
    numbers = (rows @ signs / rows.shape[1] ** 0.5).flatten().tolist()
    return [float(f"{x:.5g}") if abs(x) < float("inf") else None for x in numbers]
