"""The cost of a chat model is measured on its own answers, with prose beside it, and the budget is on the answers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run, save_chat_model

from steer2edit.architecture import read_spec
from steer2edit.artefact.receipt import read_receipt
from steer2edit.capture.run import capture_statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.answers import LABELS
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import Example
from steer2edit.data.everyday import everyday_prompts
from steer2edit.data.neutral import NeutralChats, read_neutral
from steer2edit.data.questions import Question
from steer2edit.engines.own_answers import OwnAnswer, own_answers
from steer2edit.errors import DataError
from steer2edit.evaluation.metrics import Neutral
from steer2edit.evaluation.suite import Suite
from steer2edit.files.layout import EVALUATION, REPORT
from steer2edit.notices import collected
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.plan.measured import Measured
from steer2edit.report.measured import selection
from steer2edit.report.tables import render_study
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.search.study import Study
from steer2edit.search.tune import Search, plan_of, tune
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.meet import estimate
from steer2edit.strength.neutral_texts import NeutralTexts, neutral_texts
from steer2edit.strength.settle import KL_BUDGETS, settle_strength

PROSE = "The old cat sees a small bird, and the river runs to the sea. " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture(scope="module")
def talker(folder: Path) -> LoadedModel:
    checkpoint = open_checkpoint(folder)
    return load_model(checkpoint, read_spec(checkpoint))


@pytest.fixture(scope="module")
def texts(talker: LoadedModel) -> NeutralTexts:
    return neutral_texts(talker, limit=8)


@pytest.fixture(scope="module")
def plan(talker: LoadedModel) -> EditPlan:
    """A random rank-1 edit of every attention output."""
    generator = torch.Generator().manual_seed(0)
    sites = [site for site in talker.spec.sites if "self_attn" in site.tensor]
    edits = [
        LowRank(
            site.matrix,
            torch.randn(site.out_features, 1, generator=generator) / 10,
            torch.randn(1, site.in_features, generator=generator) / 10,
        )
        for site in sites
    ]
    return EditPlan(Base("talker", None, talker.fingerprint or ""), tuple(edits))


def with_template(talker: LoadedModel, template: str | None) -> LoadedModel:
    tokenizer = copy.deepcopy(talker.tokenizer)
    tokenizer.chat_template = template
    return replace(talker, tokenizer=tokenizer, fingerprint=None)


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_kl_in_chat_is_that_of_the_answers_tokens(talker: LoadedModel, plan: EditPlan) -> None:
    answers = own_answers(talker, everyday_prompts("neutral")[:5], fingerprint=None, max_new_tokens=9)
    text = NeutralText(talker, answers)
    assert text.kind == "chat" and text.tokens == sum(len(one.ids) - one.start for one in answers)

    def predicted(answer: OwnAnswer) -> torch.Tensor:
        with torch.inference_mode():
            logits = talker.model(torch.tensor([answer.ids])).logits[0]
        return logits[answer.start - 1 : -1].double().log_softmax(-1)

    with edited(talker, plan, 3.0):
        found, by_answer = text.measure(), text.windows()
    assert by_answer.tokens == tuple(len(one.ids) - one.start for one in answers)
    for answer, kl, loss in zip(answers, by_answer.kl, by_answer.base_loss, strict=True):
        p = predicted(answer)
        with edited(talker, plan, 3.0):
            q = predicted(answer)
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
        # each token of the answer is the likeliest
        assert loss == pytest.approx(-float(p.max(-1).values.sum()), rel=1e-3)
    assert found.kl == pytest.approx(sum(by_answer.kl) / text.tokens) and found.low < found.kl < found.high


def test_a_budget_is_met_in_chat_and_prose_is_measured_once(
    talker: LoadedModel, plan: EditPlan, texts: NeutralTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    windows = NeutralText.windows

    def counted(self: NeutralText, *arguments: Any, glance: bool = False, **more: Any) -> Any:
        passes.append("" if glance else self.kind)
        return windows(self, *arguments, glance=glance, **more)

    monkeypatch.setattr(NeutralText, "windows", counted)
    measured = settle_strength(talker, plan, kl_budget=0.05, neutral=texts).measured
    assert passes.count("prose") == 1 and passes.count("chat") == len(measured.steps or ())
    assert measured.budget_text == "chat" and measured.costs.keys() == {"chat", "prose"}
    assert 0.0475 <= measured.costs["chat"].kl <= 0.05 and measured.kl == measured.costs["chat"].kl
    assert measured.steps is not None and measured.steps[-1][1] == measured.kl
    assert measured.strength is not None
    for text in texts:
        with edited(talker, plan, measured.strength):
            assert text.measure() == measured.costs[text.kind]
    assert Measured.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_the_default_budget_is_that_of_the_text(talker: LoadedModel, plan: EditPlan, texts: NeutralTexts) -> None:
    assert texts.other is not None
    for given in (texts, NeutralTexts(texts.other)):
        measured = settle_strength(talker, plan, neutral=given).measured
        assert measured.kl_budget == KL_BUDGETS[given.budget.kind] and measured.budget_text == given.budget.kind


def test_a_quick_look_takes_a_few_answers_of_all_lengths(talker: LoadedModel, plan: EditPlan) -> None:
    answers = own_answers(talker, everyday_prompts("neutral")[::4], fingerprint=talker.fingerprint)
    text = NeutralText(talker, answers)
    apply = partial(edited, talker, plan)
    with apply(1.0):
        glance, whole = text.windows(glance=True), text.windows()
    assert 4 <= len(glance.kl) < len(whole.kl) and sum(glance.tokens) <= 1024
    assert all(any(a == pytest.approx(b, rel=1e-3) for b in whole.kl) for a in glance.kl)
    start = estimate(apply, text, 0.02)
    with apply(start):
        assert text.measure().kl == pytest.approx(0.02, rel=0.4)


def test_both_texts_are_metrics_and_perplexity_is_that_of_prose(texts: NeutralTexts) -> None:
    names = [[metric.name for metric in Neutral(text).metrics] for text in texts]
    assert names == [["KL in chat"], ["KL on prose", "perplexity"]]


def test_a_base_model_answers_in_plain_text(talker: LoadedModel, plan: EditPlan) -> None:
    base = with_template(talker, None)
    with collected() as said:
        texts = neutral_texts(base, limit=6)
    assert [text.kind for text in texts] == ["answers", "prose"] and not any("prose alone" in one for one in said)
    begun = [base.tokenizer.decode(row) for row in texts.budget.rows]
    assert sum(one.startswith("User: ") for one in begun) == sum(not one.startswith("User: ") for one in begun) == 3
    settled = settle_strength(base, plan, neutral=texts).measured
    assert settled.budget_text == "answers" and settled.kl_budget == KL_BUDGETS["answers"]
    assert settled.costs.keys() == {"answers", "prose"}
    assert Neutral(texts.budget).kl.name == "KL on answers"


def test_a_tokenizer_without_human_words_leaves_prose(plan: EditPlan, loaded: LoadedModel) -> None:
    with collected() as said:
        texts = neutral_texts(loaded, "the cat sees the dog . " * 50)
    assert [text.kind for text in texts] == ["prose"] and any("does not know the words" in one for one in said)


def test_a_template_that_rejects_every_prompt_leaves_prose(talker: LoadedModel) -> None:
    with collected() as said:
        texts = neutral_texts(with_template(talker, "{{ raise_exception('closed') }}"), limit=4)
    assert [text.kind for text in texts] == ["prose"]
    assert any("prose alone" in one and "closed" in one for one in said)


PROMPTS = [{"prompt": f"Name {count} birds."} for count in ("two", "three", "four", "five", "six")]
CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "A tit."}]}
    for row in PROMPTS
]


def test_a_user_s_text_has_the_budget_whichever_kind_it_is(talker: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "text.md").write_text(PROSE)
    own = read_neutral(tmp_path / "text.md")
    assert own == PROSE
    assert [text.kind for text in neutral_texts(talker, own, limit=4)] == ["prose", "chat"]
    for rows in (PROMPTS, CHATS, [*PROMPTS[:2], *CHATS[2:]], [{**row, "response": "A tit."} for row in PROMPTS]):
        own = read_neutral(written(tmp_path / "chats.jsonl", rows))
        assert isinstance(own, NeutralChats) and len(own.chats) == 5
        chat, prose = neutral_texts(talker, own)
        assert (chat.kind, prose.kind) == ("chat", "prose") and len(chat.rows) == 5
        answered = sum("messages" in row or "response" in row for row in rows)
        read = [talker.tokenizer.decode(row) for row in chat.rows]
        assert sum(text.endswith("A tit.<eos>") for text in read) == answered
    assert chat.tokens == 5 * len("A tit.") + 5


def test_too_many_chats_are_said(talker: LoadedModel, tmp_path: Path) -> None:
    long = {"messages": [CHATS[0]["messages"][0], {"role": "assistant", "content": "words and " * 40}]}
    own = read_neutral(written(tmp_path / "chats.jsonl", [long] * 90))
    with collected() as said:
        chat = neutral_texts(talker, own).budget
    assert len(chat.rows) == 64 and any("64 of the 90 chats" in one for one in said)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], 'expected "messages"'),
        ([{"prompt": ""}], "prompt is empty"),
        ([{"prompt": 7}], "expected a string"),
        ([["a"]], "expected an object"),
        ([{"messages": []}], "empty"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "no prompt before it"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}], "white space"),
        ([{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], "ends in an answer"),
        ([], "empty"),
    ],
)
def test_bad_chats_are_refused_with_their_rows(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_neutral(written(tmp_path / "chats.jsonl", rows))


def test_files_that_cannot_be_read_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\xd8")
    for name in ("bytes.txt", "nowhere.jsonl", "nowhere.txt"):
        with pytest.raises(DataError, match=name):
            read_neutral(tmp_path / name)
    result = run("eval", folder, "--behavior", "concise", "--neutral", tmp_path / "nowhere.jsonl")
    assert result.exit_code == 2 and "does not exist" in result.stderr


@pytest.fixture(scope="module")
def artefact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A compile of the chat model with few held-out questions: its folder, its JSON and its standard error."""
    place = tmp_path_factory.mktemp("compiled")
    rows = [{**row, "prompt": f"{row['prompt']} {word}"} for row in ROWS for word in ("old", "new")]
    data = written(place / "pairs.jsonl", ROWS)
    held = written(
        place / "held.jsonl", [{key: row[key] for key in ("prompt", "positive", "negative")} for row in rows]
    )
    few = written(place / "chats.jsonl", [*PROMPTS, *CHATS])
    result = run("compile", folder, "--data", data, "--eval", held, "--neutral", few, "-o", place / "out", "--json")
    assert result.exit_code == 0, result.output
    return place / "out", json.loads(result.stdout), result.stderr


