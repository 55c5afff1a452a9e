"""A new user's first steps: build a wheel, install it elsewhere, run the default, paste the README's Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import run

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_runs_the_digits_default(tmp_path: Path) -> None:
    """Built from the checkout, installed into an empty folder, run from another: nothing of the checkout is used."""
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in _plain_files()]
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(source)]
    subprocess.run(wheel, check=True)
    (built,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(built)], check=True)
    shipped = Path("denoisers", "data")
    assert sorted(p.name for p in (tmp_path / "site" / shipped).iterdir()) == sorted(
        p.name for p in (ROOT / shipped).iterdir()
    )
    assert (tmp_path / "site" / "analysis" / "report" / "report.html").is_file()
    code = (
        "import certify, sys; from pathlib import Path; assert Path(certify.__file__).is_relative_to(sys.path[0]);"
        "from certify.cli import main; main(['--model', 'digits', '--sigma', '0.25', '--n', '1000', '--json'])"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"}
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["images"] == 100
    assert 0.7 < result["certified_accuracy"]["0"] < 0.95
    assert (tmp_path / result["run"]).is_file()
    assert (tmp_path / result["curve"]).is_file()


def _plain_files() -> list[Path]:
    packages = [p for name in ("certify", "denoisers", "training", "analysis") for p in (ROOT / name).rglob("*")]
    return [p for p in [*packages, *ROOT.glob("*")] if p.is_file() and "__pycache__" not in p.parts]


def test_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(snippet, namespace)
    assert 0.8 < namespace["run"].certified_accuracy(0) <= 1
    assert (tmp_path / "curve.png").exists()
    assert 0 < namespace["g"].certify(namespace["image"], n=1000).radius < 0.8


def test_the_example_classifier_can_be_certified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A nearest-mean classifier beats guessing by far, and its certificates are of the usual kind."""
    monkeypatch.chdir(ROOT)
    command = "--model examples.my_model:nearest_mean --data digits --skip 20 --sigma 0.25 --n 1000 --json --out"
    run(*command.split(), str(tmp_path / "r.jsonl"))
    result = json.loads(capsys.readouterr().out)
    assert result["base_accuracy"] > 0.7
    assert result["certified_accuracy"]["0"] > 0.5


def test_readme_has_the_two_commands() -> None:
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("certify --model digits --sigma 0.25")
    assert commands[1].endswith("-m pytest")


def test_help_is_fast_because_it_imports_nothing_heavy() -> None:
    code = "import sys\ntry:\n import certify.cli; certify.cli.main(['--help'])\nexcept SystemExit: pass\n" + (
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'scipy', 'matplotlib', 'timm')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0
    )
