"""What is counted in a written answer: words, list markers, and matches of a regular expression."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from steer2edit.errors import DataError, shown
from steer2edit.files.sandbox import TooMuchError, limited

PATTERN_SECONDS = 5.0
"""What a pattern may take on one answer; one that backtracks without end takes more."""
LONGEST = 50_000
"""Characters of an answer that patterns are tried on, from its beginning."""
LIST_LINES = 2
"""Lines with a marker from which on an answer has a list."""
_MARKS = "".join(chr(code) for code in range(0x0300, 0xAC00) if unicodedata.category(chr(code)).startswith("M"))
"""Signs that belong to the letter before them, such as vowels in Hindi and Thai; ``\\w`` does not hold them."""
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Letters of scripts without spaces between words."""
_PART = rf"(?:(?![{_UNSPACED}])\w[{_MARKS}]*)+"
_WORD = re.compile(rf"(?=\w)[{_UNSPACED}][{_MARKS}]*|{_PART}")
_JOINED = re.compile(rf"(?=\w)[{_UNSPACED}][{_MARKS}]*|{_PART}(?:['’\-]{_PART})*")
_MARKER = re.compile(r"^[ \t]{0,12}(?:[-*+•–]|(?:\*\*)?\(?(?:\d{1,3}|[a-zA-Z])[.)](?:\*\*)?)[ \t]+\S", re.MULTILINE)


def words(text: str) -> int:
    """Words of a text, which spaces and punctuation part; "it's" and "well-known" are one each.

    In scripts without spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each character counts as one.
    """
    return sum(1 for _ in _JOINED.finditer(text))


def each_word(text: str) -> Iterator[str]:
    """The words of a text as :func:`words` counts them, but "it's" and "well-known" are two each."""
    return (match[0] for match in _WORD.finditer(text))


def has_list(text: str) -> bool:
    """Whether at least ``LIST_LINES`` lines begin with a bullet, a number or a letter of a list."""
    return len(_MARKER.findall(text)) >= LIST_LINES


def matches(pattern: str, text: str) -> int:
    """How often a regular expression is found in a text, without overlaps.

    Raises DataError where it takes longer than ``PATTERN_SECONDS``.
    """
    text = text[:LONGEST]
    try:
        with limited(PATTERN_SECONDS):
            return sum(1 for _ in re.finditer(pattern, text))
    except TooMuchError:
        raise DataError(
            f"the pattern {shown(pattern)} takes longer than {PATTERN_SECONDS:g} seconds on an answer of {len(text)} "
            "characters; write it without a repetition inside a repetition, such as (a+)+"
        ) from None


def per_hundred_words(count: int, text: str) -> float:
    """A count per 100 words of the text; a text without words counts as one of one word."""
    return 100 * count / max(words(text), 1)
