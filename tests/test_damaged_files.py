"""Damaged run files, comparisons, logs and audits: a command that reads one works, or says why in one line."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import run
from damage import damage_bytes, damage_document, damage_lines
from scripted_service import service

from certify.cli.app import main

DIGITS = "--model digits --sigma 0.25 --max 3 --skip 30 --quiet --compile off"
COMPARE = "compare --model digits --defences none,median --attacks square --eps 0.1 --max 2 --queries 5 --quiet"
AUDIT = (
    "audit --endpoint URL --protocol json --protocol-option labels=labels --protocol-option scores=scores "
    "--data digits --skip 250 --sigma 0.1 --repeat-clean 1 --quiet"
)
MAPPED = "--class-map FOLDER/map.csv --n0 3 --n 9 --budget 90"
LOG = "idx label predict radius correct time\n0 1 1 0.5 1 0:01\n9 1 -1 0.0 0 0:01\n18 3 3 0.9 1 0:01\n"
SPEED = {"case": "a", "engine": 5.0, "reference": 3.0, "ratio": 1.6, "ratio_min": 1.5, "ratio_max": 1.7}
METRICS = [{"step": 1, "images": 64, "loss": 0.5}, {"step": 2, "images": 128, "loss": 0.4}]
PARTS = ("audit.json", "run.jsonl", "ledger.jsonl")

Case = tuple[str, str]
"""A file among the sound ones, and a command, in which FILE, FOLDER and OUT stand for paths."""

QUICK: list[Case] = [
    *(("certify.jsonl", f"table FILE{more}") for more in ("", " --simultaneous", " --envelope --format csv")),
    *((name, "recompute FILE --alpha 0.01 --out OUT.jsonl --json") for name in ("certify.jsonl", "decide.jsonl")),
    *((name, "recompute FILE --bound betting --out OUT.jsonl") for name in ("certify.jsonl", "tolerance.jsonl")),
    ("decide.jsonl", "table FILE"),
    ("predict.jsonl", "table FILE"),
    ("predict.jsonl", "recompute FILE --alpha 0.01 --out OUT.jsonl"),
    ("tolerance.jsonl", "table FILE --simultaneous"),
    ("shard1.jsonl", "merge FILE FOLDER/shard2.jsonl -o OUT.jsonl --json"),
    ("compare.jsonl", "table FILE"),
    ("log.tsv", "table FILE"),
    ("audit/run.jsonl", "table FILE"),
    *((f"audit/{name}", "replay FOLDER/audit") for name in PARTS),
    *((f"audit/{name}", "replay FOLDER/audit --alpha 0.01") for name in PARTS),
    *((f"decided/{name}", "replay FOLDER/decided --json") for name in PARTS),
]
SLOW: list[Case] = [
    *((f"{name}.jsonl", "plot FILE -o OUT.svg") for name in ("certify", "compare", "speed", "metrics")),
    ("log.tsv", "plot FILE -o OUT.svg"),
    *((f"{name}.jsonl", "plot FILE --samples -o OUT.svg") for name in ("certify", "tolerance")),
    *((f"{name}.jsonl", "plot FILE --image 1297 -o OUT.svg") for name in ("certify", "decide")),
    *((f"audit/{name}", "report FOLDER/audit") for name in PARTS),
    *((f"decided/{name}", "report FOLDER/decided") for name in PARTS),
    ("certify.jsonl", f"{DIGITS} --n 200 --out FILE"),
    ("decide.jsonl", f"{DIGITS} --n 500 --radius 0.1,0.25 --out FILE"),
    ("shard1.jsonl", f"{DIGITS} --n 200 --shard 1/2 --out FILE"),
    ("compare.jsonl", f"{COMPARE} --out FILE"),
    *((f"audit/{name}", f"{AUDIT} {MAPPED} --out FOLDER/audit") for name in PARTS),
]


def answer(number: int, headers: Any) -> tuple[int, str, dict[str, str]]:
    """One label, now and then an error, by a fixed plan."""
    if number % 9 == 5:
        return 503, "busy", {"Retry-After": "0"}
    return (400, "no", {}) if number % 11 == 7 else (200, '{"labels": ["zero", "one"], "scores": [0.7, 0.2]}', {})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sound files."""
    folder = tmp_path_factory.mktemp("sound")
    for name, options in {
        "certify": "--n 200", "decide": "--n 500 --radius 0.1,0.25", "tolerance": "--n 1000 --tolerance 0.2",
        "shard1": "--n 200 --shard 1/2", "shard2": "--n 200 --shard 2/2",
    }.items():  # fmt: skip
        run(*f"{DIGITS} {options} --out {folder / name}.jsonl".split())
    run(*f"predict {DIGITS} --n 200 --out {folder}/predict.jsonl".split())
    run(*f"{COMPARE} --out {folder}/compare.jsonl".split())
    (folder / "log.tsv").write_text(LOG.replace(" ", "\t"))
    (folder / "speed.jsonl").write_text(2 * (json.dumps(SPEED) + "\n"))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    (folder / "map.csv").write_text("zero,a\none,b\n")
    with service(answer) as url:
        audit = AUDIT.replace("URL", url)
        run(*f"{audit} {MAPPED.replace('FOLDER', str(folder))} --out {folder}/audit".split())
        run(*f"{audit} --radius 0.02 --n 20 --budget 90 --out {folder}/decided".split())
    return folder


