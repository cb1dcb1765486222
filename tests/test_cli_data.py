"""``data`` on the command line: ways that exclude each other, what is printed, and a model that writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import run, save_chat_model
from fake_engine import NOUNS, FakeEngine

from steer2edit.cli.data_options import DataFlags
from steer2edit.cli.judge_flags import JudgeFlags
from steer2edit.cli.making import Making
from steer2edit.cli.making_flags import AnswerFlags, AuthorFlags
from steer2edit.data.contrast import read_contrast
from steer2edit.data.data_folder import open_data_folder
from steer2edit.data.metric_choice import MetricChoice
from steer2edit.pairs.folder import FILES
from steer2edit.pairs.journal import JOURNAL
from steer2edit.pairs.make import Engines


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "chat")


TOLD = ("--positive", "Answer briefly.", "--negative", "Answer at length.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --trait, --behavior"),
        (("--negative", "Be brief."), "--negative is the opposite of --positive"),
        ((*TOLD, "--by", "length"), "each name a way"),
        (("--trait", "blunt: says it", "--behavior", "formal"), "each name a way"),
        (("--by", "pattern"), "--by pattern and --pattern go together"),
        (("--by", "length", "--pattern", "x"), "--pattern is what --by pattern, --metric pattern"),
        (("--by", "length", "--metric", "length"), "--by names the metric"),
        (("--behavior", "formal", "--metric", "length"), "the file of --behavior names the metric"),
        ((*TOLD, "--metric", "shortness"), "expected one of margin"),
        ((*TOLD, "--metric", "length"), "--goal is not given; expected more or less for length"),
        ((*TOLD, "--metric", "count", "--goal", "less"), "--pattern is not given; expected a regular expression"),
        (("--by", "pattern", "--pattern", "("), "not a regular expression"),
        (("--by", "function", "--function", "no.py:f"), "expected file.py:name"),
        (("--by", "answer"), "needs --prompts"),
        (("--by", "judge", "--judge", "self"), "needs --trait"),
        (("--by", "judge", "--trait", "blunt: says it"), "needs --trait"),
        (("--by", "answer", "--only-correct", "--prompts", "x.jsonl"), "leaves no wrong ones"),
        (("--positive-only", *TOLD), "not with --by or --negative"),
        (("--trait", "blunt"), "without a colon; expected a name, a colon and a description"),
        (("--trait", "b: c"), "whose description has 1 word; expected"),
        (("--behavior", "formall"), "Did you mean formal"),
        (("--by", "length", "--prompts", "nowhere.jsonl"), "does not exist"),
        ((*TOLD, "--positive", "Be short.", "--negative", "No.", "--negative", "Never."), "unequal numbers"),
        (("--positive", " ", "--negative", "Answer at length."), "is empty"),
        ((*TOLD, "--goal", "less"), "--goal is for answers that are sorted"),
        ((*TOLD, "--tails", "0.2"), "--tails is for answers that are sorted"),
        ((*TOLD, "--only-correct"), "--only-correct is for answers that are sorted"),
        ((*TOLD, "--questions", "5"), "--questions are written for a trait"),
        (("--behavior", "formal", "--positive-only", "--samples", "2"), "leave --samples out"),
        ((*TOLD, "--answers-by", "http://one", "--server", "http://two"), "--answers-by and --server both name"),
        ((*TOLD, "--answers-by", "x", "--engine", "vllm"), "--answers-by and --engine vllm both name"),
        ((*TOLD, "--server-model", "x"), "--server-model names a model of a server"),
        ((*TOLD, "--answers-by", "folder", "--server-model", "x"), "--server-model names a model of a server"),
        ((*TOLD, "--judge", "self", "--judge-model", "x"), "--judge-model names a model of a server"),
        ((*TOLD, "--writer-model", "x"), "--writer-model names a model of a server"),
        ((*TOLD, "--requests", "8"), "--requests says how a server is asked, and no server is"),
        ((*TOLD, "--rate", "60", "--judge", "self"), "--rate says how a server is asked, and no server is"),
        ((*TOLD, "--api-key-from", "KEY", "--answers-by", "x"), "--api-key-from says how a server is asked"),
        (
            ("--trait", "blunt: says it", "--samples", "2", "--temperature", "0"),
            "at a temperature of 0 are all the same",
        ),
        ((*TOLD, "--samples", "2", "--temperature", "0"), "at a temperature of 0 are all the same"),
        (("--by", "length", "--temperature", "0"), "at a temperature of 0 are all the same"),
        (("--by", "length", "--only-correct"), "expected a column answer or choices"),
        ((*TOLD, "--top-p", "0.5"), "at a temperature of 0 nothing is"),
        ((*TOLD, "--writer", "x"), "--writer writes the opposite of a trait"),
        (
            ("--by", "judge", "--trait", "blunt: says it", "--judge", "self", "--writer", "x"),
            "--writer writes the opposite",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_before_a_model_is_loaded(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("data", tmp_path / "no-model", *arguments, "-o", tmp_path / "data")
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--answers-by", "http://127.0.0.1:9"), "cannot be reached"),
        (("--server", "http://127.0.0.1:9"), "cannot be reached"),
        (("--judge", "http://127.0.0.1:9"), "cannot be reached"),
        (("--trait", "brief: in few words", "--writer", "http://127.0.0.1:9"), "cannot be reached"),
        (("--trait", "brief: in few words", "--writer", "nowhere"), "nowhere"),
        ((), "files that steer2edit data did not write"),
    ],
)
def test_what_is_not_there_is_said_before_a_model_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setattr("steer2edit.cli.options.ModelFlags.load", None)
    (tmp_path / "data").mkdir()
    if not arguments:
        (tmp_path / "data" / "mine.txt").write_text("mine")
    told = () if "--trait" in arguments else TOLD
    result = run("data", model, *told, *arguments, "-o", tmp_path / "data")
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output


def test_a_models_own_answers_become_a_folder(model: Path, tmp_path: Path) -> None:
    settings = ("--max-prompts", "30", "--max-new-tokens", "12", "--temperature", "1", "--keep-cut", "--json")
    made = run("data", model, *TOLD, *settings, "-o", tmp_path / "data")
    # a random model obeys nothing
    assert made.exit_code == 1, made.output
    result: dict[str, Any] = json.loads(made.stdout)
    assert result["verdict"]["word"] == "not" and result["folder"] == str(tmp_path / "data")
    assert result["written"]["answers"] == 60 and not result["reused"]
    assert {key: result[key] for key in ("rows", "separation")} == {
        key: dict(open_data_folder(tmp_path / "data").receipt)[key] for key in ("rows", "separation")
    }
    assert len(read_contrast(tmp_path / "data" / FILES["train"])) == 2 * result["rows"]["train"]
    # half of the journal is lost, and written again as it was
    journal = tmp_path / "data" / JOURNAL
    before = [(tmp_path / "data" / name).read_bytes() for name in FILES.values()]
    journal.write_bytes(journal.read_bytes()[: journal.stat().st_size // 2])
    again = run("data", model, *TOLD, *settings, "-o", tmp_path / "data")
    assert 0 < json.loads(again.stdout)["written"]["answers"] <= 60
    assert [(tmp_path / "data" / name).read_bytes() for name in FILES.values()] == before
    other = run("data", model, *TOLD, *settings, "--seed", "1", "-o", tmp_path / "data")
    assert other.exit_code == 2 and "seed was 0 and is 1" in other.stderr


def test_arguments_for_the_template_reach_the_model_that_answers_in_its_place(model: Path) -> None:
    arguments, place = AnswerFlags(chat_template_kwargs=("style=short",), think="keep"), str(model)
    asked = Making(place, answers=arguments, authors=AuthorFlags(answers_by=place, writer=place))
    engines = asked.engines()
    described = engines.answers.described()
    assert described["chat_template_kwargs"] == {"style": "short"} and described["think"] is True
    # who writes instructions is asked plainly
    assert not engines.writer.described()["chat_template_kwargs"]


def test_positives_of_rows_that_repeat_a_prompt_are_taken_once(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"what is the {a} of {b}", "response": f"it is {a} {b} here"} for a in NOUNS[:5] for b in NOUNS]
    rows.append({**rows[0], "response": "another one"})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("--positive-only", "--prompts", tmp_path / "own.jsonl", "--max-prompts", "30", "--max-new-tokens", "4")
    made = run("data", model, *settings, "--keep-cut", "-o", tmp_path / "data")
    assert made.exit_code in (0, 1) and "another one says the same" in made.stderr, made.output
    assert "another one" not in (tmp_path / "data" / FILES["train"]).read_text()


def test_the_summary_says_what_to_do(model: Path, tmp_path: Path) -> None:
    settings = ("--max-prompts", "12", "--max-new-tokens", "8", "--keep-cut", "--samples", "2")
    made = run("data", model, "--trait", "brief: in very few words", *settings, "-o", tmp_path / "data")
    assert made.exit_code == 1, made.output
    assert (
        "Verdict" in made.stdout
        and "--answers-by" in made.stdout
        and "fewer than 10 prompts" in " ".join(made.stdout.split())
    )


# data that a compile lacks

TRAIT = ("--trait", "brief: answers briefly, with nothing around it")
COMPILE = ("--to", "lora", "--no-report", "--strength", "0.1")


@pytest.fixture
def obeying(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr(Making, "engines", lambda _making: Engines(engine, engine, None))
    return engine


def test_compile_makes_the_data_that_it_lacks_and_uses_what_is_there(
    model: Path, obeying: FakeEngine, tmp_path: Path
) -> None:
    arguments = (*TRAIT, "--max-prompts", "30", *COMPILE, "--out", tmp_path / "brief")
    compiled = run("compile", model, *arguments)
    assert compiled.exit_code == 0, compiled.output
    assert f"data was made in {tmp_path / 'brief-data'}: kept 30 of 30" in compiled.stderr
    assert (tmp_path / "brief" / "adapter_model.safetensors").is_file()
    written = obeying.seen
    again = run("compile", model, *arguments, "--force")
    assert again.exit_code == 0 and "is used again" in again.stderr
    assert obeying.seen <= written + 1
    # the same folder by its name
    named = run("compile", model, "--data", tmp_path / "brief-data", *COMPILE, "--out", tmp_path / "two")
    assert named.exit_code == 0, named.output
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("brief", "two")]
    assert weights[0] == weights[1]


def test_compile_takes_what_data_takes_and_the_metric(model: Path, obeying: FakeEngine, tmp_path: Path) -> None:
    said = ("--positive", "Answer briefly.", "--metric", "length", "--goal", "less", "--seed", "3", "--samples", "2")
    more = (
        "--max-prompts",
        "30",
        "--max-new-tokens",
        "40",
        "--temperature",
        "0.3",
        "--top-p",
        "0.8",
        "--think",
        "keep",
    )
    compiled = run("compile", model, *said, *more, *COMPILE, "--out", tmp_path / "out")
    assert compiled.exit_code == 0, compiled.output
    folder = open_data_folder(tmp_path / "out-data")
    assert folder.metric == MetricChoice("length", "less") and folder.receipt["seed"] == 3
    assert folder.receipt["sampling"] == {"max_new_tokens": 40, "temperature": 0.3, "top_p": 0.8, "seed": 3}
    assert folder.receipt["think"] == "keep" and folder.receipt["made"]["samples"] == 2
    # without an opposite the other side is the model's own answers
    assert folder.receipt["made"]["negative"] == [""] and folder.positive == "Answer briefly."


def test_a_behaviour_without_pairs_is_made_too(model: Path, obeying: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'description = "x"\npositive = "Answer briefly."\nnegative = "Answer at length."\n'
        'metric = {name = "length", goal = "less"}\n'
    )
    arguments = ("--behavior", tmp_path / "mine.toml", "--max-prompts", "30", "--data-out", tmp_path / "data")
    compiled = run("compile", model, *arguments, *COMPILE, "--out", tmp_path / "out")
    assert compiled.exit_code == 0, compiled.output
    assert open_data_folder(tmp_path / "data").metric == MetricChoice("length", "less")


def test_compile_refuses_data_that_does_not_hold_the_behaviour(
    model: Path, obeying: FakeEngine, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(
        'description = "x"\npositive = "Talk like a pirate."\nnegative = "Talk like a clerk."\n'
        'metric = {name = "length", goal = "less"}\n'
    )
    made = run("data", model, "--behavior", tmp_path / "mine.toml", "--max-prompts", "30", "-o", tmp_path / "data")
    assert made.exit_code == 1, made.output
    refused = run("compile", model, "--data", tmp_path / "data", *COMPILE, "--out", tmp_path / "out")
    assert (
        refused.exit_code == 2 and "do not differ in length" in refused.stderr and "--despite-verdict" in refused.stderr
    )
    taken = run("compile", model, "--data", tmp_path / "data", "--despite-verdict", *COMPILE, "--out", tmp_path / "out")
    assert taken.exit_code == 0, taken.output
    asked = ("--behavior", tmp_path / "mine.toml", "--max-prompts", "30", *COMPILE, "--out", tmp_path / "x")
    missing = run("compile", model, *asked)
    assert missing.exit_code == 2 and "does not hold the behaviour" in missing.stderr
    assert "--despite-verdict" in missing.stderr
    despite = run("compile", model, *asked, "--despite-verdict")
    assert despite.exit_code == 0, despite.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "papyrus"), "no target 'papyrus'"),
        (("--to", "lora", "--eval", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (("--to", "lora", "--neutral", "nowhere.txt"), "nowhere.txt"),
        (("--to", "lora", "--background", "nowhere.txt"), "nowhere.txt"),
        (("--to", "lora", "--keep", "nowhere.txt"), "nowhere.txt"),
        (("--to", "lora", "--protect", "nowhere"), "nowhere"),
        (
            ("--to", "lora", "--aim", "shortness=4"),
            "no metric 'shortness' of the behaviour to aim at; there are margin",
        ),
        (("--to", "lora", "--aim", "length=4", "--strength", "1"), "decides the strength"),
        (("--to", "lora", "--judge", "http://127.0.0.1:9"), "cannot be reached"),
        (("--to", "lora", "--judge", "nowhere"), "nowhere"),
        (("--to", "lora", "--judge", "self", "--no-report"), "no --no-report"),
        (("--to", "lora", "--weights", "nowhere"), "--weights has no place"),
        (("--to", "lora"), "out exists"),
    ],
)
def test_what_is_wrong_with_a_compile_is_said_before_data_is_made(
    model: Path, obeying: FakeEngine, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    if message == "out exists":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("x")
    result = run("compile", model, *TRAIT, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "out-data").exists()


def test_prompts_are_not_called_questions(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Which tea?"\n')
    result = run("data", model, *TOLD, "--prompts", tmp_path / "p.jsonl", "-o", tmp_path / "data")
    assert result.exit_code == 2 and "cannot be used as prompts to answer" in result.stderr


def test_instructions_are_not_ignored_by_a_method_that_needs_no_data(
    model: Path, obeying: FakeEngine, tmp_path: Path
) -> None:
    method = ("--method", "silence", "--components", "layer.1", "--to", "lora", "--no-report")
    run("compile", model, *TOLD, "--max-prompts", "30", *method, "--out", tmp_path / "out")
    assert (tmp_path / "out-data" / "data.json").is_file()


def test_a_behaviours_own_questions_are_not_passed_over_in_silence(
    model: Path, obeying: FakeEngine, tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "Which tea do you like?"}\n')
    (tmp_path / "mine.toml").write_text(
        'description = "x"\npositive = "Answer briefly."\nnegative = "Answer at length."\nquestions = "q.jsonl"\n'
        'metric = {name = "length", goal = "less"}\n'
    )
    arguments = ("--behavior", tmp_path / "mine.toml", "--max-prompts", "30", *COMPILE, "--out", tmp_path / "out")
    compiled = run("compile", model, *arguments)
    assert "takes the behaviour's own" in " ".join(compiled.stderr.split()), compiled.output


def test_a_judge_of_the_folder_looks_for_what_its_data_was_made_by(
    model: Path, obeying: FakeEngine, tmp_path: Path
) -> None:
    told = run("data", model, *TOLD, "--max-prompts", "30", "-o", tmp_path / "told")
    assert told.exit_code == 0, told.output
    choice = JudgeFlags(judge="self").choice(DataFlags(data=(str(tmp_path / "told"),)))
    assert choice is not None and choice.trait == "Answer briefly."
    # how answers were sorted is not a trait
    made = run("data", model, "--by", "length", "--samples", "2", "--max-prompts", "30", "-o", tmp_path / "by")
    assert made.exit_code in (0, 1), made.output
    with pytest.raises(click.UsageError, match="say it with --rubric"):
        JudgeFlags(judge="self").choice(DataFlags(data=(str(tmp_path / "by"),)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TRAIT, "--behavior", "formal"), "give one of the three"),
        ((*TRAIT, "--stats", "x.stats.safetensors"), "without --plan, --stats"),
        (("--behavior", "formal", "--data-out", "x"), "--data-out is for data that is made"),
        (("--behavior", "formal", "--temperature", "1"), "--temperature is for data that is made"),
        (("--behavior", "formal", "--positive", "Be brief."), "--positive stands in place of --data and --behavior"),
        ((*TRAIT, "--dry-run"), "--dry-run makes no data"),
    ],
)
def test_compile_says_what_does_not_go_together(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("compile", model, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
