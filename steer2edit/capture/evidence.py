"""What contrast data can show: whether its classes differ at all, and how many independent draws it holds.

A draw is a distinct prompt: repeated rows, and several responses to one prompt, say nothing new of other prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

from steer2edit.bootstrap import LEAST_DRAWS
from steer2edit.data.answers import LABELS, Label
from steer2edit.data.contrast import Example, count
from steer2edit.data.prompts import prompt_digest
from steer2edit.data.tokens import Encoded
from steer2edit.errors import DataError, listing
from steer2edit.notices import notice


def distinct_prompts(examples: Sequence[Example]) -> dict[str, int]:
    """How many distinct prompts each class has."""
    return {label: len({prompt_digest(e.prompt) for e in examples if e.label == label}) for label in LABELS}


def checked(examples: Sequence[Example], encoded: Sequence[Encoded]) -> list[Encoded]:
    """The encoded examples with one row number for each distinct prompt, so that its examples share their bootstrap weight.

    Says in notices what repeats itself. Raises DataError where the classes hold the same texts, or the same tokens.
    """
    texts = [(prompt_digest(e.prompt), e.response.strip()) for e in examples]
    refuse = "both classes hold the same responses to the same prompts (apart from white space at their ends)"
    shared = _shared(examples, texts, refuse, "give responses that differ in the behaviour")
    # the last token is only predicted: nothing of it is captured
    tokens = [(one.start, one.ids[:-1]) for one in encoded]
    cut = "what is read of both classes' responses is the same, token by token"
    advice = "with --span matched a pair's responses are cut to the shorter's length: try --span response"
    shared = max(shared, _shared(examples, tokens, cut, advice))
    if shared:
        notice(f"{shared} of the data's positive examples are negative examples too, and cancel out")
    counts = count(examples)
    if repeated := counts.rows - counts.distinct_rows:
        notice(
            f"{repeated} of the data's {counts.rows} rows repeat another row; the bootstrap counts each distinct prompt once, "
            "the means count every row"
        )
    return _one_row_for_each_prompt(examples, encoded)


def too_few(prompts: int) -> str:
    """Why the sign of no score is beyond doubt."""
    many = "1 distinct prompt" if prompts == 1 else f"{prompts} distinct prompts"
    return f"the contrast data has {many}, and from fewer than {LEAST_DRAWS} the sign of no score is beyond doubt"


def _shared(examples: Sequence[Example], contents: Sequence[Hashable], what: str, advice: str) -> int:
    """How many positive examples are negative ones too. Raises DataError where all of both are."""
    counts: dict[Label, Counter[Hashable]] = {label: Counter() for label in LABELS}
    for example, content in zip(examples, contents, strict=True):
        counts[example.label][content] += 1
    positive, negative = (counts[label] for label in LABELS)
    if positive == negative:
        places = listing(dict.fromkeys(example.where for example in examples), limit=3)
        raise DataError(f"{what}: there is nothing to tell them apart; {advice}\n{places}")
    return (positive & negative).total()


def _one_row_for_each_prompt(examples: Sequence[Example], encoded: Sequence[Encoded]) -> list[Encoded]:
    """Each prompt's first row number; another one where a row of another source has that number already."""
    rows: dict[str, int] = {}
    taken: set[int] = set()
    for example in examples:
        digest = prompt_digest(example.prompt)
        if digest not in rows:
            row = example.row
            while row in taken:
                row += 1
            rows[digest] = row
            taken.add(row)
    return [replace(one, row=rows[prompt_digest(e.prompt)]) for e, one in zip(examples, encoded, strict=True)]
