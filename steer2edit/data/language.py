"""Whether an answer left the language of its prompt: by script, and by function words where scripts are the same.

Function words are counted for eleven languages; between two others of one script, nothing is noticed. A text with fewer than
``LEAST`` of them, or with nearly as many of another language, belongs to no language, and then its script alone counts.
Quotations and code in another script are passed over as long as they are the smaller part.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

LEAST = 3
"""Function words from which on a text's language is told."""
_LETTERS = 8
_EAST_ASIAN = {"CJK": "HAN", "HIRAGANA": "KANA", "KATAKANA": "KANA"}
FUNCTION_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(listed.split())
    for language, listed in {
        "English": "the and of to is in that it you for are with this be have was can or your not what how when which they",
        "French": "le la les des et est une dans pour que qui pas vous il elle sur avec ce cette sont être nous je du au",
        "German": "der die das und ist nicht ein eine zu den von mit sie auf für dem im sind auch wie oder ich wir es wird",
        "Spanish": "el la los las y es una que de en por con para no se su como más pero son está del usted lo ser",
        "Italian": "il la di che e è un una per non con sono del della come più gli le si anche nel questo essere ha ma",
        "Portuguese": "o a os as e é um uma que de em para com não se por mais como do da são você ou ser no na",
        "Dutch": "de het een en is van niet dat te zijn op met voor in ook aan je er maar om als worden wordt heeft die",
        "Swedish": "och att det som en är på av för med den till inte ett har om kan jag eller du från men vara",
        "Polish": "i w na z nie to się że jest do jak o co po ale czy od za przez być może są lub dla",
        "Russian": "и в не на что с это как по но он она они я мы вы из за для от или так же есть к у",
        "Ukrainian": "і в не на що з це як та до але він вона вони я ми ви із за для від або є у й",
    }.items()
}


def left_language(prompt: str, answer: str) -> bool:
    """Whether most of the answer is in another script than the prompt, or in another language of the same script."""
    mine, theirs = script(answer), script(prompt)
    if mine is None or theirs is None:
        return False
    if mine != theirs:
        return True
    spoken, asked = language(answer), language(prompt)
    return spoken is not None and asked is not None and spoken != asked


def script(text: str) -> str | None:
    """The script of most letters, as Unicode names it (LATIN, CYRILLIC, …); None with fewer than a few letters.

    Chinese is HAN; Japanese is KANA as soon as a tenth of its characters are.
    """
    counts = Counter(_script(letter) for letter in text if letter.isalpha())
    total = sum(counts.values())
    if total < (_LETTERS if "HAN" not in counts and "HANGUL" not in counts else 2):
        return None
    if counts["KANA"] * 10 >= total:
        return "KANA"
    return counts.most_common(1)[0][0]


def language(text: str) -> str | None:
    """The language whose function words are the most frequent by far; None where that is not clear."""
    found = re.findall(r"[^\W\d_]+", text.casefold())
    counts = sorted(
        ((sum(word in listed for word in found), name) for name, listed in FUNCTION_WORDS.items()), reverse=True
    )
    (most, name), (second, _) = counts[:2]
    return name if most >= LEAST and most >= 1.5 * second else None


def _script(letter: str) -> str:
    first = unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
    return _EAST_ASIAN.get(first, first)
