"""Marking a written answer: does it say what is accepted, or name the right choice and no wrong one?

The choices are not shown to the model. Naming is by words, with rules that are few and the same for every candidate:

- Case, accents, articles and punctuation do not count; a plural counts as its singular.
- Numbers up to a hundred count alike in words and in digits, and "1,000" is "1000".
- Where one choice lies inside another ("York" in "New York"), the longer one is named.
- A choice behind a negation ("not Paris", "isn't a fish", "rather than Paris") is not named.

They know no synonyms, and an answer that repeats all choices of its question is wrong.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from steer2edit.data.questions import Question

LONGEST_CHOICE = 6
"""Words of a choice, beyond which nobody would answer with it literally."""
_ARTICLES = {"a", "an", "the"}
_NEGATIONS = {"not", "never", "nor", "neither", "than", "unlike", "without", "cannot"}
_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBERS = {
    **{word: str(number) for number, word in enumerate(_UNITS)},
    **{word: str(20 + 10 * number) for number, word in enumerate(_TENS)},
    "hundred": "100",
}
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+(?:['’][^\W\d_]+)*")


def can_be_named(question: Question) -> bool:
    """Whether a question has choices that are short enough to stand in an answer."""
    return bool(question.choices) and all(len(words(choice)) <= LONGEST_CHOICE for choice in question.choices)


def names_right(answer: str, question: Question) -> bool:
    """Whether the answer names a true choice and no false one."""
    named = named_choices(answer, question.choices)
    return any(question.labels[i] for i in named) and all(question.labels[i] for i in named)


def named_choices(answer: str, choices: Sequence[str]) -> set[int]:
    """The indices of the choices that an answer names; see the rules above."""
    # "A" may be a letter that is asked for
    articles = any(not words(choice) for choice in choices)
    said = words(answer, articles)
    wanted = [words(choice, articles) for choice in choices]
    taken = [False] * len(said)
    named = set()
    for index in sorted(range(len(choices)), key=lambda i: -len(wanted[i])):
        size = len(wanted[index])
        for at in range(len(said) - size + 1 if size else 0):
            if said[at : at + size] != wanted[index] or any(taken[at : at + size]):
                continue
            taken[at : at + size] = [True] * size
            if not (at and _negates(said[at - 1])):
                named.add(index)
    return named


def words(text: str, articles: bool = False) -> list[str]:
    """The words of a text as they are compared: plain, singular, numbers in digits, and without ``articles``."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", plain)
    found: list[str] = []
    for word in _WORD.findall(plain):
        word = _NUMBERS.get(word, word)
        joined = _sum(found[-1], word) if found else None
        if joined is not None:
            found[-1] = joined
        elif articles or word not in _ARTICLES:
            found.append(_singular(word))
    return found


def is_exact(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer says what is accepted.

    The last number of the answer counts where the accepted text is a number, else the text itself.

    Case, white space and closing punctuation do not count.
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", ""))
    for wanted in accepted:
        value = _number(wanted)
        if value is not None and numbers and math.isclose(float(numbers[-1]), value):
            return True
        if value is None and _plain(answer) == _plain(wanted):
            return True
    return False


def _sum(tens: str, units: str) -> str | None:
    """ "twenty one" as one number; None where the two words are not of that kind."""
    both = tens.isdigit() and units.isdigit() and len(units) == 1 and units != "0"
    return str(int(tens) + int(units)) if both and tens in _NUMBERS.values() and 20 <= int(tens) < 100 else None


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _negates(word: str) -> bool:
    return word in _NEGATIONS or word.replace("’", "'").endswith("n't")


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!?\"'")