def outcome(command: str, folder: Path, **paths: str) -> tuple[int, list[str]]:
    """The exit code, and the lines on stderr without warnings."""
    for name, path in {"FOLDER": str(folder), "OUT": str(folder / "out"), **paths}.items():
        command = command.replace(name, path)
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        main(command.split())
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("warning: ")]
    return ended.value.code or 0, lines  # type: ignore[return-value]


def check(sound: Path, folder: Path, case: Case, seed: int, url: str = "") -> int:
    """Damage the case's file by this seed, and see that its command works or says why in one line; the exit code."""
    name, command = case
    rng = random.Random(f"{seed} {name} {command}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder, ignore=shutil.ignore_patterns("*.png", "report.html"))
    if "URL" in command:  # the audit was of a service at another port
        for path in (folder / "audit").glob("*.json*"):
            path.write_text(re.sub(r"http://127\.0\.0\.1:\d+/predict", url, path.read_text()))
    kinds: list[Callable[[random.Random, bytes], bytes]] = [damage_lines, damage_lines, damage_lines, damage_bytes]
    if name.endswith(".json"):
        kinds[:3] = [damage_document] * 3
    elif not name.endswith(".jsonl"):
        kinds = [damage_bytes]
    (folder / name).write_bytes(rng.choice(kinds)(rng, (folder / name).read_bytes()))
    code, lines = outcome(command, folder, FILE=str(folder / name), URL=url)
    assert code in (0, 1, 2)
    assert not code or lines[-1].startswith("certify: ")
    assert code != 2 or len(lines) == 1
    return code


@pytest.mark.parametrize("case", QUICK, ids=" ".join)
def test_damage_is_one_line(case: Case, sound: Path, tmp_path: Path) -> None:
    for seed in range(3):
        check(sound, tmp_path / "damaged", case, seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*QUICK, *SLOW], ids=" ".join)
def test_much_damage_is_one_line(case: Case, sound: Path, tmp_path: Path) -> None:
    with service(answer) as url:
        for seed in range(3, 200 if case in QUICK else 50):
            check(sound, tmp_path / "damaged", case, seed, url)


AGAIN = "delete that line and run the command again to redo its image"
BACK = "put back a copy of it, or name another file"
LACKS = "which is needed here; expected a file that certify wrote"
WRONG: list[tuple[str, int, str, str]] = [
    # file, line, what is changed there, what `recompute` or `replay` says, else `table`
    ("certify.jsonl", 1, "alpha", f"FILE, line 1, has no 'alpha', {LACKS}"),
    ("certify.jsonl", 1, "n", f"FILE, line 1, has no 'n', {LACKS}"),
    ("decide.jsonl", 1, "stopping.rule", f"'stopping' of FILE, line 1, has no 'rule', {LACKS}"),
    ("predict.jsonl", 2, "base", f"FILE, line 2, has no 'base', {LACKS}"),
    ("certify.jsonl", 3, "seconds", f"FILE is damaged at line 3: it has no 'seconds'; {AGAIN}"),
    ("certify.jsonl", 1, "schema={}", f"FILE has a damaged header: 'schema' is not a whole number from 0; {BACK}"),
    ("certify.jsonl", 1, "alpha=1.5", f"FILE has a damaged header: 'alpha' is not a number between 0 and 1; {BACK}"),
    ("certify.jsonl", 2, "votes=[5]", f"FILE is damaged at line 2: 'votes' is not a count for each class; {AGAIN}"),
    (
        *("certify.jsonl", 2, 'votes={"1000000000": 200}'),
        f"FILE is damaged at line 2: 'votes' is not a count for each class; {AGAIN}",
    ),
    (
        *("certify.jsonl", 2, "votes.0=199"),
        f"FILE is damaged at line 2: 'votes' and 'failures' do not add up to 'trials'; {AGAIN}",
    ),
    ("certify.jsonl", 3, "id={}", f"FILE is damaged at line 3: 'id' is not text; {AGAIN}"),
    ("certify.jsonl", 3, "type={}", f"FILE is damaged at line 3: its type is not 'image'; {AGAIN}"),
    (
        *("decide.jsonl", 2, "decisions=[]"),
        f"FILE is damaged at line 2: 'decisions' are not about the radii in the header; {AGAIN}",
    ),
    (
        *("compare.jsonl", 1, "conditions=5"),
        f"FILE has a damaged header: 'conditions' is not a list, each a name and a group; {BACK}",
    ),
    (
        *("compare.jsonl", 2, "answers=[null]"),
        f"FILE is damaged at line 2: 'answers' is not a list, each a class below 1,000,000, or -1; {AGAIN}",
    ),
    (*("speed.jsonl", 1, "ratio_min=9"), "FILE is damaged at line 1: 'ratio' is not from 'ratio_min' to 'ratio_max'"),
    (
        *("audit/audit.json", 1, "class_map=[]"),
        "FILE is damaged: 'class_map' is not an object, each value text or null; put back a copy of it, or run the "
        "audit's command again",
    ),
    (
        *("audit/audit.json", 1, "images=[{}]"),
        "FILE is damaged: 'images' is not a list, each an object with an id; put back a copy of it, or run the audit's "
        "command again",
    ),
    (
        *("audit/ledger.jsonl", 3, f"seconds={10**400}"),
        "FILE is damaged at line 3; it is left alone: put back a copy of it, or choose another folder",
    ),
    (
        *("audit/ledger.jsonl", 1, "format=[]"),
        "FILE has a damaged header: 'format' is not an object; put back a copy of it, or choose another folder",
    ),
]


