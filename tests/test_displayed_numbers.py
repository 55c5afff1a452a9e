"""Guaranteed quantities are rounded to the safe side in every output, and formatted in no other way."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import run

ROOT = Path(__file__).parent.parent
HEADER = {"type": "run", "schema": 1, "model": "m", "data": "d", "norm": "l2", "sigma": 0.25, "n": 100, "alpha": 0.001}


def write(path: Path, right: int, total: int, radius: float = 0.5, **header: Any) -> str:
    """A run file: so many images are right with this radius, the others abstain."""
    empty = {
        "label": 1,
        "p_lower": 0.0,
        "votes": {"1": 100},
        "selection": {},
        "trials": 100,
        "failures": 0,
        "seconds": 0.1,
    }
    known = {"prediction": 1, "radius": radius}, {"prediction": -1, "radius": 0.0}
    lines = [{**HEADER, "expected": total, **header}]
    lines += [{"type": "image", "id": str(i), **empty, **known[i >= right]} for i in range(total)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("style", ["text", "markdown", "latex"])
def test_accuracies_in_tables_are_rounded_down(tmp_path: Path, capsys: pytest.CaptureFixture[str], style: str) -> None:
    """1,999 of 2,000 is not 1.000, at least 2/3 is not at least 0.667; of an interval each end goes outward."""
    run("table", write(tmp_path / "a.jsonl", 1999, 2000, 2 / 3), "--radii", "0.25", "--intervals", "--format", style)
    out = capsys.readouterr().out
    assert "0.999 [0.997, 1.000]" in out  # 0.9995 [0.99721, 0.99999]
    assert re.search(r"\b0\.666\b", out), "the average radius is 0.66633"
    stopped = write(tmp_path / "b.jsonl", 2, 3, stopping={"radii": [0.5]})
    run("table", stopped, "--radii", "0.25", "--format", style)
    assert {"text": "≥ 0.666", "markdown": "≥ 0.666", "latex": r"$\geq$ 0.666"}[style] in capsys.readouterr().out


def test_tables_for_machines_have_every_digit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("table", write(tmp_path / "a.jsonl", 2, 3), "--radii", "0.25", "--format", "csv")
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert float(row["value"]) == 2 / 3
    assert float(row["acr"]) == 1 / 3


@pytest.mark.parametrize("style", ["text", "markdown", "latex"])
def test_a_radius_is_displayed_as_given(tmp_path: Path, capsys: pytest.CaptureFixture[str], style: str) -> None:
    """A claim at 0.2499999 need not hold at 0.25: the table does not state it there, and two radii stay two."""
    path = write(tmp_path / "a.jsonl", 3, 3, 0.2499999)
    run("table", path, "--radii", "0.2499999,0.25", "--format", style)
    heading, *_ = (line for line in capsys.readouterr().out.splitlines() if "abstained" in line)
    assert re.findall(r"r = ([\d.]+)", heading) == ["0.2499999", "0.25"]
    decided = write(tmp_path / "b.jsonl", 3, 3, 0.2499999, stopping={"radii": [0.2499999]})
    run("plot", decided, "-o", str(tmp_path / "p.svg"))
    assert "decided at r = 0.2499999" in (tmp_path / "p.svg").read_text()


def test_radii_of_the_json_object_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "--model digits --sigma 0.25 --n 200 --max 2 --radii 0.2499999,0.25 --json --quiet --out r.jsonl"
    run(*command.split())
    assert list(json.loads(capsys.readouterr().out)["certified_accuracy"]) == ["0.2499999", "0.25"]


@pytest.mark.parametrize(("n", "norm"), [(100, "l2"), (777, "l2"), (777, "linf")])
def test_a_largest_radius_is_rounded_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], n: int, norm: str
) -> None:
    """ "At most" is above what a unanimous image is certified at; the image's own radius is displayed from below."""
    monkeypatch.chdir(tmp_path)
    Path("unlabelled.npz").write_bytes(_white())
    run(*f"--model digits --data unlabelled.npz --sigma 0.03 --n {n} --norm {norm} --out r.jsonl".split())
    said = capsys.readouterr()
    largest = float(re.search(r"^radius .*, at most ([\d.]+)", said.err, re.MULTILINE)[1])  # type: ignore[index]
    row = json.loads(Path("r.jsonl").read_text().splitlines()[1])
    assert list(row["votes"].values()) == [n]
    displayed = float([line for line in said.out.splitlines() if line.startswith("0 ")][-1].split()[-2])
    assert displayed <= row["radius"] <= largest
    assert largest - displayed < {"l2": 1.01e-4, "linf": 1.01e-6}[norm]


