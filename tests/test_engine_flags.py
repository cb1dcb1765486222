"""Flags of engines and judges that have nothing to do are refused, in every command and before a model is opened."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run

COMMANDS = {
    "eval": ("--behavior", "concise"),
    "tune": ("--behavior", "concise", "-o", "out"),
    "compile": ("--behavior", "concise", "-o", "out"),
}
NO_SERVER = "says how a server is asked, and no server is: give --judge"
CASES = [
    (("--requests", "8"), NO_SERVER),
    (("--rate", "60", "--judge", "self"), NO_SERVER),
    (("--api-key-from", "KEY", "--judge", "folder"), NO_SERVER),
    (("--judge-model", "x"), "give --judge too"),
    (("--judge-model", "x", "--judge", "self"), "give --judge with the server's URL"),
    (("--rubric", "It is short."), "give --judge too"),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("arguments", "message"), CASES)
def test_what_has_nothing_to_do_is_refused(
    tmp_path: Path, command: str, arguments: tuple[str, ...], message: str
) -> None:
    result = run(command, tmp_path / "no-model", *COMMANDS[command], *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def test_a_search_refuses_a_server_and_says_what_comes_nearest(tmp_path: Path) -> None:
    result = run("tune", tmp_path / "no-model", *COMMANDS["tune"], "--server", "http://one")
    assert result.exit_code == 2 and "eval MODEL --server URL --served NAME" in " ".join(result.stderr.split())
    assert "--server " not in run("tune", "--help").stdout


def test_plans_are_composed_without_a_judge(tmp_path: Path) -> None:
    result = run("compile", tmp_path / "no-model", "--plan", "x", "--requests", "3", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "--requests says how a server is asked" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--draws", "2"), "--match and --draws are for --baselines"),
        (("--match", "norm"), "--match and --draws are for --baselines"),
        (("--lm-eval-path", "folder"), "name the tasks with --lm-eval"),
    ],
)
def test_flags_of_eval_that_have_nothing_to_do(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("eval", tmp_path / "no-model", "--behavior", "concise", *arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
