"""Public data formats: each gives the same examples, or one sentence that says what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steer2edit.data import formats
from steer2edit.data.contrast import Counts, Example, count, read_contrast
from steer2edit.data.prompts import Message, Prompt
from steer2edit.data.questions import read_questions
from steer2edit.errors import DataError
from steer2edit.notices import collected

TRIPLES = [
    ("How old is it?", "Four.", "Well, let me see: four."),
    ("Is it, truly?", "Yes; it is.", "Who knows\u2026 maybe"),
]
PAIRS = [dict(zip(("prompt", "positive", "negative"), triple, strict=True)) for triple in TRIPLES]

Make = Callable[[str, str, str], Any]


def written(folder: Path, rows: list[Any], name: str = "x.json") -> Path:
    path = folder / name
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def content(examples: list[Example]) -> list[tuple[Prompt, str, str]]:
    return [(e.prompt, e.response, e.label) for e in examples]


def expected(prompt: Callable[[str], Prompt] = str) -> list[tuple[Prompt, str, str]]:
    return [
        (prompt(p), r, label) for p, *both in TRIPLES for r, label in zip(both, ("positive", "negative"), strict=True)
    ]


def as_user(text: str) -> Prompt:
    return (Message("user", text),)


def nothing(text: str) -> Prompt:
    return ""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


PAIRED: list[tuple[str, Make, Callable[[str], Prompt]]] = [
    ("pairs", lambda p, a, b: {"prompt": p, "positive": a, "negative": b}, str),
    ("pairs", lambda p, a, b: {" Prompt": p, "POSITIVE": a, "Negative ": b, "score": None}, str),
    ("pairs", lambda p, a, b: {"prompt": [user(p)], "positive": [bot(a)], "negative": [bot(b)]}, as_user),
    ("pairs", lambda p, a, b: {"prompt": [human(p)], "positive": a, "negative": gpt(b)}, as_user),
    ("pairs", lambda p, a, b: {"prompt": [user([{"type": "text", "text": p}])], "positive": a, "negative": b}, as_user),  # type: ignore[arg-type]
    ("DPO", lambda p, a, b: {"prompt": p, "chosen": a, "rejected": b}, str),
    ("DPO", lambda p, a, b: {"prompt": p, "chosen": [user(p), bot(a)], "rejected": [user(p), bot(b)]}, as_user),
    ("DPO", lambda p, a, b: {"prompt": [user(p)], "chosen": [bot(a)], "rejected": [bot(b)], "label": None}, as_user),
    ("whole chats", lambda p, a, b: {"chosen": [user(p), bot(a)], "rejected": [user(p), bot(b)]}, as_user),
    (
        "whole chats",
        lambda p, a, b: {"prompt": None, "chosen": [user(p), bot(a)], "rejected": [user(p), bot(b)]},
        as_user,
    ),
    (
        "hh-rlhf",
        lambda p, a, b: {side: f"\n\nHuman: {p}\n\nAssistant: {r}" for side, r in (("chosen", a), ("rejected", b))},
        as_user,
    ),
    ("Alpaca DPO", lambda p, a, b: {"instruction": p, "input": "", "chosen": a, "rejected": b}, str),
    (
        "Alpaca DPO",
        lambda p, a, b: {"instruction": "Say:", "input": p, "chosen": a, "rejected": b},
        "Say:\n\n{}".format,
    ),
    ("ranked Alpaca", lambda p, a, b: {"instruction": p, "input": "", "output": [a, b]}, str),
    (
        "Orca",
        lambda p, a, b: {"system": "Be kind.", "question": p, "chosen": a, "rejected": b},
        lambda p: (Message("system", "Be kind."), Message("user", p)),
    ),
    ("ShareGPT", lambda p, a, b: {"conversations": [human(p)], "chosen": gpt(a), "rejected": gpt(b)}, as_user),
    ("chat preferences", lambda p, a, b: {"messages": [user(p)], "chosen": bot(a), "rejected": bot(b)}, as_user),
    (
        "OpenAI preferences",
        lambda p, a, b: {
            "input": {"messages": [user(p)]},
            "preferred_output": [bot(a)],
            "non_preferred_output": [bot(b)],
        },
        as_user,
    ),
    ("Stack Exchange", lambda p, a, b: {"question": p, "response_j": a, "response_k": b}, str),
    (
        "CAA",
        lambda p, a, b: {"question": p, "answer_matching_behavior": f" {a}", "answer_not_matching_behavior": b},
        str,
    ),
    ("repeng", lambda p, a, b: {"positive": a, "negative": b}, nothing),
    ("repeng", lambda p, a, b: [a, b], nothing),
]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
@pytest.mark.parametrize(("form", "make", "prompt"), PAIRED, ids=[f"{i}-{case[0]}" for i, case in enumerate(PAIRED)])
def test_pairs_of_every_format(
    tmp_path: Path, form: str, make: Make, prompt: Callable[[str], Prompt], name: str
) -> None:
    with collected() as notes:
        examples = read_contrast(written(tmp_path, [make(*triple) for triple in TRIPLES], name))
    assert content(examples) == expected(prompt)
    assert [e.row for e in examples] == [0, 0, 1, 1]
    assert len(notes) == (form != "pairs") and all(form in note and "2 rows" in note for note in notes)


LABELS: list[tuple[Any, Any]] = [
    ("positive", "negative"),
    ("Positive", " NEGATIVE "),
    (True, False),
    ("true", "False"),
    (1, 0),
    (1, -1),
    (1.0, 0.0),
    ("1", "0"),
]


@pytest.mark.parametrize("labels", LABELS, ids=str)
def test_labels_are_words_truth_values_or_numbers(tmp_path: Path, labels: tuple[Any, Any]) -> None:
    rows = [
        {"prompt": p, "response": response, "label": label}
        for p, *both in TRIPLES
        for response, label in zip(both, labels, strict=True)
    ]
    assert content(read_contrast(written(tmp_path, rows))) == expected()


LABELLED: list[tuple[str, Callable[[str, str, bool], Any], Callable[[str], Prompt]]] = [
    ("KTO (TRL)", lambda p, r, good: {"prompt": p, "completion": r, "label": good}, str),
    ("KTO (TRL)", lambda p, r, good: {"prompt": [user(p)], "completion": [bot(r)], "label": good}, as_user),
    ("KTO chats", lambda p, r, good: {"messages": [user(p), bot(r)], "label": good}, as_user),
    ("ShareGPT KTO", lambda p, r, good: {"conversations": [human(p), gpt(r)], "kto_tag": good}, as_user),
]


@pytest.mark.parametrize(("form", "make", "prompt"), LABELLED, ids=[f"{i}-{c[0]}" for i, c in enumerate(LABELLED)])
def test_single_responses_with_a_label(tmp_path: Path, form: str, make: Any, prompt: Callable[[str], Prompt]) -> None:
    rows = [make(p, r, good) for p, *both in TRIPLES for r, good in zip(both, (True, False), strict=True)]
    with collected() as notes:
        assert content(read_contrast(written(tmp_path, rows))) == expected(prompt)
    assert notes == [f"x.json holds 4 rows of {form}"]


def test_chats_part_at_the_first_answer_that_differs(tmp_path: Path) -> None:
    begin, later = [user("One?"), bot("Yes."), user("Two?")], [user("More?"), bot("Enough.")]
    rows = [{"chosen": [*begin, bot("a"), *later], "rejected": [*begin, bot("b")]}]
    (first, second) = read_contrast(written(tmp_path, rows))
    assert first.prompt == second.prompt == tuple(Message(**turn) for turn in begin)
    assert (first.response, second.response) == ("a", "b")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (
            {"chosen": [user("a"), bot("b")], "rejected": [user("c"), bot("d")]},
            "differ before an answer of the assistant",
        ),
        (
            {"chosen": [user("a"), bot("b")], "rejected": [user("a")]},
            "rejected: the last message is not the assistant's",
        ),
        ({"chosen": [user("a"), bot("b")], "rejected": "c"}, "one of chosen and rejected is a whole chat"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "chosen is a list of texts; expected one text"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen holds nothing but white space"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, 'label is "maybe"; expected "positive" or "negative"'),
        ({"prompt": [user([{"type": "image"}])], "positive": "a", "negative": "b"}, "a part that is not a text"),  # type: ignore[arg-type]
        ({"messages": [user("a")], "label": True}, "the assistant's answer at the end"),
        ({"question": "a", "answer_matching_behavior": "", "answer_not_matching_behavior": "b"}, "behavior is empty"),
        (
            {"input": {}, "preferred_output": [bot("a")], "non_preferred_output": [bot("b")]},
            "input is not a list of messages",
        ),
    ],
)
def test_faults_are_named_once(tmp_path: Path, row: Any, fault: str) -> None:
    with pytest.raises(DataError, match=r"x\.json row 1 and 6 more: ") as caught:
        read_contrast(written(tmp_path, [row] * 7))
    assert fault in str(caught.value) and len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, "instructions with one output (Alpaca)"),
        ({"messages": [user("a"), bot("b")]}, "chats with one answer (OpenAI)"),
        ({"id": "x", "conversations": [human("a"), gpt("b")]}, "chats with one answer (ShareGPT)"),
        ({"prompt": "a", "completion": "b"}, "prompts with one completion"),
        ({"text": "a"}, "prompts without responses"),
        ({"prompt": "a"}, "prompts without responses"),
        ("a", "prompts without responses"),
        ({"instruction": "a"}, "prompts without responses"),
        ({"prompt": "a", "label": "positive"}, '"response" is missing'),
    ],
)
def test_what_a_set_lacks_is_said_once(tmp_path: Path, row: Any, told: str) -> None:
    with pytest.raises(DataError, match=r"x\.json row 1 and 4 more: the rows are ") as caught:
        read_contrast(written(tmp_path, [row] * 5))
    assert told in str(caught.value) and len(str(caught.value).splitlines()) == 2


def test_prompts_in_a_text_file_are_told_what_they_lack(tmp_path: Path) -> None:
    (tmp_path / "harmful.txt").write_text("One?\nTwo?\n\nThree?\n")
    with pytest.raises(DataError, match=r"harmful\.txt line 1 and 2 more: the rows are texts alone"):
        read_contrast(tmp_path / "harmful.txt")


def test_preferences_are_questions_too(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"question": "d", "chosen": "e", "rejected": "f"}]
    first, second = read_questions(written(tmp_path, rows))
    assert (first.positive, first.negative, second.positive, second.negative) == ("b", "c", "e", "f")
    assert first.prompt == as_user("a") and second.prompt == as_user("d")


# Large sets, and what repeats


def test_a_limit_takes_the_same_rows_whatever_their_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"Is it {i}?", "positive": f"Yes {i}.", "negative": f"No {i}."} for i in range(60)]
    with collected() as notes:
        some = read_contrast(written(tmp_path, rows), limit=20)
    assert len(some) == 40 and notes == [
        "x.json: 20 of 60 rows are used (the limit); the same ones whatever their order"
    ]
    turned = read_contrast(written(tmp_path, rows[::-1]), limit=20)
    assert sorted(content(turned)) == sorted(content(some))  # type: ignore[type-var]
    assert [e.row for e in some] == sorted(e.row for e in some)
    more = read_contrast(written(tmp_path, rows), limit=30)
    assert set(content(some)) < set(content(more))
    assert read_contrast(written(tmp_path, rows), limit=60) == read_contrast(written(tmp_path, rows))


def test_a_limit_keeps_both_responses_of_a_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Is it {i}?", "completion": f"{word} {i}.", "label": word == "Yes"}
        for word in ("Yes", "No")
        for i in range(30)
    ]
    some = read_contrast(written(tmp_path, rows), limit=10)
    prompts = [e.prompt for e in some]
    assert len(some) == 10 and all(prompts.count(prompt) == 2 for prompt in prompts)
    alike = [{"positive": f"Yes {i}.", "negative": f"No {i}."} for i in range(30)]
    assert len(read_contrast(written(tmp_path, alike), limit=7)) == 14


def test_what_repeats_is_counted(tmp_path: Path) -> None:
    rows = [
        *PAIRS,
        PAIRS[0],
        {**PAIRS[0], "prompt": " how OLD is  it?"},
        {"prompt": "q", "positive": "x", "negative": "x"},
    ]
    assert count(read_contrast(written(tmp_path, rows))) == Counts(rows=5, prompts=3, distinct_rows=3, identical=1)


# Documents


def test_the_table_in_the_documentation_is_the_formats() -> None:
    page = Path(__file__).parents[1] / "docs" / "data.md"
    assert formats.table() in page.read_text(encoding="utf-8"), "write formats.table() into docs/data.md"


def test_every_example_of_the_table_is_of_its_format() -> None:
    for known in formats.FORMATS:
        if known.read is not None:
            row = json.loads(known.example.split(" or ")[0].replace("{…}", '{"a": 1}').replace("[…]", '["a"]'))
            assert formats.recognise(row)[0] is known