def test_both_costs_are_on_every_page(artefact: tuple[Path, dict[str, Any], str], folder: Path) -> None:
    out, told, _ = artefact
    costs = told["measured"]["costs"]
    assert told["measured"]["budget_text"] == "chat" and list(costs) == ["chat", "prose"]
    budget = KL_BUDGETS["chat"]
    assert 0.9 * budget <= costs["chat"]["kl"] <= budget == told["measured"]["kl_budget"]
    assert all(costs[kind]["tokens"] > 0 and costs[kind]["low"] <= costs[kind]["kl"] for kind in costs)
    assert read_receipt(out)["measured"] == told["measured"]
    for page in (out / "README.md", out / REPORT):
        text = page.read_text()
        assert "KL in chat" in text and "KL on prose" in text, page
    evaluation = json.loads((out / EVALUATION).read_text())
    names = [metric["name"] for metric in evaluation["metrics"]]
    assert [name for name in names if name in ("KL in chat", "KL on prose", "perplexity")] == [
        *("KL in chat", "KL on prose", "perplexity")
    ]
    assert {row["note"] for row in evaluation["rows"]} >= {"at equal KL in chat"}
    for command in (["show", out], ["report", out, "-o", out.parent / "again.html"]):
        result = run(*command)
        assert result.exit_code == 0, result.output
    shown = run("show", out).stdout
    assert "KL in chat" in shown and "KL on prose" in shown
    assert run("verify", out, "--base", folder, "--level", "bytes").exit_code == 0


