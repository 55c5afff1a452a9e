"""The command, run in this process, and what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from certify.cli.app import main
from certify.runs.records import ImageRow, RunHeader
from certify.runs.run_file import Run, read_run


def run(*args: str, code: int = 0) -> None:
    """Run ``certify ARGS`` and expect this exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert (ended.value.code or 0) == code


def run_of_json(path: Path | str, header: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> Run:
    """A run file as it would be read, of this header and these rows."""
    return Run(Path(path), RunHeader.from_json(header), [ImageRow.from_json(row) for row in rows])


def rows_without_seconds(path: Path | str) -> list[dict[str, Any]]:
    """The image lines of a run file, finished or not, without their times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_run(path, allow_partial=True).images]
