"""Gradient-based attacks on the bare classifier, on surrogates, or on the whole defence.

ART runs the projected gradient ascent; the functions it maximises are defined here. Each returns log-probabilities
``(B, K)``; the loss is their negative entry at the label.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from analysis.comparison.attacked import SLACK, Proposal, Task, distances
from certify.errors import UserError
from certify.models.classifier import Classifier, labels_from_logits
from certify.models.defence import Defence, Member
from certify.smoothing.rng import block_generator


class _Finished(Exception):
    """A deterministic model misclassifies an image in the ball, so the attack can stop."""


class _Objective(nn.Module):
    """The function to maximise, as a module for ART; counts images and zero gradients.

    With a ``goal`` (clean image, label, norm and radius of the ball) it also keeps the best image in the ball:
    misclassified ones first, then the highest loss.

    Args:
        log_scores: images ``(B, C, H, W)`` to log-probabilities ``(B, K)``.
        each: passes of the attacked model per image.
        judge: a deterministic model's label of an image ``(1, C, H, W)``. If given, it is used in place of the largest
            log-probability, and the first misclassification ends the attack.
    """

    def __init__(
        self, log_scores: Callable[[Tensor], Tensor], each: int, judge: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.log_scores, self.each, self.judge = log_scores, each, judge
        self.sent = self.gradients = self.zero_gradients = 0
        self.best: Tensor | None = None
        self.rank = (False, -math.inf)
        self.goal: tuple[Tensor, int, str, float] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return log-probabilities ``(B, K)``.

        Raises:
            UserError: they have no gradient.
            _Finished: the attack can stop.
        """
        self.sent += len(images) * self.each
        log_scores = self.log_scores(images)
        if images.requires_grad:
            if not log_scores.requires_grad:
                raise UserError(
                    "the attacked model gives no gradients (labels only, or a runtime without them); expected torch "
                    "modules, or an attack by queries, such as hopskipjump"
                )
            images.register_hook(self._count_gradient)
        if self.goal is not None:
            self._keep_best(images.detach(), log_scores.detach(), *self.goal)
        return log_scores

    def _keep_best(self, images: Tensor, log_scores: Tensor, clean: Tensor, label: int, norm: str, eps: float) -> None:
        for image, scores in zip(images, log_scores, strict=True):
            if float(distances(image[None].cpu(), clean, norm)) > eps + SLACK:
                continue
            wrong = int(scores.argmax()) != label
            if self.judge is not None:
                self.sent += 1
                with torch.no_grad():
                    wrong = int(self.judge(image[None])) != label
            rank = wrong, -float(scores[label].nan_to_num(math.inf))
            if self.best is None or rank > self.rank:
                self.best, self.rank = image.cpu().clone(), rank
            if wrong and self.judge is not None:
                raise _Finished

    def _count_gradient(self, gradient: Tensor) -> None:
        self.gradients += 1
        self.zero_gradients += int(not bool(gradient.any()))


def _ascend(
    image: Tensor,
    label: int,
    task: Task,
    objective: _Objective,
    judge: Callable[[Tensor], Tensor],
    classifier: Classifier,
    *,
    steps: int,
    step: float,
    random_start: bool,
    decay: float | None = None,
    last: bool = False,
) -> Proposal:
    """Run ART's projected gradient ascent, and propose the best image on its path, or the ``last`` one.

    ``step`` is relative to eps, ``decay`` is the decay of the momentum; ``classifier`` defines classes and device.
    """
    from art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch import (
        ProjectedGradientDescentPyTorch,
    )
    from art.estimators.classification import PyTorchClassifier

    if steps < 1 or not step > 0:
        raise UserError(f"steps {steps}, step {step}: expected 1 or more, and a share of eps above 0, such as 0.25")
    assert task.eps is not None
    classes, device = classifier.num_classes, classifier.mean.device
    model = PyTorchClassifier(
        objective,
        loss=nn.NLLLoss(),
        input_shape=tuple(image.shape),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if device.type == "cuda" else "cpu",
    )
    library = ProjectedGradientDescentPyTorch(
        model,
        norm=2 if task.norm == "l2" else np.inf,
        eps=float(task.eps),
        eps_step=float(task.eps * step),
        decay=decay,
        max_iter=steps,
        num_random_init=int(random_start),
        verbose=False,
    )
    if not last:
        objective.goal = image[None], label, task.norm, task.eps
    moved = image[None]
    with suppress(_Finished):
        moved = torch.from_numpy(library.generate(image[None].numpy(), y=np.eye(classes, dtype=np.float32)[[label]]))
    if objective.best is not None:
        moved = objective.best[None]
    proposed = moved.clamp(0, 1)  # rounding may leave [0, 1] by 1e-7
    all_zero = objective.zero_gradients == objective.gradients > 0
    note = f"all {objective.gradients} gradients were zero" if all_zero else ""
    with torch.no_grad():
        answer = int(judge(proposed.to(device)))
    return Proposal(proposed[0], answer, objective.sent, note)


