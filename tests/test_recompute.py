"""Another alpha or bound from stored votes: what a live run would have said, and refusals where it cannot be said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run

import certify
from certify import read_run
from certify.errors import UserError
from certify.runs.recompute import recompute
from certify.smoothing.bounds import BOUNDS
from certify.smoothing.stopping_rules import RULES

DIGITS = ["--model", "digits", "--sigma", "0.25", "--max", "8", "--skip", "40", "--quiet"]
RUNS = {
    "fixed": ["--n", "1000"],
    "linf": ["--n", "1000", "--norm", "linf"],
    "uniform": ["--n", "1000", "--noise", "uniform"],
    "exact": ["--n", "1000", "--noise", "exact", "--round"],
    "decide": ["--radius", "0.1,0.25"],
    "union": ["--radius", "0.25", "--rule", "union-bound"],
    "tolerance": ["--tolerance", "0.3", "--n", "20000"],
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, options in RUNS.items():
        run(*DIGITS, *options, "--out", str(folder / f"{name}.jsonl"))
    run("predict", *DIGITS, "--n", "500", "--out", str(folder / "predict.jsonl"))
    return {name: folder / f"{name}.jsonl" for name in [*RUNS, "predict"]}


@pytest.mark.parametrize("name", [*RUNS, "predict"])
def test_each_line_follows_from_its_votes_and_the_header(name: str, runs: dict[str, Path]) -> None:
    found = read_run(runs[name])
    assert len(found.usable) == 8
    for row in found.usable:
        assert row.recomputed(found.header) == row


@pytest.mark.parametrize("bound", list(BOUNDS))
def test_the_same_as_a_live_run_with_that_alpha_and_bound(bound: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """Same noise, so the same votes; the randomized bound's draw is the same too."""
    live = tmp_path / "live.jsonl"
    run(*DIGITS, "--n", "1000", "--alpha", "0.01", "--bound", bound, "--out", str(live))
    again = certify.read_run(runs["fixed"]).recompute(alpha=0.01, bound=bound, out=tmp_path / "again.jsonl")
    assert read_run(again.path).header == again.header
    for a, b in zip(read_run(live).usable, read_run(again.path).usable, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert (again.header["alpha"], again.header["bound"]) == (0.01, bound)
    assert again.header["recomputed"]["from"]["alpha"] == 0.001
    assert len(again.header["recomputed"]["sha256"]) == 64


def test_a_larger_alpha_and_better_bounds_give_larger_radii(runs: dict[str, Path]) -> None:
    old = read_run(runs["fixed"])
    plain = [row["radius"] for row in old.usable]
    larger = [row["radius"] for row in recompute(old, alpha=0.05)[1]]
    randomized = [row["radius"] for row in recompute(old, bound="randomized")[1]]
    best = [row["radius"] for row in recompute(old, bound="best")[1]]
    assert all(a >= b for a, b in zip(larger, plain, strict=True))
    assert all(a >= b for a, b in zip(randomized, plain, strict=True))
    assert sum(best) > 1.05 * sum(plain)


def test_a_decision_at_another_alpha(runs: dict[str, Path]) -> None:
    old = read_run(runs["decide"])
    _, rows = recompute(old, alpha=1e-12)
    assert {d["outcome"] for row in old.usable for d in row["decisions"]} == {"robust", "not certifiable"}
    assert {d["outcome"] for row in rows for d in row["decisions"]} == {"undecided"}
    _, rows = recompute(old, alpha=0.01)
    outcomes = [[d["outcome"] for d in row["decisions"]] for row in rows]
    assert outcomes == [[d["outcome"] for d in row["decisions"]] for row in old.usable]


@pytest.mark.parametrize(
    ("name", "bound", "reason"),
    [
        ("decide", "clopper-pearson", "stopped by looking at its votes"),
        ("decide", "union-bound", "stopped by looking at its votes"),
        ("tolerance", "clopper-pearson", "peeking breaks it"),
        ("tolerance", "best", "peeking breaks it"),
        ("predict", "best", "predictions, which have no radius"),
    ],
)
def test_what_the_design_cannot_support_is_refused(name: str, bound: str, reason: str, runs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=reason):
        recompute(read_run(runs[name]), bound=bound)


def test_votes_that_chose_the_class_cannot_bound_it(runs: dict[str, Path], tmp_path: Path) -> None:
    header, *rows = [json.loads(line) for line in runs["fixed"].read_text().splitlines()]
    for row in rows:
        row["selection"] = {}
    path = tmp_path / "reused.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [{**header, "n0": 0}, *rows]) + "\n")
    with pytest.raises(UserError, match=r"no selection votes \(n0 = 0\)"):
        recompute(read_run(path), bound="clopper-pearson")
    assert recompute(read_run(path), bound="betting")[1]


def test_from_the_command_line(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = runs["fixed"].read_bytes()
    run("recompute", str(runs["fixed"]), "--bound", "best", "--json")
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["run"] == str(runs["fixed"].with_name("fixed-best.jsonl"))
    assert result["samples"] == 8 * 1100
    run("table", str(runs["fixed"]), result["run"])
    out = capsys.readouterr().out
    assert "clopper-pearson" in out
    assert "best" in out
    run("recompute", str(runs["fixed"]), "--bound", "best", code=2)
    assert "is there already and is left alone" in capsys.readouterr().err
    run("recompute", str(runs["fixed"]), code=2)
    assert "would change nothing" in capsys.readouterr().err
    assert runs["fixed"].read_bytes() == before


def test_where_the_new_file_goes_and_what_has_no_table(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["recompute", str(runs["fixed"]), "--alpha", "0.01", "--out", "new/sigma_0.25"]
    run(*command, code=2)
    assert "a new one: end it with /" in capsys.readouterr().err
    run(*command[:-1], "new/sigma_0.25/")
    assert Path("new/sigma_0.25/fixed-alpha0.01.jsonl").is_file()
    header, *rows = [json.loads(line) for line in runs["fixed"].read_text().splitlines()]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(line) + "\n" for line in (header, *({**r, "error": "is cut"} for r in rows))))
    capsys.readouterr()
    run("recompute", str(bad), "--alpha", "0.01", code=2)
    assert f"none of the 8 images could be used; the first, {rows[0]['id']}: is cut" in capsys.readouterr().err


def test_norms_stay_apart(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The norm stands in record, table and axis; runs of two norms share no table and no plot."""
    fixed, linf = read_run(runs["fixed"]), read_run(runs["linf"])
    assert (fixed.header["norm"], linf.header["norm"]) == ("l2", "linf")
    for a, b in zip(fixed.usable, linf.usable, strict=True):
        assert b["radius"] == pytest.approx(a["radius"] / 8)  # 64 pixels
    run("table", str(runs["linf"]))
    assert "certified accuracy at l-infinity radius r" in capsys.readouterr().out
    for verb in ("table", "plot"):
        run(verb, str(runs["fixed"]), str(runs["linf"]), code=2)
        assert "different norms (l2, linf)" in capsys.readouterr().err


def test_decisions_can_be_tabulated(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run("table", str(runs["decide"]), "--radii", "0.1,0.25")
    out = capsys.readouterr().out
    assert "decided at r = 0.1, 0.25" in out
    rows = read_run(runs["decide"]).usable
    right = sum(row["prediction"] == row["label"] and row["radius"] >= 0.25 for row in rows)
    assert f"{right / 8:.3f}" in out
    assert out.count("≥") == 1  # the average radius: beyond those asked for nothing is known
    run("table", str(runs["decide"]))
    assert "r = 0.25" in capsys.readouterr().out
    run("table", str(runs["decide"]), "--radii", "0,0.1")
    assert out.count("≥") < capsys.readouterr().out.count("≥")


def test_a_stopped_decide_run_goes_on(runs: dict[str, Path], tmp_path: Path) -> None:
    """The lines that are missing are made again, each as it was."""
    header, *rows = runs["decide"].read_text().splitlines()
    path = tmp_path / "torn.jsonl"
    path.write_text("\n".join([header, *rows[:3]]) + "\n" + rows[3][:40])
    run(*DIGITS, *RUNS["decide"], "--out", str(path))
    old, new = ({row["id"]: {**row, "seconds": 0} for row in read_run(p).images} for p in (runs["decide"], path))
    assert old == new


def test_an_unfinished_decide_run_shows_no_accuracy(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images decided with few samples come first, so their share is biased."""
    path = tmp_path / "part.jsonl"
    path.write_text("".join(runs["decide"].read_text().splitlines(keepends=True)[:4]))
    for verb in (["table"], ["plot", "-o", str(tmp_path / "x.png")]):
        run(verb[0], str(path), *verb[1:], code=2)
        assert "3 of 8 images, and those decided with few samples come first" in capsys.readouterr().err


def test_json_of_a_decided_run_says_only_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    run(*DIGITS, "--radius", "0.1", "--radii", "0,0.1,0.3", "--json", "--out", "decided.jsonl")
    result = json.loads(capsys.readouterr().out)
    assert list(result["certified_accuracy"]) == ["0.1"]
    assert (result["smoothed_accuracy"], result["abstained"]) == (None, None)
    assert sum(result["decisions"]["0.1"].values()) == 8
    run("table", "decided.jsonl", "--radii", "0", "--intervals")
    assert ", 1.000]" in capsys.readouterr().out  # at least, so no upper end


@pytest.mark.parametrize("rule", list(RULES))
def test_all_images_at_once_after_early_stopping(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Decided at alpha / m and recomputed at alpha: what is certified by betting holds for all images at once."""
    run(*DIGITS, "--radius", "0.1", "--rule", rule, "--alpha", str(0.001 / 8), "--out", f"{rule}.jsonl")
    run("recompute", f"{rule}.jsonl", "--alpha", "0.001", "--out", f"{rule}-again.jsonl")
    capsys.readouterr()
    run("table", f"{rule}-again.jsonl", "--simultaneous", "--format", "csv")
    header, line = (text.split(",") for text in capsys.readouterr().out.splitlines()[:2])
    row = dict(zip(header, line, strict=True))
    assert float(row["all_at_once"]) <= float(row["value"]) > 0.3
    if rule == "betting":
        assert row["all_at_once"] == row["value"]


def test_one_image_off_the_grid_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.full((5, 8, 8), 100 / 255, dtype=np.float32)
    x[2] += 0.3 / 255
    np.savez(tmp_path / "x.npz", x=x)
    out = str(tmp_path / "out.jsonl")
    common = ["--model", "digits", "--sigma", "0.25", "--data", str(tmp_path / "x.npz"), "--labels", "none", "--quiet"]
    run(*common, "--noise", "exact", "--n", "100", "--out", out)
    assert "8-bit grid" in capsys.readouterr().err
    found = read_run(out)
    assert [row["id"] for row in found.images if "error" in row] == [found.images[2]["id"]]
