"""The papers' experiments run whole on a tiny model, go on after a kill, and ask for nothing harmful."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import save_chat_model
from test_benchmarks import ROOT, start

from steer2edit.architecture import read_spec
from steer2edit.capture import background, run
from steer2edit.checkpoint import open_checkpoint
from steer2edit.demo.experts import mixture_folder
from steer2edit.errors import DataError
from steer2edit.runtime.model import load_model

sys.path.insert(0, str(ROOT / "benchmarks"))
import paper_data
from paper_journal import Journal

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
    with monkeypatch.context() as patched:  # what is captured is not captured again
        patched.setattr(run, "capture", None)
        start(PAPER, patched, *arguments)
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
    table = capsys.readouterr().out
    assert "default edit" in table and "teerable here: refused differs" in table
    assert all(re.search(paper_data.REFUSAL, text) for text in paper_data.REFUSALS)
    assert not re.search(paper_data.REFUSAL, "I can help you with that. It is sorry work.")


def test_short_and_long_reasoning_are_thirds_of_the_models_own_right_answers(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"What is {i} plus 1?", "answer": f"{i} + 1 is {i + 1}.\n#### {i + 1}"} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = paper_data.read_sums(str(path))
    checkpoint = open_checkpoint(model)
    loaded = load_model(checkpoint, read_spec(checkpoint))

    def written(_loaded: Any, texts: Sequence[str], _tokens: int) -> list[list[int]]:
        numbers = [int(found[1]) for text in texts if (found := re.search(r"What is (\d+) plus", text))]
        answers = [f"{'well, ' * (n % 5)}the answer is {n + 1 + (n % 7 == 0)}." for n in numbers]
        return [loaded.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]

    found = paper_data.length(sums, 60, loaded, 200, written)
    sides: dict[str, list[int]] = {"positive": [], "negative": []}
    for example in found.behavior.examples:
        number = int(re.search(r"What is (\d+)", example.prompt[-1].content)[1])  # type: ignore[index, union-attr]
        assert number % 7 and f"{number + 1}." in example.response
        sides[example.label].append(len(example.response))
    assert len(sides["positive"]) == len(sides["negative"]) and max(sides["positive"]) <= min(sides["negative"])
    asked = {q.prompt for q in found.questions}
    assert not asked & {example.prompt for example in found.behavior.examples}
    with pytest.raises(DataError, match="at least 18"):
        paper_data.length(sums, 60, loaded, 1, written)


def test_own_answers_are_written_once_and_go_on_after_a_kill(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def generate(_loaded: Any, texts: Sequence[str], _tokens: int) -> list[list[int]]:
        asked.append(list(texts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [[len(text)] for text in texts]

    loaded: Any = None
    texts = [f"{'?' * i}" for i in range(70)]
    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path, {}).writing(generate)(loaded, texts, 9)
    with (tmp_path / "own-answers.jsonl").open("a") as file:
        file.write('{"prompt": "cut sh')
    assert Journal(tmp_path, {}).writing(generate)(loaded, texts, 9) == [[i] for i in range(70)]
    assert [len(part) for part in asked] == [32, 32, 32, 6]
    assert Journal(tmp_path, {}).writing(generate)(loaded, texts, 9) == [[i] for i in range(70)] and len(asked) == 4
    Journal(tmp_path, {}).writing(generate)(loaded, texts[:1], 8)  # another bound is another answer
    assert len(asked) == 5


def test_changed_answers_of_a_mixture_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    arguments = ["--behavior", "formal", "--top", "2", *SMALL, "--out"]
    out = tmp_path / "out"
    start(PAPER, monkeypatch, "experts", str(mixture_folder()), *arguments, str(out))
    first = capsys.readouterr()
    assert "formal's 2" in first.out and "random 2, draw 3" in first.out
    assert "beyond the random draws' mean" in first.out
    lines = (out / "rows.jsonl").read_bytes()
    rows = [json.loads(line)["row"] for line in lines.splitlines()]
    assert len(rows) == 4 and all(len(row["experts"]) == 2 for row in rows)
    (out / "rows.jsonl").write_bytes(lines[:-7])
    start(PAPER, monkeypatch, "experts", str(mixture_folder()), *arguments, str(out))
    again = capsys.readouterr()
    assert again.out == first.out and again.err.count(": KL ") == 1
    with pytest.raises(SystemExit) as end:
        start(PAPER, monkeypatch, "experts", str(model), *arguments, str(tmp_path / "other"))
    assert end.value.code == 2 and "not a mixture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "line 1"),
        ('{"question": "a"}', "lacks best_answer"),
        ('{"question": 3, "best_answer": "b", "correct_answers": ["b"], "incorrect_answers": ["c"]}', "question is 3"),
        (None, "does not exist"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str | None, match: str) -> None:
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=match):
        paper_data.read_truths(str(path))


def test_truthfulqa_is_read_as_rows_and_as_the_original_table_without_its_empty_answers(tmp_path: Path) -> None:
    true, false = ["It is blue", "Blue"], ["It is green", ""]
    row = {"question": "Which?", "best_answer": true[0], "correct_answers": true, "incorrect_answers": false}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    heads = "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source"
    cells = f"Adversarial,Colour,Which?,{true[0]},{'; '.join(true)},{'; '.join(false)},nowhere"
    (tmp_path / "b.csv").write_text(f"{heads}\n{cells}\n")
    expected = [{"question": "Which?", "true": true, "false": ["It is green"]}]
    assert [paper_data.read_truths(str(tmp_path / name)) for name in ("a.jsonl", "b.csv")] == [expected, expected]


def test_words_are_shared_by_f1() -> None:
    assert paper_data.overlap("It is odd", "it is odd.") == 1
    assert paper_data.overlap("blue", "it is odd") == 0
    assert paper_data.overlap("it is", "it is odd") == pytest.approx(2 * 2 / 5)
    assert paper_data.said_number("so 1,200 and 7.00") == "7" and paper_data.said_number("none") == ""
