"""Lower bound on the expected accuracy of all images together under attack: from a run file to its table and figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.curves import Curve, curve, default_radii, is_labelled
from analysis.figures import COLOURS, add_legend, canvas, literal
from analysis.plots import steps
from analysis.tables import render
from certify.errors import UserError
from certify.results import Plot, Table, check_radii
from certify.runs.records import ImageRow
from certify.runs.run_file import Run
from certify.smoothing.dataset_accuracy import DatasetAccuracy, dataset_accuracy
from certify.smoothing.norms import IN_TEX, IN_WORDS
from certify.smoothing.rounding import exact, floor_to
from certify.types import FAILED, WorstCase

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEGLIGIBLE, _FAR = 0.01, 1e6  # the table and the figure end where the bound is below, or at this radius


@dataclass(frozen=True)
class AccuracyBound:
    """A lower bound on the expected accuracy of the randomised classifier, without and under attack.

    The randomised classifier answers each request from one fresh noisy copy of the image. With probability at least
    1 - alpha, the bounds at all radii hold at once (:mod:`certify.smoothing.dataset_accuracy`). Nothing is said about a
    single image.

    Attributes:
        run: its votes.
        result: counts, alpha, and the bound without an attack.
        noise: gives the bound under attack, in the norm of the run.
        labelled: True for accuracy; False for agreement with the base classifier's own answers to the clean images.
        missing: images without a result, which count as wrong.
    """

    run: Run
    result: DatasetAccuracy
    noise: WorstCase
    labelled: bool
    missing: int

    @property
    def lower(self) -> float:
        """Bound without an attack, in [0, 1]."""
        return self.result.lower

    def under_attack(self, radius: float) -> float:
        """Return the bound if every image is changed by at most ``radius``, in the run's norm and [0, 1] pixels.

        Raises:
            UserError: a negative radius, or a noise that does not state it.
        """
        return self.result.under_attack(radius, self.noise)

    @property
    def quantity(self) -> str:
        """Name of what is bounded."""
        return "expected accuracy" if self.labelled else "expected agreement"

    @property
    def reach(self) -> float:
        """Radius at which the bound is nearly 0: where tables and figures end."""
        low, high = 0.0, 1.0
        if self.lower <= _NEGLIGIBLE:
            return 0.0
        while self.under_attack(high) > _NEGLIGIBLE and high < _FAR:
            low, high = high, 2 * high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.under_attack(middle) > _NEGLIGIBLE else (low, middle)
        return high

    def radii(self, given: Sequence[float] | None = None) -> list[float]:
        """Return the radii of a table: those given, or round numbers up to where the bound is nearly 0."""
        return default_radii(self.reach) if given is None else check_radii(given)

    def table(self, radii: Sequence[float] | None = None, *, beside: Run | None = None, style: str = "text") -> Table:
        """Return the table of the bound over the radius, next to the certified accuracy of the majority vote.

        Args:
            radii: in [0, 1] pixels.
            beside: run of certificates; None: this run, if its images have radii.
            style: ``"text"``, ``"markdown"``, ``"latex"`` or ``"csv"``.

        Raises:
            UserError: radii below 0, an unknown style, or a run that is not comparable with this one.
        """
        radii, other = self.radii(radii), self.majority(beside)
        header = [f"{IN_WORDS[self.run.header.norm]} radius", f"{self.quantity} >="]
        rows = [[exact(r), self._cell(self.under_attack(r), style)] for r in radii]
        if other is not None:
            header.append(f"majority vote: {other.quantity} ({other.total} images)")
            for row, r, share in zip(rows, radii, other.accuracy(radii), strict=True):
                row.append("≥ " * other.at_least(r) + self._cell(float(share), style))
        return Table(render(header, rows, style))

    @staticmethod
    def _cell(value: float, style: str) -> str:
        return repr(value) if style == "csv" else floor_to(value, 3)

    def majority(self, beside: Run | None) -> Curve | None:
        """Return the certified accuracy of the majority vote; None if there is no run of it.

        Raises:
            UserError: radii in another norm, or a run without radii.
        """
        if beside is None:
            return None if self.run.header.without_radii else curve(self.run)
        if why := beside.header.without_radii:
            raise UserError(f"{beside.path} {why}; expected a run of `certify --model ...`")
        other = curve(beside)
        if other.norm != self.run.header.norm:
            raise UserError(f"{beside.path} has {other.norm} radii, and {self.run.path} {self.run.header.norm}")
        return other

    def plot(self, path: str | Path | None = None, *, beside: Run | None = None, title: str | None = None) -> Plot:
        """Plot the bound over the radius, with the certified accuracy of the majority vote, and return the plot.

        Args:
            path: of the picture to write, such as ``"curve.png"``; None writes none.
            beside: as for :meth:`table`.
            title: above the axes.

        Raises:
            UserError: as for :meth:`table`, or a format that cannot be written.
            RunFault: the file cannot be written.
        """
        other, norm = self.majority(beside), self.run.header.norm
        with canvas(4.8, 3.3, path, title=title) as (figure, axes):
            radii = np.linspace(0.0, self.reach or 1.0, 200)
            bound = [self.under_attack(float(r)) for r in radii]
            axes.plot(radii, bound, color=COLOURS[0], lw=1.6, label=f"{self.quantity}, one noisy copy, at least")
            if other is not None:
                _add_majority(axes, other)
            axes.set(xlim=(0, None), ylim=(0, 1.0), ylabel=self.quantity)
            axes.set_xlabel(f"{IN_TEX[norm]} radius (images in [0, 1] pixels)")
            add_legend(figure, axes, 1, alignment="left")
        return Plot(figure)

    def statement(self) -> str:
        """Say in plain words what is promised, and what is not."""
        result, norm = self.result, IN_WORDS[self.run.header.norm]
        about, over = "each of these images", "the noise"
        if result.population:
            about, over = "random images of the population that these were drawn from", "the noise and the images drawn"
        right = "right" if self.labelled else "the same as for the clean image"
        return (
            "A classifier that answers every request from one fresh noisy copy of the image is queried once about "
            f"{about}. The expected share of its answers that are {right} is at least the bound at r, even if an "
            f"attacker who does not know the noise of the request changes each image by at most r ({norm} norm). "
            f"Except with probability at most {exact(result.alpha)} over {over}, this is true at all r at once. "
            "It is a mean: nothing is said about a single image, nor about the majority vote."
        )

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        return self.table()._repr_html_()

    def to_dict(self, radii: Sequence[float] | None = None, beside: Run | None = None) -> dict[str, object]:
        """Return everything as JSON; the majority vote at those radii where its certified accuracy is known."""
        radii, other, result = self.radii(radii), self.majority(beside), self.result
        known = [r for r in radii if other is not None and not other.at_least(r)]
        return {
            "run": str(self.run.path),
            "norm": self.run.header.norm,
            "images": result.images,
            "draws": result.draws,
            "correct": result.correct,
            "missing": self.missing,
            "alpha": result.alpha,
            "population": result.population,
            "quantity": self.quantity,
            "lower": result.lower,
            "under_attack": {exact(r): self.under_attack(r) for r in radii},
            "majority_vote": other and {exact(r): float(a) for r, a in zip(known, other.accuracy(known), strict=True)},
        }


def _add_majority(axes: Axes, other: Curve) -> None:
    """Add the certified accuracy of the majority vote: steps, or points at the radii that were decided."""
    label = literal(f"{other.quantity}, majority vote of n = {other.run.header.n:,}")
    if other.decided:
        axes.plot(other.decided, other.accuracy(other.decided), "o", color=COLOURS[1], ms=4, label=label)
        return
    radii, certified = steps(other)
    axes.step(radii, certified / other.total, where="pre", color=COLOURS[1], lw=1.6, label=label)


def accuracy_bound(run: Run, *, alpha: float | None = None, population: bool | None = None) -> AccuracyBound:
    """Bound the expected accuracy under attack from the votes of a run with a fixed number of samples.

    All samples of its last stage count. An image without a result, and a sample without an answer, count as wrong.

    Args:
        run: of ``certify accuracy``, or of certificates or predictions at a fixed n; or an audit's.
        alpha: failure probability of the whole statement; None takes the run's.
        population: True if the images are a random sample and the statement is about their population; False if it is
            about these images; None takes the run's choice, or False.

    Raises:
        UserError: a run that stopped early, which biases the shares; one without votes; labels for some images only.
    """
    header, rows = run.header, run.usable
    if not header.has("noise") or not all(row.has("votes") for row in rows):
        raise UserError(f"{run.path} holds no noise and votes, like published logs; expected a run file of certify")
    if header.stopping is not None:
        raise UserError(
            f"{run.path} stopped sampling each image once its votes had settled it, which biases their share; expected "
            "a run with a fixed n, such as of `certify accuracy`"
        )
    other = next((row for row in rows if row.trials != header.n), None)
    if other is not None:
        raise UserError(f"{run.path}: image {other.id!r} has {other.trials:,} samples; expected n = {header.n:,}")
    labelled = is_labelled(run)
    own = header.reference is not None and header.reference.labels == "service"
    correct = [row.estimation_votes.of(_target(row)) for row in rows]
    missing = header.expected - len(rows)
    return AccuracyBound(
        run,
        dataset_accuracy(
            correct + [0] * missing,
            draws=header.n,
            alpha=header.alpha if alpha is None else alpha,
            population=getattr(header.procedure, "population", False) if population is None else population,
        ),
        _noise(run, rows),
        labelled=labelled and not own,
        missing=missing,
    )


def _target(row: ImageRow) -> int:
    """Return the class that counts as correct: the label, or the answer to the clean image."""
    if row.label is not None:
        return row.label
    base = row.get("base")
    return FAILED if base is None else int(base)


def _noise(run: Run, rows: Sequence[ImageRow]) -> WorstCase:
    """Return the noise in the run's norm; an implied norm gives the least for the largest image."""
    sizes = [row.size for row in rows]
    known = [size for size in sizes if size is not None]
    noise = run.header.radii_for(max(known, default=1) if len(known) == len(sizes) else None)
    if not isinstance(noise, WorstCase):
        raise UserError(f"noise {run.header.noise!r} has no worst_case(p, radius), which this statement needs")
    return noise
