"""eval, chat, report and the report of a compile, through the command line."""

from __future__ import annotations

import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, run
from rich.console import Console

from steer2edit import progress
from steer2edit.evaluation.chat import side_by_side
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.evaluation.projection import PROJECTION
from steer2edit.files.layout import EVALUATION, PLAN, REPORT
from steer2edit.strength.kl import NeutralText, Windows

TEXT = "the old cat sees a small bird and the river runs . " * 36
HELD = [{**row, "prompt": f"{row['prompt']} {word}"} for row in ROWS for word in ("old", "new")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, rows in (("pairs", ROWS), ("held", HELD)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "neutral.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def compiled(tiny_llama: Path, files: Path) -> Path:
    out = files / "out"
    result = run(
        "compile", tiny_llama, "--data", files / "pairs.jsonl", "--eval", files / "held.jsonl", "--neutral",
        files / "neutral.txt", "--to", "checkpoint", "--to", "lora", "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "random direction 1" in result.stdout and "report page" in result.stdout
    return out


def test_a_compile_with_questions_brings_its_proof(tiny_llama: Path, compiled: Path) -> None:
    for target in ("checkpoint", "lora"):
        found = Evaluation.load(compiled / target / EVALUATION)
        assert [row.kind for row in found.rows] == ["base", "edit", "steering", "random", "random", "random"]
        page = (compiled / target / REPORT).read_text()
        assert page.count("<svg") >= 2 and "margin" in page
    sent = run("push", compiled / "lora", "user/name", "--dry-run")
    left_out = [line for line in sent.stdout.splitlines() if EVALUATION in line or REPORT in line]
    assert len(left_out) == 2 and all("left out" in line for line in left_out)
    verified = run("verify", compiled / "lora", "--level", "bytes", "--base", tiny_llama)
    assert verified.exit_code == 0, verified.output


def test_a_compile_with_data_alone_measures_the_kl_only(tiny_llama: Path, files: Path, tmp_path: Path) -> None:
    result = run(
        "compile",
        tiny_llama,
        "--data",
        files / "pairs.jsonl",
        "--neutral",
        files / "neutral.txt",
        "--out",
        tmp_path / "x",
    )
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "x" / EVALUATION).exists()


def test_eval_measures_all_kinds_of_candidates_with_baselines(
    tiny_llama: Path, compiled: Path, files: Path, tmp_path: Path
) -> None:
    plan = compiled / "lora" / "steer2edit" / "plan.safetensors"
    settings = ["--eval", files / "held.jsonl", "--neutral", files / "neutral.txt", "--max-new-tokens", 4]
    result = run(
        "eval", tiny_llama, plan, compiled / "checkpoint", compiled / "lora", *settings, "--data", files / "pairs.jsonl",
        "--baselines", "--draws", 1, "--strengths", "0.5,1", "--pattern", "the", "-o", files / "e.json", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["kind"] for row in rows] == [
        "base", "edit", "edit", "edit", *["steering"] * 3, "random", "shuffled", "flipped", "whole", "ablation",
    ]  # fmt: skip
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    names = {
        "KL on prose",
        "perplexity",
        "margin",
        "likeliest choice right",
        "answers right",
        "length",
        "/the/",
        PROJECTION,
    }
    assert names <= set(rows[0]["metrics"])
    kl = [row["metrics"]["KL on prose"]["value"] for row in rows[1:4]]
    assert kl[1:] == pytest.approx([kl[0], kl[0]], rel=0.05)
    again = run("eval", tiny_llama, *settings, "--utility", "none")
    assert again.exit_code == 0 and "tune reports on" in again.stdout and PROJECTION not in again.stdout
    stats = tmp_path / "x.stats.safetensors"
    assert run("capture", tiny_llama, "--data", files / "pairs.jsonl", "-o", stats).exit_code == 0
    read = run("eval", tiny_llama, *settings, "--utility", "none", "--stats", stats, "--repetition-penalty", "1.2")
    assert read.exit_code == 0 and PROJECTION in read.stdout
    assert "with a repetition penalty of 1.2" in read.stdout and "repetition penalty" not in again.stdout


def test_eval_with_baselines_says_before_how_much_work_it_is(
    tiny_llama: Path, compiled: Path, files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passes = []
    measured = NeutralText.windows

    def counted(self: NeutralText, *given: Any, glance: bool = False, **more: Any) -> Windows:
        passes.append(0 if glance else 1)
        return measured(self, *given, glance=glance, **more)

    monkeypatch.setattr(NeutralText, "windows", counted)
    monkeypatch.setattr(progress, "_ended", {})  # as in a process of its own
    (tmp_path / "long.txt").write_text(TEXT * 6)
    result = run(
        "eval", tiny_llama, compiled / "lora" / PLAN, "--data", files / "pairs.jsonl", "--eval", files / "held.jsonl",
        "--utility", "none", "--neutral", tmp_path / "long.txt", "--limit", 2, "--max-new-tokens", 4, "--baselines",
        "--draws", 1, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    said = re.search(
        r"(\d+) candidates, each on (\d+) questions and (\d+) written answers of up to (\d+) tokens; about (\d+) passes over "
        r"(\d+) tokens",
        result.stderr,
    )
    assert said is not None, result.stderr
    candidates, questions, answers, tokens, about, neutral = map(int, said.groups())
    assert (candidates, questions, answers, tokens) == (len(found["rows"]), 2, 2, 4)
    # four windows of 128 tokens, each of which predicts 127
    assert neutral == found["context"]["neutral_tokens"]["prose"] == 4 * 127
    assert 0.4 * about <= sum(passes) <= about
    assert "random direction 1: KL on prose, pass 1 of about 5: 508 done in" in result.stderr
    assert len(set(result.stderr.splitlines())) == len(result.stderr.splitlines())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--baselines"], "name one"),
        (["--pattern", "("], "not a regular expression"),
        (["--function", "nowhere.py:f"], "file.py:name"),
        (["--strengths", "a"], "not a list of numbers"),
        (["--utility", "nowhere.jsonl"], "does not exist"),
        (["nothing"], "does not exist"),
        (["--strengths", "1"], "--data"),
        (["--lm-eval", "no_such_task"], "lm-eval"),
    ],
)
def test_bad_arguments_of_eval(tiny_llama: Path, files: Path, given: list[str], message: str) -> None:
    result = run("eval", tiny_llama, *given, "--eval", files / "held.jsonl", "--neutral", files / "neutral.txt")
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_without_questions_there_is_nothing_to_measure(tiny_llama: Path) -> None:
    result = run("eval", tiny_llama)
    assert result.exit_code == 2 and "--eval FILE" in result.stderr


@pytest.mark.parametrize("what", ["plan", "folder", "evaluation"])
def test_report_of_a_plan_and_of_an_artefact(compiled: Path, tmp_path: Path, what: str) -> None:
    folder = compiled / "checkpoint"
    source = folder if what == "folder" else folder / "steer2edit" / "plan.safetensors"
    more = ["--evaluation", folder / EVALUATION] if what == "evaluation" else []
    result = run("report", source, "-o", tmp_path / "r.html", *more)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "r.html").read_text()
    assert ("calibrated margin" in page) is (what != "plan")
    missing = run("report", tmp_path / "nothing", "-o", tmp_path / "x.html")
    assert missing.exit_code == 2 and "does not exist" in missing.stderr


def test_chat_shows_both_answers_and_keeps_both_conversations(tiny_llama: Path, compiled: Path) -> None:
    lines = "what is the cat ?\n\n/reset\nwhat is the dog ?\n/quit\nwhat is lost ?\n"
    result = run("chat", tiny_llama, compiled / "lora", "--max-new-tokens", 5, stdin=lines)
    assert result.exit_code == 0, result.output
    assert "> what is the cat ?" in result.stdout and "> what is the dog ?" in result.stdout
    assert "lost" not in result.stdout
    assert result.stdout.count("tiny-llama") == 2 and "lora" in result.stdout


def test_columns_are_beside_each_other_and_cannot_move_the_cursor() -> None:
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(side_by_side(("left \x1b[2J[bold]words " * 9, "右" * 50 + "\nright"), ("one", "two")))
    text = console.export_text()
    assert "\x1b" not in text and "[bold]words" in text.replace("\n", "")
    assert any("left" in line and "右" in line for line in text.splitlines())


def test_tasks_of_lm_eval_run_on_the_same_candidates(tiny_llama: Path, compiled: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": f"what is the {row['prompt'].split()[3]} ?", "choices": ["red .", "old ."]} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "answer": 0}) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(
        "task: colours\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    from steer2edit.architecture import read_spec
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.evaluation.candidates import open_candidate
    from steer2edit.evaluation.lm_eval import lm_eval
    from steer2edit.runtime.model import load_model

    checkpoint = open_checkpoint(tiny_llama)
    loaded = load_model(checkpoint, read_spec(checkpoint))
    candidate = open_candidate(loaded, checkpoint, str(compiled / "lora"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm-eval's own
        found = lm_eval(loaded, [candidate], ["colours"], include_path=str(tmp_path))
    assert [row[""] for row in found["colours"]] == ["base", candidate.name]
    assert all(0 <= row["acc"] <= 1 for row in found["colours"])
