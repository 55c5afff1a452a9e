"""Adversarial purification by score ascent: add noise, then take a few adaptive steps uphill in the log-density.

After Yoon, Hwang and Lee 2021 (Adversarial Denoising Purification). The noise drowns the perturbation and moves the
image to where the score network was trained; step lengths follow from the curvature along the score, so the remaining
noise need not be known. Empirical: there is no certificate. The published code converts the image's scale once but back
after every step, which loses contrast; here nothing is converted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.models.defence import Defence, Member
from denoisers.classical import check_positive_int
from denoisers.defences import trained
from denoisers.randomness import Generators, normal

KINDS = ("gaussian", "sign")
"""Gaussian noise, or its signs times sigma * sqrt(2 / pi), which has the same mean absolute value."""

_BATCH = 100


class ScorePurifier(nn.Module):
    """Noise, then up to T steps x <- clip(x + alpha h(x), 0, 1) with a step length alpha per image.

    With g = h(x) and the curvature c = <g, g - h(x + delta g)> / (delta <g, g>), alpha is ``step`` / c, clipped to
    [``smallest``, ``largest``]: that share of the way to the maximum of the density, taken as Gaussian along g. An
    image whose alpha falls to ``stop`` no longer changes.

    Gradients, if enabled, are those of the whole loop, step lengths included; the backward pass recomputes each step.

    Args:
        net: network with ``score(images)`` of the images' shape, see :mod:`denoisers.energy`.
        steps: T.
        step: lambda of the paper.
        delta: distance at which the curvature is probed, in units of g.
        stop: tau of the paper.
        smallest: minimum of alpha.
        largest: maximum of alpha.
        noise: standard deviation of the noise before the first step, in [0, 1] pixels; 0: deterministic.
        kind: of the noise, one of ``KINDS``.
        threshold: images whose score has at most this norm count as clean; None: none do.
        quiet: share of the noise that clean images get.
        about: description of the network, for the record.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        net: nn.Module,
        steps: int = 10,
        step: float = 0.05,
        delta: float = 1e-3,
        stop: float = 1e-3,
        smallest: float = 1e-5,
        largest: float = 0.1,
        noise: float = 0.25,
        kind: str = "gaussian",
        threshold: float | None = None,
        quiet: float = 0.0,
        about: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"score purification: kind={kind!r}; expected one of {', '.join(KINDS)}")
        check_positive_int("score purification", "steps", steps)
        numbers = {"step": step, "noise": noise, "quiet": quiet, "threshold": 0 if threshold is None else threshold}
        for key, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"score purification: {key}={value}; expected a number")
        if not (0 < smallest <= largest < math.inf and 0 < step < math.inf and 0 < delta < math.inf and stop >= 0):
            raise UserError(
                f"score purification: step={step} delta={delta} stop={stop} smallest={smallest} largest={largest}; "
                "expected numbers above 0, and smallest at most largest"
            )
        if not (0 <= noise < math.inf and 0 <= quiet <= 1):
            raise UserError(f"score purification: noise={noise} quiet={quiet}; expected noise from 0, quiet in [0, 1]")
        self.net, self.steps, self.step, self.delta, self.stop = net, steps, step, delta, stop
        self.smallest, self.largest, self.noise, self.kind = smallest, largest, noise, kind
        self.threshold, self.quiet, self.about = threshold, quiet, about

    @property
    def random(self) -> bool:
        """True if it adds noise."""
        return self.noise > 0

    @property
    def passes(self) -> int:
        """Maximum number of network calls per image: two per step, and one for the detector."""
        return 2 * self.steps + (self.threshold is not None)

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        """Purify images: return the last iterate.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            sigma: not used; the purifier adds its own noise.
            generator: one for all images or one per image; required if ``noise`` is above 0.
        """
        return self.trace(images, generator=generator)[-1]

    def trace(self, images: Tensor, *, generator: Generators = None) -> list[Tensor]:
        """Return all iterates, the noisy image first; fewer than T + 1 if all images stop earlier."""
        iterates = [self.start(images, generator)]
        active = torch.ones(len(images), dtype=torch.bool, device=images.device)
        recompute = torch.is_grad_enabled() and iterates[0].requires_grad
        for _ in range(self.steps):
            state = (iterates[-1], active)
            moved, active = checkpoint(self._step, *state, use_reentrant=False) if recompute else self._step(*state)
            if not active.any():
                break
            iterates.append(moved)
        return iterates

    def start(self, images: Tensor, generator: Generators = None) -> Tensor:
        """Add the noise, and clip to [0, 1]."""
        if not self.random:
            return images.clamp(0, 1)
        noise = normal(images, generator)
        if self.kind == "sign":
            noise = noise.sign() * math.sqrt(2 / math.pi)
        level = torch.full((len(images),), self.noise, dtype=images.dtype, device=images.device)
        if self.threshold is not None:
            level = level * torch.where(score_norm(self.net, images) > self.threshold, 1.0, self.quiet)
        return (images + level[:, None, None, None] * noise).clamp(0, 1)

    def _step(self, images: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Move the active images by one step; return all images, and which are still active."""
        score = _score(self.net, images)
        length = self.length(images, score)
        active = active & (length > self.stop)
        moved = (images + length[:, None, None, None] * score).clamp(0, 1)
        return torch.where(active[:, None, None, None], moved, images), active

    def length(self, images: Tensor, score: Tensor) -> Tensor:
        """Compute step lengths alpha ``(B,)`` for images and their scores.

        The paper's lambda delta / (1 - z), z = <g, g'> / <g, g>, with 1 - z computed as <g, g - g'> / <g, g>, which
        avoids cancellation. Upward curvature, z > 1, gives ``smallest``; zero curvature gives ``largest``.
        """
        ahead = _score(self.net, images + self.delta * score)
        flat = score.flatten(1)
        change = (flat * (score - ahead).flatten(1)).sum(1)
        straight = change == 0
        newton = self.delta * flat.pow(2).sum(1) / change.masked_fill(straight, 1)  # avoids 0 / 0, also in its gradient
        return (self.step * newton).clamp(self.smallest, self.largest).masked_fill(straight, self.largest)

    def describe(self) -> dict[str, Any]:
        """Return name and options, for the record."""
        names = "steps step delta stop smallest largest noise kind threshold quiet".split()
        return {"name": "score purification", **{n: getattr(self, n) for n in names}, "net": self.about}


def score_norm(net: nn.Module, images: Tensor) -> Tensor:
    """Compute l2 norms ``(B,)`` of the score: small for clean images, larger for attacked or noisy ones."""
    norms: Tensor = torch.linalg.vector_norm(_score(net, images), dim=(1, 2, 3))
    return norms


@torch.no_grad()
def calibrate(net: nn.Module, images: Tensor, quantile: float = 0.95) -> float:
    """Compute the detector's threshold for a network from clean training images.

    Args:
        net: see :class:`ScorePurifier`.
        images: ``(B, C, H, W)``, clean.
        quantile: share of clean images that are to count as clean.

    Returns:
        The smallest norm that at least this share of the images does not exceed.

    Raises:
        UserError: a quantile outside [0, 1], or no images.
    """
    if not (0 <= quantile <= 1 and len(images)):
        raise UserError(f"quantile={quantile} of {len(images)} images; expected a share in [0, 1], and some images")
    norms = torch.cat([score_norm(net, part) for part in images.split(_BATCH)]).sort().values
    return float(norms[max(0, math.ceil(quantile * len(norms)) - 1)])


def _score(net: nn.Module, images: Tensor) -> Tensor:
    score: Tensor = net.score(images)  # type: ignore[operator]
    return score


def ebm(
    classifier: Classifier,
    draws: int = 10,
    noise: float = 0.25,
    steps: int = 10,
    combine: str = "logits",
    kind: str = "gaussian",
    step: float = 0.05,
    threshold: float | None = None,
    quiet: float = 0.0,
    weights: str | None = None,
) -> Defence:
    """Build score purification before a frozen classifier: several noise draws, each purified and classified.

    How the published tables combine the draws is not known; mean logits of the last iterates is our default.

    Args:
        classifier: frozen.
        draws: S; 1 is used without noise.
        noise: see :class:`ScorePurifier`; the paper uses 0.25, and 0.1 against weak attacks.
        steps: T.
        combine: ``logits``, ``vote`` or ``probabilities``.
        kind: ``gaussian`` or ``sign``.
        step: lambda.
        threshold: of the detector, from :func:`calibrate`; None: no detector.
        quiet: share of the noise for images the detector takes as clean.
        weights: a file of ``certify train --objective dsm``, or a shipped name; None: those shipped for these images.

    Raises:
        UserError: a value out of range, or no such weights.
    """
    check_positive_int("ebm", "draws", draws)  # without noise too, where one draw is used
    loaded = trained("ebm", classifier.input.size, weights)
    purifier = ScorePurifier(
        loaded.net, steps, step, noise=noise, kind=kind, threshold=threshold, quiet=quiet, about=loaded.describe()
    )
    return Defence("ebm", [Member(purifier, classifier)], draws=draws if purifier.random else 1, combine=combine)
