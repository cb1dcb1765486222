"""What a judge says of answers is a metric like any other, and a judge that is the model judges with the base's weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROWS, run, save_chat_model
from test_evaluate import QUESTIONS, TEXT
from test_judge import Opinions

from steer2edit.artefact.emit import emit
from steer2edit.bootstrap import estimate
from steer2edit.data.answers import LABELS
from steer2edit.data.contrast import Example
from steer2edit.engines.agreement import Agreement, LabelledAnswer
from steer2edit.engines.engine import Request
from steer2edit.engines.judge import Judge
from steer2edit.engines.opening import JudgeChoice
from steer2edit.engines.transformers_engine import TransformersEngine
from steer2edit.evaluation.answers import Answers
from steer2edit.evaluation.candidates import Candidate, open_candidate, plan_candidate
from steer2edit.evaluation.evaluate import evaluate
from steer2edit.evaluation.judged import TraitJudge
from steer2edit.evaluation.suite import Suite
from steer2edit.methods import make_plan
from steer2edit.notices import collected
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.neutral_texts import NeutralTexts

GOOD = Agreement("traits", 0.9, 0.8, 1.0, estimate([1.0] * 8), 0.5, 8, 0)
BAD = replace(GOOD, auc=0.6)
LABELLED = [
    LabelledAnswer("kind", "why ?", f"the cat {'runs' if n % 2 else 'is red'} .", n % 2 == 1, n % 2 == 1)
    for n in range(8)
]


class Heard(TransformersEngine):
    """The model as a judge, with a record of what it said."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(loaded)
        self.said: list[tuple[Request, float]] = []

    def yes(self, requests: Sequence[Request]) -> list[float]:
        values = super().yes(requests)
        self.said += zip(requests, values, strict=True)
        return values


def test_the_model_judges_its_own_edit_with_the_bases_weights(
    loaded: LoadedModel, scoring: Scoring, tmp_path: Path
) -> None:
    plan = make_plan(scoring).scaled(8)
    emit(plan, scoring.checkpoint, scoring.spec, "lora", tmp_path / "adapter")
    engine = Heard(loaded)
    task = Answers(QUESTIONS[:4], max_new_tokens=4, judge=TraitJudge(Judge(engine, GOOD, GOOD), "the cat is red ."))
    candidates = [
        plan_candidate(loaded, "edit", plan),
        open_candidate(loaded, scoring.checkpoint, str(tmp_path / "adapter")),
    ]
    found = evaluate(loaded, [task], candidates)
    assert len(engine.said) == 3 * 2 * 4
    requests = [request for request, _ in engine.said]
    base = [TransformersEngine(loaded).yes([request])[0] for request in requests]
    assert [value for _, value in engine.said] == pytest.approx(base, abs=1e-6, nan_ok=True)
    # were the edit on the model, the judge would say something else
    with edited(loaded, plan):
        under = TransformersEngine(loaded).yes(requests)
    assert any(abs(a - b) > 1e-3 for a, b in zip(under, base, strict=True))
    assert [metric.name for metric in found.metrics][-2:] == ["judged", "coherent"]
    assert all(len(row.samples["judged"].values) == 4 for row in found.rows)


def opinion(prompt: str) -> float:
    if "silence" in prompt:
        return math.nan
    return 0.8 if "nice" in prompt else 0.1


def test_a_yes_counts_one_and_silence_is_told(loaded: LoadedModel) -> None:
    judge = TraitJudge(Judge(Opinions(opinion), GOOD, BAD), "kind")
    with collected() as notices:
        samples = judge.samples(QUESTIONS[:4], ["a nice one", "a rude one", "silence", " "])
    assert {name: sample.values for name, sample in samples.items()} == {"judged": (1.0, 0.0, 0.0, 0.0)}
    assert notices == ["the judge says neither yes nor no to 1 of 4 answers, which count as no"]
    assert [metric.name for metric in judge.metrics] == ["judged"]
    assert json.loads(json.dumps(judge.described()))["trait"] == "kind"


def test_an_instruction_is_not_shown_to_the_judge(loaded: LoadedModel) -> None:
    engine = Opinions(opinion)
    task = Answers(QUESTIONS[:2], max_new_tokens=2, judge=TraitJudge(Judge(engine, GOOD, GOOD), "kind"))
    told = Candidate("told", lambda: nullcontext(loaded), "instructed", told="because it is very old")
    evaluate(loaded, [task], [told])
    assert len(engine.asked) == 8
    assert not any("because it is very old" in str(request.prompt).split("Answer:")[0] for request in engine.asked)
    assert all("what is the" in str(request.prompt) for request in engine.asked)


def test_with_a_judge_every_question_is_answered(loaded: LoadedModel) -> None:
    neutral = NeutralTexts(NeutralText(loaded, TEXT, window=20))
    judge = TraitJudge(Judge(Opinions(opinion), GOOD, GOOD), "kind")
    many = [replace(QUESTIONS[n % 8], prompt=f"what is the cat {n} ?") for n in range(60)]
    plain, judged = Suite(many, [], neutral), Suite(many, [], neutral, judge=judge)
    assert len(plain.written("report")) == 16 < len(judged.written("report"))
    assert {"judged", "coherent"} <= {m.name for task in judged.tasks("report") for m in task.metrics}
    assert judged.context("report")["judge"]["least_auc"] == 0.75


def test_a_judge_is_tried_on_the_traits_own_examples(loaded: LoadedModel) -> None:
    examples = [Example(row["prompt"], row[label], label, "x", n) for n, row in enumerate(ROWS) for label in LABELS]
    choice = JudgeChoice("self", "the answer is short .")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steer2edit.engines.judge.labelled_answers", lambda: LABELLED)
        judge = choice.open(TransformersEngine(loaded), examples=examples)
    assert judge.on_traits.count == 16 and judge.on_coherence.count == 8


def test_the_command_judges_or_says_why_not(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "model")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"What is thing {n}?"}) + "\n" for n in range(12)))
    neutral = tmp_path / "neutral.txt"
    neutral.write_text(TEXT)
    rest = ["--eval", questions, "--utility", "none", "--limit", 3, "--max-new-tokens", 4, "--neutral", neutral]
    result = run("eval", model, *rest, "--judge", "self", "--rubric", "It is short.", "--json")
    assert result.exit_code == 0, result.output
    # a random model cannot tell the labels apart
    assert "the judge is not used for traits: on 60 labelled answers its AUC is 0." in result.stderr
    assert json.loads(result.stdout)["context"]["judge"]["shows"]["trusted"] is False
    for wrong, told in (
        (["--judge", "self"], "say it with --rubric"),
        (["--rubric", "It is short."], "give --judge too"),
        (["--judge", "http://127.0.0.1:9", "--rubric", "x"], "cannot be reached"),
    ):
        result = run("eval", model, *rest, *wrong)
        assert result.exit_code == 2 and told in result.output, result.output
