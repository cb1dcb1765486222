"""Texts to keep, from the flag to the plan: no mean push on them, and said where a method or a source does not know them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ROWS, run, save_chat_model

from steer2edit.capture.statistics import Statistics
from steer2edit.plan import EditPlan, LowRank

PROSE = "Rain fell on the hills and on the sea. " * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "prose.txt").write_text(PROSE)
    chats = [{"prompt": f"What is {n} and {n}?", "response": f"It is {2 * n}, of course."} for n in range(12)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*chats, {"prompt": "And six?"}]))
    return folder


@pytest.mark.parametrize("name", ["prose.txt", "chats.jsonl"])
@pytest.mark.parametrize("how", ["soft", "hard"])
def test_the_plan_has_no_push_on_texts_to_keep(model: Path, files: Path, tmp_path: Path, name: str, how: str) -> None:
    stats, plan = tmp_path / "x.stats.safetensors", tmp_path / "x.plan.safetensors"
    arguments = ("--data", files / "data.jsonl", "--keep", files / name, "--background", files / "prose.txt")
    captured = run("capture", model, *arguments, "-o", stats, "--json")
    assert captured.exit_code == 0, captured.output
    assert json.loads(captured.stdout)["examples"]["keep"] > 0
    planned = run("plan", model, "--stats", stats, "--all-components", "--keep-as", how, "-o", plan)
    assert planned.exit_code == 0, planned.output
    found, statistics = EditPlan.load(plan), Statistics.load(stats)
    assert found.method["no_push_on"] == ["background", "chat", "keep"] and len(str(found.data["keep"])) == 64
    assert found.edits
    for edit in found.edits:
        assert isinstance(edit, LowRank)
        key = f"attn_out.{edit.tensor.split('.')[2]}"
        kept, typical = statistics.mean(key, "input", "keep").float(), statistics.x_bar(key).float()
        assert abs(float((edit.A @ kept)[0])) < 1e-3 * abs(float((edit.A @ typical)[0]))


def test_a_method_that_does_not_know_them_says_so(model: Path, files: Path, tmp_path: Path) -> None:
    stats = tmp_path / "x.stats.safetensors"
    run("capture", model, "--data", files / "data.jsonl", "--keep", files / "prose.txt", "-o", stats)
    result = run("plan", model, "--stats", stats, "--method", "component", "--all-components", "-o", tmp_path / "p")
    assert result.exit_code == 0 and "does not know the texts of --keep" in result.stderr
    both = run("compile", model, "--stats", stats, "--keep", files / "prose.txt", "--to", "lora", "-o", tmp_path / "o")
    assert both.exit_code == 2 and "give --keep to capture" in both.stderr


def test_chats_as_background_take_the_place_of_the_models_own(model: Path, files: Path, tmp_path: Path) -> None:
    stats = tmp_path / "x.stats.safetensors"
    result = run("capture", model, "--data", files / "data.jsonl", "--background", files / "chats.jsonl", "-o", stats)
    assert result.exit_code == 0, result.output
    found = Statistics.load(stats)
    assert found.examples["chat"] == 13 and found.examples["background"] > 13
    assert float(torch.linalg.vector_norm(found.mean("attn_out.0", "input", "chat"))) > 0


@pytest.mark.parametrize("content", ['{"answer": 1}\n', "not json\n"])
def test_a_bad_file_is_named(model: Path, files: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    result = run(
        "capture", model, "--data", files / "data.jsonl", "--keep", tmp_path / "bad.jsonl", "-o", tmp_path / "s"
    )
    assert result.exit_code == 2 and "bad.jsonl" in result.stderr and not (tmp_path / "s").exists()
