"""The upper envelope over noise levels: at each radius the best run of one method, chosen after looking.

The field compares defences by it (Salman et al. 2020). The choice is made on the very images that are then counted, so
it is named wherever it is shown, and its interval pays for it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.curves import Curve, names
from certify.errors import UserError
from certify.runs.run_file import Run
from certify.smoothing.numeric import as_float
from certify.smoothing.rounding import exact

METHOD = ("model", "data", "denoiser", "noise", "rounded", "norm", "procedure", "n0", "n", "alpha", "bound")
"""Header keys in which the runs of one method agree: not sigma, nor the seed, nor how and where it ran."""

_MADE_FOR_SIGMA = ("sha256", "code_sha256", "trained_for")


@dataclass(frozen=True)
class Envelope:
    """The pointwise maximum of the curves of one method, one run a sigma, all over the same images.

    Attributes:
        runs: its curves.
        name: its line in a legend or table.

    Raises:
        UserError: no run, a run without sigma or two of one sigma, different images, or images that were decided at no
            common radius.
    """

    runs: tuple[Curve, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("an envelope of no runs; expected at least one")
        _check_sigmas(self.runs)
        _check_images(self.runs)
        if any(c.decided for c in self.runs) and not self.decided:
            asked = "; ".join(", ".join(map(exact, c.decided)) for c in self.runs)
            raise UserError(
                f"the runs of {self.name or self.runs[0].run.path} were decided at no common radius ({asked}); an "
                "envelope needs one: pass the same --radius at every sigma"
            )

    @property
    def sigmas(self) -> list[float]:
        """The noise levels, ascending."""
        return sorted(_sigma(c) for c in self.runs)

    @property
    def levels(self) -> str:
        """The noise levels in words."""
        return ", ".join(f"{s:g}" for s in self.sigmas)

    @property
    def radii(self) -> np.ndarray:
        """Sorted radii at which one of the curves falls."""
        return np.unique(np.concatenate([c.radii for c in self.runs]))

    def accuracy(self, radii: Sequence[float] | np.ndarray) -> np.ndarray:
        """The largest certified accuracy at each radius."""
        return np.asarray(np.max([c.accuracy(radii) for c in self.runs], axis=0))

    def winner(self, radius: float) -> Curve:
        """The run with the largest accuracy at this radius; of equals the better at 0, then the smaller sigma."""
        return max(self.runs, key=lambda c: (*c.accuracy([radius, 0.0]), -_sigma(c)))

    def interval(self, radii: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Interval at each radius for the largest of the runs' accuracies, for the images as a sample.

        With S runs it goes from the largest lower to the largest upper end of their Clopper-Pearson intervals at
        1 - (1 - confidence) / S. Each misses its run's accuracy with probability at most (1 - confidence) / S, so
        except with probability 1 - confidence, however the runs depend on each other, all hold: low_s <= a_s <= high_s
        for every s, and then max low_s <= max a_s <= max high_s. Whichever run is chosen by looking, its own accuracy
        is in its own interval then; where all runs have equally many images, that of the winner is this one.
        """
        each = 1.0 - (1.0 - as_float(confidence, "confidence")) / len(self.runs)
        low, high = np.max([c.interval(radii, each) for c in self.runs], axis=0)
        return low, high

    @property
    def quantity(self) -> str:
        """What the vertical axis is called."""
        return self.runs[0].quantity

    @property
    def labelled(self) -> bool:
        """Whether this is accuracy."""
        return self.runs[0].labelled

    @property
    def norm(self) -> str:
        """What the radii are measured in."""
        return self.runs[0].norm

    @property
    def decided(self) -> list[float]:
        """The radii at which the images of all runs were decided. Empty: every radius is known."""
        return sorted(set.intersection(*(set(c.decided) for c in self.runs)))

    def at_least(self, radius: float) -> bool:
        """Whether the largest accuracy is only known to be at least this: one run was not asked there."""
        return any(c.at_least(radius) for c in self.runs)

    @property
    def note(self) -> str:
        """What a reader must know: partial runs, images left out, radii that were never asked for."""
        return self.said(lambda c: c.note)

    def said(self, say: Callable[[Curve], str]) -> str:
        """What there is to say of its runs: once where it is the same, else for each sigma."""
        texts: dict[str, list[float]] = {}
        for c in sorted(self.runs, key=_sigma):
            texts.setdefault(say(c), []).append(_sigma(c))
        if len(texts) == 1:
            return next(iter(texts))
        return "; ".join(f"{text} at σ {', '.join(f'{s:g}' for s in found)}" for text, found in texts.items() if text)


Line = Curve | Envelope
"""What a table or figure gives a line to."""


