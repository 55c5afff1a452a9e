"""Smooth with your own noise distribution: independent logistic noise, which certifies l1 balls.

    python examples/own_noise.py

A smoothing distribution consists of a sampler and the radius that a probability certifies. docs/extending/noise.md has
the proof for this one and the full contract.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import certify
from certify.smoothing.noise import Additive


@dataclass(frozen=True)
class Logistic(Additive):
    """Independent logistic noise of standard deviation sigma in each pixel."""

    name = "logistic"
    norm = "l1"

    @property
    def scale_parameter(self) -> float:
        """The parameter s of the logistic distribution."""
        return self.sigma * math.sqrt(3.0) / math.pi

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Draw one block of noise from the generator alone: the log ratio of two exponentials."""
        first, second = (
            torch.empty(shape, device=generator.device).exponential_(generator=generator) for _ in range(2)
        )
        return self.scale_parameter * (first / second).log()

    def radius(self, p_lower: float, p_other: float | None = None) -> float:
        """Return s/2 (logit(p_lower) - logit(p_other)), rounded down."""
        other = 1.0 - p_lower if p_other is None else max(p_other, math.ulp(0.0))
        if not 1.0 > p_lower > other:
            return 0.0
        logits = math.log(p_lower) - math.log1p(-p_lower) - math.log(other) + math.log1p(-other)
        return max(0.0, self.scale_parameter / 2 * (logits - 1e-12))

    def probability(self, radius: float) -> float:
        """Return the probability at which the radius is reached."""
        return 1.0 / (1.0 + math.exp(-radius / self.scale_parameter))


run = certify.certify("digits", "digits", noise=Logistic(0.25), n=1000, skip=20)
print(run.table([0, 0.25, 0.5]))
