"""Texts that say nearly the same: by the words that they share in threes (Jaccard similarity of word trigrams)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

SIMILAR = 0.7
"""From this similarity on two texts are near-duplicates."""
LEAST_WORDS = 8
"""Shorter answers to different prompts are not compared: "Yes." is not a copy."""
_N = 3


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.casefold())


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The trigrams of a text's words; of a shorter text the words themselves."""
    words = words_of(text)
    return frozenset(tuple(words[i : i + _N]) for i in range(max(1, len(words) - _N + 1))) if words else frozenset()


def similarity(a: str, b: str) -> float:
    """The share of both texts' trigrams that they have in common. Two texts without a word are alike."""
    one, two = shingles(a), shingles(b)
    return len(one & two) / len(one | two) if one | two else 1.0


def repeated(texts: Sequence[str], bound: float = SIMILAR, least_words: int = LEAST_WORDS) -> set[int]:
    """The indices of texts that are near-duplicates of an earlier one that is not itself left out.

    Texts of fewer than ``least_words`` words are never among them.
    """
    found: set[int] = set()
    sizes: dict[int, int] = {}
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        own = shingles(text)
        if len(words_of(text)) < least_words:
            continue
        shared = Counter(other for shingle in own for other in holders[shingle])
        if any(count >= bound * (len(own) + sizes[other] - count) for other, count in shared.items()):
            found.add(index)
            continue
        sizes[index] = len(own)
        for shingle in own:
            holders[shingle].append(index)
    return found
