"""Attacks by gradients: of the bare classifier, of surrogates that stand for it, or of the whole defence.

The steps are ART's projected gradient; what they climb is made here. Every function that is climbed returns logarithms
of probabilities ``(B, K)`` whose entry at the label, with the sign turned, is the loss.
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


class _Found(Exception):
    """The attack has what it came for: an image of the ball that a deterministic model certainly gets wrong."""


class _Climbed(nn.Module):
    """A loss as the library wants it: counts images, and notices gradients that are zero.

    Args:
        log_scores: images ``(B, C, H, W)`` to logarithms of probabilities ``(B, K)``.
        each: answers of the attacked model for one image here.
        sure: an image ``(1, C, H, W)`` to the label that a deterministic model gives it, where that is not what the
            largest of the log scores says and the first wrong answer ends the attack.
    """

    def __init__(
        self, log_scores: Callable[[Tensor], Tensor], each: int, sure: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.log_scores, self.each, self.sure = log_scores, each, sure
        self.sent = self.steps = self.flat = 0
        self.best: Tensor | None = None
        self.rank = (False, -math.inf)
        self.aim: tuple[Tensor, int, str, float] | None = None

    def keep(self, image: Tensor, label: int, task: Task) -> None:
        """From now on keep the best of what is seen in the ball: a wrong answer first, then the highest loss."""
        assert task.eps is not None
        self.aim = image[None], label, task.norm, task.eps

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms of probabilities ``(B, K)``.

        Raises:
            UserError: nothing to climb.
            _Found: the attack may end.
        """
        self.sent += len(images) * self.each
        found = self.log_scores(images)
        if images.requires_grad:
            if not found.requires_grad:
                raise UserError(
                    "what is attacked gives no gradients (labels only, or a runtime without them); expected torch "
                    "modules, or an attack that only asks, such as hopskipjump"
                )
            images.register_hook(self._look)
        if self.aim is not None:
            self._weigh(images.detach(), found.detach(), *self.aim)
        return found

    def _weigh(self, images: Tensor, found: Tensor, clean: Tensor, label: int, norm: str, eps: float) -> None:
        for image, scores in zip(images, found, strict=True):
            if float(distances(image[None].cpu(), clean, norm)) > eps + SLACK:
                continue
            wrong = int(scores.argmax()) != label
            if self.sure is not None:
                self.sent += 1
                with torch.no_grad():
                    wrong = int(self.sure(image[None])) != label
            rank = wrong, -float(scores[label].nan_to_num(math.inf))
            if self.best is None or rank > self.rank:
                self.best, self.rank = image.cpu().clone(), rank
            if wrong and self.sure is not None:
                raise _Found

    def _look(self, gradient: Tensor) -> None:
        self.steps += 1
        self.flat += int(not bool(gradient.any()))


def _climb(
    image: Tensor,
    label: int,
    task: Task,
    loss: _Climbed,
    judge: Callable[[Tensor], Tensor],
    classifier: Classifier,
    *,
    steps: int,
    step: float,
    random_start: bool,
    decay: float | None = None,
    last: bool = False,
) -> Proposal:
    """ART's projected gradient; ``step`` in parts of eps, ``decay`` of the momentum; classes as ``classifier`` has.

    The library returns the last image; unless ``last`` is wanted, what is proposed is the best that it went through.
    """
    from art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch import (
        ProjectedGradientDescentPyTorch,
    )
    from art.estimators.classification import PyTorchClassifier

    if steps < 1 or not step > 0:
        raise UserError(f"steps {steps}, step {step}: expected 1 or more, and a part of eps above 0, such as 0.25")
    assert task.eps is not None
    classes, device = classifier.num_classes, classifier.mean.device
    model = PyTorchClassifier(
        loss,
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
        loss.keep(image, label, task)
    moved = image[None]
    with suppress(_Found):
        moved = torch.from_numpy(library.generate(image[None].numpy(), y=np.eye(classes, dtype=np.float32)[[label]]))
    if loss.best is not None:
        moved = loss.best[None]
    proposed = moved.clamp(0, 1)  # adding the projected step rounds, and may leave [0, 1] by 1e-7
    note = f"all {loss.steps} gradients were zero" if loss.flat == loss.steps > 0 else ""
    with torch.no_grad():
        answer = int(judge(proposed.to(device)))
    return Proposal(proposed[0], answer, loss.sent, note)


def blind_pgd(
    image: Tensor, label: int, task: Task, *, steps: int = 40, step: float = 0.25, random_start: bool = True
) -> Proposal:
    """PGD (Madry et al. 2018) on the cross entropy of the bare classifier; it knows of no purifier.

    It does not end with the first wrong answer: of the images on its way that the classifier gets wrong it proposes the
    one of the highest loss, which a purifier is least likely to bring back.

    Args:
        image: clean, ``(C, H, W)``.
        label: the right one.
        task: with a classifier and a ball.
        steps: gradients.
        step: length of one, in parts of eps.
        random_start: from a random point of the ball.
    """
    classifier = task.classifier
    assert classifier is not None
    loss = _Climbed(lambda images: classifier.logits(images).log_softmax(1), 1)
    return _climb(image, label, task, loss, classifier, classifier, steps=steps, step=step, random_start=random_start)


class _PassedBy(nn.Module):
    """A purifier whose gradient is taken to be that of the identity (BPDA); its output is exactly its own."""

    def __init__(self, purifier: nn.Module) -> None:
        super().__init__()
        self.purifier, self.random = purifier, getattr(purifier, "random", False)

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Any = None) -> Tensor:
        with torch.no_grad():
            seen: Tensor = self.purifier(images.detach(), sigma, generator=generator)
        return seen + (images - images.detach())  # + 0


