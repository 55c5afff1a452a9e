"""Test certificates by attacks: an image within the certified radius with another smoothed prediction is an error.

A certificate is about the smoothed classifier g, which cannot be evaluated exactly: votes only estimate it. An attack
that changed the votes, or the base classifier, therefore refutes nothing. What counts is PREDICT at the attacked image:
a class that a binomial test separates from the runner-up, or an abstention, which contradicts nothing.

Both sides can be wrong by chance: each certificate with probability at most ``alpha`` of its run, each prediction with
its own. One contradiction at alpha = 0.001 among thousands of images is to be expected; more indicate a bug.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from certify.errors import RunFault, UserError
from certify.runs.run_file import Run
from certify.smoothing.bounds import check_alpha
from certify.smoothing.rounding import exact
from certify.types import ABSTAIN

if TYPE_CHECKING:
    from torch import Tensor

    from certify.smoothed_classifier import SmoothedClassifier


@dataclass(frozen=True)
class Crossing:
    """Prediction of the smoothed classifier at an attacked image.

    Attributes:
        id: id of the image, as in the run file.
        norm: norm of the distance.
        distance: distance from the certified image.
        prediction: result of PREDICT, a class or ``ABSTAIN``.
        alpha: maximum probability that the class is wrong.
    """

    id: str
    norm: str
    distance: float
    prediction: int
    alpha: float


@dataclass(frozen=True)
class Contradiction:
    """A certificate and a prediction that cannot both be right.

    Attributes:
        id: id of the image.
        norm: norm of radius and distance.
        radius: certified radius.
        distance: distance of the attacked image, below the radius.
        certified: certified class.
        predicted: class predicted at the attacked image.
        chance: maximum probability that one of the two is wrong by chance.
    """

    id: str
    norm: str
    radius: float
    distance: float
    certified: int
    predicted: int
    chance: float

    def __str__(self) -> str:
        return (
            f"image {self.id}: class {self.certified} is certified within {self.norm} {exact(self.radius)}, and at "
            f"{exact(self.distance)} the smoothed classifier predicts class {self.predicted} (by chance with "
            f"probability at most {exact(self.chance)})"
        )


def crossing(
    smoothed: SmoothedClassifier,
    image_id: str,
    clean: Tensor,
    attacked: Tensor,
    *,
    n: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
) -> Crossing:
    """Predict the smoothed class of an attacked image; the distance is in l2.

    Args:
        smoothed: the certified classifier.
        image_id: as in the run file.
        clean: the certified image, ``(C, H, W)``.
        attacked: the attacked image.
        n: number of votes, from a separate noise stream.
        alpha: maximum probability that the class is wrong.
        seed: seed of the noise.
    """
    from analysis.comparison.attacked import (
        distances,
    )  # lazily: it imports torch, which reading a comparison does not need

    alpha = check_alpha(alpha)
    near, far = (
        smoothed.noise.input(clean),
        smoothed.noise.input(attacked),
    )  # rounded where the noise is defined on a grid
    predicted = smoothed.predict(attacked, n=n, alpha=alpha, seed=seed, image_id=f"{image_id} attacked")
    return Crossing(image_id, "l2", float(distances(far[None], near[None], "l2")), predicted.prediction, alpha)


def contradictions(run: Run, crossings: Sequence[Crossing]) -> list[Contradiction]:
    """Return the certificates that an attacked image refutes; a distance equal to the radius refutes nothing.

    Args:
        run: run with radii.
        crossings: predictions at attacked images; there may be several per image.

    Raises:
        UserError: an image that is not in the run, or a distance in another norm than the radii.
    """
    rows = {row.id: row for row in run.usable}
    norm, alpha = run.header.norm, run.header.alpha if run.header.has("alpha") else 0.0
    wrong = []
    for one in crossings:
        if one.norm != norm:
            raise UserError(f"distance of image {one.id} is in {one.norm}, radii of {run.path} in {norm}")
        if one.id not in rows:
            raise UserError(f"image {one.id!r} was attacked, but {run.path} does not contain it")
        row = rows[one.id]
        certified, radius = row.prediction, row.radius or 0.0
        if certified != ABSTAIN and one.prediction not in (ABSTAIN, certified) and one.distance < radius:
            chance = alpha + one.alpha
            wrong.append(Contradiction(one.id, norm, radius, one.distance, certified, one.prediction, chance))
    return wrong


def require_none(run: Run, crossings: Sequence[Crossing]) -> None:
    """Check that no attack refutes a certificate.

    Raises:
        RunFault: some are refuted; the message names image, radius and distance of each.
    """
    wrong = contradictions(run, crossings)
    if wrong:
        raise RunFault(
            f"{run.path}: {len(wrong)} of {len(crossings)} attacks refute a certificate: " + "; ".join(map(str, wrong))
        )
