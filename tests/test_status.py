"""``certify status``: finished, running and stalled runs, shards, folders; from files alone."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from command import run

from certify.cli.app import main
from certify.errors import UserError
from certify.runs.run_file import Run, RunFile
from certify.runs.status import find_runs, missing_shards, read_status

OPTIONS = ["--model", "digits", "--sigma", "0.25", "--n0", "10", "--n", "60", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four images, its first two as an unfinished run, and two of three shards."""
    folder = tmp_path_factory.mktemp("status")
    run("run", *OPTIONS, "--max", "4", "--out", str(folder / "done.jsonl"))
    lines = (folder / "done.jsonl").read_text().splitlines(keepends=True)
    (folder / "part.jsonl").write_text("".join(lines[:3]))
    for i in (1, 3):
        run("run", *OPTIONS, "--max", "7", "--shard", f"{i}/3", "--out", str(folder / "shards" / f"{i}.jsonl"))
    return folder


def status(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        main(["status", *map(str, arguments)])
    assert isinstance(left.value.code, int)
    return left.value.code


def test_a_finished_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(folder / "done.jsonl") == 0
    assert capsys.readouterr().out == f"{folder / 'done.jsonl'}: finished, 4 of 4 images\n"


def test_a_run_is_running_while_a_process_writes_to_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "part.jsonl"
    assert status(path) == 4
    command = Run.read(path, allow_partial=True).header.command
    assert capsys.readouterr().out.splitlines()[1] == f"  resume it with: {command}"
    with RunFile(path, Run.read(path, allow_partial=True).header):
        assert status(path) == 3
        assert read_status(path, now=time.time() + 3600).state == "stalled"  # no line for an hour
    assert ": running, 2 of 4 images, about " in capsys.readouterr().out


def test_the_time_left_follows_from_the_results(folder: Path, tmp_path: Path) -> None:
    header, *rows = [json.loads(line) for line in (folder / "part.jsonl").read_text().splitlines()]
    path = tmp_path / "run.jsonl"

    def left(expected: int, created: str, seconds: float) -> float | None:
        about = {**header, "expected": expected, "created": created}
        content = [about, *({**row, "seconds": seconds} for row in rows)]
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
        written = 1_800_000_000
        os.utime(path, (written, written))
        return read_status(path, now=written + 5.0).seconds_left

    assert left(10, "2027-01-15T08:00:00+00:00", 30.0) == 0.0  # written when the run began
    assert left(10, "2027-01-15T07:59:00+00:00", 60.0) == 8 * 30.0  # two workers: 2 results of 60 s within a minute
    assert left(10, "2026-01-15T07:59:00+00:00", 60.0) == 8 * 60.0  # after a pause of a year


def test_a_folder_stands_for_its_runs_and_names_missing_shards(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(folder / "shards") == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"no file of shard 2/3 of the run of {folder / 'shards' / '1.jsonl'}", "all: 5 of 5 images"]
    assert status(folder / "shards", "--json") == 4
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["state"], [one["shard"] for one in found["runs"]]) == ("stalled", ["1/3", "3/3"])
    assert found["missing_shards"] == {str(folder / "shards" / "1.jsonl"): ["2/3"]}
    assert missing_shards(find_runs([folder])) == {}


def test_undecided_and_unusable_images_are_counted(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    few = ["--model", "digits", "--sigma", "0.25", "--n", "60", "--radius", "0.15", "--max", "8"]
    run("run", *few, "--quiet", "--out", str(path))
    rows = Run.read(path).images
    undecided = sum(row.outcomes[0].outcome == "undecided" for row in rows)
    assert 0 < undecided < 8
    assert (read_status(path).undecided, read_status(path).unusable) == (undecided, 0)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file or folder; expected a run file, or a folder of them"):
        find_runs(["nowhere"])
    with pytest.raises(UserError, match="holds no run files"):
        find_runs([tmp_path])
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="is not a run file of certify"):
        read_status(tmp_path / "x.jsonl")


def test_a_shard_that_claims_countless_parts_is_answered_at_once(folder: Path, tmp_path: Path) -> None:
    header, *rows = [json.loads(line) for line in (folder / "shards" / "1.jsonl").read_text().splitlines()]
    header["shard"] = {"index": 1, "of": 10**15, "images": 10**15}
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *rows)))
    ((count, named),) = missing_shards([path]).values()
    assert (count, len(named), named[:2]) == (10**15 - 1, 1000, ["2/1000000000000000", "3/1000000000000000"])
