"""A run in parts: the merged file is that of a single process, and parts that do not make a run are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import rows_without_seconds, run
from PIL import Image

import certify
from certify import read_run
from certify.errors import UserError
from certify.runs.identity import identity
from certify.runs.shards import Shard, merge_shards

COMMAND = ["--model", "digits", "--data", "digits", "--sigma", "0.25", "--n", "300", "--skip", "45", "--quiet"]
KINDS = {"certify": [], "decide": ["--radius", "0.1,0.25"], "measure": ["--tolerance", "0.5"], "predict": []}


@pytest.fixture(
    scope="module",
    params=["certify", "decide", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("measure", "predict"))],
)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A run by one process, and by three shards."""
    folder = tmp_path_factory.mktemp("shards")
    verb = [request.param] if request.param == "predict" else []
    whole, shards = folder / "whole.jsonl", [folder / f"{i}.jsonl" for i in (1, 2, 3)]
    run(*verb, *COMMAND, *KINDS[request.param], "--out", str(whole))
    for i, path in enumerate(shards, 1):
        run(*verb, *COMMAND, *KINDS[request.param], "--shard", f"{i}/3", "--out", str(path))
    return whole, shards


def test_merged_shards_are_the_run(
    parts: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every record and the header's meaning, in the order of the images, in whatever order the shards are named."""
    whole, shards = parts
    merged = tmp_path / "merged.jsonl"
    run("merge", *map(str, reversed(shards)), "-o", str(merged))
    assert "12 images of digits" in capsys.readouterr().out
    found, single = read_run(merged), read_run(whole)
    if single.header["stopping"] is None:
        assert rows_without_seconds(merged) == rows_without_seconds(whole)
    else:  # where images stop by themselves, a single process writes them as they are settled
        assert [row["id"] for row in found.images] == [str(1297 + 45 * k) for k in range(12)]
        by_id = [{row["id"]: row for row in rows_without_seconds(path)} for path in (merged, whole)]
        assert by_id[0] == by_id[1]
    assert identity(found.header) == identity(single.header)
    assert [part["run"] for part in found.header["merged"]] == ["1.jsonl", "2.jsonl", "3.jsonl"]
    with pytest.raises(UserError, match=r"merged\.jsonl is there already"):
        certify.read_run(shards[0]).merge(*map(certify.read_run, shards[1:]), out=merged)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[Path]]:
    """Gives three finished shards in a folder of one's own."""
    folder = tmp_path_factory.mktemp("shards")
    for i in (1, 2, 3):
        run(*COMMAND, "--shard", f"{i}/3", "--out", str(folder / f"{i}.jsonl"))

    def copy(to: Path) -> list[Path]:
        for i in (1, 2, 3):
            (to / f"{i}.jsonl").write_bytes((folder / f"{i}.jsonl").read_bytes())
        return [to / f"{i}.jsonl" for i in (1, 2, 3)]

    return copy


