"""Train a purifier to complete masked images (AToP-style): alone, then so that a frozen classifier is right.

Lin et al. 2024 ("Adversarial Training on Purification", ICLR) fine-tune the purifier g, never the classifier f:

    L_df(x') + lambda CE(y, f(g(t(x')))),   x' = x + delta,   L_df(x) = E[D(x)] - E[D(g(t(x)))] + E |x - g(t(x))|

with a random transform t, and delta from one FGSM step on f alone. The objective ``complete`` is L_df of clean images,
``atop`` is the full loss. The discriminator D is optional here (the AE variant has none), is new in every training, and
learns by its hinge loss. Classifier and discriminator see the output of g clipped to [0, 1], as in purification; the
reconstruction error is that of the raw output, and so pulls it back into the range.
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
from denoisers.masked import MaskedUNet, check_transform, complete, random_transform
from training.data import TrainingData
from training.losses import Batch, Draw, Objective, Prepared


def completion(transform: str = "rt2", gan: bool = False, gan_gradient: bool = True) -> Objective:
    """Reconstruct the clean image from its random transform: l1, and with ``gan`` an adversarial term.

    Args:
        transform: one of :data:`denoisers.masked.TRANSFORMS`.
        gan: train a discriminator alongside.
        gan_gradient: let the purifier learn from it. False reproduces the authors' fine-tuning code, which scores a
            detached image and so teaches the purifier nothing.
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
    """Complete attacked images, with the frozen classifier's cross-entropy on the result.

    Args:
        transform: one of :data:`denoisers.masked.TRANSFORMS`.
        eps: l_inf size of the FGSM step in [0, 1] pixels, at the images' own resolution.
        weight: lambda, of the cross-entropy.
        warmup: epochs before the cross-entropy is added. The authors' code adds it from its third pass over 5,000
            images on; 10,000 images are 0.2 epochs of CIFAR-10.
        clean_target: reconstruct the clean image (a variant in the authors' code), not the attacked one (their
            equation).
        adversarial: attack the images.
        gan: see :func:`completion`.
        gan_gradient: see :func:`completion`.

    Raises:
        UserError: a value out of range.
    """
    check_transform(transform)
    if not (0 < eps <= 1 and 0 <= weight < float("inf") and warmup >= 0):
        raise UserError(f"--set eps={eps} weight={weight} warmup={warmup}: expected eps in (0, 1], the others from 0")

    def prepare(draw: Draw) -> Prepared:
        images = attack(draw, eps) if adversarial else draw.clean
        target = draw.clean if clean_target else images
        return Prepared((*random_transform(images, transform, draw.generator), target), target)

    def loss(batch: Batch) -> Tensor:
        total = reconstruction(batch) + (adversarial_loss(batch) if gan else 0.0)
        if weight and batch.epoch >= warmup:
            assert batch.labels is not None
            clipped = replace(batch, output=batch.output.clamp(0, 1))
            total = total + weight * cross_entropy(clipped.logits(), batch.labels)
        return total

    needs_classifier = adversarial or weight > 0
    return Objective(
        loss,
        classifier=needs_classifier,
        labels=needs_classifier,
        gradients=needs_classifier,
        noise=False,
        prepare=prepare,
        wrap=_wrap(gan, gan_gradient),
        purifier="atop",
        accepts=lambda net: isinstance(net, MaskedUNet),
        network="a network that takes a mask (--denoiser masked-unet)",
    )


def attack(draw: Draw, eps: float) -> Tensor:
    """Take one FGSM step on the classifier without the purifier: ``x + eps sign(grad CE(y, f(x)))`` within [0, 1].

    Raises:
        UserError: the classifier passes no gradients.
    """
    assert draw.classifier is not None
    assert draw.labels is not None
    with torch.enable_grad():
        images = draw.clean.detach().requires_grad_(True)
        logits = draw.classifier.logits(images)
        if not logits.requires_grad:
            raise UserError(
                f"{draw.classifier.name} passes no gradients; expected a PyTorch model: pass --surrogate, "
                "or leave the attack and the classifier out: --set adversarial=false --set weight=0"
            )
        (gradient,) = torch.autograd.grad(cross_entropy(logits, draw.labels), images)
    return (draw.clean + eps * gradient.sign()).clamp(0, 1)


def reconstruction(batch: Batch) -> Tensor:
    """Mean absolute error on the [-1, 1] scale, to which the published weights of the other terms refer."""
    return 2 * (batch.output - batch.target).abs().mean()


def adversarial_loss(batch: Batch) -> Tensor:
    """Hinge loss of the discriminator, minus its score of the generator's output where that gradient is wanted.

    Zero on held-out images, which have no scores: weights are selected by the other terms, because the scores of two
    networks that learn from each other mean little.
    """
    if not batch.extra:
        return batch.output.new_zeros(())
    real, fake, *generator_score = batch.extra
    hinge = 0.5 * relu(1 - real).mean() + 0.5 * relu(1 + fake).mean()
    return hinge - generator_score[0].mean() if generator_score else hinge


class Discriminator(nn.Module):
    """Image and mask to one score per patch: spectrally normalised 5x5 convolutions of stride 2.

    The authors' has six layers, for images of 256 pixels; this one has three and is narrower, for small images.
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
        """Score images ``(B, C, H, W)`` in [0, 1] and masks ``(B, 1, H, W)``: ``(B, 1, H/8, W/8)``, rounded up."""
        scores: Tensor = self.layers(torch.cat([2 * images - 1, mask], 1))
        return scores


class Completer(nn.Module):
    """The purifier in training: masks and completes as in purification, alongside an optional discriminator.

    One backward pass and one optimizer serve both networks: the discriminator's loss sees a detached image, and the
    generator's term detached parameters of the discriminator.

    Args:
        net: the generator.
        discriminator: or None.
        gan_gradient: let the discriminator's score reach the generator.
    """

    def __init__(self, net: nn.Module, discriminator: nn.Module | None, gan_gradient: bool) -> None:
        super().__init__()
        self.net, self.discriminator, self.gan_gradient = net, discriminator, gan_gradient

    def forward(self, images: Tensor, masks: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Return completed images and, in training with a discriminator, scores of real and completed images.

        Args:
            images: ``(B, C, H, W)``, from :func:`denoisers.masked.random_transform`.
            masks: ``(B, N, 1, H, W)``, from the same.
            target: real images ``(B, C, H, W)``.
        """
        completed = complete(self.net, images, masks)
        if self.discriminator is None or not self.training:
            return (completed,)
        hidden, clipped = masks.amax(1), completed.clamp(0, 1)
        scores = [self.discriminator(target, hidden), self.discriminator(clipped.detach(), hidden)]
        if self.gan_gradient:
            own = {**dict(self.discriminator.named_parameters()), **dict(self.discriminator.named_buffers())}
            frozen = {name: tensor.detach() for name, tensor in own.items()}
            scores.append(functional_call(self.discriminator, frozen, (clipped, hidden)))
        return (completed, *scores)


def _wrap(gan: bool, gan_gradient: bool) -> Callable[[nn.Module, TrainingData, int], nn.Module]:
    def wrap(net: nn.Module, data: TrainingData, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Completer(net, Discriminator(data.image[0]) if gan else None, gan_gradient)

    return wrap
