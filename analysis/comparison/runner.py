"""Every defence under every condition on the same images, image by image into one file that can be gone on with.

Attacks propose images; what counts is measured here: the defence is asked anew, with fresh random numbers and several
times where it draws any, and distances are those of the images that it was shown. A defence that breaks fails its own
column; the others are finished.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from analysis.comparison.results import Condition
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
"""Images that are attacked together, and at most lost when a run is killed."""


@dataclass(frozen=True)
class Proposed:
    """What an attack hands over.

    Attributes:
        images: ``(B, C, H, W)`` in [0, 1].
        queries: images that went through the attacked model, for each image.
        notes: what the reader of a figure has to know, for each image; empty where there is nothing to say.
    """

    images: Tensor
    queries: Sequence[int]
    notes: Sequence[str] = ()

    def take(self, rows: Sequence[int]) -> Proposed:
        """Some of them."""
        return Proposed(self.images[list(rows)], [self.queries[i] for i in rows], [self.notes[i] for i in rows])


Craft = Callable[[Condition, Defence, Tensor, Tensor, Sequence[str]], Proposed]
"""An attack under its condition: target, images, labels ``(B,)`` and ids to proposed images."""


@dataclass(frozen=True)
class Plan:
    """The numbers of a comparison.

    Attributes:
        conditions: in the order of the table.
        eps: largest distance, in [0, 1] pixels.
        norm: ``"linf"`` or ``"l2"``.
        repeats: answers of a defence that draws random numbers.
        seed: of everything drawn.
        certify_n: maximum number of samples per image for the certified column; 0: there is none.
        alpha: probability that a certificate is wrong, at most.
        settings: of the attacks, for the file.
    """

    conditions: Sequence[Condition]
    eps: float
    norm: str
    repeats: int = 5
    seed: int = 0
    certify_n: int = 1000
    alpha: float = 0.001
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _, repeats, alpha = check_counts(1, self.repeats, self.alpha)
        n = as_int(self.certify_n, "certify_n")  # 0: no certified column
        eps, seed = as_float(self.eps, "eps"), as_int(self.seed, "seed")
        numbers = {
            "certify_n": n if self.certify_n else 0,
            "repeats": repeats,
            "alpha": alpha,
            "eps": eps,
            "seed": seed,
        }
        for name, value in numbers.items():
            object.__setattr__(self, name, value)

    def l2_radius(self, values: int) -> float:
        """The l2 radius of a ball that holds every permitted image of so many values."""
        return self.eps if self.norm == "l2" else self.eps * values**0.5


def make_header(
    plan: Plan, defences: Mapping[str, Defence | str], images: ImageSet, *, model: str, data: str, command: str = ""
) -> ComparisonHeader:
    """Everything that shapes a comparison, and how many outcomes it owes."""
    size = images.input.size
    if size is None:
        raise UserError(f"{model} does not say which size it takes; give one: --input-size CxHxW")
    about = [
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
        defences=[DefenceRecord.from_json(one) for one in about],
        images={**images.describe(), "chosen": len(images)},
        versions=versions(),
        command=command,
    )


def applies(defence: Defence | str, condition: Condition) -> bool:
    """Whether the table has a figure there: a certificate only for smoothing."""
    return condition.group != "certified" or (isinstance(defence, Defence) and _smoothing(defence) is not None)


def _smoothing(defence: Defence) -> Noisy | None:
    """The noise and denoiser of a defence that is a smoothed classifier."""
    (first, *others) = defence.purifiers
    return first if isinstance(first, Noisy) and not others and defence.combine == "vote" else None


def check_defences(defences: Mapping[str, Defence | str], images: ImageSet, plan: Plan) -> None:
    """Check each defence's parts on the first image, once; one that breaks on it fails its own column later.

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
    """Run whatever the file does not hold yet.

    Args:
        defences: as named by the user; a text is why it could not be built.
        bare: the classifier alone, for attacks that know nothing else.
        images: with labels.
        plan: conditions and numbers.
        file: outcomes are appended to it.
        craft: the attacks.
        progress: told how many outcomes were added.

    Raises:
        ContractError: as of :func:`check_defences`.
    """
    check_defences({"": bare, **defences}, images, plan)
    progress(len(file.done))
    # what failed once is not tried on the next images, nor when the run goes on
    broken = {(row.defence, row.condition): row.error for row in file.done.values() if row.error is not None}
    for chunk in _chunks(images):
        for condition in sorted(plan.conditions, key=lambda c: c.group != "certified"):  # attacks are held against it
            shown = functools.cache(functools.partial(_shown, condition, bare, chunk, plan, craft))
            for named, defence in defences.items():
                todo = [i for i, name in enumerate(chunk.ids) if _key(name, named, condition) not in file.done]
                if not todo or not applies(defence, condition):
                    continue
                why = broken.get((named, condition.key), defence if isinstance(defence, str) else "")
                if not why and isinstance(defence, Defence):
                    rows, why = _attempt(defence, named, condition, chunk.take(todo), todo, shown, plan, craft)
                    if condition.group in ("blind", "adaptive"):
                        why = why or _hold_against_certificates(defence, rows, file, plan)
                if why:
                    broken[named, condition.key] = why
                    rows = [_Judged(_row(chunk, i, named, condition, [], error=why)) for i in todo]
                for row in rows:
                    file.append(row.outcome)
                progress(len(rows))


