"""Signs that a text degenerates: 4-grams that come again, tails that go round in a loop, texts that say nothing."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

TAIL = 48
"""The 4-grams at an answer's end that decide whether it loops."""
_N = 4
_UNREADABLE = "\ufffd"
"""What stands for bytes that are not a character."""


def repetition(tokens: Sequence[int]) -> float:
    """The share of a text's 4-grams that occurred in it before (rep-4, Welleck et al. 2020)."""
    again = _again(tokens)
    return sum(again) / len(again) if again else 0.0


def loops(tokens: Sequence[int], ended: bool) -> bool:
    """Whether a text went round in a loop.

    It did not end by itself, and at least half of its last ``TAIL`` 4-grams had occurred before.

    A shorter text is judged by all its 4-grams, and one of fewer than 12 tokens not at all.
    """
    again = _again(tokens)[-TAIL:]
    return not ended and len(tokens) >= 12 and 2 * sum(again) >= len(again)


def is_empty(text: str) -> bool:
    """Whether a text holds neither a word nor a pictogram such as an emoji."""
    return not any(c.isalnum() or (unicodedata.category(c) == "So" and c != _UNREADABLE) for c in text)


def _again(tokens: Sequence[int]) -> list[bool]:
    """Of each 4-gram, whether it occurred before."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for at in range(len(tokens) - _N + 1):
        gram = tuple(tokens[at : at + _N])
        found.append(gram in seen)
        seen.add(gram)
    return found
