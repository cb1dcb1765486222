"""Artefacts to push, and pushing them: fixtures and helpers of the tests that publish."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

NEUTRAL = "the old cat sees a small bird and the river runs . " * 8


@pytest.fixture(scope="session")
def compiled(tiny_llama_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint`` (of several shards) and ``lora``, compiled from a local folder. Read only."""
    from conftest import ROWS, run

    folder = tmp_path_factory.mktemp("compiled")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "neutral.txt").write_text(NEUTRAL)
    result = run(
        "compile", tiny_llama_bf16, "--data", folder / "rows.jsonl", "--neutral", folder / "neutral.txt",
        "--system", "the big red stone", "--strength", "0.5",
        "--to", "checkpoint", "--to", "lora", "--to", "gguf", "--out", folder / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture
def artefact(compiled: Path, tmp_path: Path) -> Path:
    """A copy of the compiled checkpoint that a test may spoil."""
    shutil.copytree(compiled / "checkpoint", tmp_path / "artefact")
    return tmp_path / "artefact"


def push(*arguments: object) -> dict[str, Any]:
    """What a push says, as JSON."""
    from conftest import run

    result = run("push", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refusal(*arguments: object) -> str:
    """The one line of an error."""
    from conftest import run

    result = run(*arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    return str(result.stderr[result.stderr.index("Error: ") :])