@pytest.mark.parametrize("command", ["table FILE", "plot FILE", "recompute FILE --alpha 0.01 --out OUT.jsonl"])
def test_two_runs_in_one_file_are_told_apart(command: str, sound: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "two.jsonl", (sound / "certify.jsonl").read_text()
    path.write_text(2 * content)
    lines = content.count("\n")
    code, (line,) = outcome(command, tmp_path, FILE=str(path))
    assert (code, line) == (
        2,
        f"certify: {path} holds several runs: line {lines + 1} is another header; put each run in a file of its own "
        f"(head -n {lines} {path} > first.jsonl; tail -n +{lines + 1} {path} > second.jsonl); `certify merge` joins "
        "shards",
    )
    subprocess.run(line.partition("own (")[2].partition(")")[0], shell=True, check=True, cwd=tmp_path)
    assert (tmp_path / "first.jsonl").read_text() == (tmp_path / "second.jsonl").read_text() == content


def test_other_files_are_named_in_place_of_run_files(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for content, says in (
        (gzip.compress(b'{"type": "run"}'), "is compressed by gzip, not a run file of certify"),
        (b"\x89PNG\r\n", "is a PNG image, not a run file of certify"),
        (
            b"idx,label,predict,radius,correct,time\n0,1,1,0.5,1,0:00:01\n",
            "the columns of a published log are separated by tabs",
        ),
    ):
        path.write_bytes(content + b"\n")
        code, (line,) = outcome("table FILE", tmp_path, FILE=str(path))
        assert (code, line.endswith(says)) == (2, True), line


@pytest.mark.parametrize(("name", "line", "change", "says"), WRONG, ids=[f"{w[0]} {w[2]:.20}" for w in WRONG])
def test_what_is_wrong_is_named(sound: Path, tmp_path: Path, name: str, line: int, change: str, says: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(sound, folder)
    lines = [(folder / name).read_text()] if name.endswith(".json") else (folder / name).read_text().splitlines()
    changed = json.loads(lines[line - 1])
    path, sign, text = change.partition("=")
    *way, last = path.split(".")
    holder = changed
    for key in way:
        holder = holder[key]
    if sign:
        holder[last] = json.loads(text)
    else:
        del holder[last]
    lines[line - 1] = json.dumps(changed)
    (folder / name).write_text("\n".join(lines) + "\n")
    command = "recompute FILE --alpha 0.01 --out OUT.jsonl"
    if name.startswith(("audit", "compare", "speed")):
        command = {"audit": "replay FOLDER/audit", "compare": "table FILE", "speed": "plot FILE"}[
            re.split(r"\W", name)[0]
        ]
    assert outcome(command, folder, FILE=str(folder / name)) == (
        2,
        [f"certify: {says.replace('FILE', str(folder / name))}"],
    )


@pytest.mark.parametrize(
    ("name", "command", "says"),
    [
        ("certify.jsonl", "table FILE", "is not a run file of certify: its first line is no header"),
        ("certify.jsonl", "plot FILE", "is not a run file of certify: its first line is no header"),
        ("metrics.jsonl", "plot FILE", "holds no log of a training; expected the --out folder of certify train"),
        ("audit/ledger.jsonl", "replay FOLDER/audit", "is not a ledger of certify: its first line is not a header"),
        (
            *("audit/audit.json", "replay FOLDER/audit"),
            "is damaged: no JSON object; put back a copy of it, or run the audit's command again",
        ),
    ],
)
def test_deep_nesting(sound: Path, tmp_path: Path, name: str, command: str, says: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(sound, folder)
    (folder / name).write_text("[" * 100_000 + "\n")
    assert outcome(command, folder, FILE=str(folder / name)) == (2, [f"certify: {folder / name} {says}"])
