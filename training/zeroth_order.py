"""Train a denoiser through queries alone: finite-difference gradients of a black box's scores.

The idea is ZO-AE-DS (Zhang, Yao, Jia, Yi, Hong, Chang and Liu, "How to Robustify Black-Box ML Models? A Zeroth-Order
Optimization Perspective", ICLR 2022, arXiv 2203.14195): estimate through queries the gradient of each image's loss with
respect to a low-dimensional representation, and propagate it into the denoiser by the chain rule. Their representation
is the latent of a trained autoencoder (d = 192 for CIFAR-10), which then stays between denoiser and classifier. Ours
needs no training and adds nothing to the certified pipeline: the lowest k x k frequencies of each channel (orthonormal
DCT-II; k = 8 gives d = 192 for RGB). Only the estimate is confined to them; gradients at higher frequencies are lost.
Cost per image and step: q + 1 queries with q random directions, or d + 1 (193 at k = 8) coordinate-wise.

    black_box = QueryAccess(classifier.logits, "scores", budget=1_000_000, bounded=False)
    target = black_box(clean).argmax(dim=1)
    denoised = denoiser(noisy, sigma)
    gradient = estimate_gradient(lambda images: stability(black_box(images), target), denoised, ...)
    surrogate_loss(denoised, gradient).backward()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from certify.errors import UserError
from certify.models.query_access import QueryAccess, forward_only
from denoisers.jpeg import dct_matrix
from training.losses import Batch, Objective

SIZE, STEP = 8, 0.05
"""Settings of the objective: 8x8 frequencies per channel; l2 steps of 0.05, about 0.001 per pixel of a CIFAR image."""

Method = Literal["random", "coordinate"]


@dataclass(frozen=True)
class LowFrequencies:
    """Subspace of the low spatial frequencies of images ``(C, H, W)``, with an orthonormal basis.

    Attributes:
        channels: C.
        vertical: ``(kh, H)``, the first DCT-II vectors of length H.
        horizontal: ``(kw, W)``, the first DCT-II vectors of length W.
    """

    channels: int
    vertical: Tensor
    horizontal: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image's coefficients: (C, kh, kw)."""
        return self.channels, len(self.vertical), len(self.horizontal)

    @property
    def dimensions(self) -> int:
        """Number d of coefficients."""
        return math.prod(self.shape)

    def analyse(self, images: Tensor) -> Tensor:
        """Compute the coefficients ``(B, C, kh, kw)`` of images ``(B, C, H, W)``."""
        return self.vertical @ images @ self.horizontal.T

    def synthesise(self, coefficients: Tensor) -> Tensor:
        """Compute the images ``(B, C, H, W)`` of coefficients ``(B, C, kh, kw)``; l2 norms are preserved."""
        return self.vertical.T @ coefficients @ self.horizontal


