"""``--dry-run``: everything up to the cost, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import run

import certify
from certify.errors import CertifyWarning

RUN = ["--model", "digits", "--sigma", "0.25", "--n0", "10", "--n", "90", "--max", "6"]
TRAIN = ["train", "--denoiser", "unet", "--option", "channels=[4,8]", "--sigma", "0.25", "--data", "digits-train"]
COMPARE = ["compare", "--model", "digits", "--defences", "denoised:sigma=0.25", "--attacks", "square", "--max", "3"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_writes_nothing_and_shows_what_the_real_one_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", "run.jsonl"]
    run("run", *RUN, *out, "--dry-run")
    shown = capsys.readouterr()
    assert shown.out == "dry run: run.jsonl is not written\n"
    assert "cost       6 images x 100 samples = 600: about " in shown.err
    assert not list(tmp_path.iterdir())
    run("run", *RUN, *out, "--dry-run", "--json")
    cost: dict[str, Any] = json.loads(capsys.readouterr().out)
    run("run", *RUN, *out, "--quiet")
    rows = certify.read_run("run.jsonl")
    assert (cost["dry_run"], cost["samples"]) == (True, sum(row.trials for row in rows) + 6 * 10)
    assert cost["seconds"] > 0


def test_a_run_that_was_begun_is_estimated_by_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    run("run", *RUN, "--out", "run.jsonl", "--quiet")
    lines = Path("run.jsonl").read_text().splitlines(keepends=True)
    Path("run.jsonl").write_text("".join(lines[:3]))
    capsys.readouterr()
    run("run", *RUN, "--out", "run.jsonl", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out)["samples"] == 4 * 100
    assert Path("run.jsonl").read_text() == "".join(lines[:3])


def test_a_training_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*TRAIN, "--epochs", "1", "--batch-size", "32", "--device", "cpu", "--out", "out", "--dry-run")
    shown = capsys.readouterr()
    assert shown.out == "dry run: nothing is written to out\n"
    assert "for 33 more steps, without validation" in shown.err  # 1,168 images are 36 steps, of which 3 are timed
    assert not list(tmp_path.iterdir())


def test_a_comparison_says_what_cannot_be_certified_before_any_attack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*COMPARE, "--eps", "0.4", "--norm", "l2", "--certify-n", "50", "--out", "c.jsonl", "--dry-run")
    shown = capsys.readouterr()
    assert "0.4 within n = 50; at least 145 are needed: pass a larger --certify-n" in shown.err
    assert "outcomes of 3 images" in shown.err
    assert not list(tmp_path.iterdir())


def test_python_warns_of_the_same_with_its_own_names() -> None:
    options: dict[str, Any] = {"defences": ["denoised:sigma=0.25"], "attacks": [], "progress": False}
    with pytest.warns(CertifyWarning, match=r"n = 5; at least \d+ are needed: pass a larger certify_n, or"):
        certify.compare("digits", "digits", eps=0.25, norm="l2", certify_n=5, max_images=2, **options)
