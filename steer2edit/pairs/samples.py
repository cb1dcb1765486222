"""Answers to sort and to pair: each with its question, and what of it goes into a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from steer2edit.data.questions import Question
from steer2edit.engines.engine import Answer

Think = Literal["strip", "keep", "only"]
Side = Literal["positive", "negative"]


@dataclass(frozen=True)
class Sample:
    """One answer to a question. ``number`` counts the answers to one prompt."""

    question: Question
    answer: Answer
    number: int = 0

    @property
    def length(self) -> int:
        """Tokens of the thought alone where the model thought, else of the answer."""
        return self.answer.tokens if self.answer.thought is None else self.answer.thought_tokens

    def response(self, think: Think = "strip") -> str:
        """What a row holds: the answer, the thought with the answer, or the thought alone.

        An answer without a thought is itself in all three.
        """
        text = self.answer.text.strip()
        if self.answer.thought is None or think == "strip":
            return text
        thought = f"<think>\n{self.answer.thought.strip()}\n</think>"
        return thought if think == "only" else f"{thought}\n\n{text}"


@dataclass(frozen=True)
class Pair:
    """Two answers to one question, the first of which shows the behaviour."""

    positive: Sample
    negative: Sample

    @property
    def question(self) -> Question:
        """What both answer."""
        return self.positive.question

    @property
    def sides(self) -> tuple[tuple[Side, Sample], ...]:
        """Both answers with their labels."""
        return ("positive", self.positive), ("negative", self.negative)


@dataclass(frozen=True)
class Labelled:
    """One answer with its label, where there is none of the other label to the same prompt."""

    sample: Sample
    side: Side

    @property
    def question(self) -> Question:
        """What it answers."""
        return self.sample.question

    @property
    def sides(self) -> tuple[tuple[Side, Sample], ...]:
        """The answer with its label, as a pair has both of its."""
        return ((self.side, self.sample),)


Row = Pair | Labelled


def samples_of(rows: Sequence[Row], side: Side) -> list[Sample]:
    """All answers of one label."""
    found = []
    for row in rows:
        if isinstance(row, Labelled):
            found += [row.sample] if row.side == side else []
        else:
            found.append(row.positive if side == "positive" else row.negative)
    return found