@dataclass
class _Judged:
    """An outcome with the images that it is about."""

    outcome: Outcome
    clean: Tensor | None = None
    attacked: Tensor | None = None


def _hold_against_certificates(defence: Defence, rows: list[_Judged], file: ComparisonFile, plan: Plan) -> str:
    """Add what the smoothed classifier says about images attacked inside of their certified radius, if votes changed.

    Returns:
        Why that could not be found out, or "".
    """
    smoothed = None  # made once, and only where it is asked
    for judged in rows:
        row = judged.outcome
        held = file.done.get(_key(row.image, row.defence, SMOOTHING))
        if held is None or held.error is not None or row.l2 is None or row.l2 >= (held.radius or 0.0):
            continue
        if row.answers == held.answers:
            continue
        assert judged.clean is not None
        assert judged.attacked is not None
        n, seed = plan.certify_n, plan.seed
        try:
            smoothed = smoothed or _smoothed(defence)
            found = crossing(smoothed, row.image, judged.clean, judged.attacked, n=n, alpha=plan.alpha, seed=seed)
        except Exception as error:
            return in_words(error)
        crossed = Crossed(distance=found.distance, prediction=found.prediction, alpha=found.alpha)
        judged.outcome = row.replace(crossing=crossed)
    return ""


def _smoothed(defence: Defence) -> SmoothedClassifier:
    noisy = _smoothing(defence)
    assert noisy is not None
    return SmoothedClassifier(defence.classifiers[0], noisy.sigma, denoiser=noisy.denoiser)


def _attempt(
    defence: Defence,
    named: str,
    condition: Condition,
    chunk: _Chunk,
    places: Sequence[int],
    shown: Callable[[], Proposed],
    plan: Plan,
    craft: Craft,
) -> tuple[list[_Judged], str]:
    """One defence's outcomes on these images; or none, and why: its own fault must not take the table with it."""
    try:
        own = condition.group == "adaptive"  # else the same for every defence
        proposed = _craft(craft, condition, defence, chunk) if own else shown().take(places)
        return _outcomes(defence, named, condition, chunk, proposed, plan), ""
    except Exception as error:
        return [], in_words(error)


@dataclass(frozen=True)
class _Chunk:
    ids: Sequence[str]
    images: Tensor
    labels: Tensor

    def take(self, rows: Sequence[int]) -> _Chunk:
        return _Chunk([self.ids[i] for i in rows], self.images[list(rows)], self.labels[list(rows)])

    def keys(self, seed: int, stage: str) -> list[bytes]:
        return [stream_key(seed, name, stage) for name in self.ids]


