"""Texts that say nearly the same: by the words that they share in threes (Jaccard similarity of word trigrams).

Short texts have few trigrams, and agree by right: "Yes." to two questions is not a copy. They are compared in one context alone,
such as one prompt, and repeat another where they are the same but for case, white space and the punctuation around words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from steer2edit.data.answer_text import each_word

SIMILAR = 0.7
"""From this similarity on two texts are near-duplicates."""
LEAST_WORDS = 8
"""Texts of fewer words are short."""
_N = 3
_BEFORE, _AFTER = "\"'“”„‘’«»([*_`「『《（", "\"'“”‘’«»)]*_`.,;:!?…」』》）。、，；：！？"
"""Punctuation that may stand before a word and after it. Others, as in 2-2 or C#, are part of it."""


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case; in scripts without spaces between words, its characters."""
    return list(each_word(text.casefold()))


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


def is_short(text: str) -> bool:
    """Whether a text has too few words to be compared by its trigrams."""
    return len(words_of(text)) < LEAST_WORDS


def plain(text: str) -> tuple[str, ...]:
    """What stands between white space in a text, without case and the punctuation around words."""
    parts = (part.lstrip(_BEFORE).rstrip(_AFTER) for part in text.casefold().split())
    return tuple(part for part in parts if part)


def copies(texts: Sequence[Sequence[str]], contexts: Sequence[Hashable]) -> set[int]:
    """The indices of groups of short texts that are those of an earlier group in the same context.

    A group with a text that is not short is never among them: :func:`repeated` compares these.
    """
    seen: set[tuple[Hashable, ...]] = set()
    found: set[int] = set()
    for index, (group, context) in enumerate(zip(texts, contexts, strict=True)):
        if not all(map(is_short, group)):
            continue
        key = (context, *map(plain, group))
        if key in seen:
            found.add(index)
        seen.add(key)
    return found
