"""Paths of output files, and the message of an interrupted command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.errors import Stopped, UserError

if TYPE_CHECKING:
    from certify.runs.run_file import RecordFile


def file_name(words: Sequence[str]) -> str:
    """Join words to a part of a file's name."""
    return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in word) for word in words)


def run_path(out: str | None, folder: Path, name: str) -> Path:
    """Return the path of a run file: ``out`` if it ends in .jsonl, else ``name`` in the folder ``out`` or ``folder``.

    Raises:
        UserError: ``out`` has another suffix and is no folder.
    """
    target = Path(out or folder)
    if target.suffix == ".jsonl" and out:
        return target
    if target.suffix and out and not out.endswith("/") and not target.is_dir():
        raise UserError(f"--out {out}: expected a file ending in .jsonl, or a folder (a new one: end it with /)")
    return target / name


def output_path(out: str | None, words: Sequence[str], header: Mapping[str, Any]) -> Path:
    """Return :func:`run_path` for a name of these words and a digest of the settings, by default in ``runs/``."""
    from certify.runs.identity import identity_digest

    return run_path(out, Path("runs"), f"{file_name(words)}-{identity_digest(header)}.jsonl")


@contextlib.contextmanager
def stoppable(file: RecordFile[Any, Any], expected: int, what: str) -> Iterator[None]:
    """Turn Ctrl-C into an error of one line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"stopped after {len(file.done):,} of {expected:,} {what}, which are in {file.path}"
        raise Stopped(f"{kept}; the same command resumes there") from None
