"""The command, run in this process."""

from __future__ import annotations

import pytest

from certify.cli.app import main


def run(*args: str, code: int = 0) -> None:
    """Run ``certify ARGS`` and expect this exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert (ended.value.code or 0) == code
