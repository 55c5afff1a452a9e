"""Certificates against attacks: a certified radius above the distance of an image with another prediction is an error.

A certificate is about the smoothed classifier g, which nobody can evaluate: a vote only estimates it. An attack that
changed a vote, or the base classifier, has therefore shown nothing yet. What counts here is PREDICT at the attacked
image: a class that the binomial test tells from the runner-up, else an abstention, which contradicts nothing.

Both sides can err by chance: each certificate with probability ``alpha`` of its run, each prediction with its own. A
single contradiction at alpha = 0.001 among thousands of images is to be expected; one more than that is a bug.
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
    """What the smoothed classifier says about an attacked image.

    Attributes:
        id: of the image, as in the run file.
        norm: of the distance.
        distance: from the image that was certified.
        prediction: of PREDICT, a class or ``ABSTAIN``.
        alpha: probability that the class is wrong, at most.
    """

    id: str
    norm: str
    distance: float
    prediction: int
    alpha: float


@dataclass(frozen=True)
class Contradiction:
    """A certificate and an image that cannot both be right.

    Attributes:
        id: of the image.
        norm: of radius and distance.
        radius: certified for ``certified``.
        distance: at which ``found`` was predicted, less than the radius.
        certified: the certificate's class.
        found: the smoothed classifier's class at the attacked image.
        chance: probability that one of the two was wrong by chance, at most.
    """

    id: str
    norm: str
    radius: float
    distance: float
    certified: int
    found: int
    chance: float

    def __str__(self) -> str:
        return (
            f"image {self.id}: class {self.certified} is certified within {self.norm} {exact(self.radius)}, and at "
            f"{exact(self.distance)} the smoothed classifier predicts class {self.found} (by chance with probability "
            f"{exact(self.chance)} at most)"
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
    """Ask the smoothed classifier about an attacked image, by PREDICT; its distance is in l2.

    Args:
        smoothed: the one that was certified.
        image_id: as in the run file.
        clean: the image that was certified, ``(C, H, W)``.
        attacked: what an attack made of it.
        n: votes, from a noise stream of their own.
        alpha: probability that the class is wrong, at most.
        seed: of the votes.
    """
    from analysis.comparison.attacked import distances  # torch, which reading a comparison does without

    alpha = check_alpha(alpha)
    near, far = smoothed.noise.input(clean), smoothed.noise.input(attacked)  # rounded, where the noise is on a grid
    predicted = smoothed.predict(attacked, n=n, alpha=alpha, seed=seed, image_id=f"{image_id} attacked")
    return Crossing(image_id, "l2", float(distances(far[None], near[None], "l2")), predicted.prediction, alpha)


def contradictions(run: Run, found: Sequence[Crossing]) -> list[Contradiction]:
    """Every certificate of a run that an attacked image refutes; the radius itself is not within the certificate.

    Args:
        run: with radii.
        found: attacked images of it; several about one image are fine.

    Raises:
        UserError: an image that the run does not hold, or a distance in another norm than its radii.
    """
    rows = {row.id: row for row in run.usable}
    norm, alpha = run.header.norm, run.header.alpha if run.header.has("alpha") else 0.0
    wrong = []
    for one in found:
        if one.norm != norm:
            raise UserError(f"distance of image {one.id} is in {one.norm}, radii of {run.path} in {norm}")
        if one.id not in rows:
            raise UserError(f"image {one.id!r} was attacked, and {run.path} does not hold it")
        row = rows[one.id]
        certified, radius = row.prediction, row.radius or 0.0
        if certified != ABSTAIN and one.prediction not in (ABSTAIN, certified) and one.distance < radius:
            chance = alpha + one.alpha
            wrong.append(Contradiction(one.id, norm, radius, one.distance, certified, one.prediction, chance))
    return wrong


def require_none(run: Run, found: Sequence[Crossing]) -> None:
    """Stop where an attack refutes a certificate.

    Raises:
        RunFault: names image, radius and distance of each.
    """
    wrong = contradictions(run, found)
    if wrong:
        raise RunFault(
            f"{run.path}: {len(wrong)} of {len(found)} attacks refute a certificate: " + "; ".join(map(str, wrong))
        )
