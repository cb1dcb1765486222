"""A child process for strangers' files and programs: it gives results, keeps its limits, and can be killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apart_functions as child
import pytest
import torch

from steer2edit.errors import DataError
from steer2edit.files.sandbox import Apart, ApartError, Limits, TooMuchError


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    with Apart(Limits(seconds=20, memory=1 << 30, output=1 << 20)) as apart:
        yield apart


def test_values_come_back_as_they_are(apart: Apart) -> None:
    values = [None, True, 3, -(10**30), 0.1, float("inf"), "ü\ud800", b"\0", [1, (2,)], {"a": {1: []}, (2, 3): ()}]
    assert apart.call(child.back, *values) == values
    found = apart.call(child.tensors)
    assert torch.equal(found[1, "a"], torch.arange(6).view(2, 3))
    assert found[2][0].dtype == torch.bfloat16 and found[2][1] == (None, True, 1.5, b"x")


def test_our_errors_and_those_of_others(apart: Apart) -> None:
    with pytest.raises(DataError, match="line one\nline two"):
        apart.call(child.refuse)
    with pytest.raises(ApartError, match=r"^inner$"):
        apart.call(child.fail)
    with pytest.raises(ApartError, match="not a plain value"):
        apart.call(child.object_of_another_class)
    assert apart.call(child.back, 1) == [1]


def test_a_call_runs_in_the_working_folder_of_now(
    apart: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert apart.call(child.working_folder) == str(tmp_path / name)
    (tmp_path / name).rmdir()  # no working folder at all
    assert apart.call(child.back, 1) == [1]


def test_what_is_printed_goes_nowhere(apart: Apart, capfd: pytest.CaptureFixture[str]) -> None:
    assert apart.call(child.print_much) == "done"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("function", "message"),
    [(child.take_memory, "memory"), (child.return_much, "at most 1.0 MB are read")],
)
def test_memory_and_output_are_limited(apart: Apart, function: Callable[[], Any], message: str) -> None:
    with pytest.raises(TooMuchError, match=message):
        apart.call(function)
    assert apart.call(child.back, 1) == [1]


def test_a_process_that_dies_is_an_error_and_not_the_end(apart: Apart) -> None:
    with pytest.raises(ApartError, match="died"):
        apart.call(child.die)
    assert apart.call(child.back, 1) == [1]


@pytest.mark.parametrize("function", [child.sleep, child.spin_in_c])
def test_time_is_limited_also_in_c(function: Callable[[], Any]) -> None:
    with Apart(Limits(seconds=0.5)) as apart:
        assert apart.call(child.back) == []
        started = time.monotonic()
        with pytest.raises(TooMuchError, match=r"longer than 0\.5 seconds"):
            apart.call(function)
        assert time.monotonic() - started < 10


def test_a_call_to_a_process_that_is_ending_because_it_was_idle_goes_to_a_new_one() -> None:
    with Apart(Limits(seconds=20), idle=0.2) as apart:
        apart.call(child.be_slow_to_end)
        first = apart._process
        time.sleep(1.0)
        assert first is not None and first.poll() is None  # a busy machine takes long to end a process
        assert apart.call(child.back, 1) == [1]
        assert first.returncode == 0 and apart._process is not first


def test_a_process_that_ends_in_the_middle_of_a_call_is_an_error() -> None:
    with Apart(Limits(seconds=20)) as apart:
        with pytest.raises(ApartError, match="ended"):
            apart.call(child.end)
        assert apart.call(child.back, 1) == [1]
