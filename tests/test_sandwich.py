"""A certificate stands unless the smoothed classifier significantly says otherwise, nearer than the radius."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from command import run_of_json

from analysis.adversarial_noise import noise_statistics
from analysis.comparison.sandwich import Crossing, contradictions, crossing, require_none
from certify import SmoothedClassifier
from certify.errors import RunFault, UserError
from certify.runs.run_file import Run
from certify.types import ABSTAIN

SHAPE = (1, 6, 6)
WEIGHT = torch.ones(36)
CLEAN = torch.full(SHAPE, 0.45)


def run_of(*rows: tuple[str, int, float], norm: str = "l2", **header: Any) -> Run:
    images = [{"type": "image", "id": i, "label": 0, "prediction": p, "radius": r} for i, p, r in rows]
    return run_of_json("run.jsonl", {"norm": norm, "alpha": 0.001, "expected": len(rows), **header}, images)


def at(distance: float, prediction: int = 1, image: str = "a", norm: str = "l2") -> Crossing:
    return Crossing(image, norm, distance, prediction, 0.001)


@pytest.mark.parametrize(
    ("found", "refuted"),
    [
        (at(0.49), True),
        (at(0.5), False),  # the certificate is about distances below the radius
        (at(0.51), False),
        (at(0.49, prediction=0), False),
        (at(0.0), True),
        (at(0.1, prediction=ABSTAIN), False),  # the vote was not significant: nothing is known
        (at(0.1, image="abstained"), False),
    ],
)
def test_conditions_under_which_a_certificate_is_refuted(found: Crossing, refuted: bool) -> None:
    run = run_of(("a", 0, 0.5), ("abstained", ABSTAIN, 0.0))
    wrong = contradictions(run, [found])
    assert bool(wrong) == refuted
    if refuted:
        assert (wrong[0].id, wrong[0].radius, wrong[0].distance) == ("a", 0.5, found.distance)
        assert wrong[0].chance == 0.002


def test_the_error_names_image_radius_and_distance() -> None:
    run = run_of(("a", 0, 0.5), ("b", 1, 0.25))
    require_none(run, [at(0.6), at(0.3, 0, "b")])
    with pytest.raises(
        RunFault, match=r"1 of 2 attacks .* image b: class 1 is certified within l2 0.25, and at 0.125 "
    ):
        require_none(run, [at(0.6), at(0.125, 0, "b")])


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"image 'c' was attacked, but run.jsonl does not contain it"):
        contradictions(run_of(("a", 0, 0.5)), [at(0.1, image="c")])
    with pytest.raises(UserError, match=r"distance of image a is in linf, radii of run.jsonl in l2"):
        contradictions(run_of(("a", 0, 0.5)), [at(0.1, norm="linf")])


def test_a_linear_classifier_is_sandwiched(linear_classifier: Any) -> None:
    """The true radius is known: beyond it the smoothed classifier changes, before it not; a false radius shows."""
    base = linear_classifier(WEIGHT, 18.0)  # class 1 where the mean exceeds a half
    smoothed = SmoothedClassifier(base, sigma=0.25)
    truth = base.radius(CLEAN)
    certificate = smoothed.certify(CLEAN, n0=50, n=2000, image_id="a")
    assert certificate.prediction == 0
    assert 0 < certificate.radius < truth
    step = WEIGHT.view(SHAPE) / WEIGHT.norm()
    beyond = crossing(smoothed, "a", CLEAN, CLEAN + 1.5 * truth * step, n=2000)
    before = crossing(smoothed, "a", CLEAN, CLEAN + 0.5 * truth * step, n=2000)
    assert (beyond.prediction, before.prediction) == (1, 0)
    assert beyond.distance == pytest.approx(1.5 * truth, rel=1e-5)
    assert crossing(smoothed, "a", CLEAN, CLEAN + truth * step, n=2000).prediction == ABSTAIN
    run = run_of(("a", certificate.prediction, certificate.radius))
    assert contradictions(run, [beyond, before]) == []
    false = run_of(("a", certificate.prediction, 2 * truth))
    assert [c.distance for c in contradictions(false, [beyond, before])] == [beyond.distance]


def test_statistics_of_known_noises() -> None:
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    clean = torch.full((4, 3, 8, 8), 0.5, dtype=torch.float64)
    noise = torch.zeros_like(clean)
    noise[0] = 0.1
    noise[1] = 0.1 * (-1.0) ** (rows + columns)
    noise[2, 0, 0, 0] = 0.3
    noise[3] = 0.1 * torch.cos(2 * torch.pi * columns.double() / 4)  # a quarter of a cycle a pixel
    found = noise_statistics(clean + noise, clean, rings=8)
    assert found.mean.tolist() == pytest.approx([0.1, 0, 0.3 / 192, 0], abs=1e-12)
    assert found.std[1:].tolist() == pytest.approx([0.1, 0.3 * (191**0.5) / 192, 0.1 / 2**0.5])
    assert found.skewness[[1, 3]].abs().max() < 1e-9
    assert float(found.skewness[2]) == pytest.approx((192 - 2) / 191**0.5)  # of one value among 192
    assert found.power.sum(1).tolist() == pytest.approx(noise.flatten(1).pow(2).sum(1).tolist())
    whole = found.power / found.power.sum(1, keepdim=True)
    assert float(whole[0, 0]) == pytest.approx(1)
    assert float(whole[1, -1]) == pytest.approx(1)
    assert float(whole[3, int((found.frequency < 0.25).sum())]) == pytest.approx(1)
    assert int(found.waves.sum()) == 64
    assert int(found.waves[0]) == 1
    assert whole[2].tolist() == pytest.approx((found.waves / 64).tolist())  # a spike is white
    with pytest.raises(UserError, match=r"expected \(B, C, H, W\) twice"):
        noise_statistics(clean, clean[:2])
