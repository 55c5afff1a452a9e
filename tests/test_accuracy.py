"""``certify accuracy`` and ``certify.accuracy``: half-spaces whose attacked accuracy is known, and run files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

import certify
from analysis.accuracy_bound import accuracy_bound
from certify import UserError
from certify.runs.run_file import read_run
from certify.smoothing.dataset_accuracy import dataset_accuracy
from certify.smoothing.noise import make_noise
from tests.command import rows_without_seconds, run, run_of_json

SIGMA, SIDE = 0.25, 4
PLAIN: Any = {"precision": "float32", "compile": "off", "batch_size": 500, "progress": False}
DIGITS = "--model digits --data digits --skip 25 --sigma 0.25 --precision float32 --compile off --batch-size 500"


class HalfSpace(nn.Module):
    """Class 1 where the mean exceeds 1/2: the distance to the boundary is |mean - 1/2| * SIDE."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def half_space_images(margins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images at these distances from the boundary on the side of their labels, which alternate."""
    labels = torch.arange(len(margins)) % 2
    means = 0.5 + (2 * labels - 1) * margins / SIDE
    return means[:, None, None, None].expand(-1, 1, SIDE, SIDE).float(), labels


def half_space_accuracy(margins: torch.Tensor, radius: float) -> float:
    """The expected accuracy under the best attack within ``radius``, which goes straight to the boundary."""
    return float(norm.cdf((margins.double().numpy() - radius) / SIGMA).mean())


@pytest.mark.parametrize(
    ("draws", "population"),
    [(1, False), *(pytest.param(d, p, marks=pytest.mark.slow) for d, p in ((3, False), (1, True), (3, True)))],
)
def test_the_bound_is_below_the_known_attacked_accuracy(draws: int, population: bool) -> None:
    """From the network to the bound, at alpha = 0.2 with 30 seeds: wrong at most as often as alpha allows (plus four
    standard errors), and close to the truth, because all images have the same margin.
    """
    margins = torch.full((150,), 0.3)
    images, labels = half_space_images(margins)
    g = certify.SmoothedClassifier(HalfSpace(), SIGMA, batch_size=500)
    runs = [
        certify.accuracy(g, images, labels, draws=draws, alpha=0.2, population=population, seed=seed, progress=False)
        for seed in range(30)
    ]
    for radius in (0.0, 0.1, 0.3):
        truth = half_space_accuracy(margins, radius)
        bounds = np.array([bound.under_attack(radius) for bound in runs])
        assert np.mean(bounds > truth) <= 0.2 + 4 * math.sqrt(0.2 * 0.8 / 30)
        assert truth - np.median(bounds) < 0.12
    assert bounds.max() > bounds.min()  # other seeds, other noise


def test_attacked_images_are_answered_as_often_as_the_bound_says() -> None:
    """The images are really moved by r, against their labels, and answered 400 times each."""
    margins, radius = 0.1 + 0.4 * torch.rand(100, generator=torch.Generator().manual_seed(1)), 0.15
    images, labels = half_space_images(margins)
    bound = certify.accuracy(HalfSpace(), images, labels, sigma=SIGMA, **PLAIN)
    moved, _ = half_space_images(margins - radius)
    assert torch.linalg.vector_norm(moved - images, dim=(1, 2, 3)).max() <= radius + 1e-6
    attacked = certify.accuracy(HalfSpace(), moved, labels, sigma=SIGMA, draws=400, seed=1, **PLAIN)
    share = attacked.result.correct / (400 * 100)
    assert share == pytest.approx(half_space_accuracy(margins, radius), abs=0.01)
    assert bound.under_attack(radius) <= share
    assert 0.0 < bound.under_attack(radius) < bound.lower


