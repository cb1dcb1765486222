"""An aim takes the weakest strength that reaches it, on the selection half, and says so where none does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROWS, run

from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.questions import Question
from steer2edit.errors import DataError, PlanError
from steer2edit.evaluation.metrics import attributes
from steer2edit.evaluation.projection import PROJECTION, Projection
from steer2edit.evaluation.suite import SAMPLES, Suite
from steer2edit.methods import make_plan
from steer2edit.plan import EditPlan
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring
from steer2edit.search.reach import check_aim, reach, settle_by_aim, weakest
from steer2edit.strength.aim import Aim
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.neutral_texts import NeutralTexts

TEXT = "the old cat sees a small bird and the river runs . " * 12
HELD = [
    {**row, "prompt": f"{row['prompt']} {word}"}
    for row in ROWS
    for word in ("now", "here", "one", "two", "yes", "well")
]


@pytest.fixture(scope="module")
def suite(loaded: LoadedModel) -> Suite:
    questions = [Question(row["prompt"], "test", row["positive"], row["negative"]) for row in HELD]
    return Suite(questions, [], NeutralTexts(NeutralText(loaded, TEXT, window=20)), max_new_tokens=4)


@pytest.mark.parametrize(
    ("curve", "base", "aim", "exact"),
    [
        (lambda s: 70 - 30 * s, 70.0, 40.0, 1.0),
        (lambda s: 70 - 30 * s, 70.0, 69.0, 1 / 30),
        (lambda s: 0.1 + s * s, 0.1, 0.5, math.sqrt(0.4)),
        # it comes down and goes up again: the first crossing counts
        (lambda s: 70 - 60 * s if s < 0.9 else 90.0, 70.0, 40.0, 0.5),
    ],
)
def test_the_weakest_strength_that_reaches_it(curve, base: float, aim: float, exact: float) -> None:  # type: ignore[no-untyped-def]
    strength, value, steps = weakest(curve, base, aim, 1.6)
    assert strength is not None and len(steps) <= 8
    assert value == curve(strength) and (value - aim) * (aim - base) >= 0
    assert exact <= strength + 1e-9 and strength <= exact * 1.35


def test_what_no_strength_reaches_is_none_and_the_steps_say_how_far_it_got() -> None:
    strength, value, steps = weakest(lambda s: 70 - 10 * s, 70.0, 40.0, 2.0)
    assert strength is None and math.isnan(value)
    assert steps[-1] == (2.0, 50.0)


@pytest.mark.parametrize("text", ["length", "length=", "=40", "length=long", "length=nan", "length=inf"])
def test_what_is_not_an_aim_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not of the form"):
        Aim.read(text)


def test_an_aim_may_be_of_any_metric_by_name() -> None:
    assert Aim.read("/a=b/=0.5") == Aim("/a=b/", 0.5)
    assert str(Aim.read("length=40")) == "length=40"


def test_a_metric_that_questions_do_not_have_is_known_without_a_model(suite: Suite) -> None:
    own = MetricChoice("words", "less")
    check_aim(suite.attribute, own, Aim("words", 4.0))
    # whatever can be aimed at later can be aimed at now
    for metric in attributes(metric for task in suite.tasks("select") for metric in task.metrics):
        check_aim(suite.attribute, None, Aim(metric.name, 1.0))
    for name, metric in (("words", None), ("shortness", own), ("answers right", own)):
        with pytest.raises(PlanError, match=f"no metric '{name}' of the behaviour to aim at"):
            check_aim(suite.attribute, metric, Aim(name, 1.0))


def test_a_plan_by_aim_remembers_what_it_was_chosen_by(loaded: LoadedModel, scoring: Scoring, suite: Suite) -> None:
    raw = make_plan(scoring)
    ceiling = reach(loaded, raw, suite, Aim("margin", -1e-9 + _base(loaded, raw, suite)[0] + 0.01), largest_kl=0.5)
    plan = settle_by_aim(loaded, raw, suite, ceiling.aim, largest_kl=0.5).plan
    assert plan.measured.strength == pytest.approx(ceiling.strength)
    assert plan.measured.kl is not None and 0 < plan.measured.kl <= 0.5 * 1.05
    assert {q.digest for q in suite.questions("select")} <= set(plan.seen)
    assert not {q.digest for q in suite.questions("report")} & set(plan.seen)
    aim = plan.measured.aim
    assert aim is not None and aim["metric"] == "margin" and aim["value"] >= aim["aim"] > aim["base"]


def _base(loaded: LoadedModel, plan: EditPlan, suite: Suite, name: str = "margin") -> tuple[float, float]:
    """The base's margin, or another metric, on the selection half, and the largest within a KL of 0.5."""
    with pytest.raises(PlanError) as error:
        reach(loaded, plan, suite, Aim(name, 1e9), largest_kl=0.5)
    words = str(error.value).split()
    return float(words[words.index("is") + 1].rstrip(",")), float(words[words.index("to") + 1])


