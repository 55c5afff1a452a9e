"""What the command makes of replies that are no answers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from email.utils import formatdate
from pathlib import Path

import pytest
from command import run
from scripted_service import Reply, service

NUMBERS = ["--data", "digits", "--skip", "400", "--sigma", "0.25", "--n0", "1", "--n", "5", "--repeat-clean", "0"]
LABELS = ["--protocol", "json", "--protocol-option", "labels=labels"]


@pytest.mark.parametrize("hours", [1, -1])
def test_a_wait_counts_from_the_clock_of_the_service(tmp_path: Path, hours: int) -> None:
    """An hour slow or fast, this machine still waits as long as it was asked to: not at all."""

    def answer(number: int, headers: Mapping[str, str]) -> Reply:
        there = formatdate(time.time() + 3600 * hours, usegmt=True)
        return (200, '{"labels": ["zero"]}', {}) if number else (429, "", {"Date": there, "Retry-After": there})

    with service(answer) as url:
        run("audit", "--endpoint", url, *LABELS, *NUMBERS, "--budget", "30", "--out", str(tmp_path / "a"))
    asked = json.loads((tmp_path / "a" / "audit.json").read_text())["asked"]
    assert (asked["retries"], asked["failures"]) == (1, {})
