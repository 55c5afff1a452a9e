"""The scripts of ``examples/`` run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import certify

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = ("own_module", "own_noise")
SLOW = ("three_sigmas", "denoised_smoothing", "audit_function")
SCRIPTS = (*QUICK, *SLOW)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_script_runs_and_certifies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert "certified accuracy" in capsys.readouterr().out
    if name == "denoised_smoothing":
        assert names["denoised"].certified_accuracy(0.25) > names["without"].certified_accuracy(0.25)
    runs = [value for value in names.values() if isinstance(value, certify.Run)] + names.get("runs", [])
    assert all(run.certified_accuracy(0) > 0.2 for run in runs)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_needs_few_lines_of_the_library(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert sum("certify." in line or "run" in line.split("(")[0] for line in source.split('"""')[2].splitlines()) <= 8


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_holds(tmp_path: Path) -> None:
    """Every cell runs, and prints what the stored cell shows; pictures may differ by a version of matplotlib."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    stored = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    fresh = nbformat.from_dict(stored)
    client = nbclient.NotebookClient(fresh, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    for before, after in zip(stored.cells, fresh.cells, strict=True):
        assert [shown(output) for output in after.get("outputs", [])] == [
            shown(output) for output in before.get("outputs", [])
        ]


def shown(output: dict[str, Any]) -> tuple[list[str], str]:
    """The kinds of an output, and its text with numbers cut to two digits: the last bits depend on the processor."""
    text = str(output.get("text") or output["data"].get("text/plain"))
    return sorted(output.get("data", ())), re.sub(r"(\d\.\d\d)\d+", r"\1", text)


def test_the_python_of_the_reference_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (EXAMPLES.parent / "docs/reference/certifying.md").read_text(encoding="utf-8")
    blocks = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "certify.audit(ask" not in block
    ]
    assert blocks
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})


@pytest.mark.slow
def test_the_python_beside_other_libraries_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("art")
    text = (EXAMPLES.parent / "docs/from-papers.md").read_text(encoding="utf-8")
    blocks = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if block.startswith("import certify")
    ]
    assert len(blocks) == text.count("import certify") == 5
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks), {})