def test_python_and_the_command_agree_and_an_interrupted_run_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "command.jsonl", tmp_path / "python.jsonl"
    words = [*DIGITS.split(), "--draws", "2", "--alpha", "0.01", "--quiet"]
    run("accuracy", *words, "--json", "--out", str(theirs))
    result = json.loads(capsys.readouterr().out)
    bound = certify.accuracy("digits", "digits", skip=25, sigma=0.25, draws=2, alpha=0.01, out=ours, **PLAIN)
    assert rows_without_seconds(ours) == rows_without_seconds(theirs)
    assert read_run(ours).header.procedure == read_run(theirs).header.procedure == bound.run.header.procedure
    assert (result["lower"], result["correct"], result["images"]) == (bound.lower, bound.result.correct, 20)
    assert result["under_attack"] == {f"{r:g}": bound.under_attack(r) for r in bound.radii()}
    assert Path(result["curve"]).read_bytes().startswith(b"\x89PNG")

    torn = tmp_path / "torn.jsonl"
    lines = theirs.read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[:8]) + lines[8][:30])
    run("accuracy", *words, "--out", str(torn))
    assert rows_without_seconds(torn) == rows_without_seconds(theirs)
    assert capsys.readouterr().out.count("expected accuracy >=") == 1

    run("accuracy", str(theirs), "--json", "--population", "--alpha", "0.3")
    again = json.loads(capsys.readouterr().out)
    assert (again["population"], again["alpha"]) == (True, 0.3)
    assert again["lower"] == certify.read_run(theirs).accuracy_bound(alpha=0.3, population=True).lower