def passing_by(defence: Defence, draws: int | None = None) -> Defence:
    """The defence as its attacker climbs it: with a gradient where a purifier has none of its own.

    Backward pass differentiable approximation (BPDA; Athalye, Carlini and Wagner 2018). A purifier with a ``twin()``, a
    differentiable one that nearly does the same, is replaced by it in both passes, so that answers differ a little from
    the defence's. Any other keeps its output and gets the identity's gradient: it returns an image near to the one it
    got. That is an approximation, which may mislead where a purifier moves images far.

    Args:
        defence: attacked.
        draws: through each member, in place of the defence's own.
    """

    def around(purifier: nn.Module) -> nn.Module | None:
        if isinstance(purifier, nn.Identity):  # stands for none
            return None
        if getattr(purifier, "differentiable", True):
            return purifier
        twin = getattr(purifier, "twin", None)
        return twin() if callable(twin) else _PassedBy(purifier)

    purifiers = [around(purifier) for purifier in defence.purifiers]
    members = [Member(*parts) for parts in zip(purifiers, defence.classifiers, defence.sigmas, strict=True)]
    return Defence(defence.name, members, draws=draws or defence.draws, combine=defence.combine)


def _expected(defence: Defence, key: bytes, answers: int) -> Callable[[Tensor], Tensor]:
    """Mean over ``answers``, new ones at each call, of the logarithm of the defence's own combination.

    Votes have no gradient; the logarithm of the mean softmax over passes stands in their place, as in SmoothAdv (Salman
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
    """PGD on the whole defence, which the attacker knows.

    Gradients are autograd's, with votes replaced by the mean softmax. They are true ones for a purifier that says it is
    differentiable, its twin's for one that has a twin, and the identity's for any other (BPDA, :func:`passing_by`).

    The loss of a random defence is an expectation over ``eot`` passes (expectation over transformation, Athalye et al.
    2018), other ones at every step and never those of its judge. A defence of P passes an answer is asked for
    ceil(eot / P) answers a gradient, and one of many draws runs through each of its M members at most ceil(eot / M)
    times an answer: of a smoothed classifier's n votes a few estimate the scores that it expects. All passes of a
    gradient, fewer than 2 eot or one of each member, are in memory at once.

    A deterministic defence ends the attack with the first image that the defence itself, not its stand-in, gets wrong.
    Of a random one the image of the highest estimated loss is proposed, those that the estimate gets wrong first.

    Args:
        image: clean, ``(C, H, W)``.
        label: the right one.
        task: with a defence and a ball.
        steps: gradients.
        step: length of one, in parts of eps.
        random_start: from a random point of the ball.
        eot: passes a gradient; nothing is repeated where nothing is random.

    Raises:
        UserError: fewer than one pass.
    """
    defence = task.defence
    assert defence is not None
    if eot < 1:
        raise UserError(f"eot {eot}: expected 1 or more passes a gradient")
    members = len(defence.classifiers)
    draws = min(defence.draws, -(-eot // members)) if defence.random else 1
    answers = -(-eot // (members * draws)) if defence.random else 1
    own = hashlib.sha256(task.key + b"judge").digest()

    def judge(images: Tensor) -> Tensor:
        answer: Tensor = defence(images, [own])
        return answer

    log_scores = _expected(passing_by(defence, draws), task.key, answers)
    loss, first = _Climbed(log_scores, answers, None if defence.random else judge), defence.classifiers[0]
    return _climb(image, label, task, loss, judge, first, steps=steps, step=step, random_start=random_start)


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
    """Momentum (MI-FGSM, Dong et al. 2018) on the mean logits of surrogates that see diverse inputs (Xie et al. 2019).

    The diverse input is our reading for classifiers of one size: the image shrunk to between ``smallest`` and all of
    its side, and put at a random place on black.

    Args:
        image: clean, ``(C, H, W)``.
        label: the right one.
        task: with surrogates and a ball.
        steps: gradients.
        step: length of one, in parts of eps.
        decay: of the momentum.
        diversity: probability that a step's input is a diverse one.
        smallest: side of the smallest image, in parts of the whole.

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

    loss = _Climbed(log_scores, 0)  # the target is not asked
    # The last image, as published: what the surrogates get wrong first is not what transfers best.
    return _climb(
        image, label, task, loss, judge, first, steps=steps, step=step, random_start=False, decay=decay, last=True
    )


def _diverse(images: Tensor, generator: torch.Generator, probability: float, smallest: float) -> Tensor:
    """Images ``(B, C, H, W)``, shrunk and put at a random place with this probability; all in the same way."""
    chance, size, down, right = torch.rand(4, generator=generator).tolist()
    height, width = images.shape[-2:]
    scale = smallest + (1 - smallest) * size
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    if chance >= probability or (h, w) == (height, width):
        return images
    top, left = round(down * (height - h)), round(right * (width - w))
    small = interpolate(images, size=(h, w), mode="bilinear", align_corners=False)
    return pad(small, (left, width - w - left, top, height - h - top))