def _white() -> bytes:
    """One zero as the digits know it, without a label."""
    import numpy as np
    from sklearn.datasets import load_digits

    out = io.BytesIO()
    np.savez(out, x=(load_digits().images[:1] / 16).astype(np.float32))
    return out.getvalue()


def test_accuracy_under_attack_is_rounded_up_and_certified_accuracy_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 of 3 under each condition: at most 0.667 under attack, since other attacks may leave less; else 0.666."""
    groups = [("clean", "plain"), ("pgd", "blind"), ("pgd", "adaptive"), ("smoothing", "certified")]
    header = {
        **HEADER, "type": "comparison", "expected": 12, "defences": [{"named": "none", "frozen": True}], "eps": 0.25,
        "eps_text": "0.25", "l2_radius": 0.24999, "certify_n": 100, "repeats": 1, "images": {"chosen": 3},
        "conditions": [{"name": name, "group": group} for name, group in groups],
    }  # fmt: skip
    keys = {group: name if group == "plain" else f"{group}: {name}" for name, group in groups}
    rows = [
        {
            "type": "outcome", "id": f"{i} | none | {key}", "image": str(i), "defence": "none", "condition": key,
            "label": 1, "answers": [int(i < 2)], "radius": 0.1, "queries": 1, "seconds": 0.1,
        }
        for key in keys.values()
        for i in range(3)
    ]  # fmt: skip
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *rows]))
    run("table", str(path), "--format", "markdown")
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("| none") and "[" in line)
    assert [cell.split()[0] for cell in line.split("|")[2:-1]] == ["0.666", "0.667", "0.667", "0.666"]
    assert all("[0.20, 0.94]" in cell for cell in line.split("|")[2:-1])  # Wilson: 0.20766 to 0.93851
    assert "at l2 radius 0.2499 " in out


GUARANTEED = re.compile(
    r"radi(us|i)|p_?lower|p_?other|accurac|average_radius|\bacr\b|largest|chance|tolerance|certified"
    r"|(\b|_)(lower|upper|low|high|lo|hi|cap|far)\b|\b(r|p0|alphas?)\b|\.(alpha|interval)\b|'alpha'",
    re.IGNORECASE,
)
"""Expressions that name a guaranteed quantity, an end of an interval, or a radius as it was given."""

ALLOWED = {
    ("preprocess.py", "low"): "range of the values of an image, in an error",
    ("preprocess.py", "high"): "range of the values of an image, in an error",
    ("bench.py", "result.certificate"): "seconds that a certificate takes",
    ("bench.py", "result.certificate_reference"): "seconds that a certificate takes",
    ("report.html", '{% macro pct(share) %}{{ "%.2f" | format(100 * share) }}%{% endmacro %}'): "bar widths",
    ("report.html", '"%.3g" | format(probe.spread)'): "spread of a score",
    ("page.html", 'const count = (n) => n.toLocaleString("en");'): "counts",
}
"""What else is formatted there, with the reason why it is no guarantee."""

_ROUNDING = re.compile(r"%[-+ \d]*\.?\d*[eEfFgG]|[.\d,]*[eEfFgG%]$")


def rounded_expressions(source: str) -> Iterator[str]:
    """Whatever a Python file rounds while it formats it: f-strings, ``%``, ``format``, ``round``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FormattedValue) and node.format_spec is not None:
            if _ROUNDING.search(ast.unparse(node.format_spec)[2:-1]):
                yield ast.unparse(node.value)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant):
            if isinstance(node.left.value, str) and _ROUNDING.search(node.left.value):
                yield ast.unparse(node.right)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("round", "np.round", "format") or called.endswith((".format", "toFixed")):
                yield from map(ast.unparse, node.args)


def test_guaranteed_quantities_are_formatted_by_two_functions_only() -> None:
    """A radius, a bound, an accuracy or a cap that is displayed passes through floor_to, ceil_to or exact."""
    found, used = [], set()
    for package in ("certify", "denoisers", "training", "analysis"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for text in rounded_expressions(path.read_text(encoding="utf-8")):
                if (path.name, text) in ALLOWED:
                    used.add((path.name, text))
                elif GUARANTEED.search(text):
                    found.append(f"{name}: {text}")
        for path in sorted((ROOT / package).rglob("*.html")):
            name = path.relative_to(ROOT).as_posix()
            text = path.read_text(encoding="utf-8")
            for there, snippet in ALLOWED:
                if there == path.name and snippet in text:
                    used.add((there, snippet))
                    text = text.replace(snippet, "")
            pattern = r".{0,40}(?:\bformat\(|\| *round|toFixed|toPrecision|toLocaleString|Math\.round|NumberFormat).*"
            found += [f"{name}: {line.strip()}" for line in re.findall(pattern, text)]
    assert found == []
    assert used == ALLOWED.keys(), "every exception is still needed"
