"""Certified accuracy as a function of the radius, with its interval over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from certify.errors import UserError
from certify.runs.run_file import Run
from certify.smoothing.numeric import as_float
from certify.smoothing.rounding import exact


@dataclass(frozen=True)
class Curve:
    """What one run certifies.

    Certified accuracy at r: the share of images whose prediction is right and whose radius is at least r. Images
    without labels give the certified fraction instead: a radius of at least r, whatever the class.

    Attributes:
        run: where it comes from.
        name: its line in a legend or table.
        radii: sorted radii of the images that count (right, not abstained), in [0, 1] pixels.
        total: images in the average.
        labelled: whether this is accuracy.
    """

    run: Run
    name: str
    radii: np.ndarray
    total: int
    labelled: bool

    def successes(self, radii: Sequence[float] | np.ndarray) -> np.ndarray:
        """How many images are certified (and right) at each radius."""
        return len(self.radii) - np.searchsorted(self.radii, np.asarray(radii, dtype=float), side="left")

    def accuracy(self, radii: Sequence[float] | np.ndarray) -> np.ndarray:
        """Certified accuracy at each radius, in [0, 1]."""
        return self.successes(radii) / self.total

    def interval(self, radii: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Exact (Clopper-Pearson) interval at each radius, for the images as a sample of what they stand for.

        Where the accuracy is only known to be at least what is counted, it has no upper end below 1.
        """
        low, high = proportion_interval(self.successes(radii), self.total, confidence)
        return low, np.where([self.at_least(float(r)) for r in radii], 1.0, high)

    @property
    def average_radius(self) -> float:
        """The average certified radius (ACR; Zhai et al. 2020): over all images, wrong ones and abstentions as 0.

        Of images that were decided or measured to a tolerance it is at least this.
        """
        return float(self.radii.sum() / self.total)

    @property
    def quantity(self) -> str:
        """What the vertical axis is called."""
        return "certified accuracy" if self.labelled else "certified fraction"

    @property
    def norm(self) -> str:
        """What the radii are measured in."""
        return str(self.run.header.get("norm", "l2"))

    @property
    def decided(self) -> list[float]:
        """The radii at which its images were decided; between them nothing was asked. Empty: every radius is known."""
        stopping = self.run.header.get("stopping") or {}
        return list(stopping.get("radii", ()))

    @property
    def stopped(self) -> bool:
        """Whether its images stopped by themselves, so that their radii may be larger than they say."""
        return bool(self.run.header.get("stopping"))

    def at_least(self, radius: float) -> bool:
        """Whether the accuracy at this radius is only known to be at least what is counted: nobody asked there."""
        return bool(self.decided) and radius not in self.decided

    @property
    def note(self) -> str:
        """What a reader must know: a partial run, images left out, radii that were never asked for."""
        parts = []
        if self.decided:
            parts.append("decided at r = " + ", ".join(map(exact, self.decided)))
        if self.run.partial:
            parts.append(f"partial: {len(self.run.images)} of {self.run.header['expected']}")
        left_out = len(self.run.images) - self.total
        if left_out:
            parts.append(f"{left_out} unreadable")
        return ", ".join(parts)


