"""Run attacks, and measure the images they propose.

Distance, norm ball, [0, 1] range and success are measured here and never taken from an attack. Nothing is projected: a
proposal outside the ball or outside [0, 1] counts as a failure, with a note.

Images are attacked one by one. The libraries draw from the global generators of numpy, Python and torch. These are
seeded from (seed, image id, attack) for each image and restored afterwards, so that a result does not depend on the
other images, their order, or interruptions. The one place where ART seeds itself from the system (the start of
HopSkipJump) is replaced.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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

SLACK = 1e-6
"""Tolerance for float32 rounding at the edge of a ball."""


@dataclass(frozen=True)
class Task:
    """Inputs of an attack on one image, limited to what the attack declares as its needs.

    Attributes:
        norm: ``l2`` or ``linf``.
        eps: radius of the ball in [0, 1] pixels; None: find the nearest misclassified image.
        key: 32 bytes that seed all random numbers.
        access: query access to the target; None for attacks without queries.
        classifier: the classifier without its purifier; None for attacks that do not need its gradients.
        defence: the whole defended classifier; None for attacks that do not need its gradients.
        surrogates: other classifiers of the same task; empty for attacks that need none.
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
    """Result of an attack on one image.

    Attributes:
        image: ``(C, H, W)``.
        answer: the attacked model's answer for exactly this image, during or right after the attack.
        queries: images sent through the attacked model, by queries or for gradients.
        note: a remark for the reader, or empty.
    """

    image: Tensor
    answer: int
    queries: int
    note: str = ""


@dataclass(frozen=True)
class Attacked:
    """A batch of images after an attack.

    Attributes:
        name: name of the attack.
        norm: norm of the ball and of the minimised distance.
        eps: radius of the ball, or None.
        images: ``(B, C, H, W)`` to show to a defence: the proposed image, or the clean one if the proposal is invalid.
        l2: l2 distance of each from the clean image.
        linf: l-infinity distance of each from the clean image.
        success: True if the proposal is valid and the attacked model (the target of the queries, the bare classifier,
            the defence, the mean of the surrogates) misclassified it during the attack; for queries to a random target,
            in most of the answers. A random model may answer differently later.
        queries: images sent through the attacked model, for each image.
        notes: a remark on each image, possibly empty.
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
        """Distances in the attack's own norm."""
        return self.l2 if self.norm == "l2" else self.linf


def distances(images: Tensor, clean: Tensor, norm: str) -> Tensor:
    """Return the distance of each image ``(B, C, H, W)`` from ``clean`` (one or B), float64 ``(B,)``; l2 or linf."""
    moved = (images.double() - clean.double()).flatten(1)
    return moved.norm(dim=1) if norm == "l2" else moved.abs().amax(dim=1)


def invalid(image: Tensor, clean: Tensor, norm: str, eps: float | None) -> str:
    """Return why a proposed image ``(C, H, W)`` is invalid; empty if it is valid."""
    if not bool(((image >= 0) & (image <= 1)).all()):
        return "proposed values outside [0, 1]"
    distance = float(distances(image[None], clean[None], norm))
    if eps is not None and distance > eps + SLACK:
        return f"nearest proposal: {norm} {ceil_to(distance, 6)}, outside the ball of {exact(eps)}"
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
    """Attack images one by one, and measure the results.

    Args:
        name: name of an attack in ``ATTACKS``.
        images: clean images ``(B, C, H, W)`` in [0, 1].
        labels: true classes ``(B,)``.
        ids: key the random numbers of each image.
        norm: ``l2`` or ``linf``.
        eps: radius of the ball in [0, 1] pixels; None: find the nearest misclassified image, if the attack can.
        seed: seed of the attack.
        access: query access for each image, with a budget, for query-based attacks.
        classifier: classifier for blind-pgd; surrogates must differ from it.
        defence: defence for adaptive-pgd.
        surrogates: surrogates for transfer.
        options: options of the attack.

    Returns:
        Images, distances, success, queries and notes.

    Raises:
        UserError: a required argument is missing, or does not fit.
    """
    chosen = find_attack(name, norm)
    need_extra(name)
    _check(name, chosen, images, labels, ids, eps)
    if wrong := [key for key in options if key not in chosen.options]:
        raise UserError(f"attack {name} has no option {wrong[0]!r}; its options: {', '.join(chosen.options)}")
    if chosen.by_queries:
        _check_access(name, chosen, len(images), access)
    known = [c.identity() for c in ([classifier] if classifier else []) + (defence.classifiers if defence else [])]
    given = {CLASSIFIER: classifier, DEFENCE: defence, SURROGATES: surrogates or None}
    if chosen.needs in given and given[chosen.needs] is None:
        argument = {CLASSIFIER: "classifier", DEFENCE: "defence", SURROGATES: "surrogates"}[chosen.needs]
        raise UserError(f"attack {name} needs {chosen.needs}; pass {argument}=")
    if chosen.needs == SURROGATES and any(s.identity() in known for s in surrogates):
        raise UserError(f"attack {name}: a surrogate is the target itself (same weights); expected other classifiers")
    clean, proposals = images.detach().cpu().float(), []
    for i, image in enumerate(clean):
        key = stream_key(seed, ids[i], f"attack {name} {norm}")
        task = Task(
            norm,
            eps,
            key,
            access[i] if chosen.by_queries else None,
            classifier if chosen.needs == CLASSIFIER else None,
            defence if chosen.needs == DEFENCE else None,
            surrogates if chosen.needs == SURROGATES else (),
        )
        with seeded(key):
            proposals.append(chosen(image, int(labels[i]), task, **options))
    return _measured(name, norm, eps, clean, labels, proposals)


