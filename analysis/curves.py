"""Certified accuracy as a function of the radius, with its interval over images."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from certify.errors import UserError
from certify.runs.records import RunHeader
from certify.runs.run_file import Run
from certify.smoothing.numeric import as_float
from certify.smoothing.rounding import exact


@dataclass(frozen=True)
class Curve:
    """Certified accuracy of a run.

    Certified accuracy at r is the share of images with a correct prediction and a radius of at least r. Without labels
    it is the certified fraction: the share of images with a radius of at least r, whatever the class.

    Attributes:
        run: the run.
        name: label in legends and tables.
        radii: sorted radii of the images that count (correct, not abstained), in [0, 1] pixels.
        total: number of images in the average.
        labelled: True for accuracy, False for the certified fraction.
    """

    run: Run
    name: str
    radii: np.ndarray
    total: int
    labelled: bool

    def successes(self, radii: Sequence[float] | np.ndarray) -> np.ndarray:
        """Count the images that are certified (and correct) at each radius."""
        return len(self.radii) - np.searchsorted(self.radii, np.asarray(radii, dtype=float), side="left")

    def accuracy(self, radii: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the certified accuracy at each radius, in [0, 1]."""
        return self.successes(radii) / self.total

    def interval(self, radii: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Return the exact (Clopper-Pearson) interval at each radius, with the images as a random sample.

        At radii that were not decided the accuracy is only known from below, and the upper end is 1.
        """
        low, high = proportion_interval(self.successes(radii), self.total, confidence)
        return low, np.where([self.at_least(float(r)) for r in radii], 1.0, high)

    @functools.cached_property
    def limit(self) -> float:
        """Largest radius that any image could have at this n and alpha; infinite where that is not known."""
        header = self.run.header
        if not (header.has("n") and header.has("alpha") and header.has("noise")):  # a published log
            return math.inf
        try:
            largest = header.procedure.prospects(header.radii_for(self.run.usable[0].size)).largest
        except UserError:  # custom noise that is not registered here
            return math.inf
        return math.inf if largest is None else largest

    def reachable(self, radius: float) -> bool:
        """True if an image could be certified at this radius; if not, an accuracy of 0 says nothing about it."""
        return self.at_least(radius) or radius <= self.limit

    @property
    def capped(self) -> int:
        """Number of images at the limit: more samples could certify larger radii for them."""
        return int(np.sum(self.radii >= self.limit * (1 - 1e-6))) if 0 < self.limit < math.inf else 0

    @property
    def average_radius(self) -> float:
        """Average certified radius (ACR; Zhai et al. 2020) over all images; errors and abstentions count as 0.

        A lower bound if images were decided, or measured to a tolerance.
        """
        return float(self.radii.sum() / self.total)

    @property
    def quantity(self) -> str:
        """Label of the vertical axis."""
        return "certified accuracy" if self.labelled else "certified fraction"

    @property
    def norm(self) -> str:
        """Norm of the radii."""
        return self.run.header.norm

    @property
    def decided(self) -> list[float]:
        """Radii at which the images were decided; empty if every radius is known."""
        return list(self.run.header.radii)

    @property
    def stopped(self) -> bool:
        """True if sampling stopped early, so that true certified radii may be larger."""
        return self.run.header.stopping is not None

    def at_least(self, radius: float) -> bool:
        """True if the accuracy at this radius is only a lower bound, because the images were not decided there."""
        return bool(self.decided) and radius not in self.decided

    @property
    def note(self) -> str:
        """Restrictions: decided radii, a partial run, unreadable images."""
        parts = []
        if self.decided:
            parts.append("decided at r = " + ", ".join(map(exact, self.decided)))
        if self.run.partial:
            parts.append(f"partial: {len(self.run.images)} of {self.run.header.expected}")
        left_out = len(self.run.images) - self.total
        if left_out:
            parts.append(f"{left_out} unreadable")
        return ", ".join(parts)


def proportion_interval(
    successes: np.ndarray | int, total: int, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact two-sided interval of proportions (Clopper and Pearson 1934)."""
    from scipy.special import betaincinv  # statsmodels has this interval, but takes a second to import

    confidence = as_float(confidence, "confidence", "a number strictly between 0 and 1, such as 0.95")
    if not 0.0 < confidence < 1.0:
        raise UserError(f"confidence = {confidence}: expected a number strictly between 0 and 1, such as 0.95")
    tail, k = (1.0 - confidence) / 2, np.asarray(successes, dtype=float)
    low = np.where(k > 0, betaincinv(np.maximum(k, 1), total - k + 1, tail), 0.0)
    high = np.where(k < total, betaincinv(k + 1, np.maximum(total - k, 1), 1 - tail), 1.0)
    return low, high


def curve(run: Run, name: str = "") -> Curve:
    """Return the curve of one run.

    Raises:
        UserError: no usable image; labels for some images only; or an unfinished run with early stopping, whose
            finished images are the easy ones (unless they were processed in order).
    """
    if run.partial and run.header.stopping is not None and not run.header.in_order:
        raise UserError(
            f"{run.path} is unfinished: {len(run.images)} of {run.header.expected} images, and those "
            "decided with few samples come first, so their share would mislead; run its command again to resume"
        )
    rows = run.usable
    if not rows:
        raise UserError(f"{run.path} holds no finished image yet")
    labelled = is_labelled(run)
    certified = [row for row in rows if not row.abstained]
    radii = [row.radius for row in certified if row.label is None or row.prediction == row.label]
    return Curve(run, name, np.sort(np.asarray(radii, dtype=float)), len(rows), labelled)


def is_labelled(run: Run) -> bool:
    """True if the usable images of a run have labels.

    Raises:
        UserError: only some of them have.
    """
    labelled, total = sum(row.label is not None for row in run.usable), len(run.usable)
    if 0 < labelled < total:
        raise UserError(f"{run.path}: {labelled} of {total} images have labels; expected all or none")
    return labelled > 0


def by_class(whole: Curve) -> list[Curve]:
    """Return a curve for each class of the labels, in their order.

    Raises:
        UserError: images without labels.
    """
    if not whole.labelled:
        raise UserError(f"{whole.run.path} has no labels, so no classes to tell apart; leave out --per-class")
    names = whole.run.class_names
    parts = []
    for label in sorted({row.label for row in whole.run.usable if row.label is not None}):
        rows = [row for row in whole.run.usable if row.label == label]
        part = Run(whole.run.path, whole.run.header.replace(expected=len(rows)), rows)
        parts.append(curve(part, f"{whole.name}, class {names.get(label, label)}"))
    return parts


def common_norm(runs: Sequence[Run]) -> str:
    """Return the norm of the radii of all runs.

    Raises:
        UserError: the norms differ.
    """
    norms = sorted({run.header.norm for run in runs})
    if len(norms) > 1:
        raise UserError(f"runs with radii in different norms ({', '.join(norms)}); show them separately")
    return norms[0]


def curves(runs: Sequence[Run], given: Sequence[str] = (), *, short: bool = False) -> list[Curve]:
    """Return a curve per run, with the given names or those of :func:`names`.

    Raises:
        UserError: more or fewer names than runs, radii in different norms, or labelled and unlabelled runs together.
    """
    common_norm(runs)
    if given and len(given) != len(runs):
        raise UserError(f"{len(given)} names for {len(runs)} runs: expected --name once per run, in the same order")
    named = [curve(run, name) for run, name in zip(runs, given or names(runs, short=short), strict=True)]
    if len({c.labelled for c in named}) > 1:
        plain = next(c.run.path for c in named if not c.labelled)
        raise UserError(f"{plain} has no labels and others have: they cannot be compared; show them separately")
    return named


NAMING = ("data", "denoiser", "noise", "n", "alpha", "bound", "seed")
"""Header keys that distinguish runs, besides model and sigma."""


def names(runs: Sequence[Run], keys: Sequence[str] = NAMING, *, short: bool = False) -> list[str]:
    """Name each run by model, sigma and those of ``keys`` that differ; missing keys (published logs) do not count.

    With ``short``, model and sigma are left out too where several runs share them.
    """
    differing = [k for k in keys if k != "model" and len(_values(runs, k)) > 1]
    shared = {k for k in ("model", "sigma") if short and len(runs) > 1 and len(_values(runs, k)) == 1}
    shared = shared if differing or len(shared) < 2 else set()
    data = _values(runs, "data")
    short = len({Path(name).name for name in data}) == len(data)

    def name(run: Run) -> str:
        header = run.header
        parts = [] if "model" in shared else [header.model if header.has("model") else run.path.stem]
        if header.has("sigma") and "sigma" not in shared:
            parts.append(f"σ = {header.sigma:g}")
        if header.has("noise") and header.noise != "gaussian" and "noise" not in differing:
            parts.append(f"{header.noise} noise")
        for key in differing:
            value = _denoiser(header) if key == "denoiser" else header.get(key)
            if key == "data" and value is not None and short:
                value = Path(value).name
            if value is not None and value != "none":
                parts.append(value if isinstance(value, str) else f"{key} = {number(value)}")
        return ", ".join(parts)

    every = [name(run) for run in runs]
    return [f"{n} ({run.path.stem})" if every.count(n) > 1 else n for n, run in zip(every, runs, strict=True)]


def _values(runs: Sequence[Run], key: str) -> set[str]:
    """Return the values of a key in the headers that have it, as text."""
    return {str(run.header[key]) for run in runs if run.header.get(key) is not None}


def _denoiser(header: RunHeader) -> str | None:
    """Return the requested denoiser, or the one that ``auto`` chose."""
    requested = header.denoiser
    steps = header.pipeline if requested == "auto" else ()
    return next((step.get("name", requested) for step in steps if step.get("step") == "denoiser"), requested)


def number(value: float | int) -> str:
    """Format a setting for a legend or caption."""
    return f"{value:,}" if isinstance(value, int) else exact(value)


def default_radii(largest: float) -> list[float]:
    """Return a few round radii from 0 up to the largest possible one."""
    for step in (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0):
        if largest <= 6 * step:
            return [round(i * step, 4) for i in range(int(largest / step) + 1)]
    return [0.0, largest / 2, largest]


def table_radii(run: Run) -> list[float]:
    """Return the radii of a run's table: those to decide, or round numbers up to the largest possible radius."""
    from certify.smoothing.certificates import largest_radius

    header = run.header
    if header.radii:
        return list(header.radii)
    noise, selected = header.radii_for(run.usable[0].size), header.stopping is None
    return default_radii(largest_radius(noise, header.n, header.alpha, header.bound, selected=selected))