def _chunks(images: ImageSet) -> Iterator[_Chunk]:
    for start in range(0, len(images), CHUNK):
        places = range(start, min(start + CHUNK, len(images)))
        labels = torch.tensor([images.labels[i] for i in places])
        yield _Chunk([images.items[i].id for i in places], torch.stack([images.load(i) for i in places]), labels)


def _shown(condition: Condition, bare: Defence, chunk: _Chunk, plan: Plan, craft: Craft) -> Proposed:
    """What every defence is shown under a condition that knows none of them."""
    if condition.group == "blind":
        return _craft(craft, condition, bare, chunk)
    free, silent = [0] * len(chunk.ids), [""] * len(chunk.ids)
    if condition != RANDOM:
        return Proposed(chunk.images, free, silent)
    return Proposed(randomly_moved(chunk.images, chunk.ids, plan.eps, plan.norm, plan.seed), free, silent)


def randomly_moved(images: Tensor, ids: Sequence[str], eps: float, norm: str, seed: int) -> Tensor:
    """Images ``(B, C, H, W)`` with noise of length ``eps``, clipped to [0, 1].

    Args:
        images: clean.
        ids: that name their random numbers.
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
    found = craft(condition, target, chunk.images, chunk.labels, chunk.ids)
    return Proposed(found.images, found.queries, found.notes or [""] * len(chunk.ids))


def _outcomes(
    defence: Defence, named: str, condition: Condition, chunk: _Chunk, shown: Proposed, plan: Plan
) -> list[_Judged]:
    """The defence's answers about these images, one line each."""
    if condition.group == "certified":
        smoothed = _smoothed(defence)
        return [_Judged(_certified(smoothed, named, condition, chunk, i, plan)) for i in range(len(chunk.ids))]
    keys = chunk.keys(plan.seed, f"judge {named} {condition.key}")
    turns = plan.repeats if defence.random else 1
    began = time.perf_counter()
    answers = [defence(shown.images, keys, turn).tolist() for turn in range(turns)]
    seconds = (time.perf_counter() - began) / turns / len(chunk.ids)
    failures = sum(FAILED in given for given in zip(*answers, strict=True))
    if failures:
        raise RunFault(f"no finite answer about {failures} of {len(chunk.ids)} images")
    rows = []
    for i, given in enumerate(zip(*answers, strict=True)):
        distance = shown.images[i] - chunk.images[i]
        outcome = _row(
            chunk,
            i,
            named,
            condition,
            list(given),
            l2=float(distance.norm()),
            linf=float(distance.abs().max()),
            queries=int(shown.queries[i]),
            note=shown.notes[i],
            seconds=seconds,
        )
        rows.append(_Judged(outcome, chunk.images[i], shown.images[i]))
    return rows


def _certified(
    smoothed: SmoothedClassifier, named: str, condition: Condition, chunk: _Chunk, i: int, plan: Plan
) -> Outcome:
    """Whether the smoothed classifier is certifiably robust at the plan's radius, decided with few samples."""
    image = chunk.images[i]
    radius = plan.l2_radius(image.numel())
    began = time.perf_counter()
    if smoothed.noise.probability(radius) >= 1:  # as far as numbers reach: no vote is that sure
        return _row(chunk, i, named, condition, [ABSTAIN], radius=0.0, outcome=NOT_CERTIFIABLE, queries=0, seconds=0.0)
    found = smoothed.decide(
        image, radius=radius, alpha=plan.alpha, n=plan.certify_n, seed=plan.seed, image_id=chunk.ids[i]
    )
    return _row(
        chunk,
        i,
        named,
        condition,
        [found.prediction],
        radius=found.radius,
        outcome=found.outcomes[-1],
        queries=found.drawn,
        seconds=time.perf_counter() - began,
    )


def _row(chunk: _Chunk, i: int, named: str, condition: Condition, answers: list[int], **more: Any) -> Outcome:
    return Outcome(
        id=_key(chunk.ids[i], named, condition),
        image=chunk.ids[i],
        defence=named,
        condition=condition.key,
        label=int(chunk.labels[i]),
        answers=answers,
        **more,
    )


def _key(image: str, named: str, condition: Condition) -> str:
    return f"{image} | {named} | {condition.key}"
