"""The house: imports point one way, names are listed once, importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import certify
from certify.errors import UserError
from certify.registry import Registry

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "certify": {"certify"},
    "denoisers": {"certify", "denoisers"},
    "training": {"certify", "denoisers", "training"},
    "analysis": {"certify", "denoisers", "analysis"},
}
MODULES = sorted(p.relative_to(ROOT) for package in ALLOWED for p in (ROOT / package).rglob("*.py"))


KNOW_MORE = {
    "certify/__init__.py": {"analysis", "training"},  # Comparison, read_comparison, train_denoiser
    "certify/api.py": {"analysis"},  # the type of accuracy()
    "certify/smoothed_classifier.py": {"denoisers"},  # SmoothedClassifier(denoiser="auto")
    "certify/results.py": {"analysis"},  # Run.table, Run.plot
    "certify/auditing.py": {"denoisers", "analysis"},  # a denoiser by name, the report
    "certify/comparing.py": {"denoisers", "analysis", "training"},  # defences, attacks, measurements
}
"""Modules that users call, which import other packages when a method needs them."""

LAYERS = (
    ("types", "errors", "registry", "text", "sibling_packages"),
    ("smoothing",),
    ("models",),
    ("images",),
    ("engine",),
    ("runs",),
    ("smoothed_classifier",),
    ("blackbox",),
    ("serve", "cluster"),
    ("results",),
    ("api",),
    ("auditing", "comparing"),
    ("cli", "__main__"),
)
"""Inside ``certify``, each layer imports itself and what stands above it."""


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found & ALLOWED.keys()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_one_way(module: Path) -> None:
    if module.parts[:2] == ("certify", "cli"):
        return  # the command knows all packages, and imports them when a verb needs them
    also = KNOW_MORE.get(str(module), set())
    assert imported_packages(ROOT / module) <= ALLOWED[module.parts[0]] | also


def test_imports_inside_certify_point_one_way() -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    package = ROOT / "certify"
    assert {p.stem for p in package.iterdir() if p.suffix in (".py", "")} - {
        "__init__",
        "__pycache__",
        "data",
    } == level.keys()
    wrong = []
    for path in sorted(package.rglob("*.py")):
        here = path.relative_to(package).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                here == "__init__"
                or not isinstance(node, ast.ImportFrom)
                or not (node.module or "").startswith("certify")
            ):
                continue
            names = [alias.name for alias in node.names] if node.module == "certify" else [node.module.split(".")[1]]
            wrong += [f"{path.name}: {name}" for name in names if level.get(name, -1) > level[here]]
    assert not wrong


@pytest.mark.parametrize("module", [m for m in MODULES if m.name != "__init__.py"], ids=str)
def test_the_architecture_page_names_every_module(module: Path) -> None:
    assert module.name in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "module", ["certify", "certify.cli", "certify.runs.run_file", "denoisers", "analysis.curves", "analysis.runs"]
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'scipy.stats', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


LIGHT = ["--help", "--version", "run --help", "train --help", "serve --help", "list bounds", "list protocols"]


def test_help_and_lists_do_not_import_torch() -> None:
    """Commands that only list names do not import torch; one process runs them one after the other."""
    code = (
        "import contextlib, io, sys\n"
        "from certify.cli import main\n"
        f"for line in {LIGHT!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        main(line.split())\n"
        "    assert out.getvalue(), line\n"
        "    heavy = sys.modules.keys() & {'torch', 'torchvision', 'timm', 'matplotlib', 'scipy', 'ray', 'fastapi'}\n"
        "    assert not heavy, (line, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    assert certify.__all__ == ["__version__", *sorted(certify._HOME)]
    for name in certify.__all__:
        assert getattr(certify, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = certify.nothing


def test_registry() -> None:
    registry = Registry("thing")
    registry.add("median", "statistics:median", "of numbers")
    assert registry.get("median")([1, 2, 9]) == 2
    assert list(registry) == ["median"]
    with pytest.raises(ValueError, match="registered twice"):
        registry.add("median", max)
    with pytest.raises(UserError, match="unknown thing 'medain'; nearest: median"):
        registry.get("medain")
