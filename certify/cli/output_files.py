"""Where a command's file goes, and what is said when it is stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.errors import Stopped, UserError

if TYPE_CHECKING:
    from certify.runs.run_file import RunFile


def telling_name(words: Sequence[str]) -> str:
    """The words as a part of a file's name."""
    return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in word) for word in words)


def run_path(out: str | None, folder: Path, name: str) -> Path:
    """Where ``--out`` puts a run file: there, if it ends in .jsonl, else as ``name`` in that folder, or in ``folder``.

    Raises:
        UserError: another suffix, and no folder of that name.
    """
    target = Path(out or folder)
    if target.suffix == ".jsonl" and out:
        return target
    if target.suffix and out and not out.endswith("/") and not target.is_dir():
        raise UserError(f"--out {out}: expected a file ending in .jsonl, or a folder (a new one: end it with /)")
    return target / name


def output_path(out: str | None, words: Sequence[str], header: Mapping[str, Any]) -> Path:
    """Where a run goes: :func:`run_path` with a telling name, in ``runs/`` unless named."""
    from certify.runs.identity import identity_digest

    return run_path(out, Path("runs"), f"{telling_name(words)}-{identity_digest(header)}.jsonl")


@contextlib.contextmanager
def stoppable(file: RunFile, expected: int, what: str) -> Iterator[None]:
    """Ctrl-C ends the work in one line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"stopped after {len(file.done):,} of {expected:,} {what}, which are in {file.path}"
        raise Stopped(f"{kept}; the same command goes on from there") from None
