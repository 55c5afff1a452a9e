"""Progress lines: when they are printed, and whether their rate and remaining time are right."""

from __future__ import annotations

import sys

import pytest

from certify.runs import progress
from certify.runs.progress import ProgressLines, duration, progress_bar, rate_text


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.setattr(progress.time, "strftime", lambda how: "12:31")
    return clock


def work(bar: ProgressLines, clock: Clock, units: int, seconds: float, times: int) -> None:
    for _ in range(times):
        clock.now += seconds
        bar.update(units)


def test_lines_come_after_1_2_5_and_10_minutes_and_then_every_10(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = progress_bar(10_000, "images")  # stderr is no terminal here
    printed = []
    for minute in range(1, 41):
        work(bar, clock, 1, 6.0, 10)
        if capsys.readouterr().err:
            printed.append(minute)
    assert printed == [1, 2, 5, 10, 20, 30, 40]


def test_the_time_left_follows_the_rate_since_the_line_before(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(10_000 * 100, "samples", shown=60, each=100) as bar:
        bar.update(4_000 * 100)  # those of an earlier run, reported at once, are no measure of speed
        work(bar, clock, 100, 0.5, 120)
        assert capsys.readouterr().err == (
            "12:31  4,120 of 10,000 images, 200 samples/s, about 49 min left\n"  # 5,880 images at 2 per second
        )
        work(bar, clock, 100, 4.0, 15)
    assert capsys.readouterr().err == "12:31  4,135 of 10,000 images, 25 samples/s, about 6 h 31 min left\n"


def test_a_note_is_part_of_the_next_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar(200, "images", shown=10.0)
    bar.set_postfix_str("loss 0.5", refresh=False)
    work(bar, clock, 1, 5.0, 2)
    assert capsys.readouterr().err == "12:31  2 of 200 images, loss 0.5, 0.2 images/s, about 16 min left\n"


def test_nothing_is_shown_on_request_and_a_bar_in_a_terminal(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar(2, "images", shown=False) as bar:
        clock.now += 7200
        bar.update()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(2, "images"):
        pass
    assert "0/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5399, "1 h 30 min"),
        (11400, "3 h 10 min"),
        (7200, "2 h"),
        (172800, "2 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rates() -> None:
    assert [rate_text(rate) for rate in (81234.5, 12.4, 9.96, 0.234)] == ["81,234", "12", "10.0", "0.23"]
