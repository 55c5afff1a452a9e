"""Run every defence under every condition on the same images, appending to one file that can be resumed.

Attacks propose images; the results are measured here: each defence classifies the proposed image anew, with new random
numbers and several times if it is random, and distances are those of the images it was shown. A defence that raises an
error fails only its own results.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analysis.comparison.attacked import Attacked
from analysis.comparison.plan import RANDOM, SMOOTHING, AttackContext, Plan, applies, smoothing_of
from analysis.comparison.results import Condition, outcome_id
from analysis.comparison.sandwich import crossing
from certify.errors import RunFault, in_words
from certify.images.dataset import ImageSet
from certify.models.defence import Defence
from certify.runs.comparison_records import Crossed, Outcome
from certify.runs.run_file import ComparisonFile
from certify.smoothed_classifier import SmoothedClassifier
from certify.smoothing.rng import block_generator, stream_key
from certify.types import ABSTAIN, FAILED, NOT_CERTIFIABLE

CHUNK = 25
"""Images attacked together; at most that many are lost if a run is killed."""


@dataclass(frozen=True)
class Proposed:
    """Images proposed by an attack.

    Attributes:
        images: ``(B, C, H, W)`` in [0, 1].
        queries: for each image, number of images sent through the attacked model.
        notes: remark on each image, possibly empty.
    """

    images: Tensor
    queries: Sequence[int]
    notes: Sequence[str] = ()

    def take(self, rows: Sequence[int]) -> Proposed:
        """Select images."""
        return Proposed(self.images[list(rows)], [self.queries[i] for i in rows], [self.notes[i] for i in rows])


Craft = Callable[[Condition, Defence, Tensor, Tensor, Sequence[str]], Proposed | Attacked]
"""Runs the attack of a condition: target, images, labels ``(B,)`` and ids to proposed images."""


def compare(
    context: AttackContext, plan: Plan, file: ComparisonFile, progress: Callable[[int], None] = lambda outcomes: None
) -> None:
    """Run the defences and conditions that are missing in the file.

    Args:
        context: defences, images and attacks.
        plan: conditions and parameters.
        file: outcomes are appended to it.
        progress: called with the number of new outcomes.

    Raises:
        ContractError: see :meth:`AttackContext.check_defences`.
    """
    context.check_defences()
    progress(len(file.done))
    # a cell that failed is not run again on later images, nor after a resumption
    failed = {(row.defence, row.condition): row.error for row in file.done.values() if row.error is not None}
    for chunk in _chunks(context.images):
        for condition in sorted(plan.conditions, key=lambda c: c.group != "certified"):  # attacks test the certificates
            common = functools.cache(functools.partial(_common_proposal, condition, chunk, context))
            for name, defence in context.defences.items():
                todo = [i for i, id_ in enumerate(chunk.ids) if outcome_id(id_, name, condition.key) not in file.done]
                if not todo or not applies(defence, condition):
                    continue
                part = _Part(name, condition, chunk.take(todo), plan)
                reason = failed.get((name, condition.key), defence if isinstance(defence, str) else "")
                if not reason and isinstance(defence, Defence):
                    adaptive = condition.group == "adaptive"  # other images are the same for all defences
                    try:
                        shown = _craft(context, condition, defence, part.chunk) if adaptive else common().take(todo)
                        outcomes = _evaluate(defence, part, shown)
                        if condition.attacked:
                            outcomes = _test_certificates(defence, part, shown, outcomes, file)
                    except Exception as error:  # of any defence or attack
                        reason = in_words(error)
                if reason:
                    failed[name, condition.key] = reason
                    outcomes = [part.outcome(i, [], error=reason) for i in range(len(todo))]
                for outcome in outcomes:
                    file.append(outcome)
                progress(len(outcomes))


@dataclass(frozen=True)
class _Part:
    """The images of a chunk that a defence, by its name, still has to classify under a condition."""

    name: str
    condition: Condition
    chunk: _Chunk
    plan: Plan

    def outcome(self, i: int, answers: Sequence[int], **more: Any) -> Outcome:
        """Return the line of the i-th image."""
        image, key = self.chunk.ids[i], self.condition.key
        return Outcome(
            id=outcome_id(image, self.name, key),
            image=image,
            defence=self.name,
            condition=key,
            label=int(self.chunk.labels[i]),
            answers=list(answers),
            **more,
        )


def _test_certificates(
    defence: Defence, part: _Part, shown: Proposed, outcomes: Sequence[Outcome], file: ComparisonFile
) -> list[Outcome]:
    """Add the smoothed prediction for images attacked within their certified radius whose votes changed."""
    tested, smoothed, plan = [], None, part.plan
    for outcome, clean, attacked in zip(outcomes, part.chunk.images, shown.images, strict=True):
        held = file.done.get(outcome_id(outcome.image, outcome.defence, SMOOTHING.key))
        within = held is not None and held.error is None and (outcome.l2 or 0.0) < (held.radius or 0.0)
        if held is not None and within and outcome.answers != held.answers:
            smoothed = smoothed or _smoothed(defence)
            n, alpha, seed = plan.certify_n, plan.alpha, plan.attacks.seed
            met = crossing(smoothed, outcome.image, clean, attacked, n=n, alpha=alpha, seed=seed)
            record = Crossed(distance=met.distance, prediction=met.prediction, alpha=met.alpha)
            outcome = outcome.replace(crossing=record)  # noqa: PLW2901
        tested.append(outcome)
    return tested


def _smoothed(defence: Defence) -> SmoothedClassifier:
    noisy = smoothing_of(defence)
    assert noisy is not None
    return SmoothedClassifier(defence.classifiers[0], noisy.sigma, denoiser=noisy.denoiser)


@dataclass(frozen=True)
class _Chunk:
    """Some of the images: ids, images ``(B, C, H, W)`` and labels ``(B,)``."""

    ids: Sequence[str]
    images: Tensor
    labels: Tensor

    def take(self, rows: Sequence[int]) -> _Chunk:
        return _Chunk([self.ids[i] for i in rows], self.images[list(rows)], self.labels[list(rows)])


def _chunks(images: ImageSet) -> Iterator[_Chunk]:
    for start in range(0, len(images), CHUNK):
        places = range(start, min(start + CHUNK, len(images)))
        labels = torch.tensor([images.labels[i] for i in places])
        yield _Chunk([images.items[i].id for i in places], torch.stack([images.load(i) for i in places]), labels)


def _common_proposal(condition: Condition, chunk: _Chunk, context: AttackContext) -> Proposed:
    """Return the images that are shown to every defence under a condition other than an adaptive attack."""
    if condition.group == "blind":
        return _craft(context, condition, context.bare, chunk)
    images, attacks = chunk.images, context.attacks
    if condition == RANDOM:
        images = randomly_moved(images, chunk.ids, attacks.eps, attacks.norm, attacks.seed)
    return Proposed(images, [0] * len(chunk.ids), [""] * len(chunk.ids))


def randomly_moved(images: Tensor, ids: Sequence[str], eps: float, norm: str, seed: int) -> Tensor:
    """Add noise of norm ``eps`` to images ``(B, C, H, W)``, and clip to [0, 1].

    Args:
        images: clean images.
        ids: key the random numbers of each image.
        eps: norm of the noise, in [0, 1] pixels.
        norm: ``linf``: random signs times eps; ``l2``: a random direction.
        seed: seed of the noise.
    """
    moved = []
    for image, name in zip(images, ids, strict=True):
        step = torch.randn(image.shape, generator=block_generator(stream_key(seed, name, "random noise"), 0))
        step = step.sign() * eps if norm == "linf" else step * (eps / step.norm())
        moved.append((image + step).clamp(0, 1))
    return torch.stack(moved)


def _craft(context: AttackContext, condition: Condition, target: Defence, chunk: _Chunk) -> Proposed:
    proposed = context.craft(condition, target, chunk.images, chunk.labels, chunk.ids)
    return Proposed(proposed.images, proposed.queries, proposed.notes or [""] * len(chunk.ids))


def _evaluate(defence: Defence, part: _Part, shown: Proposed) -> list[Outcome]:
    """Classify the proposed images, or certify the clean ones."""
    chunk, plan, condition = part.chunk, part.plan, part.condition
    if condition.group == "certified":
        smoothed = _smoothed(defence)
        return [_certified(smoothed, part, i) for i in range(len(chunk.ids))]
    keys = [stream_key(plan.attacks.seed, image, f"judge {part.name} {condition.key}") for image in chunk.ids]
    turns = plan.repeats if defence.random else 1
    start = time.perf_counter()
    answers = [defence(shown.images, keys, turn).tolist() for turn in range(turns)]
    seconds = (time.perf_counter() - start) / turns / len(chunk.ids)
    per_image = list(zip(*answers, strict=True))
    if failures := sum(FAILED in given for given in per_image):
        raise RunFault(f"no finite answer for {failures} of {len(chunk.ids)} images")
    moved = shown.images - chunk.images
    return [
        part.outcome(
            i,
            given,
            l2=float(moved[i].norm()),
            linf=float(moved[i].abs().max()),
            queries=int(shown.queries[i]),
            note=shown.notes[i],
            seconds=seconds,
        )
        for i, given in enumerate(per_image)
    ]


def _certified(smoothed: SmoothedClassifier, part: _Part, i: int) -> Outcome:
    """Decide whether the smoothed classifier is certifiably robust at the plan's radius."""
    image, plan = part.chunk.images[i], part.plan
    radius = plan.l2_radius(image.numel())
    start = time.perf_counter()
    if smoothed.noise.probability(radius) >= 1:  # rounds to 1: no number of votes suffices
        return part.outcome(i, [ABSTAIN], radius=0.0, outcome=NOT_CERTIFIABLE, queries=0, seconds=0.0)
    decision = smoothed.decide(
        image, radius=radius, alpha=plan.alpha, n=plan.certify_n, seed=plan.attacks.seed, image_id=part.chunk.ids[i]
    )
    return part.outcome(
        i,
        [decision.prediction],
        radius=decision.radius,
        outcome=decision.outcomes[-1],
        queries=decision.drawn,
        seconds=time.perf_counter() - start,
    )
