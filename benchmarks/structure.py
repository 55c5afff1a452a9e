"""Measure the size and shape of the code: ``python benchmarks/structure.py``.

``python benchmarks/structure.py --sample SEED`` prints twelve random public functions with their docstrings instead,
for a reader to judge.

Counts lines and modules, entries at the top of ``certify/``, functions that take or return ``dict[str, Any]``, modules
that spell the run file's keys, the modules and functions that one image passes through in ``certify run``, from
the first line of the command to the last, and the start-up time of ``certify --help``.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("certify", "denoisers", "training", "analysis")
KEYS = ("stopping", "procedure", "selection", "failures", "expected", "tolerance", "p_lower", "drawn")


def count_code() -> dict[str, Any]:
    """Return counts over the source files of the four packages."""
    files = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    functions = [n for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    untyped = [f for f in functions if "dict[str, Any]" in ast.unparse(f.args) or _returns_dict(f)]
    spelled = {
        key: sum(any(isinstance(n, ast.Constant) and n.value == key for n in ast.walk(t)) for t in trees.values())
        for key in KEYS
    }
    top = [p for p in (ROOT / "certify").iterdir() if p.name not in ("__pycache__", "py.typed")]
    return {
        "lines": sum(path.read_text(encoding="utf-8").count("\n") for path in files),
        "modules": len(files),
        "largest module": max(path.read_text(encoding="utf-8").count("\n") for path in files),
        "entries at the top of certify/": len(top),
        "functions": len(functions),
        "functions with dict[str, Any] in their signature": len(untyped),
        "modules that spell a key of the run file": spelled,
    }


def _returns_dict(function: ast.FunctionDef) -> bool:
    return function.returns is not None and "dict[str, Any]" in ast.unparse(function.returns)


def trace_image() -> dict[str, int]:
    """Run the command on one image and count the modules and functions of this project that were called."""
    sys.path.insert(0, str(ROOT))
    from certify.cli import main

    seen: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            module = Path(code.co_filename).relative_to(ROOT)
            if module.parts[0] in PACKAGES and not code.co_name.startswith("<"):
                seen.add((str(module), code.co_qualname))

    options = "--precision float32 --compile off --n 1000 --max 1 --quiet --json"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        command = f"--model digits --sigma 0.25 {options} --out {folder}/run.jsonl"
        sys.setprofile(note)
        try:
            with contextlib.suppress(SystemExit):
                main(command.split())
        finally:
            sys.setprofile(None)
    classes = {name for _, name in seen if _is_class_body(name)}
    return {
        "modules crossed by one image": len({module for module, _ in seen}),
        "functions crossed by one image": len(seen) - len(classes),
    }


def time_help(runs: int = 9) -> dict[str, float]:
    """Run ``certify --help`` in new processes and return the median of their processor seconds."""
    seconds = []
    for _ in range(runs):
        before = os.times()
        subprocess.run([sys.executable, "-m", "certify", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return {"processor seconds of certify --help": round(statistics.median(seconds), 3)}


def _is_class_body(name: str) -> bool:
    last = name.rsplit(".", 1)[-1].lstrip("_")
    return last[:1].isupper()


def sample_functions(seed: int, count: int = 12) -> str:
    """Return public functions and methods, drawn at random: place, signature and docstring."""
    functions = []
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node):
                signature = f"{path.relative_to(ROOT)}:{node.lineno}\ndef {node.name}({ast.unparse(node.args)})"
                functions.append(f"{signature}\n    {ast.get_docstring(node)}\n")
    return "\n".join(random.Random(seed).sample(functions, count))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sample"]:
        print(sample_functions(int(sys.argv[2])))
        sys.exit()
    print(json.dumps(count_code() | trace_image() | time_help(), indent=1))
