"""Labels, ids, names and messages from outside, in whatever shows them: they act on no terminal, page or figure."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from command import run
from fastapi.testclient import TestClient
from small_audit import WORDS, make_audit
from test_displayed_numbers import HEADER, write
from test_serve import serving

from analysis.tables import render
from certify.images.dataset import load_images
from certify.models.classifier import Classifier
from certify.runs.config import Settings
from certify.smoothing.procedures import Certify
from certify.text import printable

EVIL = "\x1b[2J\x07\u202egpj $\\frac$ \x9b1m\u2066\u200f\u2028\r\nabstained 0 of 9\ud800 <b>"
"""Clears the screen, rings, reverses text, is a wrong formula, isolates, breaks lines; half a surrogate pair."""


def acting(text: str) -> list[str]:
    """The characters of an output that act instead of being displayed."""
    found = (c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"))
    return sorted({f"U+{ord(c):04X}" for c in found})


def test_control_characters_become_escapes_and_all_others_stay() -> None:
    assert printable(EVIL) == (r"\x1b[2J\x07\u202egpj $\frac$ \x9b1m\u2066\u200f\u2028\r\nabstained 0 of 9\ud800 <b>")
    for text in ("tench, Tinca tinca", "a\u0301", "猫\u3000犬", "כלב", "é\u00a0– ½", "🐈"):
        assert printable(text) == text
    for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C):
        assert printable(f"a{chr(code)}b").isascii(), hex(code)


def evil_run(path: Path, **row: Any) -> str:
    """A run file whose names come from somebody else."""
    return write(path, 2, 3, **{"model": EVIL, "data": EVIL, "denoiser": EVIL, **row})


@pytest.mark.parametrize("style", ["text", "markdown", "latex", "csv"])
def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], style: str) -> None:
    paths = [evil_run(tmp_path / "a.jsonl"), evil_run(tmp_path / "b.jsonl", denoiser="none", bound=EVIL)]
    run("table", *paths, "--radii", "0,0.5", "--format", style)
    out = capsys.readouterr().out
    assert acting(out) == []
    assert not [line for line in out.splitlines() if line.startswith("abstained 0 of 9")]
    run("table", paths[1], "--radii", "0", "--format", style)  # whose bound stands in the caption
    out = capsys.readouterr().out
    assert acting(out) == []
    assert not [line for line in out.splitlines() if line.startswith("abstained 0 of 9")]


def test_names_are_no_formulas_of_a_spreadsheet_and_no_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)")
    path = evil_run(tmp_path / "a.jsonl", **dict(zip(("model", "denoiser", "bound"), names, strict=False)))
    run("table", path, "--radii", "0", "--format", "csv")
    _, (_, model, denoiser, *_) = csv.reader(io.StringIO(capsys.readouterr().out))
    assert (model, denoiser) == ("'=cmd|' /C calc'!A0", "'+1")
    for name in names:
        assert render(["a"], [[name]], "csv").splitlines()[1].strip('"').startswith("'")
    assert render(["a"], [[-1.5]], "csv") == "a\n-1.5"
    lines = render(["a|b"], [["c|d"]], "markdown").splitlines()
    assert len({line.count("|") - line.count(r"\|") for line in lines}) == 1


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = {
        **HEADER, "type": "comparison", "expected": 1, "defences": [{"named": EVIL, "frozen": True}], "eps": 0.25,
        "eps_text": "0.25", "l2_radius": 0.25, "certify_n": 100, "repeats": 1, "images": {"chosen": 1}, "model": EVIL,
        "conditions": [{"name": f"{EVIL} gradients", "group": "blind"}],
    }  # fmt: skip
    key = f"blind: {EVIL} gradients"
    row = {
        "type": "outcome", "id": "0", "image": "0", "defence": EVIL, "condition": key, "label": 1, "answers": [1],
        "queries": 1, "seconds": 0.1, "note": f"gradients {EVIL}",
    }  # fmt: skip
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, row)))
    for style in ("text", "markdown", "latex", "csv"):
        run("table", str(path), "--format", style)
        out = capsys.readouterr().out
        assert acting(out) == []
        assert not [line for line in out.splitlines() if line.startswith("abstained 0 of 9")]
        assert not [line for line in out.splitlines() if style == "latex" and line.startswith(("note:", "failed:"))]
    run("plot", str(path), "-o", str(tmp_path / "c.svg"))
    assert acting((tmp_path / "c.svg").read_text()) == []


def test_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file's name may come out of somebody's archive."""
    run("table", f"{tmp_path}/{EVIL.replace(chr(0xD800), '')}.jsonl", code=2)
    error = capsys.readouterr().err
    assert acting(error) == []
    assert error.count("\n") == 1
    assert r"\x1b[2J\x07" in error