def test_what_is_chosen_by_written_answers_has_an_answer_to_every_question(
    loaded: LoadedModel, scoring: Scoring, suite: Suite
) -> None:
    suite = replace(suite, projection=Projection.of(loaded, scoring.statistics))
    every = suite.questions("select")
    assert len(every) > SAMPLES
    for name in ("length", "loops", PROJECTION):
        assert suite.chosen_by("margin", name).written("select") == every
    for name in ("margin", "answers right", "KL", None):
        assert len(suite.chosen_by(name).written("select")) == SAMPLES


def test_an_aim_may_be_how_far_written_answers_have_moved(loaded: LoadedModel, scoring: Scoring, suite: Suite) -> None:
    with pytest.raises(PlanError, match=f"no metric '{PROJECTION}'"):
        reach(loaded, make_plan(scoring), suite, Aim(PROJECTION, 1.0))
    check_aim(suite.attribute, None, Aim(PROJECTION, 1.0))
    suite = replace(suite, projection=Projection.of(loaded, scoring.statistics))
    raw = make_plan(scoring)
    base, most = _base(loaded, raw, suite, PROJECTION)
    found = reach(loaded, raw, suite, Aim(PROJECTION, aim := (base + most) / 2), largest_kl=0.5)
    # a model of random weights may move either way
    assert found.base == pytest.approx(base, abs=1e-2) != aim and (found.value - aim) * (aim - base) >= 0


def test_bad_aims_of_a_plan(loaded: LoadedModel, scoring: Scoring, suite: Suite) -> None:
    raw = make_plan(scoring)
    with pytest.raises(PlanError, match=r"no metric 'beauty'.*margin"):
        reach(loaded, raw, suite, Aim("beauty", 1.0))
    with pytest.raises(PlanError, match=r"no strength within a KL of 0\.2 reaches margin=1e\+09"):
        reach(loaded, raw, suite, Aim("margin", 1e9), largest_kl=0.2)


def test_the_command(tiny_llama: Path, tmp_path: Path) -> None:
    data, held, neutral = (tmp_path / name for name in ("rows.jsonl", "held.jsonl", "neutral.txt"))
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    held.write_text("".join(json.dumps(row) + "\n" for row in HELD))
    neutral.write_text(TEXT)
    given = ["compile", tiny_llama, "--data", data, "--eval", held, "--neutral", neutral, "--to", "lora", "--no-report"]
    far = run(*given, "--aim", "margin=1e9", "-o", tmp_path / "far")
    assert far.exit_code == 2 and "reaches margin=1e+09" in far.output and not (tmp_path / "far").exists()
    base = float(far.output.split("margin is ")[1].split(",")[0])
    penalty = ["--repetition-penalty", "1.2"]
    done = run(*given, "--aim", f"margin={base + 0.01}", *penalty, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    aim = json.loads(done.stdout)["measured"]["aim"]
    assert aim["value"] >= aim["aim"] and aim["repetition_penalty"] == 1.2
    assert "with a repetition penalty of 1.2" in run("show", tmp_path / "out").stdout
    assert run(*given, *penalty, "-o", tmp_path / "none").exit_code == 2
    for more in (["--strength", "1"], ["--plan", "x.plan.safetensors"]):
        bad = run(*given, "--aim", "margin=1", *more, "-o", tmp_path / "bad")
        assert bad.exit_code == 2 and "aim" in bad.output
    bad = run("compile", tiny_llama, "--data", data, "--aim", "margin=1", "-o", tmp_path / "bad")
    assert bad.exit_code == 2 and "--eval" in bad.output
