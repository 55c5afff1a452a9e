"""The ledger: no answer that was paid for is lost or queried again, whenever the program is killed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from fault_server import RAW, FaultServer, Seen, label_of, picture, queries

from certify.blackbox.ledger import Ledger
from certify.blackbox.ledger_contents import LOST, ledger_header, read_header, read_ledger
from certify.blackbox.record import AuditRecord, write_about
from certify.blackbox.types import Answer, Query, Scored
from certify.errors import RunFault, UserError
from certify.runs.files import replacing

HEADER = ledger_header("http://127.0.0.1:9/v2", RAW, encoding="png")
CAT = (Scored("cat", 0.9), Scored("dog", None))


def kept(path: Path) -> Path:
    """A ledger of four queries: answered, failed, lost, open."""
    first, second, _, fourth = (query.name for query in queries(4))
    with Ledger(path, HEADER) as ledger:
        log(
            *(ledger.sent(query, b"body") for query in queries(4)),
            ledger.answer(Answer(first, CAT, seconds=0.25)),
            ledger.answer(Answer(second, failure="no labels", seconds=0.5)),
            ledger.refused(fourth, "HTTP 503"),
        )
    return path


def log(*lines: Coroutine[Any, Any, None]) -> None:
    """Write these lines, one after the other."""

    async def write() -> None:
        for line in lines:
            await line

    asyncio.run(write())


def test_the_format_of_the_lines(tmp_path: Path) -> None:
    """The keys that other programs may rely on."""
    header, *rows = [json.loads(line) for line in kept(tmp_path / "ledger").read_text().splitlines()]
    assert (header["type"], header["endpoint"], header["encoding"]) == ("ledger", "http://127.0.0.1:9/v2", "png")
    assert header["format"] == {"name": "raw", "side": 8}
    assert {"version", "created", "schema"} <= header.keys()
    assert [row["type"] for row in rows] == ["sent"] * 4 + ["answer", "answer", "refused"]
    assert rows[0].keys() == {"type", "name", "attempt", "pixels", "body", "time"}
    assert (rows[0]["attempt"], rows[0]["pixels"]) == (1, picture(0).sha256)
    assert rows[0]["body"] == hashlib.sha256(b"body").hexdigest()
    assert rows[4] == {
        "type": "answer",
        "name": "image 0 | estimation | 0",
        "attempts": 1,
        "ranked": [["cat", 0.9], ["dog", None]],
        "failure": "",
        "seconds": 0.25,
    }
    assert rows[6] == {"type": "refused", "name": "image 0 | estimation | 3", "attempt": 1, "why": "HTTP 503"}


def test_a_ledger_is_read_back(tmp_path: Path) -> None:
    path = kept(tmp_path / "ledger")
    first, second, third, fourth = queries(4)
    answers = {
        first.name: Answer(first.name, CAT, "", 0.25, 1, known=True),
        second.name: Answer(second.name, (), "no labels", 0.5, 1, known=True),
        third.name: Answer(third.name, (), LOST, 0.0, 1, known=True),
    }
    found = read_ledger(path)
    assert (found.answers, found.spent, found.torn) == (answers, 4, False)
    assert (found.open, found.queries) == ({fourth.name: 1}, 4)
    assert read_header(path) == found.header
    assert read_header(tmp_path / "none") is None
    with Ledger(path, HEADER) as ledger:
        assert ledger.contents.answers == answers
        assert ledger.spent == 4
        assert [ledger.find(query) for query in (first, second, third)] == list(answers.values())
        assert ledger.find(fourth) is None
        assert [ledger.attempts(query.name) for query in queries(5)] == [1, 1, 1, 1, 0]
        with pytest.raises(UserError, match=r"'image 0 . estimation . 0' was another picture when it was sent"):
            ledger.find(Query(first.name, picture(7)))
        log(ledger.sent(fourth, b"body"), ledger.answer(Answer(fourth.name, CAT, attempts=2)))
    assert read_ledger(path).answers[fourth.name].attempts == 2
    assert read_ledger(path).spent == 5


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    """A ledger cut off at every byte: it opens, holds a beginning of what it held, and can be continued."""
    whole = kept(tmp_path / "whole").read_bytes()
    path, fifth = tmp_path / "cut", queries(5)[4]
    for length in [*range(0, len(whole), 29), *(i + d for i, c in enumerate(whole) if c == 10 for d in (0, 1))]:
        path.write_bytes(whole[:length])
        with Ledger(path, HEADER) as ledger:
            sent = whole[: max(length, 0)].rpartition(b"\n")[0].count(b'"sent"')
            assert ledger.spent == sent
            log(ledger.sent(fifth, b"body"), ledger.answer(Answer(fifth.name, CAT)))
        again = read_ledger(path)
        assert (again.spent, again.torn, again.answers[fifth.name].ranked) == (sent + 1, False, CAT)
        if b"\n" in whole[:length]:
            assert path.read_bytes().startswith(whole[: whole[:length].rfind(b"\n") + 1])


def damage(rows: list[Any], where: int, **keys: Any) -> list[Any]:
    rows[where] = {**rows[where], **keys}
    return rows


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda rows: [*rows[:2], "cut off", *rows[2:]], 3),
        (lambda rows: [*rows[:3], ["sent"], *rows[3:]], 4),
        (lambda rows: [*rows, rows[1]], 9),  # sent again after its answer
        (lambda rows: [*rows, rows[5]], 9),  # two answers
        (lambda rows: [rows[0], *rows[2:]], 5),  # an answer to what was not sent
        (lambda rows: damage(rows, 2, attempt=2), 3),
        (lambda rows: damage(rows, 5, ranked=[]), 6),  # neither answer nor failure
        (lambda rows: damage(rows, 5, ranked="cat"), 6),
        (lambda rows: damage(rows, 6, type="anser"), 7),
        (lambda rows: damage(rows, 7, attempt=2), 8),
    ],
)
def test_a_damaged_line_is_named(spoil: Any, line: int, tmp_path: Path) -> None:
    path = kept(tmp_path / "ledger")
    rows = spoil([json.loads(row) for row in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = path.read_bytes()
    for read in (read_ledger, lambda where: Ledger(where, HEADER)):
        with pytest.raises(UserError, match=f"ledger is damaged at line {line}; it is left alone"):
            read(path)
    assert path.read_bytes() == content


def test_another_service_or_format_is_refused_with_both_names(tmp_path: Path) -> None:
    path = kept(tmp_path / "ledger")
    content = path.read_bytes()
    other = ledger_header("https://other/v2", RAW, encoding="png")
    with pytest.raises(UserError, match=re.escape('endpoint "http://127.0.0.1:9/v2" there, "https://other/v2" here')):
        Ledger(path, other)
    with pytest.raises(UserError, match='encoding "png" there, "jpeg" here'):
        Ledger(path, {**HEADER, "encoding": "jpeg"})
    with pytest.raises(UserError, match=re.escape('format {"name": "raw", "side": 8} there, {"name": "v2"} here')):
        Ledger(path, {**HEADER, "format": {"name": "v2"}})
    Ledger(path, {**HEADER, "version": "9.9", "created": "later"}).close()
    assert path.read_bytes() == content


def test_other_files_are_not_ledgers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_ledger(tmp_path / "none")
    for content in (b"hello\n", b'{"type": "run", "expected": 5}\n', b"\x00" * 50):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UserError, match="is not a ledger of certify"):
            Ledger(tmp_path / "x", HEADER)
        assert (tmp_path / "x").read_bytes() == content
    for schema, words in ((99, "a newer version .*; update"), (1, "an older version .*; resume with that version")):
        (tmp_path / "x").write_text(json.dumps({"type": "ledger", "schema": schema}) + "\n")
        for read in (read_header, read_ledger, lambda path: Ledger(path, HEADER)):
            with pytest.raises(UserError, match=words):
                read(tmp_path / "x")
    with pytest.raises(UserError, match="not a regular file"):
        Ledger(tmp_path, HEADER)


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_nobody_else_reads_an_audit(tmp_path: Path) -> None:
    """Whatever the umask: replies may be confidential. Other results stay as the umask has them."""
    before = os.umask(0o022)
    try:
        path = kept(tmp_path / "audit" / "ledger.jsonl")
        write_about(path.parent, AuditRecord.from_json({}))
        with replacing(tmp_path / "curve.svg") as beside:
            beside.write_text("")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(found.stat().st_mode) for found in (path.parent, path, path.parent / "audit.json")]
    assert modes == [0o700, 0o600, 0o600]
    assert stat.S_IMODE((tmp_path / "curve.svg").stat().st_mode) == 0o644


def test_a_ledger_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "ledger").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"cannot write .*: it is a symbolic link; name another out"):
        Ledger(tmp_path / "ledger", HEADER)
    assert not (tmp_path / "elsewhere").exists()


def test_a_replaced_file_writes_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the file beside cannot be predicted; whoever guesses it all the same stops the writing."""
    monkeypatch.setattr("secrets.token_hex", lambda size: "0")
    (tmp_path / ".0.part").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError), replacing(tmp_path / "curve.svg") as beside:
        beside.write_text("")
    assert not (tmp_path / "victim").exists()
    (tmp_path / ".0.part").unlink()
    (tmp_path / "curve.svg").symlink_to(tmp_path / "victim")
    with replacing(tmp_path / "curve.svg") as beside:
        beside.write_text("new")
    assert not (tmp_path / "victim").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.svg"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = kept(tmp_path / "ledger")
    with Ledger(path, HEADER):
        with pytest.raises(UserError, match="is being written by another process"):
            Ledger(path, HEADER)
        assert read_ledger(path).spent == 4  # it may be read meanwhile
    Ledger(path, HEADER).close()


