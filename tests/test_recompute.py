"""Another alpha or bound from stored votes: what a live run would have said, and refusals where it cannot be said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from certify import read_run
from certify.bounds import BOUNDS
from certify.cli.app import main
from certify.errors import UserError
from certify.recompute import recompute, recompute_file
from certify.rows import answer

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


def run(*args: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert (ended.value.code or 0) == code


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
        assert {**row, **answer(found.header, row)} == row


@pytest.mark.parametrize("bound", list(BOUNDS))
def test_the_same_as_a_live_run_with_that_alpha_and_bound(bound: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """Same noise, so the same votes; the randomized bound's draw is the same too."""
    live = tmp_path / "live.jsonl"
    run(*DIGITS, "--n", "1000", "--alpha", "0.01", "--bound", bound, "--out", str(live))
    again = recompute_file(runs["fixed"], tmp_path / "again.jsonl", alpha=0.01, bound=bound)
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
    assert "≥" not in out
    run("table", str(runs["decide"]))
    assert "r = 0.25" in capsys.readouterr().out
    run("table", str(runs["decide"]), "--radii", "0,0.1")
    assert out.count("≥") == 0 < capsys.readouterr().out.count("≥")


def test_a_stopped_decide_run_goes_on(runs: dict[str, Path], tmp_path: Path) -> None:
    """The lines that are missing are made again, each as it was."""
    header, *rows = runs["decide"].read_text().splitlines()
    path = tmp_path / "torn.jsonl"
    path.write_text("\n".join([header, *rows[:3]]) + "\n" + rows[3][:40])
    run(*DIGITS, *RUNS["decide"], "--out", str(path))
    old, new = ({row["id"]: {**row, "seconds": 0} for row in read_run(p).images} for p in (runs["decide"], path))
    assert old == new