def blind_pgd(
    image: Tensor, label: int, task: Task, *, steps: int = 40, step: float = 0.25, random_start: bool = True
) -> Proposal:
    """PGD (Madry et al. 2018) on the cross entropy of the bare classifier, without knowledge of a purifier.

    It takes ``steps`` gradient steps of ``step`` times eps, from a random point of the ball if ``random_start``. It
    does not end with the first misclassification: among the misclassified images on its path it proposes the one with
    the highest loss, which a purifier is least likely to correct.
    """
    classifier = task.classifier
    assert classifier is not None
    objective = _Objective(lambda images: classifier.logits(images).log_softmax(1), 1)
    return _ascend(
        image, label, task, objective, classifier, classifier, steps=steps, step=step, random_start=random_start
    )


class _StraightThrough(nn.Module):
    """A purifier with the gradient of the identity (BPDA); its output is unchanged."""

    def __init__(self, purifier: nn.Module) -> None:
        super().__init__()
        self.purifier, self.random = purifier, getattr(purifier, "random", False)

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Any = None) -> Tensor:
        with torch.no_grad():
            purified: Tensor = self.purifier(images.detach(), sigma, generator=generator)
        return purified + (images - images.detach())  # adds 0, and the gradient of the identity


def differentiable(defence: Defence, draws: int | None = None) -> Defence:
    """Return a version of the defence with gradients, for its attacker.

    Backward pass differentiable approximation (BPDA; Athalye, Carlini and Wagner 2018): a purifier with a ``twin()``, a
    differentiable approximation, is replaced by it in both passes, so that answers differ slightly from the defence's.
    Any other non-differentiable purifier keeps its output and gets the gradient of the identity, because it returns an
    image close to its input. The approximation can mislead if a purifier moves images far.

    Args:
        defence: the defence to attack.
        draws: passes through each member; None keeps the defence's number.
    """

    def with_gradient(purifier: nn.Module) -> nn.Module | None:
        if isinstance(purifier, nn.Identity):  # no purifier
            return None
        if getattr(purifier, "differentiable", True):
            return purifier
        twin = getattr(purifier, "twin", None)
        return twin() if callable(twin) else _StraightThrough(purifier)

    purifiers = [with_gradient(purifier) for purifier in defence.purifiers]
    members = [Member(*parts) for parts in zip(purifiers, defence.classifiers, defence.sigmas, strict=True)]
    return Defence(defence.name, members, draws=draws or defence.draws, combine=defence.combine)


def _expected(defence: Defence, key: bytes, answers: int) -> Callable[[Tensor], Tensor]:
    """Return a function that averages the defence's log-probabilities over ``answers`` new answers at each call.

    Votes have no gradient; they are replaced by the logarithm of the mean softmax over passes, as in SmoothAdv (Salman
    et al. 2019).
    """
    turns = itertools.count()

    def log_scores(images: Tensor) -> Tensor:
        many = images.repeat_interleave(answers, 0)
        keys = [hashlib.sha256(key + i.to_bytes(4, "little")).digest() for i in range(len(many))]
        logits = defence.passes_of(many, keys, next(turns))
        if defence.combine == "logits":
            one = logits.mean(1).log_softmax(1)
        else:
            one = logits.log_softmax(2).logsumexp(1) - math.log(logits.shape[1])
        return one.view(len(images), answers, -1).mean(1)

    return log_scores


