"""Sorting, pairing, filtering and dealing out answers: the laws of the parts that need no model."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer2edit.data.prompts import Message, prompt_digest
from steer2edit.data.questions import Question
from steer2edit.engines.engine import Answer
from steer2edit.errors import DataError
from steer2edit.pairs import filters
from steer2edit.pairs.filters import Allowed, Tally, sample_fault, sift
from steer2edit.pairs.lengths import lengths
from steer2edit.pairs.near_duplicates import is_short, plain, repeated, similarity
from steer2edit.pairs.samples import Labelled, Pair, Sample, samples_of
from steer2edit.pairs.sorting import by_answer, by_function, by_length, by_pattern
from steer2edit.pairs.split import SHARES, deal
from steer2edit.pairs.tails import LEAST_PAIRED, ends

LONG = "the river runs past the old house and nobody in the village remembers who built it or when it was left"
OTHER = "a cat sleeps on warm stone while two birds argue above the red roof about where the worms are today"


def sample(text: str, prompt: str = "why", *, ended: bool = True, number: int = 0, **more: object) -> Sample:
    question = Question((Message("user", prompt),), prompt, **more)  # type: ignore[arg-type]
    return Sample(question, Answer(text, len(text.split()), ended), number)


def pair(positive: str, negative: str, prompt: str = "why", *, ended: bool = True) -> Pair:
    return Pair(sample(positive, prompt, ended=ended), sample(negative, prompt))


# sorting


def test_length_is_that_of_the_thought_alone_where_there_is_one() -> None:
    thinking = Sample(sample("x").question, Answer("one two", 2, True, "so long a thought", 90))
    assert by_length([sample("one two three"), thinking]) == [3.0, 90.0]


def test_a_thought_is_stripped_or_kept_or_alone() -> None:
    thinking = Sample(sample("x").question, Answer(" Yes. ", 2, True, "hm", 1))
    assert thinking.response() == "Yes."
    assert thinking.response("keep") == "<think>\nhm\n</think>\n\nYes."
    assert thinking.response("only") == "<think>\nhm\n</think>"
    assert sample("Yes.").response("only") == "Yes."


def test_patterns_answers_and_functions_give_a_number_to_each_answer() -> None:
    asked = [sample("It is 42.", answers=("42",)), sample("It is 41.", answers=("42",)), sample("It is 42.")]
    right = by_answer(asked)
    assert right[:2] == [1.0, 0.0] and math.isnan(right[2])
    assert by_answer([sample("Paris", choices=("Paris", "Rome"), labels=(True, False))]) == [1.0]
    assert by_pattern([sample("Is it?"), sample("It is.")], r"\?$") == [1.0, 0.0]
    assert by_function(asked, lambda prompt, answer: len(prompt) + len(answer)) == [12.0, 12.0, 12.0]


@pytest.mark.parametrize("function", [lambda p, a: 1 / 0, lambda p, a: math.nan, lambda p, a: "no number"])
def test_a_function_that_fails_is_named(function: object) -> None:
    with pytest.raises(DataError, match="lambda"):
        by_function([sample("x")], function)  # type: ignore[arg-type]


# tails

numbers = st.lists(st.tuples(st.integers(0, 5), st.integers(-50, 50)), min_size=1, max_size=60)


@settings(max_examples=80, deadline=None)
@given(numbers, st.floats(0.01, 0.5), st.booleans())
def test_a_pair_is_of_one_prompt_and_its_first_is_better(
    answers: list[tuple[int, int]], share: float, more: bool
) -> None:
    prompts, values = [p for p, _ in answers], [float(v) for _, v in answers]
    found = ends(values, prompts, share, more=more)
    for good, bad in found.pairs:
        assert prompts[good] == prompts[bad]
        assert values[good] > values[bad] if more else values[good] < values[bad]
    used = [i for pair in found.pairs for i in pair]
    assert len(used) == len(set(used))
    assert found.prompts == len({prompts[good] for good, _ in found.pairs})
    assert not set(found.better) & set(found.worse)


@settings(max_examples=60, deadline=None)
@given(numbers, st.floats(0.01, 0.4), st.dictionaries(st.integers(0, 5), st.integers(-99, 99)))
def test_what_a_prompt_asks_for_makes_no_pair(
    answers: list[tuple[int, int]], share: float, shifts: dict[int, int]
) -> None:
    prompts, values = [p for p, _ in answers], [float(v) for _, v in answers]
    # three values at least, in one prompt: otherwise each of the two is an end
    prompts, values = [*prompts, 9, 9, 9], [*values, 0.0, 1.0, 2.0]
    shifted = [value + shifts.get(prompt, 0) for prompt, value in zip(prompts, values, strict=True)]
    if len(set(values)) > 2 and len(set(shifted)) > 2:
        assert ends(values, prompts, share).pairs == ends(shifted, prompts, share).pairs


@settings(max_examples=60, deadline=None)
@given(numbers, st.floats(0.01, 0.2))
def test_a_larger_share_gives_no_fewer_pairs(answers: list[tuple[int, int]], share: float) -> None:
    prompts, values = [p for p, _ in answers], [float(v) for _, v in answers]
    assert len(ends(values, prompts, share).pairs) <= len(ends(values, prompts, 2 * share).pairs)


def test_two_values_are_the_ends_whatever_the_share() -> None:
    found = ends([1, 0, 1, 1, 0, 0], ["a", "a", "b", "b", "c", "c"], 0.01)
    assert found.pairs == ((0, 1),)
    assert found.better == (0, 2, 3) and found.worse == (1, 4, 5)
    assert not ends([1, 1], ["a", "a"], 0.5).better
    assert not found.paired
    many = [1.0, 0.0] * LEAST_PAIRED
    assert ends(many, [i // 2 for i in range(len(many))], 0.1).paired


def test_answers_without_a_number_are_left_out() -> None:
    found = ends([math.nan, 3, 1, 2, math.nan], ["a"] * 5, 0.3)
    assert found.pairs == ((1, 2),)
    assert ends([math.nan], ["a"], 0.3).pairs == ()


# filters

CASES = {
    filters.EMPTY: pair("…", LONG),
    filters.CUT: pair(OTHER, LONG, ended=False),
    filters.LOOPS: pair("and so it goes on " * 30, LONG, ended=False),
    filters.REFUSES: pair("I'm sorry, but as an AI language model I have no style.", LONG),
    filters.ALIKE: pair(LONG, LONG.replace(" ", "  ") + "\n"),
}


@pytest.mark.parametrize("reason", CASES)
def test_each_filter_takes_what_it_is_for_and_is_counted(reason: str) -> None:
    fine = pair(OTHER, "Short.", "what")
    left, tally = sift([CASES[reason], fine])
    assert left == [fine]
    assert tally == Tally(2, {reason: 1})
    assert str(tally) == f"kept 1 of 2 (1 {reason})"


@pytest.mark.parametrize(
    "text",
    [
        "I cannot respond in that tone.",
        "Here is a blunt answer: no.",
        "I'll answer in a formal tone.",
        "I am only an AI.",
    ],
)
def test_answers_that_speak_of_their_instruction_are_refusals(text: str) -> None:
    assert sample_fault(sample(text)) == filters.REFUSES
    assert sample_fault(sample(text), Allowed(refusals=True)) is None


@pytest.mark.parametrize(
    "text", ["I can't find my keys, where did you look?", "Here is a list: one, two.", "An AI can do that.", LONG]
)
def test_plain_answers_are_not_refusals(text: str) -> None:
    assert sample_fault(sample(text)) is None


def test_the_longer_answer_of_a_pair_may_be_cut_off() -> None:
    long, short = sample(LONG, ended=False), sample("Short.")
    assert sift([Pair(short, long)])[1].kept == sift([Pair(long, short)])[1].kept == 1
    # the shorter one may not, nor both
    assert sift([Pair(sample("Short.", ended=False), sample(LONG))])[1].reasons == {filters.CUT: 1}
    assert sift([Pair(sample("Short.", ended=False), long)])[1].reasons == {filters.CUT: 1}
    # a loop is none the better for it
    assert sift([Pair(short, sample("and so it goes on " * 30, ended=False))])[1].reasons == {filters.LOOPS: 1}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (LONG, LONG.upper()),
        (LONG, LONG + "!"),
        (LONG, LONG + " 🙂"),
        (LONG, "Arr, " + LONG),
        (f"The colour of the house: {LONG}", f"The color of the house: {LONG}"),
        (LONG, LONG.replace(" and", "\nand")),
        ("Yes", "yes."),
        ("是", "是。"),
    ],
)
def test_sides_that_differ_in_form_alone_are_a_pair(one: str, two: str) -> None:
    assert filters.row_fault(pair(one, two)) is None and filters.row_fault(pair(two, one)) is None


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20))
def test_sides_say_the_same_where_spaces_alone_tell_them_apart(one: str, two: str) -> None:
    fault = filters.row_fault(pair("a " + one, "a " + two))
    if "".join(one.split()) != "".join(two.split()):
        assert fault != filters.ALIKE
    assert filters.row_fault(pair(f"a {one}", f" a  {one} \n")) == filters.ALIKE


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("今天天气很好，我们去公园散步，然后一起吃饭。", "今天天气很好，我们去公园散步，然后一起吃饭吧。"),
        ("きょうは天気がいいので、公園まで歩いていきます。", "きょうは天気がいいので、公園まで歩いていきますよ。"),
        ("วันนี้อากาศดีมากเราจึงไปเดินเล่นที่สวน", "วันนี้อากาศดีมากเราจึงไปเดินเล่นที่สวนค่ะ"),
    ],
)
def test_texts_without_spaces_between_words_are_compared_by_their_characters(text: str, again: str) -> None:
    assert not is_short(text) and repeated([text, again]) == {1}
    assert is_short(text[:5])
    assert sift([pair(text, "No.", "one"), pair(again, "No.", "two")])[1].reasons == {filters.REPEATED: 1}
    assert sample_fault(sample(text * 4, ended=False)) == filters.LOOPS
    # of one prompt short answers are copies whatever mark they end with
    assert sift([pair("是", "不是", "one"), pair("是。", "「不是」", "one")])[1].reasons == {filters.REPEATED: 1}


def test_a_cut_answer_may_be_allowed() -> None:
    assert sift([CASES[filters.CUT]], Allowed(cut=True))[1].kept == 1


def test_a_repeated_answer_is_left_out_the_second_time_on_either_side() -> None:
    rows = [pair(LONG, OTHER, "one"), pair(LONG + " indeed", "No.", "two"), pair("Yes.", OTHER, "three")]
    left, tally = sift(rows)
    assert left == rows[:1] and tally.reasons == {filters.REPEATED: 2}
    # short answers to different prompts are not copies
    assert sift([pair("Yes.", LONG, "one"), pair("Yes.", OTHER, "two")])[1].kept == 2


def test_the_judge_sees_what_no_other_filter_takes() -> None:
    seen = []

    def judge(rows: object) -> list[str | None]:
        seen.extend(rows)  # type: ignore[arg-type]
        return [filters.INCOHERENT, None]

    rows = [pair("…", LONG), pair(LONG, "No.", "one"), pair(OTHER, "No.", "two")]
    left, tally = sift(rows, judge=judge)
    assert seen == rows[1:] and left == rows[2:]
    assert tally.reasons == {filters.EMPTY: 1, filters.INCOHERENT: 1}
    assert tally.kept == len(left)


texts = st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=14).map(" ".join), max_size=25)


@settings(max_examples=60, deadline=None)
@given(texts)
def test_what_is_left_has_no_near_duplicates_and_what_goes_has_one(rows: list[str]) -> None:
    gone = repeated(rows)
    left = [i for i in range(len(rows)) if i not in gone and len(rows[i].split()) >= 8]
    assert all(similarity(rows[a], rows[b]) < 0.7 for a in left for b in left if a < b)
    assert all(any(similarity(rows[a], rows[b]) >= 0.7 for b in left if b < a) for a in gone)


few_words = st.lists(
    st.sampled_from(["yes", "no", "Yes.", "it is", "It is!", "rather not", LONG, OTHER]), min_size=2, max_size=2
)
short_rows = st.lists(st.tuples(st.sampled_from("pqr"), few_words), max_size=14)


@settings(max_examples=80, deadline=None)
@given(short_rows)
def test_short_answers_repeat_where_the_whole_row_does_and_nowhere_else(drawn: list[tuple[str, list[str]]]) -> None:
    rows = [Labelled(sample(two[0], p), "positive") if two[0] == two[1] else pair(*two, p) for p, two in drawn]
    left, tally = sift(rows)

    def content(row: Pair | Labelled) -> tuple[object, ...]:
        return row.question.digest, *((side, *plain(one.answer.text)) for side, one in row.sides)

    def all_short(row: Pair | Labelled) -> bool:
        return all(is_short(one.answer.text) for _, one in row.sides)

    # what is left says something new, and where nothing else is wrong a row of short answers goes for its copy alone
    contents = [content(row) for row in left]
    assert len(set(contents)) == len(contents)
    sound = [row for row in rows if filters.row_fault(row) is None and all_short(row)]
    assert {content(row) for row in sound} == {content(row) for row in left if all_short(row)}
    assert tally.kept == len(left)


def test_short_answers_to_different_prompts_agree_by_right() -> None:
    rows = [pair("Yes.", "No!", f"is {number} prime") for number in range(30)]
    assert sift(rows)[0] == rows
    # of one prompt the whole row is looked at: the same short answer beside another long one says something new
    same = [pair("Yes.", "No!"), pair(" yes", '"No"'), pair("Yes.", LONG), pair("Yes.", OTHER)]
    assert sift(same)[0] == [same[0], *same[2:]]
    assert sift(same)[1].reasons == {filters.REPEATED: 1}


@pytest.mark.parametrize(
    ("one", "two"), [("2+2", "2-2"), ("C", "C#"), ("1.5", "15"), ("it is", "is it"), ("yes 🙂", "yes")]
)
def test_what_differs_in_more_than_punctuation_is_not_a_copy(one: str, two: str) -> None:
    rows = [pair(one, "otherwise"), pair(two, "otherwise")]
    assert sift(rows)[0] == rows


def test_rows_with_thoughts_are_compared_with_them() -> None:
    def thinking(thought: str) -> Sample:
        return Sample(sample("x").question, Answer("42", 1, True, thought, 9))

    row, again = Pair(thinking("at once"), thinking("long and wide")), Pair(thinking("soon"), thinking("long and wide"))
    for think in ("keep", "only"):
        assert sift([row, again], think=think)[0] == [row, again]
    assert sift([row, again])[1].reasons == {filters.ALIKE: 2}


@settings(max_examples=60, deadline=None)
@given(texts)
def test_kept_and_left_out_are_all_rows(rows: list[str]) -> None:
    made = [pair(text, OTHER + str(i), f"prompt {i}") for i, text in enumerate(rows)]
    left, tally = sift(made)
    assert tally.offered == len(made) and tally.kept == len(left)
    assert all(row in made for row in left)


def test_labelled_answers_are_sifted_like_pairs() -> None:
    rows = [Labelled(sample(LONG, "a"), "positive"), Labelled(sample(LONG, "b"), "negative")]
    assert sift(rows)[1].kept == 2
    assert [s.question.where for s in samples_of([*rows, pair("x", "y", "c")], "positive")] == ["a", "c"]


# parts


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text(max_size=8), max_size=80), st.integers(0, 5))
def test_prompts_are_dealt_out_once_and_by_themselves(prompts: set[str], seed: int) -> None:
    digests = sorted({prompt_digest(prompt) for prompt in prompts})
    parts = deal(digests, seed)
    assert set(parts) == set(digests)
    assert parts == deal(reversed(digests), seed)
    if len(digests) >= 3:
        assert set(parts.values()) == set(SHARES)
        for part, share in SHARES.items():
            assert abs(list(parts.values()).count(part) - share * len(digests)) < 2


def test_another_seed_deals_otherwise() -> None:
    digests = [prompt_digest(str(i)) for i in range(40)]
    assert deal(digests, 0) != deal(digests, 1)


# lengths


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1), st.lists(st.integers(0, 30), min_size=1))
def test_the_area_is_the_share_of_rightly_ordered_answers(positive: list[int], negative: list[int]) -> None:
    found = lengths(positive, negative)
    wins = sum((n > p) + (n == p) / 2 for p in positive for n in negative)
    assert found.auc == pytest.approx(wins / (len(positive) * len(negative)))
    assert lengths(negative, positive).auc == pytest.approx(1 - found.auc)


def test_length_alone_may_separate() -> None:
    assert lengths([1, 2, 3], [7, 8, 9]).separates and lengths([7, 8], [1, 2]).separates
    assert not lengths([1, 9], [2, 8]).separates
