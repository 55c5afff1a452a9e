"""Run every defence under every condition on the same images, appending to one file that can be resumed.

Attacks propose images; the results are measured here: each defence classifies the proposed image anew, with new random
numbers and several times if it is random, and distances are those of the images it was shown. A defence that fails does
so in its own column; the others continue.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from analysis.comparison.attacked import Attacked
from analysis.comparison.results import Condition, outcome_id
from analysis.comparison.sandwich import crossing
from certify.engine.contract import breakage_left, check_defence
from certify.errors import RunFault, UserError, in_words
from certify.images.dataset import ImageSet
from certify.models.defence import Defence
from certify.runs.config import versions
from certify.runs.records import SCHEMA, ComparisonHeader, ConditionRecord, Crossed, DefenceRecord, Outcome
from certify.runs.run_file import ComparisonFile
from certify.smoothed_classifier import SmoothedClassifier
from certify.smoothing.certificates import check_counts
from certify.smoothing.numeric import as_float, as_int
from certify.smoothing.rng import block_generator, stream_key
from certify.types import ABSTAIN, FAILED, NOT_CERTIFIABLE
from denoisers.defences import Noisy

CLEAN = Condition("clean", "plain")
RANDOM = Condition("random noise", "plain")
SMOOTHING = Condition("smoothing", "certified")
CHUNK = 25
"""Images that are attacked together; at most as many are lost if a run is killed."""


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


@dataclass(frozen=True)
class Plan:
    """Parameters of a comparison.

    Attributes:
        conditions: in the order of the table.
        eps: maximum distance of attacked images, in [0, 1] pixels.
        norm: ``"linf"`` or ``"l2"``.
        repeats: answers per image of a random defence.
        seed: of all random numbers.
        certify_n: maximum number of samples per image for the certified column; 0: no such column.
        alpha: maximum probability that a certificate is wrong.
        settings: of the attacks, for the header.
    """

    conditions: Sequence[Condition]
    eps: float
    norm: str
    repeats: int = 5
    seed: int = 0
    certify_n: int = 1000
    alpha: float = 0.001
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _, repeats, alpha = check_counts(1, self.repeats, self.alpha)
        n = as_int(self.certify_n, "certify_n") if self.certify_n else 0
        eps, seed = as_float(self.eps, "eps"), as_int(self.seed, "seed")
        numbers = {"certify_n": n, "repeats": repeats, "alpha": alpha, "eps": eps, "seed": seed}
        for name, value in numbers.items():
            object.__setattr__(self, name, value)

    def l2_radius(self, values: int) -> float:
        """Return the l2 radius that contains the ball of the attacks, for images of so many values."""
        return self.eps if self.norm == "l2" else self.eps * values**0.5


def make_header(
    plan: Plan, defences: Mapping[str, Defence | str], images: ImageSet, *, model: str, data: str, command: str = ""
) -> ComparisonHeader:
    """Return the header of the file: everything that determines the results, and the expected number of lines."""
    size = images.input.size
    if size is None:
        raise UserError(f"{model} does not define its input size; expected --input-size CxHxW")
    described = [
        {"named": named, **(d.describe() if isinstance(d, Defence) else {"frozen": True, "built": False})}
        for named, d in defences.items()
    ]
    cells = sum(applies(d, c) for d in defences.values() for c in plan.conditions)
    settings = ComparisonHeader.from_json({"expected": cells * len(images), **plan.settings}, "the comparison")
    return settings.replace(
        schema=SCHEMA,
        model=model,
        data=data,
        norm=plan.norm,
        eps=plan.eps,
        l2_radius=plan.l2_radius(size[0] * size[1] * size[2]),
        repeats=plan.repeats,
        seed=plan.seed,
        certify_n=plan.certify_n,
        alpha=plan.alpha,
        conditions=[ConditionRecord(name=c.name, group=c.group) for c in plan.conditions],
        defences=[DefenceRecord.from_json(one) for one in described],
        images={**images.describe(), "chosen": len(images)},
        versions=versions(),
        command=command,
    )


def applies(defence: Defence | str, condition: Condition) -> bool:
    """True if a defence is evaluated under a condition: certificates exist for smoothing only."""
    return condition.group != "certified" or (isinstance(defence, Defence) and _smoothing(defence) is not None)


def _smoothing(defence: Defence) -> Noisy | None:
    """Return noise and denoiser of a defence that is a smoothed classifier, otherwise None."""
    (first, *others) = defence.purifiers
    return first if isinstance(first, Noisy) and not others and defence.combine == "vote" else None


def check_defences(defences: Mapping[str, Defence | str], images: ImageSet, plan: Plan) -> None:
    """Check each defence on the first image; one that raises an error fails its own column later.

    Raises:
        ContractError: a denoiser or classifier is not a fixed function of one image.
    """
    for defence in defences.values():
        if isinstance(defence, Defence):
            with breakage_left():
                check_defence(defence, images.load(0), stream_key(plan.seed, images.items[0].id, "contract"))


def compare(
    defences: Mapping[str, Defence | str],
    bare: Defence,
    images: ImageSet,
    plan: Plan,
    file: ComparisonFile,
    craft: Craft,
    progress: Callable[[int], None] = lambda outcomes: None,
) -> None:
    """Run whatever is missing in the file.

    Args:
        defences: by name; a text in place of a defence says why it could not be built.
        bare: the classifier alone, which blind attacks target.
        images: with labels.
        plan: conditions and parameters.
        file: outcomes are appended to it.
        craft: runs an attack.
        progress: called with the number of new outcomes.

    Raises:
        ContractError: see :func:`check_defences`.
    """
    check_defences({"": bare, **defences}, images, plan)
    progress(len(file.done))
    # a cell that failed is not run again on later images, nor after a resumption
    failed = {(row.defence, row.condition): row.error for row in file.done.values() if row.error is not None}
    for chunk in _chunks(images):
        for condition in sorted(plan.conditions, key=lambda c: c.group != "certified"):  # attacks test the certificates
            common = functools.cache(functools.partial(_common_proposal, condition, bare, chunk, plan, craft))
            for name, defence in defences.items():
                todo = [i for i, id_ in enumerate(chunk.ids) if outcome_id(id_, name, condition.key) not in file.done]
                if not todo or not applies(defence, condition):
                    continue
                cell, part, outcomes = (name, condition.key), chunk.take(todo), []
                why = failed.get(cell, defence if isinstance(defence, str) else "")
                if not why and isinstance(defence, Defence):
                    adaptive = condition.group == "adaptive"  # other images are the same for all defences
                    try:
                        proposed = _craft(craft, condition, defence, part) if adaptive else common().take(todo)
                        outcomes = _evaluate(defence, name, condition, part, proposed, plan)
                        if condition.attacked:
                            outcomes = _test_certificates(defence, outcomes, part, proposed, file, plan)
                    except Exception as error:  # of any defence or attack
                        why = in_words(error)
                if why:
                    failed[cell] = why
                    outcomes = [_outcome(part, i, name, condition, [], error=why) for i in range(len(todo))]
                for outcome in outcomes:
                    file.append(outcome)
                progress(len(outcomes))


def _test_certificates(
    defence: Defence, outcomes: Sequence[Outcome], chunk: _Chunk, proposed: Proposed, file: ComparisonFile, plan: Plan
) -> list[Outcome]:
    """Add the smoothed prediction for images attacked within their certified radius whose votes changed."""
    tested, smoothed = [], None
    for outcome, clean, attacked in zip(outcomes, chunk.images, proposed.images, strict=True):
        held = file.done.get(outcome_id(outcome.image, outcome.defence, SMOOTHING.key))
        within = held is not None and held.error is None and (outcome.l2 or 0.0) < (held.radius or 0.0)
        if held is not None and within and outcome.answers != held.answers:
            smoothed = smoothed or _smoothed(defence)
            n, alpha = plan.certify_n, plan.alpha
            met = crossing(smoothed, outcome.image, clean, attacked, n=n, alpha=alpha, seed=plan.seed)
            record = Crossed(distance=met.distance, prediction=met.prediction, alpha=met.alpha)
            outcome = outcome.replace(crossing=record)  # noqa: PLW2901
        tested.append(outcome)
    return tested


def _smoothed(defence: Defence) -> SmoothedClassifier:
    noisy = _smoothing(defence)
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


def _common_proposal(condition: Condition, bare: Defence, chunk: _Chunk, plan: Plan, craft: Craft) -> Proposed:
    """Return the images that are shown to every defence under a condition other than an adaptive attack."""
    if condition.group == "blind":
        return _craft(craft, condition, bare, chunk)
    images = chunk.images
    if condition == RANDOM:
        images = randomly_moved(images, chunk.ids, plan.eps, plan.norm, plan.seed)
    return Proposed(images, [0] * len(chunk.ids), [""] * len(chunk.ids))


def randomly_moved(images: Tensor, ids: Sequence[str], eps: float, norm: str, seed: int) -> Tensor:
    """Add noise of norm ``eps`` to images ``(B, C, H, W)``, and clip to [0, 1].

    Args:
        images: clean.
        ids: key the random numbers of each image.
        eps: in [0, 1] pixels.
        norm: ``linf``: random signs times eps; ``l2``: a random direction.
        seed: of the noise.
    """
    moved = []
    for image, name in zip(images, ids, strict=True):
        step = torch.randn(image.shape, generator=block_generator(stream_key(seed, name, "random noise"), 0))
        step = step.sign() * eps if norm == "linf" else step * (eps / step.norm())
        moved.append((image + step).clamp(0, 1))
    return torch.stack(moved)


def _craft(craft: Craft, condition: Condition, target: Defence, chunk: _Chunk) -> Proposed:
    proposed = craft(condition, target, chunk.images, chunk.labels, chunk.ids)
    return Proposed(proposed.images, proposed.queries, proposed.notes or [""] * len(chunk.ids))


def _evaluate(
    defence: Defence, name: str, condition: Condition, chunk: _Chunk, shown: Proposed, plan: Plan
) -> list[Outcome]:
    """Classify the proposed images, or certify the clean ones."""
    if condition.group == "certified":
        smoothed = _smoothed(defence)
        return [_certified(smoothed, name, condition, chunk, i, plan) for i in range(len(chunk.ids))]
    keys = [stream_key(plan.seed, image, f"judge {name} {condition.key}") for image in chunk.ids]
    turns = plan.repeats if defence.random else 1
    start = time.perf_counter()
    answers = [defence(shown.images, keys, turn).tolist() for turn in range(turns)]
    seconds = (time.perf_counter() - start) / turns / len(chunk.ids)
    per_image = list(zip(*answers, strict=True))
    failures = sum(FAILED in given for given in per_image)
    if failures:
        raise RunFault(f"no finite answer for {failures} of {len(chunk.ids)} images")
    outcomes = []
    for i, given in enumerate(per_image):
        distance = shown.images[i] - chunk.images[i]
        outcome = _outcome(
            chunk,
            i,
            name,
            condition,
            list(given),
            l2=float(distance.norm()),
            linf=float(distance.abs().max()),
            queries=int(shown.queries[i]),
            note=shown.notes[i],
            seconds=seconds,
        )
        outcomes.append(outcome)
    return outcomes


def _certified(
    smoothed: SmoothedClassifier, name: str, condition: Condition, chunk: _Chunk, i: int, plan: Plan
) -> Outcome:
    """Decide whether the smoothed classifier is certifiably robust at the plan's radius."""
    image = chunk.images[i]
    radius = plan.l2_radius(image.numel())
    start = time.perf_counter()
    if smoothed.noise.probability(radius) >= 1:  # rounds to 1: no number of votes suffices
        more: dict[str, Any] = {"radius": 0.0, "outcome": NOT_CERTIFIABLE, "queries": 0, "seconds": 0.0}
        return _outcome(chunk, i, name, condition, [ABSTAIN], **more)
    decision = smoothed.decide(
        image, radius=radius, alpha=plan.alpha, n=plan.certify_n, seed=plan.seed, image_id=chunk.ids[i]
    )
    return _outcome(
        chunk,
        i,
        name,
        condition,
        [decision.prediction],
        radius=decision.radius,
        outcome=decision.outcomes[-1],
        queries=decision.drawn,
        seconds=time.perf_counter() - start,
    )


def _outcome(chunk: _Chunk, i: int, name: str, condition: Condition, answers: list[int], **more: Any) -> Outcome:
    return Outcome(
        id=outcome_id(chunk.ids[i], name, condition.key),
        image=chunk.ids[i],
        defence=name,
        condition=condition.key,
        label=int(chunk.labels[i]),
        answers=answers,
        **more,
    )
