"""A capture that was killed goes on from the sums it kept, to the same statistics bit by bit; another run never does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run

from steer2edit.capture.accumulator import Accumulator
from steer2edit.capture.resume import Partial, identity, partial_path
from steer2edit.capture.statistics import Statistics
from steer2edit.errors import PlanError
from steer2edit.files.atomic import load_tensors

# the process kills itself once it has kept its sums the given number of times
KILLED = """
import os, signal, sys
from steer2edit.capture import resume
from steer2edit.cli.app import main
left, keep = int(sys.argv.pop(1)), resume.Partial.keep
def keep_and_die(self, accumulator, done):
    global left
    keep(self, accumulator, done)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
resume.Partial.keep = keep_and_die
main()
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def killed(times: int, *arguments: object) -> None:
    command = [sys.executable, "-c", KILLED, str(times), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ})
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def bits(path: Path) -> dict[str, bytes]:
    tensors, _ = load_tensors(path)
    return {name: values.numpy().tobytes() for name, values in tensors.items()}


def test_a_killed_capture_goes_on_to_the_same_statistics(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "x.stats.safetensors"
    capture = ["capture", tiny_llama, "--data", data, "--batch-tokens", 512, "--keep-every", 0]
    run(*capture, "-o", whole)
    killed(5, *capture, "-o", out)
    assert not out.exists()
    _, metadata = load_tensors(partial_path(out))
    assert json.loads(metadata["partial"])["done"] == 5
    result = run(*capture, "-o", out)
    assert result.exit_code == 0 and "goes on after 5 of" in result.stderr
    assert bits(out) == bits(whole)
    assert Statistics.load(out).source == Statistics.load(whole).source
    assert not partial_path(out).exists()


def test_another_run_does_not_take_up_what_is_left(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "x.stats.safetensors"
    killed(5, "capture", tiny_llama, "--data", data, "--batch-tokens", 512, "--keep-every", 0, "-o", out)
    other = ["capture", tiny_llama, "--data", data, "--batch-tokens", 512, "--span", "response", "--keep-every", 0]
    run(*other, "-o", whole)
    result = run(*other, "-o", out)
    assert "goes on" not in result.stderr and bits(out) == bits(whole)


def summed(rows: int = 2) -> Accumulator:
    accumulator = Accumulator()
    accumulator.begin([("positive", row, 1) for row in range(rows)])
    accumulator.add("attn_out.0", "input", torch.ones(rows, 4), torch.eye(rows), heads=2)
    return accumulator


def test_the_states_of_disjoint_examples_add_up() -> None:
    one, two = summed(2).state(), summed(2).state()
    both = Accumulator.of({name: one[name] + two[name] for name in one}).result({})
    assert both.examples["positive"] == 4
    assert torch.equal(both.mean("attn_out.0", "input", "positive"), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {"total": torch.zeros(3, dtype=torch.float64)},
        lambda state: state | {"sums/attn_out.0/input": torch.zeros(2, 4, dtype=torch.float64)},
        lambda state: state | {"counts": state["counts"].float()},
        lambda state: state | {"other": torch.zeros(3, dtype=torch.float64)},
    ],
)
def test_sums_of_another_make_are_refused(change: Any) -> None:
    with pytest.raises(PlanError):
        Accumulator.of(change(summed().state()))


def test_damaged_sums_are_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "x.partial"
    partial = Partial(path, identity({"a": 1}), every=0)
    partial.keep(summed(), 1)
    assert partial.load(2)[1] == 1
    assert partial.load(0)[1] == 0  # more batches than there are
    assert Partial(path, identity({"a": 2})).load(2)[1] == 0
    path.write_bytes(path.read_bytes()[:-9])
    assert partial.load(2)[1] == 0
