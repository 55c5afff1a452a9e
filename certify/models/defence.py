"""Defences: purifiers in front of frozen classifiers, with several draws or members combined into one label.

Each pass purifies the image (possibly with fresh random numbers) and classifies the result; the logits of all passes
are combined into a label. A plain purifier takes one pass, score purification S, a JPEG ensemble one per member, and
denoised smoothing used as a plain classifier n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from certify.errors import RunFault, UserError
from certify.models.classifier import Classifier, labels_from_logits
from certify.models.identity import record_module
from certify.smoothing.rng import block_generator
from certify.types import FAILED

COMBINE = ("vote", "logits", "probabilities")
"""Ways to combine passes: most votes (ties by summed softmax), mean logits, or mean softmax."""

_PASSES = 256  # per batch


@dataclass(frozen=True)
class Member:
    """A purifier and a classifier.

    Attributes:
        purifier: ``forward(images, sigma, *, generator)`` to images of the same shape, or None. It may
            have attributes: ``random`` is True if it draws random numbers, ``passes`` is its number of network calls
            per image (default 1), ``differentiable`` is False if its gradient is not that of its output.
        classifier: the frozen classifier.
        sigma: noise level passed to the purifier, in [0, 1] pixels, or None.
    """

    purifier: nn.Module | None
    classifier: Classifier
    sigma: float | None = None


class Defence(nn.Module):
    """The defended classifier as an attacker faces it: images in [0, 1] to labels.

    Args:
        name: name of the defence in the results.
        members: at least one; all have the same classes.
        draws: passes through each member, each with its own random numbers.
        combine: one of ``COMBINE``.
        frozen: False if the classifiers were fine-tuned.
        about: options, for the run file.

    Attributes:
        checked: True once its parts were checked on an image (:mod:`certify.engine.contract`).

    Raises:
        UserError: invalid draws or combination, or members with different classes.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[Member],
        *,
        draws: int = 1,
        combine: str = "vote",
        frozen: bool = True,
        about: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if combine not in COMBINE:
            raise UserError(f"defence {name}: combine={combine!r}; expected one of {', '.join(COMBINE)}")
        if type(draws) is not int or draws < 1:
            raise UserError(f"defence {name}: draws={draws}; expected a whole number from 1")
        known = {member.classifier.num_classes for member in members}
        if len(known) != 1:
            raise UserError(f"defence {name}: members have {sorted(known)} classes; expected the same number for all")
        self.name, self.draws, self.combine, self.frozen = name, draws, combine, frozen
        self.purifiers = nn.ModuleList([m.purifier if m.purifier is not None else nn.Identity() for m in members])
        self.classifiers = [m.classifier for m in members]  # a list, because they are frozen
        self.sigmas = [m.sigma for m in members]
        self._bare = [m.purifier is None for m in members]
        self.num_classes = known.pop()
        self.about = about or {}
        self.purifiers.requires_grad_(False).eval()
        self.checked = False

    @property
    def random(self) -> bool:
        """True if two answers about the same image may differ."""
        return any(getattr(p, "random", False) for p in self.purifiers)

    @property
    def differentiable(self) -> bool:
        """True if gradients of the logits are exact; otherwise an attack has to approximate them (BPDA)."""
        return all(getattr(p, "differentiable", True) for p in self.purifiers)

    @property
    def passes(self) -> int:
        """Network calls per answer about one image, including the classifiers'."""
        own = [0 if bare else int(getattr(p, "passes", any(True for _ in p.parameters()))) for p, bare in self._pairs()]
        return self.draws * sum(n + 1 for n in own)

    def _pairs(self) -> Iterator[tuple[nn.Module, bool]]:
        return zip(self.purifiers, self._bare, strict=True)

    def purify(self, images: Tensor, member: int = 0, generator: Any = None) -> Tensor:
        """Return the purified images ``(B, C, H, W)`` for a member's classifier.

        Raises:
            RunFault: the purifier changed the images' shape.
        """
        if self._bare[member]:
            return images
        purifier = self.purifiers[member]
        options = {"generator": generator} if getattr(purifier, "random", False) else {}
        purified: Tensor = purifier(images, self.sigmas[member], **options)
        if purified.shape != images.shape:
            raise RunFault(
                f"defence {self.name} turned {tuple(images.shape)} into {tuple(purified.shape)}; expected equal shapes"
            )
        return purified

    def passes_of(self, images: Tensor, keys: Sequence[bytes], turn: int = 0) -> Tensor:
        """Return logits ``(B, P, K)`` of every pass; differentiable if the purifiers are.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            keys: one key of :func:`certify.smoothing.rng.stream_key` per image, which determines all random numbers.
            turn: number of earlier queries with the same key; each turn has its own random numbers.
        """
        if len(keys) != len(images):
            raise ValueError(f"{len(keys)} keys for {len(images)} images; expected one for each")
        rows = []
        total = self.draws * len(self.classifiers)
        for member, classifier in enumerate(self.classifiers):
            places = [(i, member * self.draws + d) for i in range(len(images)) for d in range(self.draws)]
            for start in range(0, len(places), _PASSES):
                part = places[start : start + _PASSES]
                generators = [block_generator(keys[i], turn * total + p) for i, p in part] if self.random else None
                seen = self.purify(images[[i for i, _ in part]], member, generators)
                rows.append(_answers(classifier, seen))
        split = torch.cat(rows).view(len(self.classifiers), len(images), self.draws, self.num_classes)
        return split.transpose(0, 1).flatten(1, 2)

    def scores(self, images: Tensor, keys: Sequence[bytes], turn: int = 0) -> Tensor:
        """Return class probabilities ``(B, K)``: the mean softmax of all passes, or the softmax of mean logits."""
        return self._scores(self.passes_of(images, keys, turn))

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.mean(1).softmax(1) if self.combine == "logits" else logits.softmax(2).mean(1)

    @torch.no_grad()
    def forward(self, images: Tensor, keys: Sequence[bytes], turn: int = 0) -> Tensor:
        """Return labels ``(B,)``; ``FAILED`` where no pass returned one."""
        logits = self.passes_of(images, keys, turn)
        if self.combine != "vote":
            return labels_from_logits(self._scores(logits))
        return majority(logits)

    def describe(self) -> dict[str, Any]:
        """Return every step with its options, hashes and fingerprints, for the run file."""
        steps = []
        for (purifier, bare), classifier, sigma in zip(self._pairs(), self.classifiers, self.sigmas, strict=True):
            named = None if bare else {**record_module(purifier, sigma, classifier.probe_size), "sigma": sigma}
            described = getattr(classifier, "record", classifier.describe)()  # a remote service has no record()
            steps.append({"purifier": named, "classifier": described})
        return {
            "name": self.name,
            "draws": self.draws,
            "combine": self.combine,
            "frozen": self.frozen,
            "passes": self.passes,
            **self.about,
            "members": steps,
        }