def changed(path: Path, line: int, **keys: Any) -> None:
    """A file one of whose lines says something else."""
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[line] |= keys
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_merged_shards_can_be_recomputed_tabulated_and_gone_on_with(
    shards: Callable[[Path], list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged.jsonl"
    run("merge", *map(str, shards(tmp_path)), "-o", str(merged), "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 12
    run("recompute", str(merged), "--alpha", "0.01")
    capsys.readouterr()
    run("table", str(merged))
    assert not capsys.readouterr().err
    run("table", str(tmp_path / "2.jsonl"))
    assert "2.jsonl is shard 2/3 of a run, so it has only part of the images" in capsys.readouterr().err
    before = merged.read_bytes()
    run(*COMMAND, "--out", str(merged))  # the single run's command finds nothing left to do
    assert merged.read_bytes() == before


def test_shards_that_do_not_make_a_run_are_refused_by_name(
    shards: Callable[[Path], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two, three = shards(tmp_path)
    other = tmp_path / "other.jsonl"

    def refused(*paths: Path) -> str:
        with pytest.raises(UserError) as error:
            merge_shards(read_run(path, allow_partial=True) for path in paths)
        return str(error.value)

    assert "1 of 3 shards are missing: 2/3" in refused(one, three)
    assert "shard=2/3" in refused(one, three)
    for path in (one, three):
        kept = path.read_bytes()
        changed(path, 0, shard={"index": 1, "of": 10**15, "images": 10**15})  # answered at once
        assert "999999999999999 of 1000000000000000 shards are missing" in refused(path)
        path.write_bytes(kept)
    other.write_bytes(two.read_bytes())
    assert f"{two} and {other} are both shard 2/3" in refused(one, two, other, three)
    changed(other, 0, n=1000)
    assert f"{other} is a shard of another run than {one} (n 300 there, 1000 here)" in refused(one, other, three)
    changed(other, 0, n=300, precision="bfloat16")
    assert 'precision "float32" there, "bfloat16" here' in refused(one, other, three)
    other.write_bytes(two.read_bytes())
    changed(other, 0, shard={"index": 2, "of": 4, "images": 12})
    assert "one of 3 shards there, of 4 here" in refused(one, other, three)
    run(*COMMAND, "--out", str(tmp_path / "whole.jsonl"))
    assert "whole.jsonl is a whole run, not a shard" in refused(one, two, three, tmp_path / "whole.jsonl")
    run("recompute", str(two), "--alpha", "0.01", "--out", str(tmp_path / "again.jsonl"))
    assert "again.jsonl was recomputed; merge the shards it came from" in refused(one, tmp_path / "again.jsonl", three)
    other.write_bytes(two.read_bytes())
    changed(other, 1, place=0)
    assert "other.jsonl is damaged: image '1342' has no place in its shard" in refused(one, other, three)
    other.write_bytes(b"".join(two.read_bytes().splitlines(keepends=True)[:-2]))
    command = json.loads(two.read_text().splitlines()[0])["command"]
    assert f"other.jsonl (shard 2/3) is unfinished: 2 of 4 images; resume it with `{command}`" in refused(
        one, other, three
    )
    other.write_bytes(two.read_bytes()[:-9])
    assert "is unfinished: 3 of 4 images" in refused(one, other, three)


def test_a_shard_goes_on_as_that_shard_alone(shards: Callable[[Path], list[Path]], tmp_path: Path) -> None:
    _, two, _ = shards(tmp_path)
    finished = rows_without_seconds(two)
    two.write_bytes(b"".join(two.read_bytes().splitlines(keepends=True)[:-2]))
    begun = two.read_bytes()
    for other in (["--shard", "3/3"], ["--shard", "2/4"], []):
        run(*COMMAND, *other, "--out", str(two), code=2)
    assert two.read_bytes() == begun
    run(*COMMAND, "--shard", "2/3", "--out", str(two))
    assert rows_without_seconds(two) == finished


def test_places_are_interleaved_and_cover_every_image_once() -> None:
    for images in (1, 7, 100):
        for of in (1, 3, 7):
            if of <= images:
                found = [place for i in range(of) for place in Shard(i + 1, of).places(images)]
                assert sorted(found) == list(range(images))
    assert list(Shard(2, 3).places(8)) == [1, 4, 7]


@pytest.mark.slow
def test_an_image_that_cannot_be_read_has_its_place_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    for i in range(5):
        Image.new("L", (8, 8), 40 * i).save(f"d/{i}.png")
    Path("d/2.png").write_bytes(b"")
    command = ["--model", "digits", "--data", "d", "--sigma", "0.25", "--n", "50", "--quiet", "--out"]
    run(*command, "whole.jsonl")
    for i in (1, 2):
        run(*command, f"{i}.jsonl", "--shard", f"{i}/2")
    run("merge", "1.jsonl", "2.jsonl", "-o", "merged.jsonl")
    assert rows_without_seconds(Path("merged.jsonl")) == rows_without_seconds(Path("whole.jsonl"))
    assert "error" in rows_without_seconds(Path("merged.jsonl"))[2]


def test_a_folder_of_shards_is_merged_once(
    shards: Callable[[Path], list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    named = shards(folder)
    (folder / "other.jsonl").write_text("{}\n")  # no run file
    out = ["-o", str(tmp_path / "m.jsonl")]
    run("merge", *map(str, named), "-o", str(tmp_path / "named.jsonl"), "--no-curve")
    run("merge", str(folder), *out, "--if-needed", "--no-curve")
    assert rows_without_seconds(tmp_path / "m.jsonl") == rows_without_seconds(tmp_path / "named.jsonl")
    assert not list(tmp_path.glob("*.png"))
    before = (tmp_path / "m.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    run("merge", str(folder), *out, "--if-needed")
    assert (tmp_path / "m.jsonl").stat().st_mtime_ns == before
    assert "12 images of digits" in capsys.readouterr().out
    run("merge", str(folder), *out, code=2)
    (tmp_path / "empty").mkdir()
    run("merge", str(tmp_path / "empty"), "-o", str(tmp_path / "x.jsonl"), code=2)
    assert "holds no run files" in capsys.readouterr().err


def test_a_shard_prints_one_line_and_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.jsonl"
    run(*COMMAND, "--max", "6", "--shard", "2/3", "--out", str(path))
    assert capsys.readouterr().out == f"shard 2/3: 2 of 2 images in {path}\n"
    assert [file.name for file in tmp_path.iterdir()] == ["s.jsonl"]


def test_an_empty_shard_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no_model.onnx").write_bytes(b"this cannot be loaded")
    options = [
        "--model",
        str(tmp_path / "no_model.onnx"),
        "--input-size",
        "1x8x8",
        "--data",
        "digits",
        "--sigma",
        "0.25",
        "--max",
        "3",
    ]
    run(*options, "--shard", "4/5", code=2)
    assert "more shards than images" in capsys.readouterr().err
