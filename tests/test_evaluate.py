"""Metrics are their definitions; a candidate's numbers are the same as hooks, as a checkpoint and as an adapter."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROWS, llama_config, save_tiny
from hypothesis import given
from hypothesis import strategies as st

from steer2edit.artefact.emit import emit
from steer2edit.bootstrap import estimate
from steer2edit.data.questions import Question
from steer2edit.data.user_scores import check_patterns, load_function
from steer2edit.errors import CheckpointError, DataError, PlanError
from steer2edit.evaluation.answers import Answers
from steer2edit.evaluation.assess import assess, with_baselines
from steer2edit.evaluation.baselines import baselines, random_direction, shuffled_labels, whole_matrices
from steer2edit.evaluation.candidates import open_candidate, plan_candidate
from steer2edit.evaluation.evaluate import Evaluation, evaluate
from steer2edit.evaluation.metrics import Choice, Metric, Neutral, Preference, Sample
from steer2edit.evaluation.suite import Suite
from steer2edit.methods import make_plan
from steer2edit.plan import EditPlan, LowRank
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.neutral_texts import NeutralTexts
from steer2edit.strength.settle import settle_strength

TEXT = "the old cat sees a small bird and the river runs . " * 12
QUESTIONS = [
    Question(
        f"{row['prompt']} {i}",
        f"row {i}",
        row["positive"],
        row["negative"],
        ("red .", "the old house .", "blue ."),
        (False, True, True),
    )
    for i, row in enumerate(ROWS)
]


@pytest.fixture(scope="module")
def neutral(loaded: LoadedModel) -> NeutralTexts:
    return NeutralTexts(NeutralText(loaded, TEXT, window=20))


@pytest.fixture(scope="module")
def plan(loaded: LoadedModel, scoring: Scoring, neutral: NeutralTexts) -> EditPlan:
    return settle_strength(loaded, make_plan(scoring), kl_budget=0.05, neutral=neutral)


@pytest.fixture(scope="module")
def suite(neutral: NeutralTexts) -> Suite:
    knowledge = [replace(q, positive="", negative="") for q in QUESTIONS]
    return Suite(QUESTIONS, knowledge, neutral, max_new_tokens=6)


def token_log_probabilities(loaded: LoadedModel, prompt: str, response: str) -> torch.Tensor:
    ids = loaded.tokenizer(f"{prompt} {response}")["input_ids"] + [loaded.tokenizer.eos_token_id]
    start = len(loaded.tokenizer(prompt)["input_ids"])
    with torch.inference_mode():
        rows = loaded.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return torch.stack([rows[i - 1, ids[i]] for i in range(start, len(ids))])


def test_margins_are_mean_log_probabilities_and_calibration_takes_off_what_is_likely_anywhere(
    loaded: LoadedModel,
) -> None:
    found = Preference(QUESTIONS).measure(loaded).samples
    for i, q in enumerate(QUESTIONS):
        pair = [token_log_probabilities(loaded, str(q.prompt), text).mean() for text in (q.positive, q.negative)]
        bare = [token_log_probabilities(loaded, "N/A", text).mean() for text in (q.positive, q.negative)]
        margin = float(pair[0] - pair[1])
        assert found["margin"].values[i] == pytest.approx(margin, abs=1e-4)
        assert found["preferred"].values[i] == float(margin > 0)
        assert found["calibrated margin"].values[i] == pytest.approx(margin - float(bare[0] - bare[1]), abs=1e-4)


def test_mc1_and_mc2_are_truthfulqas(loaded: LoadedModel) -> None:
    found = Choice(QUESTIONS).measure(loaded).samples
    per_token = Choice(QUESTIONS, "utility").measure(loaded).samples["likeliest choice right"]
    for i, q in enumerate(QUESTIONS):
        rows = [token_log_probabilities(loaded, str(q.prompt), choice) for choice in q.choices]
        totals, means = ([float(f(row)) for row in rows] for f in (torch.sum, torch.mean))
        mass = [math.exp(total) for total in totals]
        assert found["MC1"].values[i] == float(totals[1] > totals[0])
        assert found["MC2"].values[i] == pytest.approx((mass[1] + mass[2]) / sum(mass), abs=1e-4)
        assert per_token.values[i] == float(means[1] > means[0])


def test_answers_are_counted_matched_and_scored(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def vowels(prompt, answer):\n    return sum(c in 'aeiou' for c in answer)\n")
    function = load_function(f"{tmp_path / 'mine.py'}:vowels")
    questions = [replace(q, choices=(), labels=(), answers=("no such answer",)) for q in QUESTIONS]
    outcome = Answers(questions, patterns=["e", "^$"], function=function, max_new_tokens=6).measure(loaded)
    found = outcome.samples
    assert set(found) == {
        "length",
        "/e/",
        "/^$/",
        "vowels",
        "exact answers",
        "repetition",
        "loops",
        "empty",
        "other language",
    }
    for i, answer in enumerate(outcome.answers):
        assert found["/e/"].values[i] == float("e" in answer)
        assert found["vowels"].values[i] == sum(c in "aeiou" for c in answer)
        # words, and special tokens, which are no part of the answer's text
        assert found["length"].values[i] >= len(loaded.tokenizer(answer)["input_ids"])
        assert found["exact answers"].values[i] == 0.0


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("def f(prompt, answer):\n    return 1 / 0\n", "ZeroDivisionError"),
        ("def f(prompt, answer):\n    return float('nan')\n", "finite"),
        ("f = 3\n", "no function"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError"),
    ],
)
def test_a_users_function_that_fails_is_named(loaded: LoadedModel, tmp_path: Path, body: str, match: str) -> None:
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(DataError, match=match):
        Answers(QUESTIONS[:1], function=load_function(f"{tmp_path / 'mine.py'}:f"), max_new_tokens=2).measure(loaded)


def test_bad_patterns_and_absent_files_are_named() -> None:
    with pytest.raises(DataError, match="not a regular expression"):
        check_patterns(["("])
    with pytest.raises(DataError, match=r"file\.py:name"):
        load_function("nowhere.py:f")


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.floats(-10, 10))
def test_an_estimate_is_the_mean_within_its_interval_and_moves_with_the_values(values: list[float], by: float) -> None:
    found = estimate(values)
    assert found.value == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert min(values) - 1e-6 <= found.low <= found.high <= max(values) + 1e-6
    moved = estimate([value + by for value in values])
    assert moved.low == pytest.approx(found.low + by, abs=1e-6)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(300):
        found = estimate(torch.randn(60, generator=generator).tolist())
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 300 <= 0.99


def test_ratios_and_exponentials() -> None:
    found = estimate([2.0, 9.0], [1.0, 3.0])
    assert found.value == pytest.approx(11 / 4)
    assert estimate([math.log(2.0)] * 3, exponential=True).high == pytest.approx(2.0)
    metric = Metric("perplexity", "utility", "less", exponential=True)
    weights = (10.0, 20.0)
    base, other = Sample((10.0, 40.0), weights), Sample((11.0, 42.0), weights)
    assert other.change(base, metric).value == pytest.approx(math.exp(53 / 30) / math.exp(50 / 30))


def test_a_plan_gives_the_same_numbers_as_hooks_as_checkpoint_and_as_adapter(
    loaded: LoadedModel, scoring: Scoring, plan: EditPlan, suite: Suite, tmp_path: Path
) -> None:
    plan.save(tmp_path / "x.plan.safetensors")
    for target in ("checkpoint", "lora"):
        emit(plan, scoring.checkpoint, scoring.spec, target, tmp_path / target)
    places = ["x.plan.safetensors", "checkpoint", "lora"]
    candidates = [open_candidate(loaded, scoring.checkpoint, str(tmp_path / place)) for place in places]
    tasks = suite.tasks("report")
    found = evaluate(loaded, tasks, candidates)
    again = evaluate(loaded, tasks, [])
    base, hooks, *others = found.rows
    # nothing is left behind, by the adapter in particular
    assert again.rows[0].samples == base.samples
    for metric in found.metrics:
        for row in others:
            assert row.samples[metric.name].values == pytest.approx(hooks.samples[metric.name].values, abs=2e-3)
    assert found.estimate(hooks, "KL on prose").value == pytest.approx(plan.measured.kl, rel=1e-3)
    assert found.change(base, "margin").high == 0.0


def test_candidates_of_other_models_and_nothings_are_refused(
    loaded: LoadedModel, scoring: Scoring, plan: EditPlan, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", llama_config(vocab_size=160))
    replace(plan, base=replace(plan.base, fingerprint="0" * 64)).save(tmp_path / "x.plan.safetensors")
    (tmp_path / "empty").mkdir()
    for place, match in (
        ("x.plan.safetensors", "made for"),
        ("empty", "neither a checkpoint nor an adapter"),
        ("no", "exist"),
    ):
        with pytest.raises(PlanError, match=match):
            open_candidate(loaded, scoring.checkpoint, str(tmp_path / place))
    with (
        pytest.raises(CheckpointError, match="vocabulary"),
        open_candidate(loaded, scoring.checkpoint, str(other)).enter(),
    ):
        pass


def test_nothing_is_reported_on_prompts_that_made_or_chose_the_edit(
    loaded: LoadedModel, plan: EditPlan, suite: Suite
) -> None:
    seen = replace(plan, measured=replace(plan.measured, selected_on=tuple(suite.digests("select"))))
    assess(loaded, suite, [plan_candidate(loaded, "x", seen)])
    with pytest.raises(DataError, match="make or choose"):
        assess(loaded, suite, [plan_candidate(loaded, "x", seen)], split="select")
    taught = replace(plan, data={**plan.data, "prompts": [suite.questions("report")[0].digest]})
    with pytest.raises(DataError, match=r"1 of \d+ prompts"):
        assess(loaded, suite, [plan_candidate(loaded, "x", taught)])


def test_a_file_holds_the_evaluation_whole(loaded: LoadedModel, plan: EditPlan, suite: Suite, tmp_path: Path) -> None:
    found = assess(loaded, suite, [plan_candidate(loaded, "x", plan)], context={"model": "m"})
    found.save(tmp_path / "e.json")
    again = Evaluation.load(tmp_path / "e.json")
    assert again.described() == found.described() and again.rows[1].answers == found.rows[1].answers
    (tmp_path / "bad.json").write_text(json.dumps({"format": "steer2edit.evaluation.1", "rows": [{}]}))
    with pytest.raises(PlanError, match="not an evaluation"):
        Evaluation.load(tmp_path / "bad.json")


def test_baselines_are_as_large_as_the_plan_or_cost_as_much(
    loaded: LoadedModel, scoring: Scoring, plan: EditPlan, neutral: NeutralTexts
) -> None:
    for other in (random_direction(plan, 0), whole_matrices(scoring, plan)):
        assert [edit.tensor for edit in other.edits] == [edit.tensor for edit in plan.edits]
        assert [edit.norm for edit in other.edits] == pytest.approx([edit.norm for edit in plan.edits], rel=1e-4)
    shuffled = shuffled_labels(scoring, plan, 0)
    assert shuffled.norm == pytest.approx(plan.norm, rel=1e-4)
    for mine, theirs in zip(random_direction(plan, 0).edits, plan.edits, strict=True):
        assert isinstance(mine, LowRank) and isinstance(theirs, LowRank)
        assert abs(float(torch.cosine_similarity(mine.B[:, 0], theirs.B[:, 0], dim=0))) < 0.7
    found = {c.name: c for c in baselines(loaded, scoring, plan, neutral, draws=2)}
    assert len(found) == 2 + 2 + 3
    for name, candidate in found.items():
        with candidate.enter():
            kl = neutral.budget.measure().kl
        if name != "sign flipped":
            assert kl == pytest.approx(plan.measured.kl, rel=0.06), name
    at_norm = baselines(loaded, scoring, plan, neutral, match="norm", draws=1)
    assert all(candidate.note == "at equal ‖ΔW‖" for candidate in at_norm)
    with_baselines(loaded, scoring, plan, Suite(QUESTIONS, [], neutral), strengths=(0.5,), draws=1)


def test_an_edit_beats_edits_without_a_point(
    loaded: LoadedModel, scoring: Scoring, plan: EditPlan, neutral: NeutralTexts, suite: Suite
) -> None:
    """At equal KL the plan moves the margin of its own pairs more than random directions and shuffled labels do."""
    tasks = [Preference(QUESTIONS)]
    candidates = [plan_candidate(loaded, "edit", plan), *baselines(loaded, scoring, plan, neutral, only=("random",))]
    found = evaluate(loaded, tasks, candidates)
    mine, *others = (found.change(row, "margin").value for row in found.rows[1:])
    assert mine > 0 and all(mine > other for other in others)


def test_the_task_of_neutral_text_is_its_divergence(loaded: LoadedModel, plan: EditPlan, neutral: NeutralTexts) -> None:
    task = Neutral(neutral.budget)
    with edited(loaded, plan):
        sample, divergence = task.measure(loaded).samples, neutral.budget.measure()
    assert sample["KL on prose"].estimate(task.metrics[0]).value == pytest.approx(divergence.kl)
    assert sample["perplexity"].estimate(task.metrics[1]).value == pytest.approx(divergence.perplexity)
