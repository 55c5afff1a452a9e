"""Upper envelopes over noise levels: the best run of one method at each radius, chosen on the evaluated images.

Defences are usually compared by their envelopes (Salman et al. 2020). Because the best run is chosen on the evaluated
images, every output says so, and the interval accounts for it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.curves import Curve, names
from certify.errors import UserError
from certify.runs.records import RunHeader
from certify.runs.run_file import Run
from certify.smoothing.numeric import as_float
from certify.smoothing.rounding import exact

METHOD = ("model", "data", "denoiser", "noise", "rounded", "norm", "procedure", "n0", "n", "alpha", "bound")
"""Header keys that are equal for all runs of a method: not sigma, the seed, or how and where it ran."""

_MADE_FOR_SIGMA = ("sha256", "code_sha256", "trained_for")


@dataclass(frozen=True)
class Envelope:
    """Pointwise maximum of the curves of one method, one run per sigma, all over the same images.

    Attributes:
        runs: the curves.
        name: label in legends and tables.

    Raises:
        UserError: no run, a run without sigma, two runs with the same sigma, different images, or no common decided
            radius.
    """

    runs: tuple[Curve, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("an envelope of no runs; expected at least one")
        _check_sigmas(self.runs)
        _check_images(self.runs)
        if any(c.decided for c in self.runs) and not self.decided:
            radii = "; ".join(", ".join(map(exact, c.decided)) for c in self.runs)
            raise UserError(
                f"the runs of {self.name or self.runs[0].run.path} have no common decided radius ({radii}); "
                "expected the same --radius at every sigma"
            )

    @property
    def sigmas(self) -> list[float]:
        """Noise levels, ascending."""
        return sorted(_sigma(c) for c in self.runs)

    @property
    def levels(self) -> str:
        """Noise levels as text."""
        return ", ".join(f"{s:g}" for s in self.sigmas)

    @property
    def radii(self) -> np.ndarray:
        """Sorted radii at which any of the curves falls."""
        return np.unique(np.concatenate([c.radii for c in self.runs]))

    def accuracy(self, radii: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the largest certified accuracy at each radius."""
        return np.asarray(np.max([c.accuracy(radii) for c in self.runs], axis=0))

    def winner(self, radius: float) -> Curve:
        """Return the best run at this radius; ties go to the better one at 0, then to the smaller sigma."""
        return max(self.runs, key=lambda c: (*c.accuracy([radius, 0.0]), -_sigma(c)))

    def interval(self, radii: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Return an interval at each radius for the largest accuracy of the runs, with the images as a random sample.

        With S runs it extends from the largest lower to the largest upper end of their Clopper-Pearson intervals at
        confidence 1 - (1 - confidence) / S. Each of these misses its run's accuracy with probability at most
        (1 - confidence) / S. By the union bound, whatever the dependence between runs, all hold except with probability
        1 - confidence: low_s <= a_s <= high_s for every s, so max low_s <= max a_s <= max high_s. The accuracy of the
        chosen run is then within its own interval, however it was chosen; if all runs have equally many images, the
        interval of the best run is this one.
        """
        each = 1.0 - (1.0 - as_float(confidence, "confidence")) / len(self.runs)
        low, high = np.max([c.interval(radii, each) for c in self.runs], axis=0)
        return low, high

    @property
    def quantity(self) -> str:
        """Label of the vertical axis."""
        return self.runs[0].quantity

    @property
    def labelled(self) -> bool:
        """True for accuracy, False for the certified fraction."""
        return self.runs[0].labelled

    @property
    def norm(self) -> str:
        """Norm of the radii."""
        return self.runs[0].norm

    @property
    def decided(self) -> list[float]:
        """Radii at which the images of all runs were decided; empty if every radius is known."""
        return sorted(set.intersection(*(set(c.decided) for c in self.runs)))

    def at_least(self, radius: float) -> bool:
        """True if the largest accuracy is only a lower bound, because a run was not decided there."""
        return any(c.at_least(radius) for c in self.runs)

    def reachable(self, radius: float) -> bool:
        """True if an image could be certified at this radius in any of the runs."""
        return any(c.reachable(radius) for c in self.runs)

    @property
    def note(self) -> str:
        """Restrictions of the runs: decided radii, partial runs, unreadable images."""
        return self.summary(lambda c: c.note)

    def summary(self, describe: Callable[[Curve], str]) -> str:
        """Describe the runs: once if the text is the same for all, otherwise per sigma."""
        texts: dict[str, list[float]] = {}
        for c in sorted(self.runs, key=_sigma):
            texts.setdefault(describe(c), []).append(_sigma(c))
        if len(texts) == 1:
            return next(iter(texts))
        return "; ".join(f"{text} at σ {', '.join(f'{s:g}' for s in sigmas)}" for text, sigmas in texts.items() if text)


Line = Curve | Envelope
"""A line of a table or figure."""


def runs_of(line: Line) -> Sequence[Curve]:
    """Return the curves of the runs behind a line."""
    return line.runs if isinstance(line, Envelope) else [line]


def group(curves: Sequence[Curve]) -> list[Envelope]:
    """Group curves into envelopes: runs that differ only in sigma and seed belong to one method.

    A method has either the same weights at every sigma, or separate weights per sigma. In the latter case model,
    denoiser or checkpoint are named after the run's own sigma ("noise_0.25" at 0.25), or ``auto`` chose the denoiser.

    Raises:
        UserError: see :class:`Envelope`; or a run that fits others in both ways.
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
                f"{c.run.path} belongs both to {others[0].run.path} (same weights) and to {peers[0].run.path} (weights "
                "named after their sigma); an envelope is over one of them: pass only its runs"
            )
        groups.setdefault(same_recipe if peers else same_weights, []).append(c)
    # names() names runs, so each method is a run with its settings
    runs = [Run(members[0].run.path, RunHeader.from_json(json.loads(key))) for key, members in groups.items()]
    return [
        Envelope(tuple(sorted(members, key=_sigma)), name)
        for name, members in zip(names(runs, [k for k in METHOD if k != "rounded"]), groups.values(), strict=True)
    ]


