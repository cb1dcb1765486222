"""The benchmark of written answers: cells that are kept."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import save_chat_model
from test_benchmarks import ROOT, start

from steer2edit.capture import background

sys.path.insert(0, str(ROOT / "benchmarks"))
import power_cells


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_run_goes_on_where_it_was_killed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = background.everyday_prompts
    monkeypatch.setattr(background, "BACKGROUND_TOKENS", 512)
    monkeypatch.setattr(background, "everyday_prompts", lambda use: every(use)[:4])
    words = [
        str(model), "--out", str(tmp_path), "--behavior", "formal", "--questions", "3", "--tokens", "5", "--kl-rows", "4",
        "--kl", "0.001", "--kl", "0.01", "--dtype", "float32",
    ]  # fmt: skip
    start(ROOT / "benchmarks" / "written.py", monkeypatch, *words)
    whole = capsys.readouterr().out
    kept = power_cells.Journal(tmp_path).cells
    # base, instruction, and two methods at two KLs
    assert len(kept) == 6 and len(whole.splitlines()) == 2 + 5
    file = tmp_path / "cells.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:10])
    start(ROOT / "benchmarks" / "written.py", monkeypatch, *words)
    assert capsys.readouterr().out == whole
    again = power_cells.Journal(tmp_path).cells
    assert {key: cell.values for key, cell in again.items()} == {key: cell.values for key, cell in kept.items()}
