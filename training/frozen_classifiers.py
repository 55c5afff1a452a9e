"""Frozen classifiers that a denoiser is trained with: the target itself (white-box), or surrogates for it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from certify.engine.execution import folded_copy
from certify.errors import UserError
from certify.models.classifier import Classifier


class FrozenClassifiers:
    """Frozen classifiers, used round robin (Salman et al. 2020 use 14 surrogates so).

    ``working`` holds copies with folded batch norms, which are faster and equal up to rounding. The originals are not
    touched, and :meth:`unchanged` verifies it.

    Args:
        classifiers: the target alone, or surrogates.
        target: the classifier that surrogates stand for; only compared with them, never called.
        surrogates: True if ``classifiers`` are surrogates, whether or not the target is given.

    Raises:
        UserError: a surrogate is the target, or the classifiers differ in input size or number of classes.
    """

    def __init__(
        self, classifiers: Sequence[Classifier], target: Classifier | None = None, *, surrogates: bool = False
    ) -> None:
        self.originals = list(classifiers)
        self.digests = [c.identity() for c in self.originals]
        self.target = None if target is None else target.identity()
        self._check(target)
        self.working = [_folded(c) for c in self.originals]
        self.access = "none" if not self.originals else "surrogates" if surrogates else "white-box"

    def _check(self, target: Classifier | None) -> None:
        for classifier, digest in zip(self.originals, self.digests, strict=True):
            if digest == self.target:
                raise UserError(
                    f"surrogate {classifier.name!r} is the target itself (same weights), which query access must not "
                    "train with; leave it out, or drop --surrogate for white-box training"
                )
        for other in [*self.originals, *([target] if target is not None else [])]:
            first = self.originals[0] if self.originals else other
            if (other.num_classes, other.input.size) != (first.num_classes, first.input.size):
                raise UserError(
                    f"{first.name} takes {first.input.size} and has {first.num_classes} classes, {other.name} takes "
                    f"{other.input.size} and has {other.num_classes}; expected classifiers of the same task"
                )

    def __len__(self) -> int:
        return len(self.originals)

    def at(self, step: int) -> Classifier | None:
        """Return the classifier of a step, or None if there are none."""
        return self.working[step % len(self.working)] if self.working else None

    def to(self, device: torch.device) -> None:
        """Move the working copies to a device."""
        for classifier in self.working:
            classifier.to(device)

    def unchanged(self) -> bool:
        """True if every classifier is bit for bit what it was, and none has a gradient."""
        no_gradients = all(p.grad is None for c in (*self.originals, *self.working) for p in c.parameters())
        return no_gradients and [c.identity() for c in self.originals] == self.digests

    def records(self) -> list[dict[str, Any]]:
        """Return a record of each classifier, with a fingerprint if hashes do not determine it; for resuming."""
        return [c.record() for c in self.originals]

    def describe(self) -> list[dict[str, str]]:
        """Return name, weights and hash of each classifier, for the card."""
        return [
            {"name": c.name, "weights": c.weights, "sha256": digest}
            for c, digest in zip(self.originals, self.digests, strict=True)
        ]


def _folded(classifier: Classifier) -> Classifier:
    """Copy a classifier with its batch norms folded, unless folding changes its output."""
    if not classifier.native:
        return classifier
    fast = copy.deepcopy(classifier)
    folded = folded_copy(fast.net)
    if folded is None or classifier.input.size is None:
        return fast
    fast.net = folded.requires_grad_(False)
    if fast.channels_last:
        fast.net.to(memory_format=torch.channels_last)
    probe = torch.rand((4, *classifier.input.size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = torch.equal(classifier(probe), fast(probe)) and _close(classifier, fast, probe)
    if not same:
        fast.net = copy.deepcopy(classifier.net)
    return fast


def _close(classifier: Classifier, fast: Classifier, probe: torch.Tensor) -> bool:
    try:
        return torch.allclose(classifier.logits(probe), fast.logits(probe), rtol=1e-3, atol=1e-3)
    except UserError:  # the classifier gives labels only
        return True
