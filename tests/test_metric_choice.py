"""A behaviour's own metric: what it reads in an answer, and that it comes first wherever the behaviour is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer2edit.data import answer_text
from steer2edit.data.answer_text import each_word, has_list, matches, words
from steer2edit.data.metric_choice import METRICS, MetricChoice, Written, read_metric, shared_metric
from steer2edit.data.questions import Question
from steer2edit.errors import DataError
from steer2edit.evaluation.answers import Answers
from steer2edit.evaluation.instructed import brief
from steer2edit.evaluation.metrics import Metric, Preference, attributes
from steer2edit.evaluation.suite import Suite
from steer2edit.notices import collected
from steer2edit.runtime.model import LoadedModel
from steer2edit.search.reach import reach
from steer2edit.strength.aim import Aim
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.neutral_texts import NeutralTexts

TEXT = "the old cat sees a small bird and the river runs . " * 12
QUESTIONS = [
    Question(f"where is the cat {word}", "test", "it is here .", "i do not know .")
    for word in ("now", "here", "one", "two", "yes", "well", "red", "blue")
]
LISTS = MetricChoice("lists", "less")


@pytest.fixture(scope="module")
def suite(loaded: LoadedModel) -> Suite:
    return Suite(QUESTIONS, [], NeutralTexts(NeutralText(loaded, TEXT, window=20)), max_new_tokens=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- one\n- two", True),
        ("First:\n1. one\n2. two", True),
        ("* **One**: a\n* **Two**: b", True),
        ("  a) one\n  b) two", True),
        ("•  one\n\n•  two", True),
        ("**1.** one\n**2.** two", True),
        ("1. is the only line", False),
        ("It costs 3.50 or\n-5 degrees, and\n1999 was the year.", False),
        ("He said:\n---\n* * *\nNo.", False),
        ("", False),
    ],
)
def test_a_list_is_two_lines_with_markers(text: str, expected: bool) -> None:
    assert has_list(text) is expected


def test_words_and_matches_are_counted() -> None:
    assert words("It's a well-known fact — isn’t it?") == 6
    assert words("") == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("我喜欢猫。它很可爱", 8),
        ("これはペンです", 7),
        ("ที่นี่ร้อน", 5),
        ("ភាសាខ្មែរ", 5),
        ("日本語 and English", 5),
        # these have spaces; signs above and below letters part no word
        ("한국어 단어 셋", 3),
        ("हिन्दी में लिखो", 3),
        ("cafe\u0301 au lait", 3),
    ],
)
def test_scripts_without_spaces_are_counted_by_characters(text: str, count: int) -> None:
    assert words(text) == count == len(list(each_word(text)))
    assert matches("(?i)perhaps|might", "Perhaps it might. PERHAPS!") == 3


def test_a_pattern_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_text, "PATTERN_SECONDS", 0.2)
    with pytest.raises(DataError, match=r"takes longer than 0.2 seconds on an answer of 41 characters"):
        matches("(a+)+$", "a" * 40 + "b")


def test_each_metric_of_written_answers_reads_one() -> None:
    answer = Written("Wie geht es dir und was ist das?", "- It is, perhaps, the one.\n- It is not.", 14)
    choices = {
        "length": 14, "words": 8, "lists": 1, "same language": 0, "pattern": 1, "count": 12.5,
    }  # fmt: skip
    written = {name for name, kind in METRICS.items() if kind.read is not None}
    assert written == set(choices)
    for name, value in choices.items():
        pattern = "perhaps" if METRICS[name].takes_pattern else None
        assert MetricChoice(name, "more", pattern).read(answer) == value
    assert MetricChoice("same language", "more").read(replace(answer, text="")) == 0
    assert MetricChoice("same language", "more").read(replace(answer, prompt="What is it that you are?")) == 1
    with pytest.raises(DataError, match="two responses"):
        MetricChoice("margin", "more").read(answer)


@given(st.sampled_from(sorted(METRICS)), st.sampled_from(["more", "less"]), st.sampled_from([None, "hedges"]))
def test_a_choice_is_read_as_it_was_written(name: str, goal: str, title: str | None) -> None:
    kind = METRICS[name]
    goal = goal if goal in kind.goals else kind.goals[0]
    title = title if kind.read is not None else None
    choice = MetricChoice(name, goal, "a|b" if kind.takes_pattern else None, title)  # type: ignore[arg-type]
    assert read_metric(choice.described()) == (choice, [])
    assert shared_metric([choice, choice]) == choice
    assert shared_metric([choice, None]) is None


@pytest.mark.parametrize("title", ["margin", "", "a\nb", "x" * 41, 3, "|a|"])
def test_a_title_is_a_few_words_of_its_own(title: object) -> None:
    choice, faults = read_metric({"name": "lists", "goal": "less", "title": title})
    assert choice is None and any("metric.title" in fault for fault in faults)


def test_what_is_read_by_likelihood_keeps_its_name() -> None:
    for name, kind in METRICS.items():
        _, faults = read_metric({"name": name, "goal": kind.goals[0], "pattern": "a", "title": "mine"})
        assert any("keeps its name" in fault for fault in faults) == (kind.read is None)


@pytest.mark.parametrize(
    ("choice", "others"),
    [
        (MetricChoice("margin", "more"), ["calibrated margin", "preferred", "length"]),
        (MetricChoice("preferred", "more"), ["margin", "calibrated margin", "length"]),
        (LISTS, ["margin", "calibrated margin", "preferred", "length"]),
        (MetricChoice("length", "more"), ["margin", "calibrated margin", "preferred"]),
        (MetricChoice("count", "less", "i|know", "hedges"), ["margin", "calibrated margin", "preferred", "length"]),
    ],
    ids=lambda one: one.label if isinstance(one, MetricChoice) else "",
)
def test_the_behaviours_own_metric_is_the_first(suite: Suite, choice: MetricChoice, others: list[str]) -> None:
    measured = [metric for task in replace(suite, metric=choice).tasks("report") for metric in task.metrics]
    own, *rest = attributes(measured)
    assert (own.name, own.goal, own.own) == (choice.label, choice.goal, True)
    assert [metric.name for metric in rest] == others
    assert not any(metric.own for metric in rest)


def test_a_written_metric_has_an_answer_to_every_question_and_random_directions_have_it_too(suite: Suite) -> None:
    written = replace(suite, metric=LISTS)
    assert written.written("report") == written.questions("report")
    kinds = [type(task) for task in brief(written.tasks("report"))]
    assert Answers in kinds and Preference not in kinds
    kinds = [type(task) for task in brief(replace(suite, metric=MetricChoice("margin", "more")).tasks("report"))]
    assert Preference in kinds and Answers not in kinds


def test_what_cannot_be_measured_is_said(suite: Suite) -> None:
    bare = [replace(question, positive="", negative="") for question in QUESTIONS]
    with collected() as notices:
        found = replace(suite, attribute=bare, metric=MetricChoice("margin", "more")).tasks("report")
    assert attributes(metric for task in found for metric in task.metrics)[0].name == "length"
    assert any("margin, is not measured: it takes questions with two responses" in text for text in notices)


def test_an_aim_without_a_name_is_of_the_behaviours_own_metric(
    loaded: LoadedModel, scoring: object, suite: Suite
) -> None:
    assert Aim.read("0.5") == Aim("", 0.5)
    from steer2edit.methods import make_plan

    own = replace(suite, metric=MetricChoice("preferred", "more"))
    plan = make_plan(scoring)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="preferred"):
        reach(loaded, plan, own, Aim.read("7"), largest_kl=0.1)


def test_other_metrics_keep_their_order() -> None:
    metrics = [Metric("KL", "utility", "less"), Metric("a", "attribute", "more"), Metric("b", "attribute", "more")]
    assert [metric.name for metric in attributes(metrics)] == ["a", "b"]
