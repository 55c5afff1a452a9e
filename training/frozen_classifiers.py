"""The frozen classifiers that guide a denoiser: the target itself (white-box), or surrogates in its place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from certify.engine.execution import folded_copy
from certify.errors import UserError
from certify.models.classifier import Classifier


class Guides:
    """Frozen classifiers, one a batch in turn (Salman et al. 2020 use 14 surrogates round robin).

    Each works as a copy with its batch norms folded, which is faster and the same up to rounding; the classifiers that
    were handed in are not touched, and :meth:`unchanged` proves it.

    ``working`` holds the copies.

    Args:
        classifiers: the target alone, or surrogates.
        target: the classifier that surrogates stand for: compared with each of them, and never called.
        surrogates: whether these stand for another classifier, named or not.

    Raises:
        UserError: a surrogate is the target; classifiers that disagree about sizes or classes.
    """

    def __init__(
        self, classifiers: Sequence[Classifier], target: Classifier | None = None, *, surrogates: bool = False
    ) -> None:
        self.originals = list(classifiers)
        self.digests = [c.identity() for c in self.originals]
        self.target = None if target is None else target.identity()
        self._refuse(target)
        self.working = [_folded(c) for c in self.originals]
        self.access = "none" if not self.originals else "surrogates" if surrogates else "white-box"

    def _refuse(self, target: Classifier | None) -> None:
        for classifier, digest in zip(self.originals, self.digests, strict=True):
            if digest == self.target:
                raise UserError(
                    f"surrogate {classifier.name!r} is the target itself (same weights); query access means that it is "
                    "not used for training: leave it out, or drop --surrogate for white-box training"
                )
        first = self.originals[0] if self.originals else None
        for other in [*self.originals[1:], *([target] if target is not None else [])]:
            assert first is not None
            if (other.num_classes, other.input.size) != (first.num_classes, first.input.size):
                raise UserError(
                    f"{first.name} takes {first.input.size} and knows {first.num_classes} classes, {other.name} "
                    f"{other.input.size} and {other.num_classes}; expected classifiers of the same task"
                )

    def __len__(self) -> int:
        return len(self.originals)

    def at(self, step: int) -> Classifier | None:
        """The classifier of this step; the same order in every run."""
        return self.working[step % len(self.working)] if self.working else None

    def to(self, device: torch.device) -> None:
        """Move the working copies."""
        for classifier in self.working:
            classifier.to(device)

    def unchanged(self) -> bool:
        """Whether every classifier is bit for bit what it was, and no gradient was kept for it."""
        pure = all(p.grad is None for c in (*self.originals, *self.working) for p in c.parameters())
        return pure and [c.identity() for c in self.originals] == self.digests

    def records(self) -> list[dict[str, Any]]:
        """Each as its record, with a fingerprint where hashes do not determine it: compared when a training resumes."""
        return [c.record() for c in self.originals]

    def describe(self) -> list[dict[str, str]]:
        """Name, weights and hash of each, for the card."""
        return [
            {"name": c.name, "weights": c.weights, "sha256": digest}
            for c, digest in zip(self.originals, self.digests, strict=True)
        ]


def _folded(classifier: Classifier) -> Classifier:
    """A copy with batch norms folded, if that leaves the logits as they are."""
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
        expected, found = classifier(probe), fast(probe)
        same = bool((expected == found).all()) and _close(classifier, fast, probe)
    if not same:
        fast.net = copy.deepcopy(classifier.net)
    return fast


def _close(classifier: Classifier, fast: Classifier, probe: torch.Tensor) -> bool:
    try:
        return torch.allclose(classifier.logits(probe), fast.logits(probe), rtol=1e-3, atol=1e-3)
    except UserError:  # labels only
        return True