def adaptive_pgd(
    image: Tensor,
    label: int,
    task: Task,
    *,
    steps: int = 40,
    step: float = 0.25,
    random_start: bool = True,
    eot: int = 10,
) -> Proposal:
    """PGD on the whole defence, with full knowledge of it.

    Gradients are computed by autograd, with votes replaced by the mean softmax. They are exact for differentiable
    purifiers, those of the twin for purifiers that have one, and those of the identity otherwise
    (BPDA, :func:`differentiable`).

    The loss of a random defence is an expectation over ``eot`` passes (expectation over transformation, Athalye et al.
    2018), new ones at every step and never those of the final evaluation. A defence with P passes per answer gives
    ceil(eot / P) answers per gradient, and one with many draws runs at most ceil(eot / M) times per answer through each
    of its M members: a few of a smoothed classifier's n votes suffice to estimate its expected scores. All passes of a
    gradient, fewer than 2 eot or one of each member, are in memory at once.

    Against a deterministic defence the attack ends with the first image that the defence itself (not its approximation)
    misclassifies. Against a random one, the image with the highest estimated loss is proposed, misclassified ones
    first. The other options are those of :func:`blind_pgd`.

    Raises:
        UserError: fewer than one pass.
    """
    defence = task.defence
    assert defence is not None
    if eot < 1:
        raise UserError(f"eot {eot}: expected 1 or more passes per gradient")
    members = len(defence.classifiers)
    draws = min(defence.draws, -(-eot // members)) if defence.random else 1
    answers = -(-eot // (members * draws)) if defence.random else 1
    own = hashlib.sha256(task.key + b"judge").digest()

    def judge(images: Tensor) -> Tensor:
        answer: Tensor = defence(images, [own])
        return answer

    log_scores = _expected(differentiable(defence, draws), task.key, answers)
    objective, first = _Objective(log_scores, answers, None if defence.random else judge), defence.classifiers[0]
    return _ascend(image, label, task, objective, judge, first, steps=steps, step=step, random_start=random_start)


def transfer(
    image: Tensor,
    label: int,
    task: Task,
    *,
    steps: int = 20,
    step: float = 0.1,
    decay: float = 1.0,
    diversity: float = 0.5,
    smallest: float = 0.9,
) -> Proposal:
    """Momentum (MI-FGSM, Dong et al. 2018) on the mean logits of surrogates with diverse inputs (Xie et al. 2019).

    It takes ``steps`` gradient steps of ``step`` times eps, with a momentum of ``decay``. Diverse inputs, used with
    probability ``diversity`` at each step, are adapted to classifiers with a fixed input size: the image is shrunk by a
    random factor between ``smallest`` and 1, and placed at random on black.

    Raises:
        UserError: surrogates of different tasks, settings out of range.
    """
    first, *others = task.surrogates
    if any((s.num_classes, s.input.size) != (first.num_classes, first.input.size) for s in others):
        raise UserError("attack transfer: surrogates differ in classes or input sizes; expected the same task")
    if not (0 <= diversity <= 1 and 0 < smallest <= 1):
        raise UserError(f"diversity {diversity}, smallest {smallest}: expected numbers from 0 to 1")
    generator = block_generator(task.key, 0)

    def logits(images: Tensor) -> Tensor:
        return torch.stack([surrogate.logits(images) for surrogate in task.surrogates]).mean(0)

    def log_scores(images: Tensor) -> Tensor:
        return logits(_diverse(images, generator, diversity, smallest)).log_softmax(1)

    def judge(images: Tensor) -> Tensor:
        return labels_from_logits(logits(images))

    objective = _Objective(log_scores, 0)  # no queries to the target
    # the last image, as in the paper; the first that the surrogates misclassify transfers worse
    return _ascend(
        image, label, task, objective, judge, first, steps=steps, step=step, random_start=False, decay=decay, last=True
    )


def _diverse(images: Tensor, generator: torch.Generator, probability: float, smallest: float) -> Tensor:
    """Shrink images ``(B, C, H, W)`` and place them at random, all in the same way, with this probability."""
    chance, size, down, right = torch.rand(4, generator=generator).tolist()
    height, width = images.shape[-2:]
    scale = smallest + (1 - smallest) * size
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    if chance >= probability or (h, w) == (height, width):
        return images
    top, left = round(down * (height - h)), round(right * (width - w))
    small = interpolate(images, size=(h, w), mode="bilinear", align_corners=False)
    return pad(small, (left, width - w - left, top, height - h - top))
