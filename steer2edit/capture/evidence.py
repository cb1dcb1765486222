"""What contrast data can show: whether its classes differ at all, and how many independent draws it holds.

A draw is a distinct prompt: repeated rows, and several responses to one prompt, say nothing new of other prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

from steer2edit.bootstrap import LEAST_DRAWS
from steer2edit.data.answer_text import each_word
from steer2edit.data.answers import LABELS, Label
from steer2edit.data.contrast import Example, count
from steer2edit.data.prompts import prompt_digest
from steer2edit.data.tokens import Encoded
from steer2edit.errors import DataError, listing
from steer2edit.notices import notice

_TELLING = 1 / 3
"""A first word tells the classes apart where its shares of both differ by more."""
_FEWEST_FIRST_WORDS = 10


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
    if (words := telling_first_word(examples)) is not None:
        notice(words)
    counts = count(examples)
    if repeated := counts.rows - counts.distinct_rows:
        notice(
            f"{repeated} of the data's {counts.rows} rows repeat another row; the bootstrap counts each distinct prompt once, "
            "the means count every row"
        )
    return _one_row_for_each_prompt(examples, encoded)


def telling_first_word(examples: Sequence[Example]) -> str | None:
    """What to say where one class begins with a word far more often than the other.

    None where no first word tells the classes apart.

    An edit of pairs whose positive responses begin with "No" denies whatever it is asked.
    """
    firsts: dict[Label, Counter[str]] = {label: Counter() for label in LABELS}
    for example in examples:
        if (word := next(each_word(example.response), None)) is not None:
            firsts[example.label][word.casefold()] += 1
    totals = {label: sum(e.label == label for e in examples) for label in LABELS}
    if not all(totals.values()):
        return None

    def share(label: Label, word: str) -> float:
        return firsts[label][word] / totals[label]

    words = {word for counted in firsts.values() for word, times in counted.items() if times >= _FEWEST_FIRST_WORDS}
    word = max(sorted(words), key=lambda word: abs(share("positive", word) - share("negative", word)), default=None)
    if word is None or abs(share("positive", word) - share("negative", word)) <= _TELLING:
        return None
    numbers = {label: f"{firsts[label][word]} of {totals[label]}" for label in LABELS}
    return (
        f"{numbers['positive']} positive responses begin with {word!r}, and {numbers['negative']} negative ones: the edit may be "
        "that word and nothing more; add rows in which it stands on the other side"
    )


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
