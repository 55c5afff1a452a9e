"""Where a command's file goes, and what is said when it is stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.errors import RunFault, UserError

if TYPE_CHECKING:
    from certify.records import RunFile


def telling_name(words: Sequence[str]) -> str:
    """The words as a part of a file's name."""
    return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in word) for word in words)


def output_path(out: str | None, words: Sequence[str], header: Mapping[str, Any]) -> Path:
    """Where a run goes: a file as named, or a telling name in a folder (``runs/`` unless named).

    Raises:
        UserError: a file that does not end in .jsonl.
    """
    from certify.records import identity_digest

    target = Path(out or "runs")
    if target.suffix == ".jsonl":
        return target
    if target.suffix and not target.is_dir():
        raise UserError(f"--out {out!r}: expected a file ending in .jsonl, or a folder")
    return target / f"{telling_name(words)}-{identity_digest(header)}.jsonl"


@contextlib.contextmanager
def stoppable(file: RunFile, expected: int, what: str) -> Iterator[None]:
    """Ctrl-C ends the work in one line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"stopped after {len(file.done):,} of {expected:,} {what}, which are in {file.path}"
        fault = RunFault(f"{kept}; the same command goes on from there")
        fault.exit_code = 130
        raise fault from None
