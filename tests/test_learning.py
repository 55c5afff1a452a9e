"""Learning curves show what the training logged, in whatever state it was left."""

import json
from pathlib import Path

import numpy as np
import pytest
from command import run as command

from analysis.learning import is_training, read_learning
from certify.errors import UserError


def _log(folder: Path, rows: list[dict], torn: str = "") -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return folder


_ROWS = [
    {"step": 4, "images": 256, "loss": 2.0},
    {"step": 6, "held_out": {"score": 0.5, "psnr@0.25": 20.0, "accuracy@0.25": 0.5}},
    {"step": 8, "images": 512, "loss": 1.5},
    {"step": 8, "images": 512, "loss": 1.25},
    {"step": 8, "held_out": {"score": 0.4, "psnr@0.25": 21.0, "accuracy@0.25": 0.6, "accuracy@0.5": 0.3}},
]


def test_the_log_is_read_back(tmp_path):
    found = read_learning(_log(tmp_path / "run", _ROWS, torn='{"step": 12, "ima'))
    assert found.name == "run"
    assert found.images.tolist() == [256, 512]
    assert found.loss.tolist() == [2.0, 1.25]  # a step that was done again counts as it was done last
    assert found.seen.tolist() == [6 * 64, 8 * 64]  # a step is 64 images
    assert set(found.held_out) == {"psnr@0.25", "accuracy@0.25", "accuracy@0.5"}
    assert found.held_out["accuracy@0.25"].tolist() == [0.5, 0.6]
    np.testing.assert_equal(found.held_out["accuracy@0.5"], [np.nan, 0.3])


def test_a_log_without_a_training_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no log of a training"):
        read_learning(_log(tmp_path / "run", [{"step": 1, "held_out": {"score": 1.0}}], torn="[1]\n3\n"))


def test_trainings_are_drawn_together_and_apart_from_runs(tmp_path, capsys):
    one, other = _log(tmp_path / "one", _ROWS), _log(tmp_path / "other", _ROWS[:1])
    assert is_training(one)
    assert is_training(one / "metrics.jsonl")
    assert not is_training(tmp_path)

    figure = tmp_path / "learning.svg"
    command("plot", str(one), str(other), "-o", str(figure))
    drawn = figure.read_text()
    # matplotlib writes each text of a figure beside its outlines
    for words in ("loss of each objective", "held-out accuracy", "held-out PSNR (dB)", "one", "other", "sigma = 0.5"):
        assert f"<!-- {words} -->" in drawn

    for wrong, reason in (
        (str(tmp_path / "run.jsonl"), "is no training, unlike the others"),
        ("--no-band", "--no-band applies to runs of certificates; leave it out for trainings"),
    ):
        command("plot", str(one), wrong, "-o", str(figure), code=2)
        assert reason in capsys.readouterr().err