def test_a_full_disk_leaves_complete_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, query = kept(tmp_path / "ledger"), queries(6)[5]
    before = path.read_bytes()

    def half(file: Any, line: bytes) -> None:
        file.write(line[:20])
        raise OSError(28, "No space left on device")

    with Ledger(path, HEADER) as ledger:
        monkeypatch.setattr("certify.blackbox.ledger.write_all", half)
        with pytest.raises(RunFault, match="No space left on device; its lines are kept"):
            log(ledger.sent(query, b"body"))
        monkeypatch.undo()
        with pytest.raises(RunFault, match="No space"):  # for good: what is on the disk is certain no more
            log(ledger.sent(query, b"body"))
    assert path.read_bytes() == before
    ledger = Ledger(path, HEADER)
    ledger.close()
    with pytest.raises(RunFault, match="it was closed"):
        log(ledger.sent(query, b"body"))


def test_writers_share_a_flush_and_none_runs_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method returns only after a flush that began after its line was written has ended."""
    path, wanted = tmp_path / "ledger", queries(160)
    flush, flushed, flushes = os.fsync, [0], [0]

    def counted(number: int) -> None:
        size = os.fstat(number).st_size
        flush(number)
        time.sleep(0.02)  # as slow as a disk
        flushed[0], flushes[0] = size, flushes[0] + 1

    with Ledger(path, HEADER) as ledger:
        monkeypatch.setattr(os, "fsync", counted)
        late: list[str] = []

        async def write(some: list[Query]) -> None:
            for query in some:
                await ledger.sent(query, b"body")
                if query.name.encode() not in path.read_bytes()[: flushed[0]]:
                    late.append(query.name)

        async def write_all() -> None:
            await asyncio.gather(*(write(wanted[i::16]) for i in range(16)))

        asyncio.run(write_all())
    assert not late
    assert read_ledger(path).spent == 160
    assert flushes[0] < 60


def test_a_failed_flush_fails_every_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, wanted = tmp_path / "ledger", queries(8)

    def fails(number: int) -> None:
        time.sleep(0.02)
        raise OSError(5, "Input/output error")

    async def write_all(ledger: Ledger) -> list[BaseException | None]:
        return await asyncio.gather(*(ledger.sent(query, b"body") for query in wanted), return_exceptions=True)

    with Ledger(path, HEADER) as ledger:
        monkeypatch.setattr(os, "fsync", fails)
        outcomes = asyncio.run(write_all(ledger))
    assert all(isinstance(outcome, RunFault) and "Input/output error" in str(outcome) for outcome in outcomes)


def kill_again_and_again(folder: Path, kills: int, seed: int) -> None:
    """Send the same queries from one process after another, each killed at a random moment (``query_child.py``)."""
    folder.mkdir()
    path, used, budget = folder / "ledger", folder / "used", 100_000
    first: set[bytes] = set()

    def plan(number: int, seen: Seen) -> str:
        again, kind = seen.body in first, seen.body[0] % 8
        first.add(seen.body)
        return "" if again else {1: "later:0", 3: "status:503", 5: "reset", 6: "empty"}.get(kind, "")

    with FaultServer(plan, delay=0.003) as server:
        child = [sys.executable, Path(__file__).with_name("query_child.py"), server.url]
        done = subprocess.run(
            [*child, path, used, str(budget), str(kills), str(seed)],
            capture_output=True,
            text=True,
            timeout=3000,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kills"] == kills
    asked, found = json.loads(done.stdout)["asked"], read_ledger(path)
    wanted = queries(asked)
    assert found.answers.keys() == {query.name for query in wanted}

    history: dict[str, list[str]] = defaultdict(list)
    for row in map(json.loads, path.read_text().splitlines()[1:]):
        history[row["name"]].append(row["type"])
    arrived = server.count()
    for query in wanted:
        body, answer = query.picture.pixels.tobytes(), found.answers[query.name]
        steps = history[query.name]
        sent = steps.count("sent")
        # No query goes out again but after a reply that brought nothing; so none is repeated.
        assert steps[: 2 * (sent - 1)] == ["sent", "refused"] * (sent - 1)
        assert steps[2 * (sent - 1) :] in (["sent", "answer"], ["sent"])
        # What arrived was recorded before; all of it but the last was refused; what was answered arrived.
        assert sent - (answer.failure == LOST) <= arrived[body] <= sent == answer.attempts
        if answer.ranked:
            assert answer.ranked[0].label == label_of(body)
        else:
            assert answer.failure == LOST or (answer.failure.startswith("no labels") and body[0] % 8 == 6)
    spent = sum(steps.count("sent") for steps in history.values())
    assert found.spent == spent <= budget
    lost = sum(answer.failure == LOST for answer in found.answers.values())
    assert sum(arrived.values()) <= spent <= sum(arrived.values()) + lost
    assert kills / 20 < lost <= 4 * kills  # that many were under way: processes died at work
    assert asked > kills
    assert set(arrived) <= {query.picture.pixels.tobytes() for query in wanted}

    # Whatever a process had used by the time it died stands in the ledger, as it was used.
    uses = [line.split("\t") for line in used.read_text().splitlines()]
    assert len(uses) > asked
    for name, label in uses:
        answer = found.answers[name]
        assert label == (answer.ranked[0].label if answer.ranked else answer.failure)
    assert Counter(name for name, _ in uses).keys() == found.answers.keys()


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path / "run", 10, 0)


@pytest.mark.slow
def test_200_kills(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path / "run", 200, 1)
