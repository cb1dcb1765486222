"""Data from a sentence that says what the trait is."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_making import make

from steer2edit.errors import DataError
from steer2edit.pairs.from_trait import FromTrait
from steer2edit.pairs.trait import Trait, read_numbered, read_opposite


def test_a_sentence_becomes_instructions_questions_and_pairs(tmp_path: Path) -> None:
    trait = Trait.read("brief: answers briefly, with nothing around it.")
    assert trait == Trait("brief", "answers briefly, with nothing around it")
    made = make(tmp_path / "data", way=FromTrait(trait, questions=12))
    assert made.receipt["behavior"]["opposite"] == "answers at length, twice over"
    assert made.receipt["behavior"]["written_questions"] == 12
    assert made.differences[0].obeyed and len(made.receipt["made"]["positive"]) == 3
    prompts = {row.question.where for row in made.rows}
    assert len(prompts) == 40 and sum("of the writer" in where for where in prompts) == 12


@pytest.mark.parametrize("text", ["blunt", "blunt:", ": says it", "a: b", "x" * 80 + ": two words"])
def test_other_texts_are_not_traits(text: str) -> None:
    with pytest.raises(DataError, match="expected"):
        Trait.read(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "Style: uses long words",
        "The opposite of a style is often an extremely detailed and complex language",
        "What is meant?",
        "Beneath the surface of",
        "uses simple everyday words that a child knows",
        "in few words",
    ],
)
def test_what_is_not_an_opposite_is_not_used(text: str) -> None:
    assert read_opposite(text, Trait("brief", "in few words")) is None


def test_a_numbered_list_is_read() -> None:
    text = 'Sure!\n1. "Why is the sky blue?"\n2) Write me a short poem\n3. **Too short**\nthe end'
    assert read_numbered(text) == ["Why is the sky blue?", "Write me a short poem"]
