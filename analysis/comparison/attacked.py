"""Attacks run and measured: the library proposes an image, what it is worth is computed here.

Distances, the ball, [0, 1] and success are never taken from an attack. Nothing is projected either: a proposal outside
of the ball or of [0, 1] is a failure that says so.

Images are attacked one by one. The libraries draw from numpy's, Python's and torch's global generators; these are
seeded from (seed, image id, attack) around each image and put back as they were, so that what an image gets does not
depend on the others, on their order, or on where a run was stopped. A library that seeds itself from the system would
be an exception; the one place where ART does (the start of HopSkipJump) is replaced.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.attacks import ATTACKS, CLASSIFIER, DEFENCE, LABELS, SCORES, SURROGATES, Attack, find_attack, need_extra
from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.models.defence import Defence
from certify.models.query_access import QueryAccess
from certify.smoothing.rng import stream_key
from certify.smoothing.rounding import ceil_to, exact

_MEANS = {CLASSIFIER: "classifier", DEFENCE: "defence", SURROGATES: "surrogates"}
"""What an attack needs, if it does not ask, and the argument of :func:`attack` and field of ``Task`` that it is."""

SLACK = 1e-6
"""How far float32 may carry an image over the edge of a ball before it counts as outside."""


@dataclass(frozen=True)
class Task:
    """What one image is attacked with: what the attack declares to need, and nothing else.

    Attributes:
        norm: ``l2`` or ``linf``.
        eps: radius of the ball in [0, 1] pixels; None asks for the nearest wrong image.
        key: 32 bytes that all random numbers come from.
        access: to the target, by queries; None for an attack that does not ask.
        classifier: without its purifier; None for an attack that does not need its gradients.
        defence: the whole defended classifier; None for an attack that does not need its gradients.
        surrogates: other classifiers of the same task; none for an attack that needs none.
    """

    norm: str
    eps: float | None
    key: bytes
    access: QueryAccess | None = None
    classifier: Classifier | None = None
    defence: Defence | None = None
    surrogates: Sequence[Classifier] = ()


@dataclass(frozen=True)
class Proposal:
    """What an attack found for one image.

    Attributes:
        image: ``(C, H, W)``.
        answer: what the attacked model said about exactly this image, during the attack or right after it.
        queries: images that went through the attacked model, by queries or for gradients.
        note: anything the reader of a figure has to know.
    """

    image: Tensor
    answer: int
    queries: int
    note: str = ""


@dataclass(frozen=True)
class Attacked:
    """A batch of images after an attack.

    Attributes:
        name: of the attack.
        norm: of the ball, and of what was minimised.
        eps: radius of the ball, or None.
        images: ``(B, C, H, W)`` to show to a defence: what was proposed, or the clean image where that is not
            permitted.
        l2: distance of each of them from the clean image.
        linf: the same in l-infinity.
        success: whether the attacked model (the target of the queries, the bare classifier, the defence, the mean of
            the surrogates) gave another label than the right one, for a permitted image, at the time of the attack; to
            queries about an image of a random target, mostly. It may still answer otherwise when it is asked again.
        queries: images that went through the attacked model, for each image.
        notes: for each image; empty where there is nothing to say.
    """

    name: str
    norm: str
    eps: float | None
    images: Tensor
    l2: tuple[float, ...]
    linf: tuple[float, ...]
    success: tuple[bool, ...]
    queries: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def distance(self) -> tuple[float, ...]:
        """In the attack's own norm."""
        return self.l2 if self.norm == "l2" else self.linf


def distances(images: Tensor, clean: Tensor, norm: str) -> Tensor:
    """Distance of each image ``(B, C, H, W)`` from ``clean`` (one or as many), float64 ``(B,)``; ``l2`` or ``linf``."""
    moved = (images.double() - clean.double()).flatten(1)
    return moved.norm(dim=1) if norm == "l2" else moved.abs().amax(dim=1)


def refusal(image: Tensor, clean: Tensor, norm: str, eps: float | None) -> str:
    """Why an image ``(C, H, W)`` is not permitted: "" if it is."""
    if not bool(((image >= 0) & (image <= 1)).all()):
        return "proposed values outside of [0, 1]"
    far = float(distances(image[None], clean[None], norm))
    if eps is not None and far > eps + SLACK:
        return f"nearest found: {norm} {ceil_to(far, 6)}, outside of the ball of {exact(eps)}"
    return ""


