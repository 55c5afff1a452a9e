"""Recipe of a training: all hyperparameters, and the learning rate of every step."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from certify.errors import UserError
from training.data import Levels
from training.losses import Objective, default_settings, make_objective, phases

OPTIMIZERS = ("adam", "sgd", "adam-then-sgd", "muon")
SCHEDULES = ("one-cycle", "step", "constant")
_WARM_UP, _LAST = 0.1, 0.01  # one-cycle: share of the steps before the peak, final rate as a share of the peak


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters that, with data and networks, determine the weights.

    Salman et al. 2020 (repository): 90 epochs, batches of 256, rate 1e-3, schedule ``step``.

    Attributes:
        objective: a name in ``OBJECTIVES`` or ``PHASES``.
        sigmas: noise levels in [0, 1] pixels.
        continuous: train at all levels between the smallest and the largest.
        epochs: passes over the training images; may be fractional.
        batch_size: images per step.
        optimizer: ``adam``, ``sgd`` (momentum 0.9), ``adam-then-sgd``, or ``muon`` (:class:`training.optimizers.Muon`).
        rate: peak learning rate.
        weight_decay: L2 penalty, as torch's Adam and SGD apply it.
        schedule: ``one-cycle`` (warm-up over a tenth, then cosine), ``step`` (a tenth after each third), ``constant``.
        switch_at: share of the steps before ``adam-then-sgd`` switches.
        sgd_rate: learning rate of SGD after the switch.
        first_share: share of the steps of the first of two phases.
        augment: shift and mirror the images.
        temperature: divisor of the frozen classifier's logits before the cross-entropy; 1 is the published loss. A
            classifier trained without noise is overconfident on denoised images; above 1, training improves its votes,
            which certificates count, instead of its confidence.
        queries: random directions per image and step, for ``zeroth-order``.
        ema: decay of an exponential moving average of the weights, which is validated and saved; 0: none.
        only: prefixes of the parameters that are trained; empty: all. Other batch norms keep their statistics.
        seed: of initial weights, order, augmentation and noise.
        settings: of the objective, by name.
    """

    objective: str = "mse"
    sigmas: tuple[float, ...] = (0.25,)
    continuous: bool = False
    epochs: float = 10.0
    batch_size: int = 64
    optimizer: str = "adam"
    rate: float = 1e-3
    weight_decay: float = 1e-4
    schedule: str = "one-cycle"
    switch_at: float = 50 / 90
    sgd_rate: float = 1e-3
    first_share: float = 0.5
    augment: bool = True
    temperature: float = 1.0
    queries: int = 20
    ema: float = 0.0
    only: tuple[str, ...] = ()
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(objective.noise for objective in self.objectives) and not self.sigmas:
            raise UserError(f"--objective {self.objective} trains under noise: give --sigma, such as --sigma 0.25")
        for name, value, known in (("optimizer", self.optimizer, OPTIMIZERS), ("schedule", self.schedule, SCHEDULES)):
            if value not in known:
                raise UserError(f"--{name} {value!r}: expected one of {', '.join(known)}")
        if self.continuous and len(set(self.sigmas)) < 2:
            raise UserError("--sigma LOW:HIGH: expected two different levels, such as 0.1:1")
        if not (0 < self.switch_at < 1 and 0 < self.first_share < 1):
            raise UserError(
                f"--switch-at {self.switch_at:g} --first-share {self.first_share:g}: expected between 0 and 1"
            )
        if not (0 <= self.weight_decay < math.inf and 0 < self.rate < math.inf and 0 <= self.seed < 2**63):
            raise UserError(
                f"--weight-decay {self.weight_decay:g} --rate {self.rate:g} --seed {self.seed}: expected a decay from "
                "0, a rate above 0, a seed from 0 to 2^63 - 1"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"--ema {self.ema:g}: expected a decay from 0 (no average) to below 1, such as 0.999")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature:g}: expected a number above 0")
        if not (self.epochs > 0 and math.isfinite(self.epochs) and self.batch_size > 0):
            raise UserError(f"--epochs {self.epochs} --batch-size {self.batch_size}: expected numbers above 0")

    @functools.cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """The objective of each phase."""
        return tuple(make_objective(name, self.settings) for name in phases(self.objective))

    def unused(self) -> dict[str, str]:
        """Return the options that have no effect with this objective and optimizer: what each belongs to, by name."""
        switches = self.optimizer == "adam-then-sgd"
        effective = {
            "temperature": (any(one.classifier for one in self.objectives), "an objective with a classifier"),
            "sigma": (any(one.noise for one in self.objectives), "an objective that trains under noise"),
            "queries": (self.objective == "zeroth-order", "--objective zeroth-order"),
            "first_share": (self.objective == "mse+stability", "--objective mse+stability"),
            "switch_at": (switches, "--optimizer adam-then-sgd"),
            "sgd_rate": (switches, "--optimizer adam-then-sgd"),
        }
        return {name: where for name, (used, where) in effective.items() if not used}

    @property
    def levels(self) -> Levels:
        """The distribution of noise levels."""
        return Levels(self.sigmas, self.continuous)

    def steps(self, images: int) -> int:
        """Return the number of steps on this many training images."""
        return max(1, round(self.epochs * images / self.batch_size))

    def phase(self, step: int, steps: int) -> tuple[Objective, int, int]:
        """Return the objective at a step, the step within its phase, and the length of the phase."""
        if len(self.objectives) == 1:
            return self.objectives[0], step, steps
        first = max(1, min(steps - 1, round(self.first_share * steps)))
        if step < first:
            return self.objectives[0], step, first
        return self.objectives[1], step - first, steps - first

    def uses_sgd(self, step: int, steps: int) -> bool:
        """True if SGD takes this step."""
        return self.optimizer == "sgd" or (self.optimizer == "adam-then-sgd" and step >= self.switch_at * steps)

    def rate_at(self, step: int, steps: int) -> float:
        """Return the learning rate of a step; a pure function of it, so that a resumed training has the same one."""
        _, inner, length = self.phase(step, steps)
        peak = self.rate
        if self.optimizer == "adam-then-sgd" and self.uses_sgd(step, steps):
            start = math.ceil(self.switch_at * steps)
            inner, length, peak = step - start, steps - start, self.sgd_rate
        if self.schedule == "constant":
            return peak
        share = inner / max(1, length)
        if self.schedule == "step":
            return peak * 0.1 ** int(3 * share)
        if share < _WARM_UP:
            return peak * (_LAST + (1 - _LAST) * (inner + 1) / (_WARM_UP * length + 1))
        down = (share - _WARM_UP) / (1 - _WARM_UP)
        return peak * (_LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * down)))

    def describe(self) -> dict[str, Any]:
        """Return all fields for the card, with the default settings of the objective filled in."""
        defaults = {key: value for name in phases(self.objective) for key, value in default_settings(name).items()}
        return {**asdict(self), "settings": {**defaults, **self.settings}}

    def digest(self, *parts: Any) -> str:
        """Hash everything that must be equal for a training to be resumed from a checkpoint.

        Fields at their defaults are left out, so that a new field invalidates no checkpoint; defaults must never
        change.
        """
        defaults = asdict(type(self)())
        chosen = {key: value for key, value in asdict(self).items() if value != defaults[key]}
        text = json.dumps([chosen, *parts], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()
