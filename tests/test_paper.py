"""The papers' experiments run whole on a tiny model, go on after a kill, and ask for nothing harmful."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import save_chat_model
from test_benchmarks import ROOT, start

from steer2edit.architecture import read_spec
from steer2edit.capture import background
from steer2edit.checkpoint import open_checkpoint
from steer2edit.demo.experts import mixture_folder
from steer2edit.errors import DataError
from steer2edit.runtime.model import load_model

sys.path.insert(0, str(ROOT / "benchmarks"))
import paper_data

PAPER = ROOT / "benchmarks" / "paper.py"
SMALL = [
    "--limit",
    "4",
    "--max-new-tokens",
    "6",
    "--kl-rows",
    "4",
    "--kl",
    "0.1",
    "--probe",
    "12",
    "--dtype",
    "float32",
]


@pytest.fixture(autouse=True)
def _small_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """The capture's background is a few windows and answers."""
    every = background.everyday_prompts
    monkeypatch.setattr(background, "BACKGROUND_TOKENS", 512)
    monkeypatch.setattr(background, "everyday_prompts", lambda use: every(use)[:4])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "truths.jsonl"
    rows = [
        {
            "question": f"Is the number {i} even?",
            "best_answer": "Yes, it is." if i % 2 == 0 else "No, it is odd.",
            "correct_answers": ["Yes, it is." if i % 2 == 0 else "No, it is odd."],
            "incorrect_answers": ["Nobody knows.", "It is blue."],
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_truthfulness_is_measured_and_resumed(
    model: Path, truths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["truthful", str(model), "--data", str(truths), "--out", str(out), *SMALL]
    start(PAPER, monkeypatch, *arguments)
    first = capsys.readouterr()
    assert first.err.count(" done in ") == 8
    for name in ("MC1", "MC2", "closer_to_true", "default edit", "component edit", "random direction 3", "instruction"):
        assert name in first.out
    assert "beyond" in first.out and "teerable here: margin" in first.out
    lines = (out / "rows.jsonl").read_bytes()
    (out / "rows.jsonl").write_bytes(lines[:-7])
    start(PAPER, monkeypatch, *arguments)
    again = capsys.readouterr()
    assert again.err.count(" done in ") == 1
    assert [line for line in again.out.splitlines() if line.startswith("default edit")] == [
        line for line in first.out.splitlines() if line.startswith("default edit")
    ]
    found = json.loads((out / "summary-0.1.json").read_text())
    assert found["differences"] and found["steerable"][0]["random_directions"] == 3
    with pytest.raises(SystemExit) as end:
        start(PAPER, monkeypatch, *arguments[:-2], "--dtype", "bfloat16")
    assert end.value.code == 2 and "other settings" in capsys.readouterr().err


def test_refusals_are_tested_by_their_format_on_benign_requests(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(PAPER, monkeypatch, "refusal", str(model), "--out", str(tmp_path / "out"), *SMALL)
    assert "default edit" in capsys.readouterr().out
    assert all(re.search(paper_data.REFUSAL, text) for text in paper_data.REFUSALS)
    assert not re.search(paper_data.REFUSAL, "I can help you with that. It is sorry work.")


def test_short_and_long_reasoning_are_thirds_of_the_models_own_right_answers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {i} plus 1?", "answer": f"{i} + 1 is {i + 1}.\n#### {i + 1}"} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = open_checkpoint(model)
    loaded = load_model(checkpoint, read_spec(checkpoint))

    def written(_loaded: Any, texts: list[str], _tokens: int) -> list[list[int]]:
        numbers = [int(found[1]) for text in texts if (found := re.search(r"What is (\d+) plus", text))]
        answers = [f"{'well, ' * (n % 5)}the answer is {n + 1 + (n % 7 == 0)}." for n in numbers]
        return [loaded.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]

    monkeypatch.setattr(paper_data, "through_transformers", written)
    found = paper_data.length(path, 60, loaded, 200)
    sides: dict[str, list[int]] = {"positive": [], "negative": []}
    for example in found.behavior.examples:
        number = int(re.search(r"What is (\d+)", example.prompt[-1].content)[1])  # type: ignore[index, union-attr]
        assert number % 7 and f"{number + 1}." in example.response
        sides[example.label].append(len(example.response))
    assert len(sides["positive"]) == len(sides["negative"]) and max(sides["positive"]) <= min(sides["negative"])
    asked = {q.prompt for q in found.questions}
    assert not asked & {example.prompt for example in found.behavior.examples}
    with pytest.raises(DataError, match="at least 6"):
        paper_data.length(path, 60, loaded, 1)


def test_changed_answers_of_a_mixture_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    arguments = ["--behavior", "formal", "--top", "2", "--out", str(tmp_path / "out"), *SMALL]
    start(PAPER, monkeypatch, "experts", str(mixture_folder()), *arguments)
    table = capsys.readouterr().out
    assert "formal's 2" in table and "random 2, draw 3" in table and "beyond the random draws' mean" in table
    rows = json.loads((tmp_path / "out" / "changed.json").read_text())
    assert len(rows) == 4 and all(len(row["experts"]) == 2 for row in rows)
    with pytest.raises(SystemExit) as end:
        start(PAPER, monkeypatch, "experts", str(model), *arguments)
    assert end.value.code == 2 and "not a mixture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "match"),
    [("{", "line 1 is not JSON"), ('{"question": "a"}', "lacks best_answer"), (None, "cannot read")],
)
def test_bad_files_are_named(tmp_path: Path, content: str | None, match: str) -> None:
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=match):
        paper_data.truthful(path, 10)


def test_words_are_shared_by_f1() -> None:
    assert paper_data.overlap("It is odd", "it is odd.") == 1
    assert paper_data.overlap("blue", "it is odd") == 0
    assert paper_data.overlap("it is", "it is odd") == pytest.approx(2 * 2 / 5)
    assert paper_data.said_number("so 1,200 and 7.00") == "7" and paper_data.said_number("none") == ""