def _answers(classifier: Classifier, images: Tensor) -> Tensor:
    """Return logits ``(B, K)``; for a label-only classifier one-hot rows, NaN where it has no label."""
    try:
        return classifier.logits(images)
    except UserError:
        labels = classifier(images)
        chosen = one_hot(labels.clamp_min(0), classifier.num_classes).float()
        return chosen.masked_fill((labels == FAILED)[:, None], float("nan"))


def majority(logits: Tensor) -> Tensor:
    """Return the label of most passes; ties go to the larger summed softmax.

    Args:
        logits: ``(B, P, K)``; a pass with non-finite logits has no vote.

    Returns:
        Labels ``(B,)``, ``FAILED`` where no pass has a vote.
    """
    batch, passes, classes = logits.shape
    labels = labels_from_logits(logits.reshape(-1, classes)).view(batch, passes)
    valid = labels != FAILED
    votes = torch.zeros(batch, classes, device=logits.device, dtype=torch.float64)
    votes.scatter_add_(1, labels.clamp_min(0), valid.to(votes))
    sums = (logits.double().softmax(2).nan_to_num() * valid.unsqueeze(2)).sum(1)  # at most P, so it breaks ties only
    best = (votes + sums / (passes + 1)).argmax(1)
    return best.masked_fill(~valid.any(1), FAILED)
