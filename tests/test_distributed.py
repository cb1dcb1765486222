"""One capture over several processes gives what one process gives, and ends as one when something is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run
from hypothesis import given
from hypothesis import strategies as st

from steer2edit.capture.statistics import Statistics
from steer2edit.errors import Steer2EditError
from steer2edit.runtime.distributed import World
from steer2edit.runtime.launch import process_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def torchrun(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """The command line under torchrun, on a port of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # a process that torch aborts says where it was
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONFAULTHANDLER": "1"}
    command += ["-m", "steer2edit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def assert_equal(a: Statistics, b: Statistics, tolerance: float = 1e-6) -> None:
    assert a.examples == b.examples and a.tokens == b.tokens and dict(a.source) == dict(b.source)
    assert a.moments.keys() == b.moments.keys() and a.blocks.keys() == b.blocks.keys()
    for key, one in a.moments.items():
        torch.testing.assert_close(one.mean, b.moments[key].mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(one.m2, b.moments[key].m2, rtol=tolerance, atol=tolerance)
    for block, moments in a.blocks.items():
        torch.testing.assert_close(moments, b.blocks[block], rtol=tolerance, atol=tolerance)
    for name, drawn in a.resampled.items():
        torch.testing.assert_close(drawn.means, b.resampled[name].means, rtol=tolerance, atol=tolerance)
    for kind, weights in a.weights.items():
        assert torch.equal(weights, b.weights[kind])


def test_two_processes_give_the_statistics_of_one(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.stats.safetensors", tmp_path / "two.stats.safetensors"
    options = ["--data", data, "--batch-tokens", 512]
    assert run("capture", tiny_llama, *options, "-o", one).exit_code == 0
    ran = torchrun("capture", tiny_llama, *options, "-o", two, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["processes"] == 2  # one result on stdout, not one for each process
    assert_equal(Statistics.load(one), Statistics.load(two))
    assert sorted(path.name for path in tmp_path.iterdir()) == [one.name, two.name]


def test_what_fails_in_one_process_ends_all_with_one_message(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    # only the second process cannot keep its sums: a folder is in the way
    (tmp_path / "x.stats.safetensors.1-of-2.partial").mkdir()
    out = tmp_path / "x.stats.safetensors"
    ran = torchrun("capture", tiny_llama, "--data", data, "--batch-tokens", 512, "--keep-every", 0, "-o", out)
    assert ran.returncode != 0 and not out.exists()
    ours = [line for line in ran.stderr.splitlines() if line.startswith("Error: ")]
    assert len(ours) == 1 and re.search(r"process 1 of 2: .*1-of-2\.partial", ours[0])
    assert "exitcode  : 2" in ran.stderr  # torchrun's report of the process that it saw end first
    assert "steer2edit/cli" not in ran.stderr  # no traceback of ours


def test_a_fault_common_to_all_is_said_without_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise Steer2EditError("no such file")

    for faults, said in ((["no such file"] * 2, "no such file"), ([None, "disk full"], "process 1 of 2: disk full")):
        monkeypatch.setattr(World, "_gathered", lambda _self, _value, faults=faults: faults)
        for rank in range(2):
            with pytest.raises(Steer2EditError, match=f"^{said}$"):
                World(rank, 2).together(failing if faults[rank] else lambda: None)


def test_divided_matrices_give_the_statistics_of_whole_ones(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.stats.safetensors", tmp_path / "two.stats.safetensors"
    options = ["--data", data, "--batch-tokens", 2048]
    assert run("capture", tiny_llama, *options, "-o", one).exit_code == 0
    ran = torchrun("capture", tiny_llama, *options, "-o", two, "--tensor-parallel")
    assert ran.returncode == 0, ran.stderr
    assert_equal(Statistics.load(one), Statistics.load(two))


def test_other_commands_are_not_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    result = run("plan", "model", "--stats", "x", "-o", "y")
    assert result.exit_code == 2 and "plan runs in one process, and this is one of 2" in result.stderr


@given(costs=st.lists(st.integers(1, 4096), max_size=60), size=st.integers(1, 9))
def test_every_piece_of_work_has_one_process_and_loads_are_balanced(costs: list[int], size: int) -> None:
    shares = [World(rank, size).share(costs) for rank in range(size)]
    assert sorted(piece for share in shares for piece in share) == list(range(len(costs)))
    loads = [sum(costs[piece] for piece in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "h"},
        {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h"},
    ],
)
def test_a_process_is_alone_unless_a_launcher_says_otherwise(environment: dict[str, Any]) -> None:
    assert process_of(environment) is None
