"""Written answers: what the base reads along the contrast data's own directions, and cells that are kept."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import save_chat_model
from test_benchmarks import ROOT, start

from steer2edit.architecture import read_spec
from steer2edit.capture import background
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.questions import Question
from steer2edit.engines.engine import Answer
from steer2edit.runtime.model import LoadedModel, Runtime, load_model

sys.path.insert(0, str(ROOT / "benchmarks"))
import power_cells
import written as benchmark


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    checkpoint = open_checkpoint(model)
    return load_model(checkpoint, read_spec(checkpoint), Runtime(dtype="float32"))


def test_the_contrast_data_stand_one_apart_and_an_answer_that_did_not_change_has_not_moved(loaded: LoadedModel) -> None:
    behavior = Behavior.named("formal").limited(8)
    reader = benchmark.Reader.of(loaded, behavior)
    apart = reader.along(behavior)
    assert len(apart) == 8 and sum(apart) / 8 == pytest.approx(1.0)

    questions = [Question(one.prompt, "") for one in behavior.examples[::2]][:4]
    positive = [Answer(one.response, 1, True) for one in behavior.examples if one.label == "positive"][:4]
    negative = [Answer(one.response, 1, True) for one in behavior.examples if one.label == "negative"][:4]
    assert benchmark.moved(reader, questions, positive, positive) == [0.0] * 4
    empty = Answer("", 0, True)
    moved = benchmark.moved(reader, questions, [positive[0], empty, *positive[2:]], negative)
    # nothing was written: nothing has moved
    assert moved[1] == 0.0
    assert moved[0] == pytest.approx(apart[0], rel=1e-4) and moved[2:] == pytest.approx(apart[2:4], rel=1e-4)


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