def method(header: RunHeader, *, own: bool = False) -> dict[str, object]:
    """Return the settings that identify the method of a run: its header without sigma, seed and provenance.

    Args:
        header: the run's header.
        own: True if each sigma has its own weights: the run's sigma within names is replaced by "σ".
    """
    settings = {key: header[key] for key in METHOD if header.get(key) is not None}
    settings["tolerance"] = None if header.stopping is None else header.stopping.tolerance
    steps: list[Mapping[str, object]] = []
    for step in header.pipeline:
        role = "model" if step.get("step") == "classifier" else "denoiser"
        kept = {key: value for key, value in step.items() if key != "sigma"}
        if role == "denoiser" and header.get(role) == "auto":
            kept = {"step": role}
        elif own:
            named = kept | {key: _without_sigma(kept[key], header.sigma) for key in ("name", "weights") if key in kept}
            if _without_sigma(header.get(role), header.sigma) != header.get(role) or named != kept:
                kept = {key: value for key, value in named.items() if key not in _MADE_FOR_SIGMA}
        steps.append(kept)
    settings["pipeline"] = steps
    if own:
        roles = [role for role in ("model", "denoiser") if role in settings]
        settings |= {role: _without_sigma(settings[role], header.sigma) for role in roles}
    return settings


def _without_sigma(name: object, sigma: float) -> object:
    """Replace this noise level in a name by "σ"."""
    if not isinstance(name, str):
        return name
    return re.sub(r"(?<![\d.])\d+\.\d+(?!\d)", lambda number: "σ" if float(number[0]) == sigma else number[0], name)


def _key(described: Mapping[str, object]) -> str:
    return json.dumps(described, sort_keys=True)


def _sigma(c: Curve) -> float:
    if not c.run.header.has("sigma"):
        raise UserError(f"{c.run.path} has no sigma; expected a run file, or a log named like sigma_0.25")
    return c.run.header.sigma


def _check_sigmas(runs: Sequence[Curve]) -> None:
    for a, b in itertools.combinations(runs, 2):
        if _sigma(a) == _sigma(b):
            raise UserError(
                f"{a.run.path} and {b.run.path} are two runs of one method at sigma = {_sigma(a):g}; an envelope takes "
                "one run per sigma, so that the best seed cannot be picked: pass one of them"
            )


def _check_images(runs: Sequence[Curve]) -> None:
    """Check that runs are over the same images (ids, labels and, if known, contents); a partial run may have fewer."""
    whole = max(runs, key=lambda c: c.total)
    for c in runs:
        digests = [r.header.images.get("sha256") for r in (c.run, whole.run)]
        (here, expected), (there, all_expected) = (
            ({(row.id, row.label) for row in r.usable}, r.header.expected) for r in (c.run, whole.run)
        )
        alike = here <= there and expected == all_expected and (c.run.partial or here == there)
        if not alike or (None not in digests and digests[0] != digests[1]):
            raise UserError(
                f"{c.run.path} and {whole.run.path} are not over the same images; expected the same images for all "
                "runs of an envelope"
            )
