"""The power table: areas are means over log KL, a kill loses one cell, and training changes no base."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import save_chat_model
from hypothesis import given
from hypothesis import strategies as st
from test_benchmarks import ROOT, start

from steer2edit.architecture import read_spec
from steer2edit.capture import background
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import builtin_questions
from steer2edit.data.questions import take
from steer2edit.errors import DataError
from steer2edit.evaluation.candidates import open_candidate
from steer2edit.evaluation.evaluate import evaluate
from steer2edit.evaluation.metrics import Preference
from steer2edit.runtime.adapters import changed, checksums
from steer2edit.runtime.model import load_model

sys.path.insert(0, str(ROOT / "benchmarks"))
import power_cells
import power_table
import train_lora

KLS = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6, unique=True)
SMALL = [
    "--questions", "12", "--random-questions", "8", "--knowledge", "4", "--answer-tokens", "4", "--kl-rows", "4",
    "--kl", "0.05", "--kl", "0.2", "--seed", "0", "--seed", "1", "--dtype", "float32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture's background is a few windows and answers."""
    every = background.everyday_prompts
    monkeypatch.setattr(background, "BACKGROUND_TOKENS", 512)
    monkeypatch.setattr(background, "everyday_prompts", lambda use: every(use)[:4])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@given(KLS)
def test_the_weights_of_a_front_sum_to_one(kls: list[float]) -> None:
    weights = power_table.front_weights(kls, 0.025, 0.4)
    assert sum(weights) == pytest.approx(1) and min(weights) >= -1e-12


@given(st.lists(st.floats(0.03, 0.39), max_size=5, unique=True), st.floats(-3, 3), st.floats(-3, 3))
def test_a_front_that_is_straight_in_log_kl_has_the_mean_of_its_ends(inner: list[float], a: float, b: float) -> None:
    kls = [0.4, *inner, 0.025]
    values = [a + b * math.log(kl) for kl in kls]
    found = sum(w * v for w, v in zip(power_table.front_weights(kls, 0.025, 0.4), values, strict=True))
    assert found == pytest.approx(a + b * math.log(0.1), abs=1e-9)


def test_a_question_is_asked_once_whatever_halves_it_is_in() -> None:
    questions = builtin_questions("formal") or []
    asked = power_cells.ask(questions, (0, 1, 2), 30)
    assert asked.attribute == "margin" and len({q.digest for q in asked.questions}) == len(asked.questions)
    for seed in (0, 1, 2):
        mine = [q for q, seeds in zip(asked.questions, asked.seeds, strict=True) if seed in seeds]
        assert len(mine) == 30 and set(mine) <= set(take(questions, "report", seed))
    assert power_cells.ask(questions, (0,), 10).questions == power_cells.ask(questions, (0,), 30).questions[:10]


def test_a_journal_survives_a_kill_and_keeps_to_its_settings(tmp_path: Path) -> None:
    settings = power_cells.Settings("f", "float32", (0.1,), (0,), 1, 1, 1, 1, 1, 4, 1.0)
    journal = power_cells.Journal(tmp_path, settings)
    cells = [power_cells.Cell("formal", "edit", budget, 1.0, {"chat": 0.1}, {"margin": [1.0]}) for budget in (0.1, 0.2)]
    for cell in cells:
        journal.add(cell)
    data = (tmp_path / "cells.jsonl").read_bytes()
    (tmp_path / "cells.jsonl").write_bytes(data[:-9])
    again = power_cells.Journal(tmp_path, settings)
    assert list(again.cells.values()) == cells[:1]
    again.add(cells[1])
    assert (tmp_path / "cells.jsonl").read_bytes() == data
    described = json.loads((tmp_path / "settings.json").read_text())
    del described["general_split"]
    (tmp_path / "settings.json").write_text(json.dumps(described))
    assert power_cells.Journal(tmp_path, settings).cells, (
        "a folder of an earlier release lacks a setting, and had its default"
    )
    other = power_cells.Settings("g", "float32", (0.1,), (0,), 1, 1, 1, 1, 1, 4, 1.0)
    with pytest.raises(DataError, match=r"other settings \(fingerprint\)"):
        power_cells.Journal(tmp_path, other)


