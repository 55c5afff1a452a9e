"""Denoiser -> frozen classifier, as one base classifier that can describe itself.

Everything that happens after the noise sits here, so that what is certified is what is named in the record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from certify.models.fingerprint import denoiser_fingerprint
from certify.types import BaseClassifier


def state_digest(module: nn.Module) -> str | None:
    """SHA-256 over names, shapes and values of all parameters and buffers; None when there are none."""
    tensors = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    return tensors_digest(tensors) if tensors else None


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        total.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return total.hexdigest()


def in_its_words(module: nn.Module) -> dict[str, Any]:
    """What a denoiser or purifier says of itself; its class where it says nothing."""
    own = getattr(module, "describe", None)
    return dict(own()) if callable(own) else {"name": type(module).__name__}


def closed(module: nn.Module) -> bool:
    """Whether hashes cover everything that a denoiser or purifier reads: no code of anybody else's, no random draws."""
    own = getattr(module, "closed", None)
    if own is not None:
        return bool(own)
    return getattr(module, "random", False) or type(module).__module__.partition(".")[0] in ("certify", "denoisers")


def _hashed(words: Mapping[str, Any]) -> bool:
    """Whether there is a hash somewhere in what a module says of itself."""
    return any(
        _hashed(value) if isinstance(value, Mapping) else bool(value) and key.endswith("sha256")
        for key, value in words.items()
    )


def recorded(module: nn.Module, sigma: float | None, shape: tuple[int, int, int] | None) -> dict[str, Any]:
    """What a denoiser or purifier is, for the record: its own words, its tensors' hash, and a fingerprint of others'.

    Args:
        module: ``forward(images, sigma)``.
        sigma: the noise level it is handed, or None.
        shape: (C, H, W) of images that it can take; without one there is no fingerprint.
    """
    found = in_its_words(module)
    if not _hashed(found) and (digest := state_digest(module)) is not None:
        found["sha256"] = digest
    if not closed(module):
        device = next((tensor.device for tensor in module.state_dict().values()), torch.device("cpu"))
        found["fingerprint"] = shape and denoiser_fingerprint(module, shape, sigma, device)
    return found


class Pipeline(nn.Module):
    """The base classifier whose smoothing is certified: f(D(x + e)), or f(x + e) without a denoiser.

    Args:
        classifier: any base classifier.
        denoiser: ``forward(noisy, sigma)`` from images to images of the same shape, or None.
        sigma: the noise level handed to the denoiser, in [0, 1] pixels.
    """

    def __init__(
        self, classifier: BaseClassifier, denoiser: nn.Module | None = None, sigma: float | None = None
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.denoiser = denoiser.requires_grad_(False).eval() if denoiser is not None else None
        self.channels_last = denoiser is not None and any(p.ndim == 4 for p in denoiser.parameters())
        if denoiser is not None and self.channels_last:  # as in the classifier: faster, the values stay
            denoiser.to(memory_format=torch.channels_last)
        self.sigma = sigma
        self.num_classes = classifier.num_classes
        self.dtype = torch.float32

    def cast(self, dtype: torch.dtype) -> None:
        """Compute in this type from here on; noisy images still arrive, and are normalised, in float32."""
        if self.denoiser is not None:
            self.denoiser.to(dtype)
        self.classifier.cast(dtype)  # type: ignore[attr-defined]
        self.dtype = dtype

    def denoise(self, images: Tensor) -> Tensor:
        """The images ``(B, C, H, W)`` as the classifier gets them, before its normalisation."""
        if self.denoiser is None:
            return images
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        cleaned: Tensor = self.denoiser(images.to(self.dtype, memory_format=layout), self.sigma)
        return cleaned

    def logits(self, images: Tensor) -> Tensor:
        """Scores ``(B, K)`` of noisy images ``(B, C, H, W)``: for attacks, which need gradients."""
        scores: Tensor = self.classifier.logits(self.denoise(images))  # type: ignore[attr-defined]
        return scores

    def forward(self, images: Tensor) -> Tensor:
        """Labels ``(B,)`` of noisy images ``(B, C, H, W)``."""
        return self.classifier(self.denoise(images))

    @property
    def denoiser_name(self) -> str:
        """The denoiser as it calls itself, what ``auto`` chose; ``none`` without one."""
        return "none" if self.denoiser is None else str(in_its_words(self.denoiser)["name"])

    def describe(self) -> dict[str, Any]:
        """Every step with its options and hashes, in the order an image passes them."""
        steps = [self.classifier.describe()]
        if self.denoiser is not None:
            digest = state_digest(self.denoiser)
            steps.insert(0, {"step": "denoiser", "sigma": self.sigma, "sha256": digest, **in_its_words(self.denoiser)})
        return {"num_classes": self.num_classes, "steps": steps}

    def record(self) -> list[dict[str, Any]]:
        """The steps of :meth:`describe`, with fingerprints of those that no hash covers; before any :meth:`cast`."""
        steps = [getattr(self.classifier, "record", self.classifier.describe)()]
        if self.denoiser is not None:
            shape = getattr(self.classifier, "probe_size", None)
            steps.insert(0, {**self.describe()["steps"][0], **recorded(self.denoiser, self.sigma, shape)})
        return steps
