"""Held-out questions: read with every fault named, dealt out by their own prompt, refused where they were seen."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer2edit.data.behavior_file import behavior_files, builtin_questions, open_behavior
from steer2edit.data.prompts import Message, Prompt, prompt_digest, prompt_text
from steer2edit.data.questions import Question, knowledge_questions, read_questions, refuse_seen, take
from steer2edit.errors import DataError

FEWER = {
    "blunt": 100,
    "fewer-hedges": 100,
    "less-flattery": 100,
    "no-lists": 100,
    "prompt-language": 100,
    "step-by-step": 100,
}
"""The least number of questions in each half, of behaviours that have fewer than the others."""


def bare(prompt: Prompt) -> str:
    """A prompt's letters and digits: quotes, commas and capitals do not make another prompt."""
    return " ".join(re.findall(r"\w+", prompt_text(prompt).lower().replace("'", "")))


def packaged(name: str) -> list[Question]:
    """The held-out questions of a built-in behaviour, or those of general knowledge."""
    return knowledge_questions() if name == "knowledge" else open_behavior(name).read_questions()


def questions(prompts: list[str]) -> list[Question]:
    return [Question(prompt, "test") for prompt in prompts]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30), unique_by=prompt_digest, max_size=40), st.integers(0, 5))
def test_the_splits_part_the_prompts_whatever_their_order(prompts: list[str], seed: int) -> None:
    select, report = (take(questions(prompts), split, seed) for split in ("select", "report"))  # type: ignore[arg-type]
    assert sorted(q.digest for q in select + report) == sorted(map(prompt_digest, prompts))
    turned = take(questions(prompts[::-1]), "select", seed)
    assert {q.digest for q in turned} == {q.digest for q in select}


def test_other_seeds_deal_otherwise_and_both_sides_get_about_half() -> None:
    prompts = [f"question {i}" for i in range(400)]
    sides = [{q.digest for q in take(questions(prompts), "select", seed)} for seed in range(3)]
    assert len({frozenset(side) for side in sides}) == 3
    assert all(150 < len(side) < 250 for side in sides)


def test_a_prompt_is_known_again_in_other_clothes() -> None:
    assert prompt_digest("What is  it?\n") == prompt_digest((Message("user", "what is it?"),))
    assert prompt_digest("What is it?") != prompt_digest("What was it?")
    assert prompt_digest("a") != prompt_digest((Message("system", "s"), Message("user", "a")))


def test_what_was_seen_is_refused_by_name() -> None:
    held = questions(["How old is the Sun?", "How far is it?"])
    refuse_seen(held, [prompt_digest("Another one")], "the plan")
    with pytest.raises(DataError, match=r"1 of 2 prompts .* choose the plan(.|\n)*How old is the Sun"):
        refuse_seen(held, [prompt_digest("how old is the sun?")], "the plan")


@pytest.mark.parametrize("name", [*behavior_files(), "knowledge"])
def test_what_comes_with_the_package_is_disjoint_from_the_contrast_data(name: str) -> None:
    found = packaged(name)
    digests = [q.digest for q in found]
    assert len(set(digests)) == len(digests)
    for behavior in behavior_files():
        assert not set(digests) & {prompt_digest(example.prompt) for example in open_behavior(behavior).read_pairs()}
    assert builtin_questions("nothing") is None


@pytest.mark.parametrize("name", [*behavior_files(), "knowledge"])
def test_each_half_of_what_comes_with_the_package_has_the_power_for_a_paired_difference(name: str) -> None:
    found = packaged(name)
    assert min(len(take(found, split)) for split in ("select", "report")) >= FEWER.get(name, 200)  # type: ignore[arg-type]


def test_no_prompt_comes_with_the_package_twice() -> None:
    found = [q for name in (*behavior_files(), "knowledge") for q in packaged(name)]
    letters = Counter(bare(q.prompt) for q in found)
    assert [q.where for q in found if letters[bare(q.prompt)] > 1] == []
    trained = {bare(example.prompt) for name in behavior_files() for example in open_behavior(name).read_pairs()}
    assert [q.where for q in found if bare(q.prompt) in trained] == []


@pytest.mark.parametrize("name", [name for name in behavior_files() if name != "concise"])
def test_the_length_of_a_response_does_not_tell_its_side(name: str) -> None:
    pairs = [q for q in packaged(name) if q.positive]
    lengths = [(len(q.positive.split()), len(q.negative.split())) for q in pairs]
    positive, negative = (mean(side) for side in zip(*lengths, strict=True))
    assert pairs and abs(positive / negative - 1) < 0.1
    longer = mean((a > b) + 0.5 * (a == b) for a, b in lengths)
    assert 0.25 < longer < 0.75


def test_a_question_of_general_knowledge_has_one_right_choice_that_no_other_text_names() -> None:
    for question in knowledge_questions():
        names = [
            re.sub(r"^(the|an?|(in|at|to|your|his)( the| an?)?) ", "", choice.lower()) for choice in question.choices
        ]
        assert len(set(names)) == len(names) == 4 and sum(question.labels) == 1, question.choices
        right = re.compile(rf"\b{re.escape(names[question.labels.index(True)])}\b")
        assert sum(bool(right.search(name)) for name in names) == 1, question.choices


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"positive": "a", "negative": "b"}, '"prompt" is missing'),
        ({"prompt": 3}, "prompt: expected a string"),
        ({"prompt": "p", "positive": "a"}, "positive stands alone"),
        ({"prompt": "p", "positive": "a", "negative": " "}, "negative holds nothing but white space"),
        ({"prompt": "p", "choices": ["a"], "answer": 0}, "at least two texts"),
        ({"prompt": "p", "choices": "ab", "answer": 0}, "at least two texts"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": 2}, "expected the index"),
        ({"prompt": "p", "choices": ["a", "b"], "answer": True}, "expected the index"),
        ({"prompt": "p", "choices": ["a", "b"]}, "expected the index"),
        ({"prompt": "p", "choices": ["a", "b"], "labels": [1]}, "a 0 or 1 for each"),
        ({"prompt": "p", "choices": ["a", "b"], "labels": [1, 1]}, "not all"),
        ({"prompt": "p", "choices": ["a", "b"], "labels": [0, 0]}, "not all"),
        ({"prompt": "p", "answer": {}}, "expected a text or a list"),
        ({"prompt": "p", "answer": [" "]}, "expected a text or a list"),
        ([1], "expected an object"),
    ],
)
def test_every_fault_is_named(tmp_path: Path, row: object, fault: str) -> None:
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match="held-out questions") as caught:
        read_questions(path)
    assert "line 2" in str(caught.value) and fault in str(caught.value)


def test_all_forms_are_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p1"},
        {"prompt": "p2", "positive": "a", "negative": "b"},
        {"prompt": "p3", "choices": ["a", "b"], "answer": "b"},
        {"prompt": "p4", "choices": ["a", "b", "c"], "labels": [1, 0, 1]},
        {"prompt": [{"role": "user", "content": "p5"}], "answer": ["42", "forty-two"]},
        {"prompt": "p6", "answer": 7},
    ]
    path = tmp_path / "held.json"
    path.write_text(json.dumps(rows))
    found = read_questions(path)
    assert [q.labels for q in found[2:4]] == [(False, True), (True, False, True)]
    assert found[4].answers == ("42", "forty-two") and found[5].answers == ("7",)
    assert all(q.prompt[0].role == "user" for q in found)  # type: ignore[union-attr]
