"""Progress says how far, how fast and how long still, on any kind of output."""

from __future__ import annotations

import sys

import pytest

from runtime import progress as module
from runtime.progress import format_duration, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (5, "0:05"), (65, "1:05"), (59.6, "1:00"), (3725, "1:02:05"), (90000, "25:00:00")],
)
def test_durations_read_as_on_a_clock(seconds, text):
    assert format_duration(seconds) == text


def test_a_plain_line_shows_count_rate_time_left_and_note(clock, capsys):
    with progress("pretrain", 1000, "steps") as bar:
        clock.now += 20
        bar.advance(100, "loss 3.2")
    assert capsys.readouterr().err == "pretrain: 100/1,000 steps, 5.0/s, 3:00 left  loss 3.2\n"


def test_plain_lines_come_now_and_then_and_at_the_end(clock, capsys):
    with progress("pretrain", 100, "steps") as bar:
        for _ in range(100):
            clock.now += 1
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [
        "15/100",
        "30/100",
        "45/100",
        "60/100",
        "75/100",
        "90/100",
        "100/100",
    ]
    assert lines[-1].endswith("0:00 left")


def test_work_of_an_earlier_process_does_not_count_for_the_rate(clock, capsys):
    with progress("pretrain", 1000, "steps", done=900) as bar:
        clock.now += 20
        bar.advance(20)
    assert "920/1,000 steps, 1.0/s, 1:20 left" in capsys.readouterr().err


def test_more_than_was_expected_never_leaves_a_negative_time(clock, capsys):
    with progress("encode", 10) as bar:
        clock.now += 1
        bar.advance(16)
    assert "0:00 left" in capsys.readouterr().err


def test_other_ranks_are_silent(clock, capsys):
    with progress("pretrain", 2, silent=True) as bar:
        clock.now += 60
        bar.advance(2)
    assert capsys.readouterr().err == "" and bar.done == 2


def test_a_terminal_gets_a_bar_with_rate_time_left_and_note(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with progress("pretrain", 10, "steps") as bar:
        clock.now += 2
        bar.advance(4, "loss 3.2")
        assert bar.time_left() == "0:03"
    shown = capsys.readouterr().err
    assert (
        "pretrain" in shown
        and "4/10" in shown
        and "2.0 steps/s" in shown
        and "0:03 left" in shown
        and "loss 3.2" in shown
    )