def test_lengths_that_all_meet_the_bound_tell_nothing_apart(tmp_path: Path) -> None:
    """Weights that sum to 1 but for rounding make no edit better than another."""
    settings = power_cells.Settings("f", "float32", (0.025, 0.07, 0.4), (0,), 9, 9, 1, 1, 64, 4, 1.0)
    journal = power_cells.Journal(tmp_path, settings)
    journal.add(power_cells.Cell("concise", "base", None, values={"length": [64.0] * 9}))
    for method, off in (("edit", 1.01), ("steering", 0.97)):
        for kl in settings.budgets:
            cell = power_cells.Cell("concise", method, kl, 1.0, {"prose": kl * off}, {"length": [64.0] * 9})
            journal.add(cell)
    asked = {"attribute": "length", "digests": [], "seeds": [[0]] * 9}
    (tmp_path / "questions-concise.json").write_text(json.dumps(asked))
    (table,) = power_table.read_tables(tmp_path)
    assert [one.signs[0] for one in power_table.against(table)] == [0]
    assert "the length cannot be read here" in power_table.render([table])


def test_the_table_is_measured_resumed_and_printed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    methods = ["edit", "steering", "random 1", "random 2", "random 3", "instruction"]
    arguments = [str(model), "--behavior", "formal", "--out", str(out), *SMALL]
    arguments += [part for method in methods for part in ("--method", method)]
    start(ROOT / "benchmarks" / "power.py", monkeypatch, *arguments)
    first = capsys.readouterr().err
    assert first.count("formal: ") == 1 + 5 * 2 + 1 and "11 cells in 1 behaviours: about" in first
    cells = (out / "cells.jsonl").read_bytes()
    (out / "cells.jsonl").write_bytes(cells[:-5])
    start(ROOT / "benchmarks" / "power.py", monkeypatch, *arguments)
    again = capsys.readouterr().err
    assert again.count("formal: ") == 1 and "formal: instruction: margin" in again
    rows = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert rows[-1]["values"] == json.loads(cells.splitlines()[-1])["values"]
    for row in rows:
        if row["budget"]:
            assert row["kl"]["chat"] == pytest.approx(row["budget"], rel=0.08) and row["kl"]["prose"] > 0

    start(ROOT / "benchmarks" / "power.py", monkeypatch, "--summary", str(out))
    text = capsys.readouterr().out
    assert "### out, formal" in text and "teerable here: margin" in text and "by seed of the split" in text
    start(ROOT / "benchmarks" / "power.py", monkeypatch, "--summary", str(out), "--json")
    found = {one["against"]: one for one in json.loads(capsys.readouterr().out)}
    assert found.keys() == {"steering", "random", "instruction"}
    # an area's difference is the mean of the differences of the cells, question by question, with each seed's weight
    (table,) = power_table.read_tables(out)
    weights = [len(seeds) for seeds in table.seeds]
    fronts = [table.fronts[name].area("margin", 0.05, 0.2) for name in ("edit", "steering")]
    assert all(front is not None for front in fronts)
    differences = [a - b for a, b in zip(*fronts, strict=True)]  # type: ignore[arg-type]
    mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / sum(weights)
    assert found["steering"]["attribute"]["value"] == pytest.approx(mean)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_training_makes_an_adapter_that_opens_and_leaves_the_base(model: Path, tmp_path: Path, loss: Any) -> None:
    pytest.importorskip("trl")
    checkpoint = open_checkpoint(model)
    loaded = load_model(checkpoint, read_spec(checkpoint))
    before = checksums(loaded.model)
    behavior = Behavior.named("formal").limited(4)
    behavior = Behavior("formal", behavior.examples, span="response")
    done = train_lora.train(loaded, behavior, loss, 60, tmp_path / loss, steps=2, batch=4, learning_rate=1e-2)
    assert done.steps == 2 and not changed(loaded.model, before)
    questions = (builtin_questions("formal") or [])[:4]
    found = evaluate(loaded, [Preference(questions)], [open_candidate(loaded, checkpoint, str(tmp_path / loss))])
    assert found.rows[1].samples["margin"] != found.rows[0].samples["margin"]
    settings = json.loads((tmp_path / loss / "adapter_config.json").read_text())
    kinds = {name.rpartition(".")[2] for name in settings["target_modules"]}
    assert settings["r"] == 1 and {"q_proj", "down_proj"} <= kinds and "lm_head" not in kinds


def test_the_prompt_does_not_count_in_training(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    loaded = load_model(checkpoint, read_spec(checkpoint))
    behavior = Behavior.named("formal", span="response")
    encoded = behavior.encode(loaded.tokenizer, loaded.context)
    rows = train_lora.learnt(encoded)
    assert len(rows) == len(encoded) / 2
    first = next(e for e in encoded if e.label == "positive")
    assert rows[0]["labels"] == [-100] * first.start + list(first.ids[first.start :])
    pair = train_lora.preferred(encoded)[0]
    assert tuple(pair["prompt_ids"] + pair["chosen_ids"]) == first.ids and pair["rejected_ids"]
