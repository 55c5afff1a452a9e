"""A run's summary: numbers in context, and warnings of results that mislead."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from command import run

import certify
from analysis.curves import curve
from certify import load_classifier, load_images
from certify.errors import CertifyWarning
from certify.runs.records import ImageRow
from certify.runs.run_file import Run
from certify.runs.transaction import warn_of_results

OPTIONS = ["--model", "digits", "--data", "digits", "--sigma", "0.25", "--quiet", "--max", "12"]


def test_the_classifier_alone_stands_beside_the_denoised_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    run("run", *OPTIONS, "--n0", "10", "--n", "50", "--denoiser", "median", "--out", str(path))
    out = capsys.readouterr().out
    digits = load_classifier("digits")
    images = load_images("digits", digits, max_images=12)
    alone = [int(digits(images.load(i)[None])[0]) for i in range(12)]
    rows = list(certify.read_run(path))
    assert [row.alone for row in rows] == alone
    right = sum(label == row.label for label, row in zip(alone, rows, strict=True))
    assert f"classifier alone           {right / 12:.3f} ({right} of 12; " in out
    run("run", *OPTIONS, "--n0", "10", "--n", "50", "--out", str(tmp_path / "bare.jsonl"))
    assert all(row.alone is None for row in certify.read_run(tmp_path / "bare.jsonl"))
    assert "classifier alone" not in capsys.readouterr().out


def test_decided_runs_say_how_many_robust_images_are_correct(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.csv").write_text("".join(f"{i},{i % 2}\n" for i in range(1297, 1797)))
    path = tmp_path / "r.jsonl"
    labels = ["--labels", str(tmp_path / "labels.csv")]
    run("run", *OPTIONS[:-1], "60", *labels, "--radius", "0.1,0.2", "--n", "2000", "--out", str(path))
    out, found = capsys.readouterr().out, certify.read_run(path)
    for place, radius in enumerate(("0.1", "0.2")):
        robust = [row for row in found if row.outcomes[place].outcome == "robust"]
        right = sum(row.prediction == row.label for row in robust)
        assert 0 < right < len(robust)
        assert f"decided at {radius}             {len(robust)} robust ({right} of them correct), " in out


def test_json_states_settings_and_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    run("run", *OPTIONS, "--n0", "10", "--n", "200", "--seed", "3", "--radii", "0,0.2", "--json", "--out", str(path))
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    settings = {"model": "digits", "noise": "gaussian", "sigma": 0.25, "n0": 10, "n": 200, "alpha": 0.001, "seed": 3}
    assert settings.items() <= shown.items()
    assert (shown["bound"], shown["expected"], shown["partial"]) == ("clopper-pearson", 12, False)
    low, high = curve(Run.read(path)).interval([0.0, 0.2])
    assert shown["intervals_95"] == {"0": [low[0], high[0]], "0.2": [low[1], high[1]]}


@pytest.mark.parametrize(
    ("predictions", "warned"),
    [
        ([2] * 13 + [0] * 2 + [-1] * 3, True),  # class 1 never, class 2 for two thirds
        ([2] * 6 + [0] * 6 + [-1] * 6, False),  # class 1 never, but no class takes over
        ([2] * 10 + [0] * 4 + [1] * 4, False),  # all are predicted
    ],
)
def test_a_collapsed_classifier_is_named(tmp_path: Path, predictions: list[int], warned: bool) -> None:
    path = tmp_path / "r.jsonl"
    run("run", *OPTIONS, "--n0", "10", "--n", "20", "--out", str(path))
    header = Run.read(path).header
    names = ("cat", "dog", "truck")
    rows = [
        ImageRow.from_json(
            {
                "id": str(i), "label": i % 3, "prediction": chosen, "radius": 0.1 * (chosen >= 0), "p_lower": 0.6,
                "votes": {}, "selection": {}, "trials": 0, "failures": 0, "selection_failures": 0, "seconds": 0.0,
                "base": i % 3, "base_class": names[i % 3], "class": None if chosen < 0 else names[chosen],
            },
            "row",
        )
        for i, chosen in enumerate(predictions)
    ]  # fmt: skip
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", CertifyWarning)
        warn_of_results(Run(path, header, rows))
    expected = "under noise no image is predicted as dog, and 13 of 18 are predicted as truck: the smoothed classifier"
    assert [str(one.message).startswith(expected) for one in given] == [True] * warned