def _measured(
    name: str, norm: str, eps: float | None, clean: Tensor, labels: Tensor, proposals: Sequence[Proposal]
) -> Attacked:
    reasons = [invalid(p.image, x, norm, eps) for p, x in zip(proposals, clean, strict=True)]
    shown = [x if reason else p.image for p, x, reason in zip(proposals, clean, reasons, strict=True)]
    moved = torch.stack(shown) if shown else clean
    return Attacked(
        name,
        norm,
        eps,
        moved,
        tuple(distances(moved, clean, "l2").tolist()),
        tuple(distances(moved, clean, "linf").tolist()),
        tuple(not r and p.answer != int(y) for p, y, r in zip(proposals, labels, reasons, strict=True)),
        tuple(p.queries for p in proposals),
        tuple("; ".join(filter(None, (reason, p.note))) for p, reason in zip(proposals, reasons, strict=True)),
    )


def _check(name: str, chosen: Attack, images: Tensor, labels: Tensor, ids: Sequence[str], eps: float | None) -> None:
    if images.ndim != 4 or len(labels) != len(images) or len(ids) != len(images):
        raise UserError(
            f"attack {name}: images {tuple(images.shape)}, {len(labels)} labels, {len(ids)} ids; expected "
            "(B, C, H, W), B and B"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise UserError(f"attack {name}: clean images outside [0, 1]")
    if eps is not None and not 0 < eps < math.inf:
        raise UserError(f"attack {name}: eps {eps}; expected a number above 0, such as 8/255 (linf) or 0.5 (l2)")
    if eps is None and chosen.ball:
        raise UserError(f"attack {name} works within a ball; pass eps=, such as 8/255 (linf) or 0.5 (l2)")


def _check_access(name: str, chosen: Attack, count: int, access: Sequence[QueryAccess]) -> None:
    if len(access) != count:
        raise UserError(
            f"attack {name} needs {chosen.needs}: {len(access)} accesses for {count} images; expected one per image, "
            f"such as QueryAccess(defence, {chosen.needs!r}, budget=1000)"
        )
    for one in access:
        if chosen.needs == SCORES and one.answers == LABELS:
            others = ", ".join(other for other in ATTACKS if find_attack(other).needs == LABELS)
            raise UserError(
                f"attack {name} needs scores, but this access returns labels; expected QueryAccess(..., 'scores'), "
                f"or an attack by labels: {others}"
            )
        if one.budget is None:
            raise UserError(f"attack {name} needs a query budget; expected QueryAccess(..., budget=1000)")
        if one.num_classes is None:
            raise UserError(
                f"attack {name}: the number of classes is unknown; expected QueryAccess(..., num_classes=K)"
            )


@contextmanager
def seeded(key: bytes) -> Iterator[None]:
    """Seed the global generators of numpy, Python and torch (CPU) from a key, and restore them afterwards."""
    words = np.frombuffer(key[:16], dtype=np.uint32)
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - used by the libraries
    with torch.random.fork_rng(devices=[]):
        np.random.seed(words)  # noqa: NPY002
        random.seed(key)
        torch.manual_seed(int.from_bytes(key[:8], "little") >> 1)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