def test_shards_are_merged_and_another_alpha_is_recomputed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = certify.accuracy("digits", "digits", skip=25, sigma=0.25, population=True, **PLAIN)
    parts = [str(tmp_path / f"{i}.jsonl") for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        run("accuracy", *DIGITS.split(), "--population", "--shard", f"{i}/2", "--quiet", "--out", part)
    capsys.readouterr()
    run("merge", *parts, "-o", str(tmp_path / "merged.jsonl"))
    assert str(whole.table()) in capsys.readouterr().out
    run("recompute", str(tmp_path / "merged.jsonl"), "--alpha", "0.05", "--json")
    again = json.loads(capsys.readouterr().out)
    assert again["population"]
    assert (
        again["lower"]
        == dataset_accuracy(
            [1] * whole.result.correct + [0] * (20 - whole.result.correct), alpha=0.05, population=True
        ).lower
    )


def test_all_estimation_votes_of_certificates_and_predictions_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The certificates stand beside the bound from their own votes, and that from another run."""
    path = tmp_path / "certified.jsonl"
    run(*DIGITS.split(), "--n", "200", "--quiet", "--out", str(path))
    certified = certify.read_run(path)
    votes = [row.votes.get(str(row.label), 0) for row in certified]
    bound = certified.accuracy_bound()
    assert bound.result == dataset_accuracy(votes, draws=200)
    assert (bound.labelled, bound.missing) == (True, 0)
    capsys.readouterr()
    run("accuracy", str(path), "--radii", "0,0.25")
    table = capsys.readouterr().out
    assert "majority vote: certified accuracy (20 images)" in table
    for radius in (0.0, 0.25):
        shares = (bound.under_attack(radius), certified.certified_accuracy(radius))
        row = [f"{radius:g}", *(f"{math.floor(1000 * share) / 1000:.3f}" for share in shares)]
        assert row in [line.split() for line in table.splitlines()]
    assert (tmp_path / "certified-accuracy.png").exists()
    few = certify.accuracy("digits", "digits", skip=25, sigma=0.25, **PLAIN)
    assert "majority vote" not in few.table()
    assert "majority vote" in few.table(beside=certified)
    decided = certify.certify("digits", "digits", skip=25, sigma=0.25, radius=0.25, **PLAIN)
    assert "≥ " in few.table([0, 0.25], beside=decided)
    few.plot(tmp_path / "beside.svg", beside=decided)
    predicted = certify.predict("digits", "digits", skip=25, sigma=0.25, n=100, **PLAIN)
    votes = [row.votes.get(str(row.label), 0) for row in predicted]
    assert predicted.accuracy_bound().result == dataset_accuracy(votes, draws=100)


def test_without_labels_it_is_agreement_with_the_clean_answers() -> None:
    images, labels = half_space_images(torch.linspace(-0.2, 0.4, 30))  # some images are misclassified
    labelled = certify.accuracy(HalfSpace(), images, labels, sigma=SIGMA, **PLAIN)
    bound = certify.accuracy(HalfSpace(), images, sigma=SIGMA, **PLAIN)
    assert not bound.labelled
    assert "expected agreement" in bound.table()
    assert "clean image" in bound.statement()
    clean = HalfSpace()(images).argmax(1).tolist()
    votes = [row.votes.get(str(base), 0) for row, base in zip(bound.run.images, clean, strict=True)]
    assert bound.result.correct == sum(votes) != labelled.result.correct


HEADER = {
    "type": "run", "expected": 4, "model": "m", "data": "d", "noise": "gaussian", "norm": "l2", "sigma": 0.25,
    "procedure": "accuracy", "n0": 0, "n": 2, "alpha": 0.01, "bound": "fixed-list", "stopping": None,
}  # fmt: skip


def row(name: str, votes: dict[str, int], failures: int = 0, **others: Any) -> dict[str, Any]:
    keys = {"label": 1, "prediction": -1, "radius": None, "p_lower": None, "selection": {}, "seconds": 0.0, "base": 1}
    return {"type": "image", "id": name, "votes": votes, "failures": failures,
            "trials": sum(votes.values()) + failures, **keys, **others}  # fmt: skip


def test_failures_and_images_without_a_result_count_as_wrong() -> None:
    rows = [row("a", {"1": 2}), row("b", {"0": 1, "1": 1}), row("c", {"1": 1}, failures=1)]
    bound = accuracy_bound(run_of_json("r.jsonl", HEADER, rows))
    assert bound.result == dataset_accuracy([2, 1, 1, 0], draws=2, alpha=0.01)
    assert bound.missing == 1
    unusable = row("d", {}, error="cannot be read")
    assert accuracy_bound(run_of_json("r.jsonl", HEADER, [*rows, unusable])).result == bound.result


@pytest.mark.parametrize(
    ("header", "rows", "expected"),
    [
        ({"stopping": {"rule": "betting", "radii": [0.1], "tolerance": None}}, [], "biases their share"),
        ({}, [row("a", {"1": 1})], "'a' has 1 samples; expected n = 2"),
        ({}, [row("a", {"1": 2}), row("b", {"1": 2}, label=None)], "1 of 2 images have labels"),
        ({"alpha": 0.3}, [], "less than 0.25"),
    ],
)
def test_runs_that_do_not_support_the_statement(
    header: dict[str, Any], rows: list[dict[str, Any]], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        accuracy_bound(run_of_json("r.jsonl", HEADER | header, rows))


def test_an_implied_norm_gives_the_bound_of_the_largest_image() -> None:
    rows = [row(name, {"1": 2}, values=size) for name, size in (("a", 16), ("b", 64), ("c", 16), ("d", 16))]
    bound = accuracy_bound(run_of_json("r.jsonl", HEADER | {"norm": "linf"}, rows))
    gaussian: Any = make_noise("gaussian", 0.25)
    assert bound.under_attack(0.01) == pytest.approx(gaussian.worst_case(bound.lower, 0.01 * 8))


@pytest.mark.parametrize("noise", ["exact", "uniform", "laplace"])
def test_other_noises_state_their_own_bound(noise: str) -> None:
    bound = certify.accuracy("digits", "digits", skip=25, sigma=0.25, noise=noise, rounded=noise == "exact", **PLAIN)
    assert 0.0 < bound.under_attack(0.5 * bound.reach) < bound.lower
    assert bound.under_attack(bound.reach) <= 0.01


def test_what_has_no_radii_is_not_drawn_as_certificates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bound = certify.accuracy("digits", "digits", skip=100, sigma=0.25, out=tmp_path / "a.jsonl", **PLAIN)
    assert "5 images" in repr(bound.run)
    with pytest.raises(UserError, match="about all images together"):
        certify.Run.of(bound.run).table()
    run("table", str(tmp_path / "a.jsonl"), code=2)
    assert "see `certify accuracy`" in capsys.readouterr().err
