"""Training a purifier to complete masked images (AToP-style): alone, then so that a frozen classifier is right.

Lin et al. 2024 ("Adversarial Training on Purification", ICLR) fine-tune the purifier g, never the classifier f:

    L_df(x') + lambda CE(y, f(g(t(x')))),   x' = x + delta,   L_df(x) = E[D(x)] - E[D(g(t(x)))] + E |x - g(t(x))|

with a random transform t, and delta from one FGSM step on f alone. The objective ``complete`` is L_df of clean images,
``atop`` is the whole. The discriminator D is optional here (the AE variant has none), starts afresh in every training,
and is trained by its hinge loss. Classifier and discriminator see g's output clipped to [0, 1], as at purification; the
reconstruction error is that of the output as it is, and so pulls back what lies outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, relu
from torch.nn.utils.parametrizations import spectral_norm

from certify.errors import UserError
from denoisers.masked import MaskedUNet, checked, complete, random_transform
from training.data import TrainingData
from training.losses import Batch, Draw, Objective, Prepared


def completion(transform: str = "rt2", gan: bool = False, gan_gradient: bool = True) -> Objective:
    """The clean image from its random transform: l1, and with ``gan`` an adversarial term.

    Args:
        transform: one of :data:`denoisers.masked.TRANSFORMS`.
        gan: whether a discriminator is trained beside.
        gan_gradient: whether the network learns from it. False repeats the authors' fine-tuning code, where the
            discriminator's score is taken of a detached image and so teaches the network nothing.
    """
    return fine_tuning(transform, weight=0.0, adversarial=False, gan=gan, gan_gradient=gan_gradient)


def fine_tuning(
    transform: str = "rt2",
    eps: float = 8 / 255,
    weight: float = 0.05,
    warmup: float = 0.2,
    clean_target: bool = False,
    adversarial: bool = True,
    gan: bool = False,
    gan_gradient: bool = True,
) -> Objective:
    """Completion of attacked images, and the frozen classifier's cross-entropy on what was made of them.

    Args:
        transform: one of :data:`denoisers.masked.TRANSFORMS`.
        eps: of the FGSM step, l_inf in [0, 1] pixels, at the images' own resolution.
        weight: lambda, of the cross-entropy.
        warmup: epochs before the cross-entropy is added. The authors' code adds it from its third pass of 5,000 images
            on, and 10,000 images are 0.2 epochs of CIFAR-10.
        clean_target: whether to reconstruct the clean image (a variant in the authors' code) and not the attacked one
            (their equation).
        adversarial: whether images are attacked at all.
        gan: as for :func:`completion`.
        gan_gradient: likewise.

    Raises:
        UserError: numbers that make no sense.
    """
    checked(transform)
    if not (0 < eps <= 1 and 0 <= weight < float("inf") and warmup >= 0):
        raise UserError(f"--set eps={eps} weight={weight} warmup={warmup}: expected eps in (0, 1], the others from 0")

    def prepare(draw: Draw) -> Prepared:
        images = attacked(draw, eps) if adversarial else draw.clean
        return _transformed(draw, images, draw.clean if clean_target else images, transform)

    def loss(batch: Batch) -> Tensor:
        found = reconstruction(batch) + (adversarial_loss(batch) if gan else 0.0)
        if weight and batch.epoch >= warmup:
            assert batch.labels is not None
            seen = replace(batch, output=batch.output.clamp(0, 1))  # as the classifier gets it at purification
            found = found + weight * cross_entropy(seen.logits(), batch.labels)
        return found

    uses = adversarial or weight > 0
    return Objective(
        loss,
        classifier=uses,
        labels=uses,
        gradients=uses,
        noise=False,
        prepare=prepare,
        wrap=_wrap(gan, gan_gradient),
        purifier="atop",
    )


def attacked(draw: Draw, eps: float) -> Tensor:
    """One FGSM step on the bare classifier, the purifier left out: ``x + eps sign(grad CE(y, f(x)))`` within [0, 1].

    Raises:
        UserError: no gradient comes back through the classifier.
    """
    assert draw.classifier is not None
    assert draw.labels is not None
    with torch.enable_grad():
        images = draw.clean.detach().requires_grad_(True)
        logits = draw.classifier.logits(images)
        if not logits.requires_grad:
            raise UserError(
                f"no gradient comes back through {draw.classifier.name}; expected a torch model: train through a "
                "--surrogate, or leave the attack and the classifier out: --set adversarial=false --set weight=0"
            )
        (gradient,) = torch.autograd.grad(cross_entropy(logits, draw.labels), images)
    return (draw.clean + eps * gradient.sign()).clamp(0, 1)


def reconstruction(batch: Batch) -> Tensor:
    """The mean absolute error, on the [-1, 1] scale, where the published weights of the other terms belong."""
    return 2 * (batch.output - batch.target).abs().mean()


def adversarial_loss(batch: Batch) -> Tensor:
    """The discriminator's hinge loss and, where it is to reach the generator, minus the score of what that made.

    Nothing on held-out images, which the wrapped networks do not score: weights are chosen by the other terms, because
    two networks that learn from each other say little by their scores.
    """
    if not batch.extra:
        return batch.output.new_zeros(())
    real, fake, *judged = batch.extra
    hinge = 0.5 * relu(1 - real).mean() + 0.5 * relu(1 + fake).mean()
    return hinge - judged[0].mean() if judged else hinge


class Discriminator(nn.Module):
    """Image and mask to one score a patch: spectrally normalised 5x5 convolutions of stride 2.

    The authors' has six layers, for images of 256 pixels; three and a narrower start serve small ones (our design).
    """

    def __init__(self, image_channels: int, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = image_channels + 1
        for width in widths:
            layers += [spectral_norm(nn.Conv2d(before, width, 5, stride=2, padding=2)), nn.LeakyReLU(0.2)]
            before = width
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(before, 1, 3, padding=1)))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """``(B, C, H, W)`` in [0, 1] and ``(B, 1, H, W)`` to ``(B, 1, H/8, W/8)``, rounded up."""
        scores: Tensor = self.layers(torch.cat([2 * images - 1, mask], 1))
        return scores


class Completer(nn.Module):
    """The purifier as it is trained: masks and completes as at purification, beside its discriminator if it has one.

    One backward pass and one optimizer serve both: the discriminator's loss sees a detached image, and the generator's
    term is scored with the discriminator's parameters detached.

    Args:
        net: the generator.
        discriminator: or None.
        teaches: whether the discriminator's score reaches the generator.
    """

    def __init__(self, net: nn.Module, discriminator: nn.Module | None, teaches: bool) -> None:
        super().__init__()
        self.net, self.discriminator, self.teaches = net, discriminator, teaches

    def forward(self, images: Tensor, masks: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Completed images and, in training beside a discriminator, scores of targets and of what was made.

        Args:
            images: ``(B, C, H, W)``, as :func:`denoisers.masked.random_transform` gives them.
            masks: ``(B, N, 1, H, W)``, likewise.
            target: ``(B, C, H, W)``: what is real.
        """
        made = complete(self.net, images, masks)
        if self.discriminator is None or not self.training:
            return (made,)
        hidden, shown = masks.amax(1), made.clamp(0, 1)
        scores = [self.discriminator(target, hidden), self.discriminator(shown.detach(), hidden)]
        if self.teaches:
            own = {**dict(self.discriminator.named_parameters()), **dict(self.discriminator.named_buffers())}
            frozen = {name: tensor.detach() for name, tensor in own.items()}
            scores.append(functional_call(self.discriminator, frozen, (shown, hidden)))
        return (made, *scores)


def _wrap(gan: bool, teaches: bool) -> Callable[[nn.Module, TrainingData, int], nn.Module]:
    def wrap(net: nn.Module, data: TrainingData, seed: int) -> nn.Module:
        if not isinstance(net, MaskedUNet):
            raise UserError(
                f"this objective trains networks that take a mask, such as masked-unet; {type(net).__name__} takes none"
            )
        torch.manual_seed(seed)
        return Completer(net, Discriminator(data.image[0]) if gan else None, teaches)

    return wrap


def _transformed(draw: Draw, images: Tensor, target: Tensor, transform: str) -> Prepared:
    noisy, masks = random_transform(images, transform, draw.generator)
    return Prepared((noisy, masks, target), target)