def test_a_dry_run_names_the_text_of_the_budget(folder: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "pairs.jsonl", ROWS)
    (tmp_path / "text.txt").write_text(PROSE)
    few = written(tmp_path / "chats.jsonl", [*PROMPTS, *CHATS])
    for given, line in (
        ([], "passes over 5,120 tokens of the base's own answers, which are written once"),
        (["--neutral", few], "passes over 1,680 tokens of the base's own answers, which are written once"),
        (["--neutral", tmp_path / "text.txt"], "passes over 4,096 tokens of neutral prose"),
    ):
        result = run("compile", folder, "--data", data, "-o", tmp_path / "out", "--dry-run", *given)
        assert result.exit_code == 0 and line in result.stdout, result.output


def test_a_study_keeps_both_costs_of_each_trial(
    talker: LoadedModel, texts: NeutralTexts, folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    examples = [Example(row["prompt"], row[label], label, "test", i) for i, row in enumerate(ROWS) for label in LABELS]
    checkpoint = open_checkpoint(folder)
    statistics = capture_statistics(talker, checkpoint, Behavior("rows", examples))
    questions = [
        Question(f"{row['prompt']} {word}", word, row["positive"], row["negative"]) for row in ROWS for word in "ab"
    ]
    suite = Suite(questions, [], texts, max_new_tokens=2)
    search = Search(trials=2, kl_range=(0.01, 0.05), allow_broken=True)
    result = tune(talker, Scoring(checkpoint, talker.spec, statistics), suite, search, storage=tmp_path / "journal")
    assert result.settings["utility"] == {"name": "KL in chat", "goal": "less"}
    for trial in result.trials:
        assert trial.checks["KL on prose"] > 0 and 0.003 < trial.kl < 0.15
        assert trial.utility is not None and trial.utility["value"] == trial.kl
    table = render_study(Study(tmp_path, result))
    assert "KL in chat" in table and "KL on prose" in table
    page = "".join(map(str, selection(result.described()["trials"], result.settings, None)))
    assert "KL in chat" in page and "KL on prose" in page
    assert result.knee is not None
    chosen = plan_of(Scoring(checkpoint, talker.spec, statistics), talker, suite, result.trials[result.knee], search)
    assert chosen.measured.costs.keys() == {"chat", "prose"} and chosen.measured.budget_text == "chat"
    assert chosen.measured.kl == pytest.approx(result.trials[result.knee].kl, rel=1e-3)
