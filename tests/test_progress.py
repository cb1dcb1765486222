"""Progress where there is no terminal: lines with counts and times, and no flood of them."""

from __future__ import annotations

import io
import re
import sys

import pytest

from steer2edit import progress
from steer2edit.progress import EVERY_SECONDS, bar, lines


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_ended", {})
    return clock


def test_a_stage_says_how_far_it_is_from_time_to_time_and_what_was_done(
    clock: _Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with bar("capture", 8000) as advance:
        for _ in range(8):
            clock.now += 0.4 * EVERY_SECONDS
            advance(1000)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "capture: 3,000 of 8,000, 12 s, about 20 s left",
        "capture: 6,000 of 8,000, 24 s, about 8 s left",
        "capture: 8,000 done in 32 s",
    ]


def test_the_time_that_is_left_is_not_told_from_the_first_answer_of_a_batch(
    clock: _Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with bar("write", 64) as advance:
        clock.now += 20 * EVERY_SECONDS
        for _ in range(64):
            advance(1)
    assert capsys.readouterr().err.splitlines() == ["write: 1 of 64, 200 s", "write: 64 done in 200 s"]


def test_a_note_says_how_it_goes(clock: _Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with bar("write", 1000) as advance:
        clock.now += 2 * EVERY_SECONDS
        advance(20, "80 tokens/s")
        clock.now += 2 * EVERY_SECONDS
        advance(0)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "write: 20 of 1,000, 20 s, 80 tokens/s, about 16 min left"


def test_stages_of_one_name_that_follow_each_other_are_counted_and_not_repeated(
    clock: _Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(40):
        with bar("KL on neutral text", 500) as advance:
            clock.now += 1
            advance(500)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and said[0] == "KL on neutral text: 500 done in 1.0 s"
    assert said[1] == "KL on neutral text: 500 done in 1.0 s (time 11)"
    with bar("score", 30) as advance:
        advance(30)
    assert capsys.readouterr().err == "score: 30 done in 0.0 s\n"


def test_a_stage_that_fails_does_not_say_that_it_is_done(clock: _Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="shard 2"), lines("compare", 2) as advance:
        advance(1)
        raise ValueError("shard 2")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with bar("capture", 10) as advance:
        advance(10)
    assert "\r" in terminal.getvalue() and not re.search(r"done in", terminal.getvalue())
