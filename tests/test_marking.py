"""Written answers are marked by a few rules: right, wrong, going round, empty, or in another language."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer2edit.data.degeneration import TAIL, is_empty, loops, repetition
from steer2edit.data.language import FUNCTION_WORDS, language, left_language, script
from steer2edit.data.marking import can_be_named, is_exact, named_choices, names_right
from steer2edit.data.questions import Question, knowledge_questions

CITIES = ("Paris", "London", "The City of York", "New York")


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("The total is 1,234.", ("1234",), True),
        ("first 7, so 12", ("12",), True),
        ("12, no: 13", ("12",), False),
        ("It is 0.50", ("0.5",), True),
        ("  Paris. ", ("paris",), True),
        ("Paris, France", ("Paris",), False),
        ("none", ("7",), False),
        ("Berlin", ("Paris", "berlin"), True),
        ("minus -3", ("-3",), True),
    ],
)
def test_exact_answers(answer: str, accepted: tuple[str, ...], right: bool) -> None:
    assert is_exact(answer, accepted) is right


@pytest.mark.parametrize(
    ("answer", "choices", "named"),
    [
        ("It is Paris.", CITIES, {0}),
        ("PARIS, not London!", CITIES, {0}),
        ("It isn't the London; it's Paris", CITIES, {0}),
        ("Paris rather than New York", CITIES, {0}),
        ("Paris or London", CITIES, {0, 1}),
        ("the old city of york", CITIES, {2}),
        ("New York", CITIES, {3}),
        ("Parisian", CITIES, set()),
        ("", CITIES, set()),
        ("There are eight planets.", ("8", "9", "18"), {0}),
        ("There are 18 of them.", ("8", "9", "18"), {2}),
        ("twenty-one", ("20", "21", "1"), {1}),
        ("21", ("Twenty", "Twenty one", "One"), {1}),
        ("about 1,000 metres", ("1000", "100", "10"), {0}),
        ("three and a half: 3.5", ("3.5", "5"), {0}),
        ("Beavers build dams.", ("The beaver", "A fox"), {0}),
        ("cherries and boxes", ("cherry", "box", "glass"), {0, 1}),
        ("The gas is oxygen", ("Oxygen", "Ga"), {0}),
        ("São Paulo", ("Sao Paulo", "Rio"), {0}),
        ("The letter A", ("A", "B"), {0}),
    ],
)
def test_what_an_answer_names(answer: str, choices: tuple[str, ...], named: set[int]) -> None:
    assert named_choices(answer, choices) == named


def test_an_answer_is_right_that_names_a_true_choice_and_no_false_one() -> None:
    question = Question("?", "test", choices=("a cat", "a dog", "a stone"), labels=(True, True, False))
    assert names_right("dogs", question) and names_right("a cat, or a dog", question)
    assert not names_right("a dog and a stone", question)
    assert not names_right("no idea", question)


@given(st.integers(0, 99), st.integers(0, 99))
def test_numbers_are_themselves_and_no_others(one: int, other: int) -> None:
    named = named_choices(f"I think that it is {one}.", (str(one), f"{other} or {one + 100}"))
    assert named == {0}
    assert (named_choices(f"it is {one}", (str(other),)) == {0}) is (one == other)


def test_every_packaged_choice_names_itself_alone() -> None:
    asked = knowledge_questions()
    able = [question for question in asked if can_be_named(question)]
    assert len(able) > 0.95 * len(asked)
    for question in able:
        for index, choice in enumerate(question.choices):
            assert named_choices(f"Answer: {choice}.", question.choices) == {index}, question.prompt


def test_long_choices_are_not_asked_for() -> None:
    assert not can_be_named(
        Question("?", "test", choices=("no", "a sentence that nobody writes word for word"), labels=())
    )
    assert not can_be_named(Question("?", "test", answers=("7",)))


@given(st.lists(st.integers(0, 50), max_size=60))
def test_repetition_is_the_share_of_old_four_grams(tokens: list[int]) -> None:
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    assert repetition(tokens) == pytest.approx(1 - len(set(grams)) / len(grams) if grams else 0)


def test_a_loop_does_not_end_and_its_tail_has_occurred() -> None:
    start = list(range(100, 140))
    for period in (1, 5, 40):
        text = start + (list(range(period)) * 200)[: 2 * TAIL + period]
        assert loops(text, ended=False)
        assert not loops(text, ended=True)
    # a list whose items differ in their number alone
    items = [token for number in range(20) for token in (50 + number, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert loops(items, ended=False)
    assert not loops(list(range(160)), ended=False)
    assert not loops([1] * 11, ended=False) and loops([1] * 12, ended=False)
    # what went round and came out of it again is none
    assert not loops([1, 2, 3] * 20 + list(range(10, 10 + TAIL)), ended=False)


def test_empty_texts() -> None:
    assert is_empty("") and is_empty(" .!? ") and is_empty("\ufffd\ufffd")
    assert not is_empty(" a") and not is_empty("是") and not is_empty("👍")


@pytest.mark.parametrize(
    ("prompt", "answer", "left"),
    [
        ("What is the capital of France?", "The capital of France is Paris, and it is a city.", False),
        ("What is the capital of France?", "La capitale de la France est Paris, et elle est une ville.", True),
        (
            "What is the capital of France?",
            "Die Hauptstadt von Frankreich ist Paris und sie ist nicht in Spanien.",
            True,
        ),
        ("What is the capital of France?", "法国的首都是巴黎。", True),
        ("What is the capital of France?", "Столица Франции это Париж.", True),
        ("What is the capital of France?", "Paris", False),
        ("What is the capital of France?", "42", False),
        ("What is the capital of France?", "", False),
        ("フランスの首都は何ですか？", "フランスの首都はパリです。", False),
        ("フランスの首都は何ですか？", "法国的首都是巴黎，位于塞纳河畔。", True),
        ("Какая столица у Франции?", "Столиця Франції це Париж, і вона є у центрі, але не із півдня.", False),
        ("Что это и почему он не на месте?", "Столиця це Париж, і вона є у центрі, але не із півдня.", True),
        ("How do you say hello in Greek?", "You say γεια σου, and it is the same as hi in the language.", False),
    ],
)
def test_the_language_of_an_answer(prompt: str, answer: str, left: bool) -> None:
    assert left_language(prompt, answer) is left


def test_languages_are_told_by_their_own_words_and_nonsense_is_of_none() -> None:
    for name, listed in FUNCTION_WORDS.items():
        assert language(" ".join(sorted(listed))) == name
    assert language("stone river 42 bird") is None
    assert script("1234 !!") is None and script("안녕하세요") == "HANGUL"
