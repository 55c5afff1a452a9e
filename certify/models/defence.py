"""A defended classifier: purifiers in front of frozen classifiers, several draws or members, one answer.

Every defence is one sum over passes: a pass purifies the image (perhaps with fresh random numbers) and classifies the
result; the passes' logits are combined to a label. A plain purifier has one pass, score purification S, a JPEG
ensemble one a member, denoised smoothing used as a plain classifier n.
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
"""How passes become one answer: most votes (ties by summed softmax), mean logits, or mean softmax."""

_PASSES = 256


@dataclass(frozen=True)
class Member:
    """One way from an image to logits.

    Attributes:
        purifier: ``forward(images, sigma, *, generator)`` to images of the same shape, or None. One that draws random
            numbers has ``random = True``; one that calls its network more than once an image says so in ``passes``; one
            whose gradient is not that of its output has ``differentiable = False``.
        classifier: frozen.
        sigma: noise level handed to the purifier, in [0, 1] pixels, or None.
    """

    purifier: nn.Module | None
    classifier: Classifier
    sigma: float | None = None


class Defence(nn.Module):
    """What an attacker of the whole system meets: images in [0, 1] to labels.

    Args:
        name: of the defence, as in the table.
        members: at least one; all know the same classes.
        draws: passes through each member, each with random numbers of its own.
        combine: one of ``COMBINE``.
        frozen: whether the classifiers are as their makers left them; False where they were fine-tuned.
        about: options worth recording.

    Attributes:
        checked: whether its parts were checked on an image (:mod:`certify.engine.contract`).

    Raises:
        UserError: draws, combination or classes that make no sense.
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
            raise UserError(f"defence {name}: members know {sorted(known)} classes; expected the same for all")
        self.name, self.draws, self.combine, self.frozen = name, draws, combine, frozen
        self.purifiers = nn.ModuleList([m.purifier if m.purifier is not None else nn.Identity() for m in members])
        self.classifiers = [m.classifier for m in members]  # a list: frozen, not this module's to move or to train
        self.sigmas = [m.sigma for m in members]
        self._bare = [m.purifier is None for m in members]
        self.num_classes = known.pop()
        self.about = about or {}
        self.purifiers.requires_grad_(False).eval()
        self.checked = False

    @property
    def random(self) -> bool:
        """Whether two answers about the same image may differ."""
        return any(getattr(p, "random", False) for p in self.purifiers)

    @property
    def differentiable(self) -> bool:
        """Whether gradients of the logits are true ones; if not, an attacker passes them by (BPDA)."""
        return all(getattr(p, "differentiable", True) for p in self.purifiers)

    @property
    def passes(self) -> int:
        """Network calls for one answer about one image, the classifiers' among them."""
        own = [0 if bare else int(getattr(p, "passes", any(True for _ in p.parameters()))) for p, bare in self._pairs()]
        return self.draws * sum(n + 1 for n in own)

    def _pairs(self) -> Iterator[tuple[nn.Module, bool]]:
        return zip(self.purifiers, self._bare, strict=True)

    def purify(self, images: Tensor, member: int = 0, generator: Any = None) -> Tensor:
        """What a member's classifier gets to see, ``(B, C, H, W)``.

        Raises:
            RunFault: the purifier changed the images' shape.
        """
        if self._bare[member]:
            return images
        purifier = self.purifiers[member]
        options = {"generator": generator} if getattr(purifier, "random", False) else {}
        found: Tensor = purifier(images, self.sigmas[member], **options)
        if found.shape != images.shape:
            raise RunFault(
                f"defence {self.name} made {tuple(found.shape)} of {tuple(images.shape)}; expected the same shape"
            )
        return found

    def passes_of(self, images: Tensor, keys: Sequence[bytes], turn: int = 0) -> Tensor:
        """Logits ``(B, P, K)`` of every pass; differentiable where the purifiers are.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            keys: of :func:`certify.smoothing.rng.stream_key`, one an image: all random numbers come from there.
            turn: how often the same image was asked about before; another turn has other random numbers.
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
        """Class probabilities ``(B, K)``: the mean softmax of all passes, or the softmax of their mean logits."""
        return self._scores(self.passes_of(images, keys, turn))

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.mean(1).softmax(1) if self.combine == "logits" else logits.softmax(2).mean(1)

    @torch.no_grad()
    def forward(self, images: Tensor, keys: Sequence[bytes], turn: int = 0) -> Tensor:
        """Labels ``(B,)``; ``FAILED`` where no pass gave one."""
        logits = self.passes_of(images, keys, turn)
        if self.combine != "vote":
            return labels_from_logits(self._scores(logits))
        return majority(logits)

    def describe(self) -> dict[str, Any]:
        """Every step with its options, hashes and fingerprints, for the record."""
        steps = []
        for (purifier, bare), classifier, sigma in zip(self._pairs(), self.classifiers, self.sigmas, strict=True):
            named = None if bare else {**record_module(purifier, sigma, classifier.probe_size), "sigma": sigma}
            described = getattr(classifier, "record", classifier.describe)()  # a service stands there, too
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
    """Logits ``(B, K)``; of a classifier that gives labels only, 1 at its label, and NaN where it gave none."""
    try:
        return classifier.logits(images)
    except UserError:
        labels = classifier(images)
        chosen = one_hot(labels.clamp_min(0), classifier.num_classes).float()
        return chosen.masked_fill((labels == FAILED)[:, None], float("nan"))


def majority(logits: Tensor) -> Tensor:
    """The label most passes give; of equals the one with the larger summed softmax.

    Args:
        logits: ``(B, P, K)``; a pass that is not finite has no vote.

    Returns:
        Labels ``(B,)``, ``FAILED`` where no pass had a vote.
    """
    batch, passes, classes = logits.shape
    labels = labels_from_logits(logits.reshape(-1, classes)).view(batch, passes)
    valid = labels != FAILED
    votes = torch.zeros(batch, classes, device=logits.device, dtype=torch.float64)
    votes.scatter_add_(1, labels.clamp_min(0), valid.to(votes))
    sums = (logits.double().softmax(2).nan_to_num() * valid.unsqueeze(2)).sum(1)  # at most P, so it breaks ties only
    best = (votes + sums / (passes + 1)).argmax(1)
    return best.masked_fill(~valid.any(1), FAILED)