def lowest_frequencies(
    shape: Sequence[int], size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LowFrequencies:
    """Build the basis of the ``size x size`` lowest frequencies per channel of ``(C, H, W)`` images, at most H and W.

    Raises:
        UserError: a size below 1.
    """
    if size < 1:
        raise UserError(f"size {size} of the low frequencies: expected 1 or more, such as 8 (for 8x8 frequencies)")
    channels, height, width = shape
    vertical, horizontal = (dct_matrix(length)[:size].to(device, dtype) for length in (height, width))
    return LowFrequencies(channels, vertical, horizontal)


def estimate_gradient(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    method: Method,
    queries: int,
    step: float,
    size: int,
    generator: torch.Generator,
) -> Tensor:
    """Estimate the gradient of each image's loss on the low frequencies by forward differences of length mu.

    random (RGE): d / q * sum_i [loss(x + mu u_i) - loss(x)] / mu * u_i with u_i uniform on the unit sphere of the
    subspace, drawn for each image. Its mean is the projected gradient of the smoothed loss (averaged over the ball of
    radius mu around x in the subspace). For a linear loss, its variance summed over coordinates is (d - 1) / q times
    the squared norm of the projected gradient.

    coordinate (CGE): one difference along each of the d basis vectors; deterministic, with an error of mu / 2 times the
    second derivative (the published code takes central differences, for twice the queries).

    Differences are computed in float32 or better, regardless of autocast. mu moves a pixel by about mu / sqrt(C H W): a
    black box that rounds its images to 8 bits does not see a step below 1/255 per pixel.

    Args:
        loss: images ``(B, C, H, W)`` to losses ``(B,)``.
        images: ``(B, C, H, W)``; the point of the gradient, such as the denoiser's output.
        method: ``random`` or ``coordinate``.
        queries: q, number of directions of ``random``; ``coordinate`` ignores it.
        step: mu, l2 length of a step in [0, 1] pixels; the published code uses 0.005, in its latent space.
        size: k.
        generator: of the directions; one on the CPU gives the same directions on every device.

    Returns:
        ``(B, C, H, W)``, without autograd history.

    Raises:
        UserError: a setting out of range, or a loss that is not one number per image.
    """
    if method not in ("random", "coordinate"):
        raise UserError(f"method {method!r}: expected 'random' or 'coordinate'")
    if queries < 1 or not 0 < step < math.inf:
        raise UserError(f"queries {queries}, step {step}: expected 1 or more, and a finite step above 0")
    dtype = torch.promote_types(images.dtype, torch.float32)
    basis = lowest_frequencies(images.shape[1:], size, dtype, images.device)
    with forward_only(images.device):
        x = images.detach().to(dtype)
        here = loss(x)
        if here.shape != (len(x),):
            raise UserError(f"loss returned {tuple(here.shape)} for {len(x)} images; expected one number per image")

        def slope(direction: Tensor) -> Tensor:
            return (loss(x + step * basis.synthesise(direction)) - here) / step

        total = x.new_zeros((len(x), *basis.shape))
        if method == "random":
            for _ in range(queries):
                normal = torch.randn(total.shape, generator=generator, device=generator.device).to(total)
                direction = normal / normal.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                total += slope(direction).view(-1, 1, 1, 1) * direction
            total *= basis.dimensions / queries
        else:
            for unit in torch.eye(basis.dimensions, dtype=dtype, device=x.device).view(-1, 1, *basis.shape):
                total += slope(unit).view(-1, 1, 1, 1) * unit
        return basis.synthesise(total)


def surrogate_loss(images: Tensor, gradient: Tensor) -> Tensor:
    """Return a scalar whose gradient with respect to ``images`` is ``gradient / B``, that of the mean loss.

    Its backward pass propagates the estimate into whatever computed the images. Its value has no meaning.
    """
    return (images * gradient.detach()).sum() / len(images)


def stability(scores: Tensor, target: Tensor) -> Tensor:
    """Compute cross-entropies ``(B,)`` of scores ``(B, K)`` against the black box's labels ``(B,)`` of clean images."""
    return cross_entropy(scores, target, reduction="none")


def objective() -> Objective:
    """Stability by queries alone: ``queries`` + 3 per image and step, for label, loss and directions."""
    return Objective(_loss, gradients=False)


def _loss(batch: Batch) -> Tensor:
    """Return the value of the stability loss, with the estimate as its gradient."""
    assert batch.classifier is not None
    device = batch.clean.device
    black_box = QueryAccess(batch.classifier.logits, "scores", bounded=False)  # denoised images may leave [0, 1]
    target = black_box(batch.clean).argmax(dim=1).to(device)

    def loss(images: Tensor) -> Tensor:
        return stability(black_box(images).to(device) / batch.temperature, target)

    gradient = estimate_gradient(
        loss, batch.output, method="random", queries=batch.queries, step=STEP, size=SIZE, generator=batch.generator
    )
    carrier = surrogate_loss(batch.output, gradient)
    return carrier + (loss(batch.output.detach()).mean() - carrier).detach()
