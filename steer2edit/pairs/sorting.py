"""What answers are sorted by: length, a pattern, a function, a judge, or the right answer.

A way to sort is one function from answers to numbers. An answer without a number (nan) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from steer2edit.data.answer_text import matches
from steer2edit.data.marking import is_exact, names_right
from steer2edit.data.metric_choice import Goal
from steer2edit.data.prompts import Prompt
from steer2edit.errors import DataError
from steer2edit.pairs.samples import Sample

SortBy = Literal["length", "pattern", "function", "judge", "answer"]
Values = list[float]


def goal_of(by: SortBy) -> Goal:
    """Which end shows the behaviour unless the user says otherwise: short answers, and high values of all else."""
    return "less" if by == "length" else "more"


def by_length(samples: Sequence[Sample]) -> Values:
    """Tokens of each answer; where the model thought, those of the thought alone."""
    return [float(sample.length) for sample in samples]


def by_pattern(samples: Sequence[Sample], pattern: str) -> Values:
    """1 where the regular expression is found in the answer, else 0. Raises DataError where it takes seconds to look."""
    return [float(matches(pattern, sample.answer.text) > 0) for sample in samples]


def by_function(samples: Sequence[Sample], function: Callable[[str, str], float]) -> Values:
    """A user's own number, of the prompt's text and the answer. Raises DataError where the function fails."""
    name = str(getattr(function, "__name__", type(function).__name__))
    found: Values = []
    for sample in samples:
        score: Any
        try:
            score = float(function(prompt_text(sample.question.prompt), sample.answer.text))
        except Exception as error:  # whatever the user's function raises
            raise DataError(f"{name} failed on an answer: {type(error).__name__}: {error}") from None
        if not math.isfinite(score):
            raise DataError(f"{name} gave {score} for an answer; expected a finite number")
        found.append(score)
    return found


def by_answer(samples: Sequence[Sample]) -> Values:
    """1 where the answer is right, 0 where it is wrong, nan where the question's row names no right answer."""
    return [float(is_right(sample)) if has_key(sample) else math.nan for sample in samples]


def has_key(sample: Sample) -> bool:
    """Whether the question's row says what is right."""
    return bool(sample.question.answers or sample.question.choices)


def is_right(sample: Sample) -> bool:
    """Whether an answer says what is accepted, or names the right choice alone; see ``data.marking``."""
    accepted = sample.question.answers
    text = sample.answer.text
    return is_exact(text, accepted) if accepted else names_right(text, sample.question)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as text: the last message of a chat."""
    return prompt if isinstance(prompt, str) else prompt[-1].content
