"""Adversarial purification by score ascent: noise first, then a few adaptive steps uphill in the log-density.

After Yoon, Hwang and Lee 2021 (Adversarial Denoising Purification). The noise drowns the perturbation and brings the
image to where the score network was trained; the step length comes from the curvature along the score, so nobody needs
to know how much noise is left. Empirical: there is no certificate in it. The published code converts the image's scale
once but back after every step, which loses contrast; here nothing is converted.
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
from denoisers.classical import whole
from denoisers.defences import trained
from denoisers.randomness import Generators, normal

KINDS = ("gaussian", "sign")
"""Normal noise, or its signs times sigma * sqrt(2 / pi), which has the same mean absolute value."""

_BATCH = 100


class ScorePurifier(nn.Module):
    """Noise, then up to T steps x <- clip(x + alpha h(x), 0, 1) with a step length alpha for each image.

    With g = h(x) and the curvature c = <g, g - h(x + delta g)> / (delta <g, g>), alpha is ``step`` / c, held between
    ``smallest`` and ``largest``: that share of the way to where the density, taken as Gaussian along g, is highest. An
    image whose alpha falls to ``stop`` stays as it is from there on.

    Gradients, where they are on, are those of the whole loop, step lengths included; each step is computed again on the
    way back instead of being kept.

    Args:
        net: has ``score(images)`` of the images' shape, as those of ``denoisers.energy``.
        steps: T.
        step: lambda of the paper.
        delta: how far ahead the curvature is probed, in units of g.
        stop: tau of the paper.
        smallest: least step length.
        largest: greatest step length.
        noise: standard deviation of the noise before the first step, in [0, 1] pixels; 0: deterministic.
        kind: of the noise, one of ``KINDS``.
        threshold: images whose score has at most this norm before the noise are taken as clean; None: all get noise.
        quiet: the share of the noise that those still get.
        about: what the network is, for the record.

    Raises:
        UserError: numbers that make no sense.
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
        whole("score purification", "steps", steps)
        numbers = {"step": step, "noise": noise, "quiet": quiet, "threshold": 0 if threshold is None else threshold}
        for key, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"score purification: {key}={value}; expected a number")
        if not (0 < smallest <= largest < math.inf and 0 < step < math.inf and 0 < delta < math.inf and stop >= 0):
            raise UserError(
                f"score purification: step={step} delta={delta} stop={stop} smallest={smallest} largest={largest}; "
                "expected numbers above 0, and smallest not above largest"
            )
        if not (0 <= noise < math.inf and 0 <= quiet <= 1):
            raise UserError(f"score purification: noise={noise} quiet={quiet}; expected noise from 0, quiet in [0, 1]")
        self.net, self.steps, self.step, self.delta, self.stop = net, steps, step, delta, stop
        self.smallest, self.largest, self.noise, self.kind = smallest, largest, noise, kind
        self.threshold, self.quiet, self.about = threshold, quiet, about

    @property
    def random(self) -> bool:
        """Whether it draws noise."""
        return self.noise > 0

    @property
    def passes(self) -> int:
        """Network calls an image, at most: two a step, and one for the detector."""
        return 2 * self.steps + (self.threshold is not None)

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        """Purified images: the last iterate.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            sigma: not used; the purifier has its own noise.
            generator: one, or one an image; needed where ``noise`` is above 0.
        """
        return self.trace(images, generator=generator)[-1]

    def trace(self, images: Tensor, *, generator: Generators = None) -> list[Tensor]:
        """All iterates, the noisy image first; fewer than T + 1 where every image stopped before."""
        found = [self.start(images, generator)]
        going = torch.ones(len(images), dtype=torch.bool, device=images.device)
        keep = not (torch.is_grad_enabled() and found[0].requires_grad)
        for _ in range(self.steps):
            advance = (found[-1], going)
            moved, going = self._advance(*advance) if keep else checkpoint(self._advance, *advance, use_reentrant=False)
            if not going.any():
                break
            found.append(moved)
        return found

    def start(self, images: Tensor, generator: Generators = None) -> Tensor:
        """The images with noise, clipped to [0, 1]."""
        if not self.random:
            return images.clamp(0, 1)
        noise = normal(images, generator)
        if self.kind == "sign":
            noise = noise.sign() * math.sqrt(2 / math.pi)
        level = torch.full((len(images),), self.noise, dtype=images.dtype, device=images.device)
        if self.threshold is not None:
            level = level * torch.where(score_norm(self.net, images) > self.threshold, 1.0, self.quiet)
        return (images + level[:, None, None, None] * noise).clamp(0, 1)

    def _advance(self, images: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the images that are still going, and which of them went."""
        slope = _score(self.net, images)
        length = self.length(images, slope)
        going = going & (length > self.stop)
        moved = (images + length[:, None, None, None] * slope).clamp(0, 1)
        return torch.where(going[:, None, None, None], moved, images), going

    def length(self, images: Tensor, slope: Tensor) -> Tensor:
        """Step lengths alpha ``(B,)`` at these images with these scores.

        The paper's lambda delta / (1 - z), z = <g, g'> / <g, g>, with 1 - z as <g, g - g'> / <g, g>: the same number
        without subtracting two that are nearly equal. Upward curvature, z > 1, gives ``smallest``, none ``largest``.
        """
        ahead = _score(self.net, images + self.delta * slope)
        flat = slope.flatten(1)
        turned = (flat * (slope - ahead).flatten(1)).sum(1)
        straight = turned == 0
        newton = self.delta * flat.pow(2).sum(1) / turned.masked_fill(straight, 1)  # no 0 / 0, nor in its gradient
        return (self.step * newton).clamp(self.smallest, self.largest).masked_fill(straight, self.largest)

    def describe(self) -> dict[str, Any]:
        """Name and options, for the record."""
        names = "steps step delta stop smallest largest noise kind threshold quiet".split()
        return {"name": "score purification", **{n: getattr(self, n) for n in names}, "net": self.about}


def score_norm(net: nn.Module, images: Tensor) -> Tensor:
    """l2 norms ``(B,)`` of the network's score: small for clean images, larger for attacked or noisy ones."""
    norms: Tensor = torch.linalg.vector_norm(_score(net, images), dim=(1, 2, 3))
    return norms


@torch.no_grad()
def calibrate(net: nn.Module, images: Tensor, quantile: float = 0.95) -> float:
    """The threshold for the detector, from clean training images: norms depend on the network.

    Args:
        net: as for :class:`ScorePurifier`.
        images: ``(B, C, H, W)``, clean.
        quantile: the share of clean images that shall pass as clean.

    Returns:
        The least norm that at least this share of the images does not exceed.

    Raises:
        UserError: a quantile outside [0, 1], or no images.
    """
    if not (0 <= quantile <= 1 and len(images)):
        raise UserError(f"quantile={quantile} of {len(images)} images; expected a share in [0, 1], and some images")
    norms = torch.cat([score_norm(net, part) for part in images.split(_BATCH)]).sort().values
    return float(norms[max(0, math.ceil(quantile * len(norms)) - 1)])


def _score(net: nn.Module, images: Tensor) -> Tensor:
    found: Tensor = net.score(images)  # type: ignore[operator]
    return found


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
    """Score purification in front of a frozen classifier: several noise draws, each purified and classified.

    Which way of combining the draws the published tables use is not known; mean logits of the last iterates is our
    default.

    Args:
        classifier: frozen.
        draws: S; 1 where there is no noise.
        noise: as for :class:`ScorePurifier`; the paper has 0.25, and 0.1 against weak attacks.
        steps: T.
        combine: ``logits``, ``vote`` or ``probabilities``.
        kind: ``gaussian`` or ``sign``.
        step: lambda.
        threshold: of the detector, from :func:`calibrate`; None: no detector.
        quiet: the share of the noise for images that the detector takes as clean.
        weights: a file of ``certify train --objective dsm``, or a shipped name; None takes the shipped ones that fit.
    """
    whole("ebm", "draws", draws)  # where there is no noise too, which needs one only
    found = trained("ebm", classifier.input.size, weights)
    purifier = ScorePurifier(
        found.net, steps, step, noise=noise, kind=kind, threshold=threshold, quiet=quiet, about=found.describe()
    )
    return Defence("ebm", [Member(purifier, classifier)], draws=draws if purifier.random else 1, combine=combine)
