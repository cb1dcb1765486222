"""Whether an answer in words names the right choice of a question, which the power table counts."""

from __future__ import annotations

import re

from steer2edit.data.questions import Question


def names_right(answer: str, question: Question) -> bool:
    """Whether an answer names the right choice and no wrong one."""
    said = f" {_words(answer)} "
    named = [f" {_words(choice)} " in said for choice in question.choices]
    marks = list(zip(named, question.labels, strict=True))
    return (True, True) in marks and (True, False) not in marks


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
