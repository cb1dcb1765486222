"""Differences are paired by question and resampled by prompt; what chance does as well is called not steerable here."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROWS, run, save_chat_model
from hypothesis import given
from hypothesis import strategies as st

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.bootstrap import estimate
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.prompts import Message
from steer2edit.data.questions import Question
from steer2edit.evaluation.answers import Answers
from steer2edit.evaluation.assess import assess
from steer2edit.evaluation.baselines import (
    adapter_at,
    baselines,
    instructed,
    random_directions,
    shuffled_labels,
    steering_at,
    to_kl,
)
from steer2edit.evaluation.candidates import Candidate, plan_candidate
from steer2edit.evaluation.comparison import comparisons, equally_costly
from steer2edit.evaluation.evaluate import Evaluation, Row, evaluate, measure
from steer2edit.evaluation.instructed import told
from steer2edit.evaluation.metrics import Metric, Neutral, Preference, Sample
from steer2edit.evaluation.steerability import steerability
from steer2edit.evaluation.suite import Suite
from steer2edit.evaluation.summary import summary
from steer2edit.methods import make_plan
from steer2edit.plan import Base, EditPlan
from steer2edit.report.card_section import tradeoff
from steer2edit.report.tables import render_evaluation, steerable_lines
from steer2edit.runtime.model import LoadedModel, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.neutral_texts import NeutralTexts
from steer2edit.strength.settle import settle, settle_strength

TEXT = "the old cat sees a small bird and the river runs . " * 12
MARGIN = Metric("margin", "attribute", "more", "nats/token")
KL = Metric("KL", "utility", "less", "nats/token")
QUESTIONS = [
    Question(f"{row['prompt']} {i}", f"row {i}", row["positive"], row["negative"])
    for i, row in enumerate([*ROWS, *ROWS, *ROWS])
]


def row(name: str, kind: str, values: list[float], note: str = "", kl: float = 0.05) -> Row:
    return Row(name, kind, {"KL": Sample((kl,) * 4, (1.0,) * 4), "margin": Sample(tuple(values))}, note)


def made(edit: list[float], randoms: list[list[float]], steering: list[float] | None = None) -> Evaluation:
    rows = [row("base", "base", [0.0] * len(edit), kl=0.0), row("edit", "edit", edit)]
    rows += [row(f"random {i}", "random", values, "at equal KL") for i, values in enumerate(randoms)]
    if steering is not None:
        rows.append(row("steering × 2", "steering", steering, "at equal KL"))
    return Evaluation((KL, MARGIN), tuple(rows))


numbers = st.lists(st.floats(-5, 5), min_size=8, max_size=8)


@given(numbers, numbers, numbers)
def test_a_difference_is_paired_and_antisymmetric(a: list[float], b: list[float], c: list[float]) -> None:
    found = made(a, [b, c])
    _, edit, first, second = found.rows
    one, other = found.difference(edit, first, "margin"), found.difference(first, edit, "margin")
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low), abs=1e-9)
    assert found.difference(edit, found.rows[0], "margin") == found.change(edit, "margin")
    both = found.difference(edit, [first, second], "margin")
    assert both.value == pytest.approx(sum(a) / 8 - (sum(b) + sum(c)) / 16, abs=1e-9)


def test_pairing_takes_off_what_questions_have_in_common() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(60, generator=generator) * 3
    found = made((hard + 0.2).tolist(), [(hard + 0.01 * torch.randn(60, generator=generator)).tolist()])
    paired = found.difference(found.rows[1], found.rows[2], "margin")
    assert paired.low > 0.15 and paired.high < 0.25
    assert found.estimate(found.rows[1], "margin").high - found.estimate(found.rows[1], "margin").low > 1


def test_questions_of_one_prompt_are_drawn_together() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator).tolist()
    thrice = [value for value in values for _ in range(3)]
    groups = [str(i) for i in range(50) for _ in range(3)]
    once = estimate(values)
    assert estimate(thrice, groups=groups) == once
    assert estimate(thrice).high - estimate(thrice).low < 0.7 * (once.high - once.low)
    assert estimate(values, groups=list(map(str, range(50)))) == once
    weighted = estimate(thrice, [2.0] * 150, groups=groups)
    assert weighted.value == pytest.approx(once.value / 2) and weighted.count == 50


def test_repeated_prompts_are_known_from_the_questions(loaded: LoadedModel, tmp_path: Path) -> None:
    twice = [*QUESTIONS[:4], *(replace(q, positive="red .") for q in QUESTIONS[:4])]
    found = evaluate(loaded, [Preference(twice), Answers(QUESTIONS[:2], max_new_tokens=2)], [])
    assert found.estimate(found.rows[0], "margin").count == 4
    assert found.rows[0].samples["length"].groups is None
    found.save(tmp_path / "e.json")
    again = Evaluation.load(tmp_path / "e.json")
    assert again.rows == found.rows


def test_losses_come_first() -> None:
    better, worse = [1.0 + 0.1 * i for i in range(12)], [0.1 * i for i in range(12)]
    found = made([0.5 + 0.1 * i for i in range(12)], [worse, worse, worse], better)
    edit = found.rows[1]
    first, second = comparisons(found, edit)
    assert (first.against, first.signs(found.metrics)["margin"]) == ("activation steering", -1)
    assert (second.against, second.signs(found.metrics)["margin"]) == ("random directions (mean of 3)", 1)
    text = render_evaluation(found)
    assert text.startswith("edit is worse than activation steering in margin (−0.5")
    assert text.index("activation steering  ") < text.index("random directions (mean of 3)")
    plain = summary(found)
    assert [one["against"] for one in plain["differences"]] == [first.against, second.against]
    assert plain["differences"][0]["metrics"]["margin"]["verdict"] == "worse"
    card = "\n\n".join(tradeoff(found))
    assert "The edit is worse than activation steering" in card and "beyond activation steering" in card


def test_what_costs_otherwise_is_not_compared() -> None:
    found = made([1.0] * 8, [[0.0] * 8])
    dear = row("steering × 9", "steering", [5.0] * 8, "at equal KL", kl=0.2)
    free = row("steering × 1", "steering", [5.0] * 8, "activation steering")
    found = replace(found, rows=(*found.rows, dear, free))
    assert [one.kind for one in comparisons(found, found.rows[1])] == ["random"]
    assert equally_costly(found, found.rows[1], "steering") == []


@pytest.mark.parametrize(("count", "trials"), [(32, 150), (200, 60)])
def test_a_random_direction_is_seldom_called_steerable(count: int, trials: int) -> None:
    """Each direction moves the metric by an amount of its own, so more questions do not make chance an effect."""
    generator = torch.Generator().manual_seed(count)
    alarms = 0
    for _ in range(trials):
        moves = torch.randn(4, generator=generator) * 0.1
        values = moves[:, None] + torch.randn(4, count, generator=generator) * 0.3
        edit, *randoms = values.tolist()
        found = made(edit, randoms)
        judged = steerability(found, found.rows[1])
        assert judged is not None
        alarms += judged.steerable
    assert alarms / trials <= 0.05


def test_a_large_effect_is_steerable_and_a_small_one_names_the_questions_it_needs() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 32, generator=generator) * 0.1
    base = made((noise[0] + 1).tolist(), noise[1:].tolist())
    judged = steerability(base, base.rows[1])
    assert judged is not None and judged.steerable and str(judged).startswith("Steerable here")
    assert judged.needed is None and steerable_lines(base) == [str(judged)]

    # directions that agree, so that the questions alone decide
    spread = torch.linspace(-1, 1, 32)
    small = made((spread + 0.05).tolist(), [[0.0] * 32] * 3)
    judged = steerability(small, small.rows[1])
    assert judged is not None and not judged.steerable
    half = (judged.beyond.high - judged.beyond.low) / 2
    assert judged.needed == pytest.approx(32 * (half * 2.8 / 1.96 / 0.05) ** 2, rel=0.02)
    (line,) = steerable_lines(small)
    assert line.startswith("Not steerable here: margin differs by +0.05") and f"about {judged.needed:,}" in line
    apart = made([0.05 + 0.01 * i for i in range(8)], [[0.5] * 8, [-0.5] * 8, [0.0] * 8])
    judged = steerability(apart, apart.rows[1])
    assert judged is not None and judged.needed is None and "differ too much among themselves" in str(judged)
    assert steerability(made([1.0] * 8, [[0.0] * 8] * 2), base.rows[1]) is None


def test_wrong_way_is_said() -> None:
    found = made([-1.0 - 0.01 * i for i in range(8)], [[0.0] * 8] * 3)
    judged = steerability(found, found.rows[1])
    assert judged is not None and not judged.steerable and str(judged).endswith("that is the wrong direction.")


def test_what_is_ahead_of_harm_alone_is_not_steerable() -> None:
    """Random directions that make the metric worse do not turn an edit that does nothing into a success."""
    harmful = [[-1.0 - 0.01 * i for i in range(8)]] * 3
    idle, harm = [0.1 if i % 2 else -0.1 for i in range(8)], [-0.5 - 0.01 * i for i in range(8)]
    for values, why in ((idle, "what may be nothing"), (harm, "the wrong direction")):
        found = made(values, harmful)
        judged = steerability(found, found.rows[1])
        assert judged is not None and judged.beyond.low > 0 and not judged.steerable and judged.needed is None
        assert str(judged).startswith("Not steerable here") and str(judged).endswith(f"from the base, {why}.")


@pytest.fixture(scope="module")
def neutral(loaded: LoadedModel) -> NeutralTexts:
    return NeutralTexts(NeutralText(loaded, TEXT, window=20))


def test_random_directions_cost_the_same_and_are_measured_in_brief(
    loaded: LoadedModel, scoring: Scoring, neutral: NeutralTexts
) -> None:
    plan = settle_strength(loaded, make_plan(scoring), kl_budget=0.05, neutral=neutral)
    randoms = random_directions(loaded, plan, neutral, plan.measured.kl or 0.0)
    suite = Suite(QUESTIONS, [], neutral, max_new_tokens=3)
    found = assess(loaded, suite, [plan_candidate(loaded, "edit", plan), *randoms])
    _, edit, *others = found.rows
    assert len(equally_costly(found, edit, "random")) == 3
    assert set(others[0].samples) == set(edit.samples)
    assert all("margin" in other.samples and "length" not in other.samples for other in others[1:])
    judged = steerability(found, edit)
    assert judged is not None and judged.metric.name == "margin" and judged.directions == 3
    assert judged.beyond.value == pytest.approx(found.difference(edit, others, "margin").value)


def test_costs_that_are_known_are_those_that_would_be_measured(
    loaded: LoadedModel, scoring: Scoring, neutral: NeutralTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the base, of an edit that was settled, and of baselines that were brought to its KL: to the last bit."""
    prose = NeutralText(loaded, TEXT, window=30)
    both = NeutralTexts(neutral.budget, prose)
    settled = settle(loaded, make_plan(scoring), kl_budget=0.05, neutral=both)
    kl = settled.plan.measured.kl or 0.0
    edit = replace(plan_candidate(loaded, "edit", settled.plan), costs=settled.costs)
    others = [steering_at(loaded, scoring, both, kl), *random_directions(loaded, settled.plan, both, kl)]
    others += baselines(loaded, scoring, settled.plan, both, only=("random", "whole"), draws=1, kl=kl)
    assert set(edit.costs) == {neutral.budget, prose} and all(set(one.costs) == {neutral.budget} for one in others)
    tasks = [Neutral(neutral.budget), Neutral(prose)]
    passes: list[NeutralText] = []
    windows = NeutralText.windows

    def counted(text: NeutralText, *given: object, **named: object) -> object:
        passes.append(text)
        return windows(text, *given, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(NeutralText, "windows", counted)
        known = evaluate(loaded, tasks, [edit, *others])
    assert passes == [prose] * len(others)
    measured = evaluate(loaded, tasks, [replace(one, costs={}) for one in (edit, *others)])
    base = measure(Candidate("base", lambda: nullcontext(loaded), "base"), tasks)
    assert known.rows[0].samples == base.samples
    assert [row.samples for row in known.rows] == [row.samples for row in measured.rows]


def test_shuffled_labels_are_not_steerable(loaded: LoadedModel, scoring: Scoring, neutral: NeutralTexts) -> None:
    plan = settle_strength(loaded, make_plan(scoring), kl_budget=0.05, neutral=neutral)
    kl = plan.measured.kl or 0.0
    randoms = random_directions(loaded, plan, neutral, kl)
    tasks = [Neutral(neutral.budget), Preference(QUESTIONS)]
    shuffles = [to_kl(loaded, shuffled_labels(scoring, plan, i), neutral, kl) for i in range(4)]
    candidates = [plan_candidate(loaded, f"shuffled {i}", one) for i, one in enumerate(shuffles)]
    found = evaluate(loaded, tasks, [*candidates, *randoms])
    judged = [steerability(found, one) for one in found.rows[1:5]]
    assert all(one is not None for one in judged)
    assert sum(one.steerable for one in judged if one is not None) <= 1


def test_an_instruction_stands_before_every_prompt(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_chat_model(tmp_path / "model"))
    loaded = load_model(checkpoint, read_spec(checkpoint))
    asked = [Question((Message("user", q.prompt),), q.where, q.positive, q.negative) for q in QUESTIONS[:3]]
    task = Preference(asked)
    changed = told(task, "be brief .", loaded)
    assert isinstance(changed, Preference) and changed.system == "be brief ."
    own = [replace(q, prompt=(Message("system", "you are a cat ."), *q.prompt)) for q in asked]
    inside = told(Preference(own), "be brief .", loaded)
    assert isinstance(inside, Preference) and inside.questions[0].prompt[0].content == "you are a cat .\n\nbe brief ."
    text = NeutralText(loaded, TEXT)
    assert told(Neutral(text), "be brief .", loaded) is None
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    loaded.tokenizer.chat_template = refusing + "{{ m.content }}{% endfor %}"
    refused = told(task, "be brief .", loaded)
    assert isinstance(refused, Preference) and refused.system is None
    assert refused.questions[0].prompt[-1].content.startswith("be brief .\n\n")

    found = evaluate(loaded, [Neutral(text), task], instructed(plan_candidate(loaded, "edit", empty()), loaded, "x"))
    assert [row.kind for row in found.rows] == ["base", "instructed", "edit and instruction"]
    assert not any(name.startswith("KL") for name in found.rows[1].samples)
    # an edit of nothing under an instruction is the base under it
    assert found.rows[1].samples == found.rows[2].samples != found.rows[0].samples


def empty() -> EditPlan:
    return EditPlan(Base("m", None, "f" * 64), ())


def test_another_adapter_is_scaled_to_the_same_kl(
    loaded: LoadedModel, scoring: Scoring, neutral: NeutralTexts, tmp_path: Path
) -> None:
    plan = settle_strength(loaded, make_plan(scoring), kl_budget=0.05, neutral=neutral)
    emit(plan.scaled(0.3), scoring.checkpoint, scoring.spec, "lora", tmp_path / "weak")
    other = adapter_at(loaded, tmp_path / "weak", neutral, plan.measured.kl or 0.0)
    found = evaluate(
        loaded, [Neutral(neutral.budget), Preference(QUESTIONS)], [plan_candidate(loaded, "e", plan), other]
    )
    _, edit, scaled = found.rows
    assert scaled.strength == pytest.approx(1 / 0.3, rel=0.05)
    (one,) = comparisons(found, edit)
    assert one.against == scaled.name and abs(one.changes["margin"].value) < 0.02


def test_compile_ends_with_the_judgement(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{**r, "prompt": f"{r['prompt']} {i}"} for i, r in enumerate([*ROWS, *ROWS])]
    for name, written in (("pairs.jsonl", ROWS), ("held.jsonl", rows)):
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in written))
    (tmp_path / "neutral.txt").write_text(TEXT)
    result = run(
        "compile", tiny_llama, "--data", tmp_path / "pairs.jsonl", "--eval", tmp_path / "held.jsonl", "--neutral",
        tmp_path / "neutral.txt", "--told", "what is it ?", "--to", "lora", "-o", tmp_path / "x",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith(("Steerable here: margin", "Not steerable here: margin"))
    assert "beyond" in result.stdout and "the instruction" in result.stdout