def group(curves: Sequence[Curve]) -> list[Envelope]:
    """The envelopes of these curves: runs that agree in everything but sigma and seed are one method.

    A method either keeps its weights at every sigma, or has weights for each: then model, denoiser or checkpoint are
    named after the run's own sigma ("noise_0.25" at 0.25), or the denoiser is the one that ``auto`` takes there.

    Raises:
        UserError: as :class:`Envelope`, or a run that goes with others in both ways.
    """
    for c in curves:
        _sigma(c)
    kept, own = ([_key(method(c.run.header, own=o)) for c in curves] for o in (False, True))
    groups: dict[str, list[Curve]] = {}
    for c, same_weights, same_recipe in zip(curves, kept, own, strict=True):
        others = [d for d, key in zip(curves, kept, strict=True) if key == same_weights and _sigma(d) != _sigma(c)]
        peers = [d for d, k, o in zip(curves, kept, own, strict=True) if o == same_recipe and k != same_weights]
        if others and peers:
            raise UserError(
                f"{c.run.path} goes with {others[0].run.path} (the same weights) and with {peers[0].run.path} (weights "
                "named after their sigma); an envelope is over one or the other: pass only its runs"
            )
        groups.setdefault(same_recipe if peers else same_weights, []).append(c)
    # the method stands for a run: names tell methods apart as they do runs
    runs = [Run(found[0].run.path, json.loads(key)) for key, found in groups.items()]
    return [
        Envelope(tuple(sorted(found, key=_sigma)), name)
        for name, found in zip(names(runs, [k for k in METHOD if k != "rounded"]), groups.values(), strict=True)
    ]


def method(header: Mapping[str, Any], *, own: bool = False) -> dict[str, Any]:
    """What makes the method of a run: its header without sigma, seed and circumstances.

    Args:
        header: of the run.
        own: read what is named after the run's sigma as one name, with "σ" in it, for weights that differ.
    """
    found = {key: header[key] for key in METHOD if header.get(key) is not None}
    found["tolerance"] = (header.get("stopping") or {}).get("tolerance")
    steps = []
    for step in header.get("pipeline", ()):
        role = "model" if step.get("step") == "classifier" else "denoiser"
        kept = {key: value for key, value in step.items() if key != "sigma"}
        if role == "denoiser" and header.get(role) == "auto":
            kept = {"step": role}
        elif own:
            named = {key: _opened(kept[key], header["sigma"]) for key in ("name", "weights") if key in kept}
            if _opened(header.get(role), header["sigma"]) != header.get(role) or {**kept, **named} != kept:
                kept = {key: value for key, value in {**kept, **named}.items() if key not in _MADE_FOR_SIGMA}
        steps.append(kept)
    found["pipeline"] = steps
    if own:
        found |= {role: _opened(found[role], header["sigma"]) for role in ("model", "denoiser") if role in found}
    return found


def _opened(name: Any, sigma: float) -> Any:
    """The name with "σ" where it says this noise level."""
    if not isinstance(name, str):
        return name
    return re.sub(r"(?<![\d.])\d+\.\d+(?!\d)", lambda number: "σ" if float(number[0]) == sigma else number[0], name)


def _key(described: Mapping[str, Any]) -> str:
    return json.dumps(described, sort_keys=True)


def _sigma(c: Curve) -> float:
    sigma = c.run.header.get("sigma")
    if sigma is None:
        raise UserError(f"{c.run.path} does not say its sigma; expected a run file, or a log named sigma_0.25 or so")
    return float(sigma)


def _check_sigmas(runs: Sequence[Curve]) -> None:
    for a, b in itertools.combinations(runs, 2):
        if _sigma(a) == _sigma(b):
            raise UserError(
                f"{a.run.path} and {b.run.path} are two runs of one method at sigma = {_sigma(a):g}; an envelope takes "
                "one a sigma, so that no seed is picked: pass one of them"
            )


def _check_images(runs: Sequence[Curve]) -> None:
    """The same ids and labels (of an unfinished run, as far as it got), and the same contents where they are known."""
    whole = max(runs, key=lambda c: c.total)
    for c in runs:
        digests = [(r.header.get("images") or {}).get("sha256") for r in (c.run, whole.run)]
        (here, owed), (there, all_owed) = (
            ({(row["id"], row["label"]) for row in r.usable}, r.header["expected"]) for r in (c.run, whole.run)
        )
        alike = here <= there and owed == all_owed and (c.run.partial or here == there)
        if not alike or (None not in digests and digests[0] != digests[1]):
            raise UserError(
                f"{c.run.path} and {whole.run.path} are not over the same images; expected one selection for all runs "
                "of an envelope: certify the same images at every sigma"
            )