def attack(
    name: str,
    images: Tensor,
    labels: Tensor,
    ids: Sequence[str],
    *,
    norm: str,
    eps: float | None = None,
    seed: int = 0,
    access: Sequence[QueryAccess] = (),
    classifier: Classifier | None = None,
    defence: Defence | None = None,
    surrogates: Sequence[Classifier] = (),
    **options: object,
) -> Attacked:
    """Attack images one by one and measure what came out.

    Args:
        name: of an attack in ``ATTACKS``.
        images: clean ones, ``(B, C, H, W)`` in [0, 1].
        labels: the right ones, ``(B,)``.
        ids: name the random numbers of each image.
        norm: ``l2`` or ``linf``.
        eps: radius of the ball in [0, 1] pixels; None for an attack that looks for the nearest wrong image, if it can.
        seed: of the attack.
        access: one for each image, with a budget, for attacks that only ask.
        classifier: for blind-pgd; surrogates are compared with it.
        defence: for adaptive-pgd.
        surrogates: for transfer.
        options: the attack's own.

    Returns:
        Images, distances, success, queries and notes.

    Raises:
        UserError: something the attack needs is missing, or does not fit.
    """
    found = find_attack(name, norm)
    need_extra(name)
    _check(name, found, images, labels, ids, eps, access, options)
    given: dict[str, Any] = {"classifier": classifier, "defence": defence, "surrogates": surrogates or None}
    own = {word: given[word] for need, word in _MEANS.items() if need == found.needs}
    if None in own.values():
        raise UserError(f"attack {name} needs {found.needs}; give {_MEANS[found.needs]}=")
    known = [c.identity() for c in ([classifier] if classifier else []) + (defence.classifiers if defence else [])]
    if found.needs == SURROGATES and any(s.identity() in known for s in surrogates):
        raise UserError(f"attack {name}: a surrogate is the target itself (same weights); expected other classifiers")
    proposals = []
    for i, image in enumerate(images.detach().cpu().float()):
        key = stream_key(seed, ids[i], f"attack {name} {norm}")
        task = Task(norm, eps, key, access[i] if found.asks else None, **own)
        with seeded(key):
            proposals.append(found(image, int(labels[i]), task, **options))
    return _measured(name, norm, eps, images.detach().cpu().float(), labels, proposals)


def _measured(
    name: str, norm: str, eps: float | None, clean: Tensor, labels: Tensor, proposals: Sequence[Proposal]
) -> Attacked:
    why = [refusal(p.image, x, norm, eps) for p, x in zip(proposals, clean, strict=True)]
    shown = [x if refused else p.image for p, x, refused in zip(proposals, clean, why, strict=True)]
    moved = torch.stack(shown) if shown else clean
    return Attacked(
        name,
        norm,
        eps,
        moved,
        tuple(distances(moved, clean, "l2").tolist()),
        tuple(distances(moved, clean, "linf").tolist()),
        tuple(not w and p.answer != int(y) for p, y, w in zip(proposals, labels, why, strict=True)),
        tuple(p.queries for p in proposals),
        tuple("; ".join(n for n in (w, p.note) if n) for p, w in zip(proposals, why, strict=True)),
    )


def _check(
    name: str,
    found: Attack,
    images: Tensor,
    labels: Tensor,
    ids: Sequence[str],
    eps: float | None,
    access: Sequence[QueryAccess],
    options: dict[str, object],
) -> None:
    if images.ndim != 4 or len(labels) != len(images) or len(ids) != len(images):
        raise UserError(
            f"attack {name}: images {tuple(images.shape)}, {len(labels)} labels, {len(ids)} ids; expected "
            "(B, C, H, W), B and B"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise UserError(f"attack {name}: clean images outside of [0, 1]")
    if eps is not None and not 0 < eps < math.inf:
        raise UserError(f"attack {name}: eps {eps}; expected a number above 0, such as 8/255 (linf) or 0.5 (l2)")
    if eps is None and found.ball:
        raise UserError(f"attack {name} works inside a ball; give eps=, such as 8/255 (linf) or 0.5 (l2)")
    wrong = [key for key in options if key not in found.options]
    if wrong:
        raise UserError(f"attack {name} has no option {wrong[0]!r}; its options: {', '.join(found.options)}")
    if found.asks:
        _check_access(name, found, len(images), access)


def _check_access(name: str, found: Attack, count: int, access: Sequence[QueryAccess]) -> None:
    if len(access) != count:
        raise UserError(
            f"attack {name} needs {found.needs}: {len(access)} accesses for {count} images; expected one for each, "
            f"such as QueryAccess(defence, {found.needs!r}, budget=1000)"
        )
    for one in access:
        if found.needs == SCORES and one.answers == LABELS:
            others = ", ".join(other for other in ATTACKS if find_attack(other).needs == LABELS)
            raise UserError(
                f"attack {name} needs scores, and this access answers labels; expected QueryAccess(..., 'scores'), or "
                f"an attack that needs labels alone: {others}"
            )
        if one.budget is None:
            raise UserError(f"attack {name} asks for as long as it may: give the access a budget, such as 1000")
        if one.num_classes is None:
            raise UserError(f"attack {name}: this access does not say how many classes there are; give num_classes=")


@contextmanager
def seeded(key: bytes) -> Iterator[None]:
    """numpy's, Python's and torch's global generators (of the CPU) seeded from the key, and put back afterwards."""
    words = np.frombuffer(key[:16], dtype=np.uint32)
    ours, theirs = np.random.get_state(), random.getstate()  # noqa: NPY002 - the generator that the libraries use
    with torch.random.fork_rng(devices=[]):
        np.random.seed(words)  # noqa: NPY002
        random.seed(key)
        torch.manual_seed(int.from_bytes(key[:8], "little") >> 1)
        try:
            yield
        finally:
            np.random.set_state(ours)  # noqa: NPY002
            random.setstate(theirs)
