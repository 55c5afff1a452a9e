"""Every shell command of README.md and docs/, run as a reader would: page by page, in an empty folder, in order.

Commands are fenced as ``bash``, what they print follows as ``text``: its words must come again (numbers may differ, and
``...`` stands for what was left out). Marks, which no reader sees, stand on the lines before a block:

    <!-- not run: why -->                  the whole block stays out
    <!-- not run with "photos/": why -->   commands of the block that hold these words stay out, the others run
    <!-- exits 2 -->                       the block must end with this code instead of 0

A block may leave a server behind (``&``): it is ended after the page. One page with its timing:

    python -m pytest -m slow tests/test_docs_commands.py -k certify.md
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "docs/results/frozen-resnet56.md": "trainings and certificates of CIFAR-10, many hours",
    "docs/scaling.md": "clusters, and commands with placeholders; tutorials/scale.md runs what one machine can",
}
PAGES = [
    name
    for name in ("README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))))
    if name not in ELSEWHERE
]
COMMAND = re.compile(r"^(certify|python3?|pip|curl|torchrun|ray) ", re.MULTILINE)
MARK = re.compile(r'<!-- (?:not run(?: with "(?P<words>[^"]+)")?: (?P<why>.+)|exits (?P<code>\d+)) -->')
LONGEST = 1800.0
"""Seconds that a block may take, on a busy machine."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the marks before it, and the line on which it begins."""

    language: str
    text: str
    marks: tuple[re.Match[str], ...]
    line: int

    @property
    def code(self) -> int:
        """The exit code that the page implies."""
        return next((int(m["code"]) for m in self.marks if m["code"]), 0)

    def commands(self) -> tuple[str, list[tuple[str, str]]]:
        """The blocks that are run, and those that are not, with the reason."""
        out = [m for m in self.marks if m["why"]]
        if not out:
            return self.text, []
        if whole := next((m for m in out if m["words"] is None), None):
            return "", [(self.text, whole["why"])]
        run, left = [], []
        for command in re.findall(r"(?:[^\n]*\\\n)*[^\n]+", self.text):
            why = next((m["why"] for m in out if m["words"] in command), None)
            run.append(command) if why is None else left.append((command, why))
        return "\n".join(run), left


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    marks: list[re.Match[str]] = []
    inside: list[str] | None = None
    language, start = "", 0
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("```"):
            if inside is None:
                inside, language, start = [], line[3:].strip(), number
            else:
                found.append(Block(language, "\n".join(inside), tuple(marks), start))
                inside, marks = None, []
        elif inside is not None:
            inside.append(line)
        elif mark := MARK.fullmatch(line.strip()):
            marks.append(mark)
        elif line.strip():
            marks = []
    assert inside is None, f"{page}:{start}: a block without an end"
    return found


def shape(text: str) -> str:
    """Text without what differs from machine to machine: arithmetic, numbers and their plural, widths of columns."""
    text = re.sub(r"b?float(?:16|32), (?:eager|compiled), batches", "batches", text)
    text = re.sub(r"\d[\d,.]*(?:e[+-]?\d+)?", "#", text).replace("# threads", "# thread")
    return re.sub(r"-{2,}", "--", re.sub(r"[ \t]+", " ", text))


def missing(shown: str, printed: str) -> list[str]:
    """Lines of the page (or parts of them around ``...``) that were not printed."""
    parts = [part.strip() for line in shown.splitlines() for part in line.split("...")]
    return [part for part in parts if shape(part) not in shape(printed)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The reader's working directory: a checkout with its examples. Processes left in it are ended afterwards."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    STARTED[tmp_path] = []
    yield tmp_path
    end(STARTED.pop(tmp_path))


STARTED: dict[Path, list[int]] = {}
"""Process groups of the blocks that were run in a folder."""


def end(groups: list[int]) -> None:
    """End what still runs in these process groups: by asking, then without."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        for group in groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, sent)
        last = time.monotonic() + 15
        while any(_alive(group) for group in groups) and time.monotonic() < last:
            time.sleep(0.1)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def run(script: str, where: Path) -> tuple[int, str]:
    """A block's exit code, and what it printed on both streams until then; servers go on."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with (where.parent / f"{where.name}.printed").open("w+b") as printed:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=where,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        STARTED[where].append(process.pid)
        code = process.wait(LONGEST)
        printed.seek(0)
        return code, printed.read().decode("utf-8", "replace")


def computing() -> float:
    """Seconds of computing of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "bash" for b in blocks(page))])
def test_the_commands_of(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, wrong = [], []
    start, used = time.monotonic(), computing()
    found = blocks(page)
    for block, after in zip(found, [*found[1:], None], strict=True):
        if block.language != "bash":
            continue
        script, left = block.commands()
        report += [f"  not run, line {block.line}: {command.splitlines()[0]}  ({why})" for command, why in left]
        if not script:
            continue
        code, printed = run(script, folder)
        if code != block.code:
            wrong.append(f"{page}:{block.line}: exit code {code} instead of {block.code}\n{script}\n{printed[-3000:]}")
        elif after is not None and after.language == "text" and (lost := missing(after.text, printed)):
            wrong.append(f"{page}:{after.line}: not printed: {lost}\nprinted:\n{printed[-3000:]}")
    seconds = f"{time.monotonic() - start:.0f} s by the clock, {computing() - used:.0f} s of computing"
    with capsys.disabled():
        print("\n" + "\n".join([f"{page}: {seconds}", *report]))
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_fenced_as_such(page: str) -> None:
    """A block that nobody fenced as bash would never be run; a mark before no commands says nothing."""
    for block in blocks(page):
        assert block.language in {"bash", "python", "text", "json", "toml", ""}, (
            f"{page}:{block.line}: {block.language}"
        )
        if block.language != "bash":
            assert not COMMAND.search(block.text), f"{page}:{block.line}: commands; fence them as bash"
            assert not block.marks, f"{page}:{block.line}: marks belong before commands"
        for mark in block.marks:
            words = mark["words"]
            assert words is None or words in block.text, f"{page}:{block.line}: no command holds {words!r}"


def test_marks_choose_commands() -> None:
    marks = tuple(MARK.finditer('<!-- not run with "photos/": yours -->\n<!-- exits 2 -->'))
    block = Block("bash", "certify a \\\n  b\ncertify --data \\\n  photos/\ncertify c", marks, 1)
    assert block.code == 2
    assert block.commands() == ("certify a \\\n  b\ncertify c", [("certify --data \\\n  photos/", "yours")])
    whole = Block("bash", "certify a", tuple(MARK.finditer("<!-- not run: a download -->")), 1)
    assert whole.commands() == ("", [("certify a", "a download")])


def test_a_text_that_was_not_printed_is_found() -> None:
    printed = "radius   certified\n------  ---\n0.25    0.450\nabstained   12 of 100\n"
    assert missing("radius certified\n-- --\n0.5 0.4\n...\nabstained 3 of ...", printed) == []
    assert missing("abstained 3 of 100 images", printed) == ["abstained 3 of 100 images"]


def test_a_block_is_run_to_its_end_and_its_server_is_ended(folder: Path) -> None:
    code, printed = run("sleep 60 > /dev/null 2>&1 & echo here; false; echo there", folder)
    assert (code, printed) == (1, "here\n")
    assert _alive(STARTED[folder][0])
    end(STARTED[folder])
    assert not _alive(STARTED[folder][0])


LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
