"""Attacks by gradients: of the bare classifier, of surrogates that stand for it, or of the whole defence.

The steps are ART's projected gradient; what they climb is made here. Every function that is climbed returns logarithms
of probabilities ``(B, K)`` whose entry at the label, with the sign turned, is the loss.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from analysis.attacked import Proposal, Task
from certify.classifiers import labels_from_logits
from certify.defence import Defence, Member
from certify.errors import UserError
from certify.streams import block_generator

_TINY = 1e-30


class _Climbed(nn.Module):
    """A loss as the library wants it: counts images, and notices gradients that are zero.

    Args:
        log_scores: images ``(B, C, H, W)`` to logarithms of probabilities ``(B, K)``.
        each: images that go through the attacked model for one image here.
    """

    def __init__(self, log_scores: Callable[[Tensor], Tensor], each: int) -> None:
        super().__init__()
        self.log_scores, self.each = log_scores, each
        self.sent = self.steps = self.flat = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms of probabilities ``(B, K)``.

        Raises:
            UserError: nothing to climb.
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
        return found

    def _look(self, gradient: Tensor) -> None:
        self.steps += 1
        self.flat += int(not bool(gradient.any()))


def _climb(
    image: Tensor,
    label: int,
    task: Task,
    loss: _Climbed,
    judge: Callable[[Tensor], Tensor],
    classes: int,
    *,
    steps: int,
    step: float,
    random_start: bool,
    decay: float | None,
    device: torch.device,
) -> Proposal:
    """ART's projected gradient; ``step`` in parts of eps, ``decay`` of the momentum."""
    from art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch import (
        ProjectedGradientDescentPyTorch,
    )
    from art.estimators.classification import PyTorchClassifier

    if steps < 1 or not step > 0:
        raise UserError(f"steps {steps}, step {step}: expected 1 or more, and a part of eps above 0, such as 0.25")
    assert task.eps is not None
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
    moved = library.generate(image[None].numpy(), y=np.eye(classes, dtype=np.float32)[[label]])
    proposed = torch.from_numpy(moved).clamp(0, 1)  # adding the projected step rounds, and may leave [0, 1] by 1e-7
    note = f"all {loss.steps} gradients were zero" if loss.flat == loss.steps else ""
    with torch.no_grad():
        answer = int(judge(proposed.to(device)))
    return Proposal(proposed[0], answer, loss.sent, note)


def blind_pgd(
    image: Tensor, label: int, task: Task, *, steps: int = 40, step: float = 0.25, random_start: bool = True
) -> Proposal:
    """PGD (Madry et al. 2018) on the cross entropy of the bare classifier; it knows of no purifier.

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
    return _climb(
        image,
        label,
        task,
        loss,
        classifier,
        classifier.num_classes,
        steps=steps,
        step=step,
        random_start=random_start,
        decay=None,
        device=classifier.mean.device,
    )


class _PassedBy(nn.Module):
    """A purifier whose gradient is taken to be that of the identity (BPDA); its output is exactly its own."""

    def __init__(self, purifier: nn.Module) -> None:
        super().__init__()
        self.purifier, self.random = purifier, getattr(purifier, "random", False)

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Any = None) -> Tensor:
        with torch.no_grad():
            seen: Tensor = self.purifier(images.detach(), sigma, generator=generator)
        return seen + (images - images.detach())  # + 0


def passing_by(defence: Defence) -> Defence:
    """The same defence, with the same answers, and the identity's gradient where a purifier has none of its own.

    Backward pass differentiable approximation (Athalye, Carlini and Wagner 2018), in its simplest form: a purifier
    returns an image near to the one it got.
    """

    def around(purifier: nn.Module) -> nn.Module | None:
        if isinstance(purifier, nn.Identity):  # stands for none
            return None
        return purifier if getattr(purifier, "differentiable", True) else _PassedBy(purifier)

    purifiers = [around(purifier) for purifier in defence.purifiers]
    members = [Member(*parts) for parts in zip(purifiers, defence.classifiers, defence.sigmas, strict=True)]
    return Defence(defence.name, members, draws=defence.draws, combine=defence.combine)


def _expected(defence: Defence, key: bytes, eot: int) -> Callable[[Tensor], Tensor]:
    """Mean over ``eot`` answers, new ones at each call, of the logarithm of the defence's own combination.

    Of votes, which have no gradient, the mean over passes of the logarithm stands in their place.
    """
    turns = itertools.count()

    def log_scores(images: Tensor) -> Tensor:
        many = images.repeat_interleave(eot, 0)
        keys = [hashlib.sha256(key + i.to_bytes(4, "little")).digest() for i in range(len(many))]
        logits = defence.passes_of(many, keys, next(turns))
        if defence.combine == "logits":
            one = logits.mean(1).log_softmax(1)
        elif defence.combine == "probabilities":
            one = logits.softmax(2).mean(1).clamp_min(_TINY).log()
        else:
            one = logits.log_softmax(2).mean(1)
        return one.view(len(images), eot, -1).mean(1)

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
    """PGD on the whole defence, which the attacker knows: true gradients where there are any.

    Purifiers that are not differentiable are passed by (BPDA). The loss of a random defence is the mean over ``eot``
    answers (expectation over transformation, Athalye et al. 2018), other ones at every step and never those of its
    judge. All of them are in memory at once.

    Args:
        image: clean, ``(C, H, W)``.
        label: the right one.
        task: with a defence and a ball.
        steps: gradients.
        step: length of one, in parts of eps.
        random_start: from a random point of the ball.
        eot: answers a gradient; 1 where nothing is random.

    Raises:
        UserError: fewer than one answer.
    """
    defence = task.defence
    assert defence is not None
    if eot < 1:
        raise UserError(f"eot {eot}: expected 1 or more answers a gradient")
    draws = eot if defence.random else 1
    own = hashlib.sha256(task.key + b"judge").digest()
    return _climb(
        image,
        label,
        task,
        _Climbed(_expected(passing_by(defence), task.key, draws), draws),
        lambda proposed: defence(proposed, [own]),
        defence.num_classes,
        steps=steps,
        step=step,
        random_start=random_start,
        decay=None,
        device=defence.classifiers[0].mean.device,
    )


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

    return _climb(
        image,
        label,
        task,
        _Climbed(log_scores, 0),  # the target is not asked
        lambda proposed: labels_from_logits(logits(proposed)),
        first.num_classes,
        steps=steps,
        step=step,
        random_start=False,
        decay=decay,
        device=first.mean.device,
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
