"""Replies without an answer: what the command reports, and how long it waits."""

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
def test_retry_after_counts_from_the_clock_of_the_service(tmp_path: Path, hours: int) -> None:
    """With a clock that is an hour slow or fast, too: here the requested wait is zero."""

    def answer(number: int, headers: Mapping[str, str]) -> Reply:
        there = formatdate(time.time() + 3600 * hours, usegmt=True)
        return (200, '{"labels": ["zero"]}', {}) if number else (429, "", {"Date": there, "Retry-After": there})

    with service(answer) as url:
        run("audit", "--endpoint", url, *LABELS, *NUMBERS, "--budget", "30", "--out", str(tmp_path / "a"))
    asked = json.loads((tmp_path / "a" / "audit.json").read_text())["asked"]
    assert (asked["retries"], asked["failures"]) == (1, {})


FAILED = "labels 'labels' finds nothing in the reply"
WITHOUT_LABELS = {
    '{"error": "Invalid API key provided"}': f"{FAILED}, which says 'Invalid API key provided'",
    '{"Error": {"Code": 7, "Message": "no credit"}}': f"{FAILED}, which says 'no credit'",
    '{"success": false, "errors": [{"code": 7, "reason": "no picture"}]}': f"{FAILED}, which says 'no picture'",
    '"Please sign in."': f"{FAILED}, which says 'Please sign in.'",
    '[{"detail": "quota"}]': f"{FAILED}, which says 'quota'",
    '{"predictions": [{"name": "cat"}], "version": 3}': f"{FAILED}, which holds predictions, version",
    '["cat"]': FAILED,
    "[]": FAILED,
}


@pytest.mark.parametrize("body", WITHOUT_LABELS)
def test_a_reply_without_labels_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str) -> None:
    with service(lambda number, headers: (200, body, {})) as url:
        where = ["--endpoint", url, "--budget", "30", "--out", str(tmp_path / "a")]
        run("audit", *where, *LABELS, *NUMBERS, code=1)
    why = WITHOUT_LABELS[body]
    assert f"certify: the service gave no label for the first image: {why}; no other query" in capsys.readouterr().err
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["asked"]["failures"] == {why: 1}


@pytest.mark.parametrize(
    ("protocol", "why"),
    [
        (["tf-serving", "--protocol-option", "model=m"], "no predictions in the reply"),
        (["hugging-face", "--protocol-option", "model=a/b"], "an object where a list of labels was expected"),
        (["v2", "--protocol-option", "model=m"], "no outputs in the reply"),
        (["google-vision"], "no responses in the reply"),
    ],
)
def test_every_protocol_quotes_a_reply_without_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: list[str], why: str
) -> None:
    with service(lambda number, headers: (200, '{"message": "Over the limit."}', {})) as url:
        where = ["--endpoint", url, "--budget", "30", "--out", str(tmp_path / "a")]
        run("audit", *where, "--protocol", *protocol, *NUMBERS, code=1)
    assert f"first image: {why}, which says 'Over the limit.'; no other query was sent" in capsys.readouterr().err