def test_summaries_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes and ids of a run without labels: the table at its end, and the votes of one image."""
    monkeypatch.chdir(tmp_path)
    run(*"--model digits --sigma 0.25 --n 100 --max 1 --labels none --quiet --out r.jsonl".split())
    header, row = (json.loads(line) for line in Path("r.jsonl").read_text().splitlines())
    named = {"class": EVIL, "base_class": EVIL, "classes": {str(label): EVIL for label in range(10)}, "id": EVIL}
    lines = [{**header, "model": EVIL, "data": EVIL}, {**row, **named}]
    Path("evil.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    run(*"recompute evil.jsonl --alpha 0.01 --out again.jsonl".split())
    out = capsys.readouterr().out
    assert acting(out) == []
    assert r"\u202egpj" in out
    assert not [line for line in out.splitlines() if line.startswith("abstained 0 of 9")]
    run("plot", "evil.jsonl", "--image", EVIL, "-o", "votes.svg")
    run("plot", "evil.jsonl", "-o", "curve.svg")
    run("plot", "evil.jsonl", "--samples", "-o", "samples.svg")
    for picture in ("votes.svg", "curve.svg", "samples.svg"):
        text = Path(picture).read_text(encoding="utf-8")
        assert acting(text) == []
        ElementTree.fromstring(text)
    assert "gpj" in Path("votes.svg").read_text(encoding="utf-8")


def test_the_report_of_an_audit(tmp_path: Path, digits: Classifier) -> None:
    images = load_images("digits", digits, skip=120)
    settings = Settings(Certify(n0=10, n=40), seed=1)
    words = [f"{EVIL}{word}" for word in WORDS]
    folder = make_audit(tmp_path / "run", digits, images, settings=settings, words=words, about={"command": EVIL})
    run("report", str(folder))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert acting(page) == []
    assert r"\u202egpj" in page
    assert page.count("&lt;b&gt;") > 10
    assert "<b>" not in page


def test_the_served_page(digits: Classifier) -> None:
    """The page displays what /classify answers; programs get the names as they are from /v2."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("L", (8, 8), 128).save(out, "PNG")
    with serving(digits, names=lambda label: f"{EVIL}{label}") as (client, *_):
        assert isinstance(client, TestClient)
        found = client.post("/classify?samples=100", content=out.getvalue(), headers={"content-type": "image/png"})
        assert found.status_code == 200
        said = found.json()
        assert all(acting(vote["name"]) == [] for vote in said["votes"])
        assert acting(said["name"]) == []
        wrong = client.post("/classify?radius=" + "a%1b%e2%80%ae", content=b"", headers={"content-type": "image/png"})
        assert wrong.status_code == 400
        assert acting(wrong.json()["error"]) == []


def test_the_command_prints_in_one_place_only() -> None:
    cli = Path(__file__).parent.parent / "certify" / "cli"
    found = {p.name for p in cli.glob("*.py") if "click.echo(" in p.read_text(encoding="utf-8")}
    assert found == {"console.py", "app.py"}  # app.py: click's own help
