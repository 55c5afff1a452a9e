"""Run files of version 0.1.0 as it was first released: they are read, recomputed, resumed and merged.

``earlier_runs`` holds what these commands wrote, for ``--model digits --sigma 0.25 --precision float32 --compile off
--batch-size 500``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run

from certify import read_run
from certify.runs.recompute import recompute

FILES = Path(__file__).parent / "earlier_runs"
COMMON = "--model digits --sigma 0.25 --precision float32 --compile off --batch-size 500 --quiet"
COMMANDS = {
    "certify": "--n 1000 --max 8",
    "randomized": "--n 1000 --max 8 --bound randomized --seed 3",
    "decide": "--radius 0.25,0.4 --max 12",
    "measure": "--tolerance 0.2 --n 3000 --max 8",
    "predict": "--n 1000 --max 8",
    "exact": "--noise exact --round --n 500 --max 4",
}
ROUNDED = ("radius", "p_lower", "p_other", "p_value")  # outward by a few more units in the last places since then


def same(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Both lines hold the same votes and the same answer."""
    for key in old.keys() - {"seconds", "image", *ROUNDED}:
        assert new[key] == old[key], key
    assert old["image"] == new["image"][: len(old["image"])]
    for key in old.keys() & set(ROUNDED):
        assert new[key] == (old[key] if old[key] is None else pytest.approx(old[key], rel=1e-6)), key


@pytest.mark.parametrize("name", COMMANDS)
def test_an_earlier_run_recomputes_to_the_same_answers(name: str) -> None:
    earlier = read_run(FILES / f"{name}.jsonl")
    header, rows = recompute(earlier)
    assert [header[key] for key in ("procedure", "bound", "n")] == [
        earlier.header[key] for key in ("procedure", "bound", "n")
    ]
    for old, new in zip(earlier.images, rows, strict=True):
        same(old, new)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_earlier_run_is_resumed_with_the_same_votes(name: str, tmp_path: Path) -> None:
    """Its last images, taken away, come back; the header names this release of torch."""
    header, *lines = (FILES / f"{name}.jsonl").read_text().splitlines()
    now = {**json.loads(header), "torch": ".".join(torch.__version__.split(".")[:2])}
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join([json.dumps(now), *lines[:-2]]) + "\n")
    verb = ["predict"] if name == "predict" else ["run"]
    run(*verb, *COMMON.split(), *COMMANDS[name].split(), "--out", str(path))
    resumed = {row["id"]: row for row in read_run(path).images}
    assert len(resumed) == len(lines)
    for line in lines:
        old = json.loads(line)
        same(old, resumed[old["id"]])


def test_earlier_shards_are_merged_to_the_whole_run(tmp_path: Path) -> None:
    run("merge", *(str(FILES / f"shard{i}.jsonl") for i in (3, 1, 2)), "-o", str(tmp_path / "merged.jsonl"))
    merged, whole = read_run(tmp_path / "merged.jsonl"), read_run(FILES / "certify.jsonl")
    for old, new in zip(whole.images, merged.images, strict=True):
        same(old, new)