def proportion_interval(
    successes: np.ndarray | int, total: int, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Exact two-sided interval of proportions (Clopper and Pearson 1934)."""
    from scipy.special import betaincinv  # statsmodels has the same, and takes a second to import

    confidence = as_float(confidence, "confidence", "a number strictly between 0 and 1, such as 0.95")
    if not 0.0 < confidence < 1.0:
        raise UserError(f"confidence = {confidence}: expected a number strictly between 0 and 1, such as 0.95")
    tail, k = (1.0 - confidence) / 2, np.asarray(successes, dtype=float)
    low = np.where(k > 0, betaincinv(np.maximum(k, 1), total - k + 1, tail), 0.0)
    high = np.where(k < total, betaincinv(k + 1, np.maximum(total - k, 1), 1 - tail), 1.0)
    return low, high


def curve(run: Run, name: str = "") -> Curve:
    """The curve of one run.

    Raises:
        UserError: no usable image, some images with labels and some without, or an unfinished run whose images stop
            by themselves, unless they came in their order: those that are there are the easy ones.
    """
    if run.partial and run.header.get("stopping") and not run.header.get("in_order"):
        raise UserError(
            f"{run.path} is unfinished: {len(run.images)} of {run.header['expected']} images, and those that are "
            "settled soon come first, so their share would mislead; run its command again"
        )
    rows = run.usable
    if not rows:
        raise UserError(f"{run.path} holds no finished image yet")
    known = [row["label"] is not None for row in rows]
    if any(known) and not all(known):
        raise UserError(f"{run.path}: {sum(known)} of {len(rows)} images have labels; expected all or none")
    counted = [
        row["radius"] for row in rows if row["prediction"] >= 0 and (not known[0] or row["prediction"] == row["label"])
    ]
    return Curve(run, name, np.sort(np.asarray(counted, dtype=float)), len(rows), known[0])


def common_norm(runs: Sequence[Run]) -> str:
    """The norm that the radii of all these runs are in.

    Raises:
        UserError: there are several.
    """
    norms: list[str] = sorted({run.header.get("norm", "l2") for run in runs})
    if len(norms) > 1:
        raise UserError(f"runs with radii in different norms ({', '.join(norms)}); show them apart")
    return norms[0]


def curves(runs: Sequence[Run], given: Sequence[str] = ()) -> list[Curve]:
    """One curve a run, named as ``given`` says, or by what tells them apart.

    Raises:
        UserError: more or fewer names than runs, radii in different norms, or labelled and unlabelled runs together.
    """
    common_norm(runs)
    if given and len(given) != len(runs):
        raise UserError(f"{len(given)} names for {len(runs)} runs: expected --name once for each, in their order")
    found = [curve(run, name) for run, name in zip(runs, given or names(runs), strict=True)]
    if len({c.labelled for c in found}) > 1:
        plain = next(c.run.path for c in found if not c.labelled)
        raise UserError(f"{plain} has no labels and others have: accuracy and fraction do not compare; show them apart")
    return found


NAMING = ("data", "denoiser", "noise", "n", "alpha", "bound", "seed")
"""Header keys that tell runs apart, besides model and sigma."""


def names(runs: Sequence[Run], keys: Sequence[str] = NAMING) -> list[str]:
    """A legend for each run: its model and sigma, and whatever else of ``keys`` differs between the runs that say it.

    (Published logs say neither their data nor their bound.)
    """
    differing = [k for k in keys if k != "model" and len(_values(runs, k)) > 1]
    data = _values(runs, "data")
    short = len({Path(name).name for name in data}) == len(data)

    def name(run: Run) -> str:
        header = run.header
        parts = [str(header.get("model", run.path.stem))]
        if header.get("sigma") is not None:
            parts.append(f"σ = {header['sigma']:g}")
        if header.get("noise", "gaussian") != "gaussian" and "noise" not in differing:
            parts.append(f"{header['noise']} noise")
        for key in differing:
            value = _denoiser(header) if key == "denoiser" else header.get(key)
            if key == "data" and value is not None and short:
                value = Path(value).name
            if value is not None and value != "none":
                parts.append(value if isinstance(value, str) else f"{key} = {number(value)}")
        return ", ".join(parts)

    found = [name(run) for run in runs]
    return [f"{n} ({run.path.stem})" if found.count(n) > 1 else n for n, run in zip(found, runs, strict=True)]


def _values(runs: Sequence[Run], key: str) -> set[str]:
    """What those say that say it, as text: whatever a file holds there can be compared."""
    return {str(run.header[key]) for run in runs if run.header.get(key) is not None}


def _denoiser(header: Mapping[str, Any]) -> Any:
    """The denoiser as it was asked for, or what ``auto`` chose."""
    asked = header.get("denoiser")
    steps = header.get("pipeline") or () if asked == "auto" else ()
    return next((step.get("name", asked) for step in steps if step.get("step") == "denoiser"), asked)


def number(value: float | int) -> str:
    """A setting in a legend or caption."""
    return f"{value:,}" if isinstance(value, int) else exact(value)


def default_radii(largest: float) -> list[float]:
    """A handful of round radii from 0 up to the largest one that is possible."""
    for step in (0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0):
        if largest <= 6 * step:
            return [round(i * step, 4) for i in range(int(largest / step) + 1)]
    return [0.0, largest / 2, largest]
