"""Combine denoiser and frozen classifier into one base classifier: everything after the noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from certify.models.identity import describe_module, record_module, state_digest
from certify.types import BaseClassifier


class Pipeline(nn.Module):
    """The base classifier whose smoothing is certified: f(D(x + e)), or f(x + e) without a denoiser.

    Args:
        classifier: any base classifier.
        denoiser: ``forward(noisy, sigma)`` from images ``(B, C, H, W)`` to images of the same shape, or None. It is put
            into evaluation mode.
        sigma: the noise level passed to the denoiser, in [0, 1] pixels.
    """

    def __init__(
        self, classifier: BaseClassifier, denoiser: nn.Module | None = None, sigma: float | None = None
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.denoiser = denoiser.requires_grad_(False).eval() if denoiser is not None else None
        self.channels_last = denoiser is not None and any(p.ndim == 4 for p in denoiser.parameters())
        if denoiser is not None and self.channels_last:  # faster, with the same values, as in the classifier
            denoiser.to(memory_format=torch.channels_last)
        self.sigma = sigma
        self.num_classes = classifier.num_classes
        self.dtype = torch.float32

    def cast(self, dtype: torch.dtype) -> None:
        """Convert denoiser and classifier to ``dtype``; noisy images and normalisation stay in float32."""
        if self.denoiser is not None:
            self.denoiser.to(dtype)
        self.classifier.cast(dtype)  # type: ignore[attr-defined]
        self.dtype = dtype

    def denoise(self, images: Tensor) -> Tensor:
        """Return denoised images ``(B, C, H, W)``, as passed to the classifier."""
        if self.denoiser is None:
            return images
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        cleaned: Tensor = self.denoiser(images.to(self.dtype, memory_format=layout), self.sigma)
        return cleaned

    def logits(self, images: Tensor) -> Tensor:
        """Return scores ``(B, K)`` of noisy images ``(B, C, H, W)``, for attacks that need gradients."""
        scores: Tensor = self.classifier.logits(self.denoise(images))  # type: ignore[attr-defined]
        return scores

    def forward(self, images: Tensor) -> Tensor:
        """Return labels ``(B,)`` of noisy images ``(B, C, H, W)``."""
        return self.classifier(self.denoise(images))

    @property
    def denoiser_name(self) -> str:
        """Name of the denoiser (the one chosen if it was ``auto``); ``none`` without one."""
        return "none" if self.denoiser is None else str(describe_module(self.denoiser)["name"])

    def describe(self) -> dict[str, Any]:
        """Return every step with its options and hashes, in the order of the data flow."""
        denoiser = [] if self.denoiser is None else [self._describe_denoiser(self.denoiser)]
        return {"num_classes": self.num_classes, "steps": [*denoiser, self.classifier.describe()]}

    def record(self) -> list[dict[str, Any]]:
        """Return the steps of :meth:`describe`, with fingerprints where no hash suffices. Call before :meth:`cast`."""
        steps = [getattr(self.classifier, "record", self.classifier.describe)()]
        if self.denoiser is not None:
            shape = getattr(self.classifier, "probe_size", None)
            description = self._describe_denoiser(self.denoiser)
            steps.insert(0, {**description, **record_module(self.denoiser, self.sigma, shape)})
        return steps

    def _describe_denoiser(self, denoiser: nn.Module) -> dict[str, Any]:
        digest = state_digest(denoiser)
        return {"step": "denoiser", "sigma": self.sigma, "sha256": digest, **describe_module(denoiser)}
