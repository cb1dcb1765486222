"""How much work an evaluation or a search is, said before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steer2edit.capture.populations import RESAMPLES
from steer2edit.data.questions import Split
from steer2edit.errors import count_of
from steer2edit.evaluation.baselines import Match
from steer2edit.evaluation.suite import Suite

SEARCH_PASSES = 2
"""Passes that bring a baseline to a KL, about, beside the one that its evaluation takes over."""


@dataclass(frozen=True)
class Work:
    """``candidates`` (the base is one) on ``questions`` each, ``answers`` of which are written in up to ``answer_tokens``.

    ``passes`` are runs over the whole text that budgets are on, of ``tokens`` predictions, those that bring baselines to a KL
    included.
    """

    candidates: int
    questions: int
    answers: int
    answer_tokens: int
    passes: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{count_of(self.candidates, 'candidate')}, each on {count_of(self.questions, 'question')} and "
            f"{count_of(self.answers, 'written answer')} of up to {count_of(self.answer_tokens, 'token')}; about "
            f"{count_of(self.passes, 'pass', 'passes')} over {count_of(self.tokens, 'token', style=',')} of neutral text"
        )


def work_of(suite: Suite, split: Split, candidates: int, passes: int = 0) -> Work:
    """The work of ``candidates`` and the base on one split; ``passes`` come before the evaluation itself."""
    context = suite.context(split)
    asked = context["questions"] + context["utility_questions"]
    total = candidates + 1
    return Work(total, asked, suite.answers(split), suite.max_new_tokens, total + passes, suite.neutral.budget.tokens)


def baselines_work(match: Match, draws: int, strengths: Sequence[float] = ()) -> tuple[int, int]:
    """How many candidates :func:`assess.with_baselines` makes, and about how many passes over the neutral text that takes."""
    edits = draws + min(draws, RESAMPLES["shuffled"]) + 3
    matched = edits - 1 if match == "kl" else 0
    # activation steering at the plan's KL is one more, and the plan's own KL takes one pass
    return edits + 1 + len(strengths), 1 + SEARCH_PASSES * (matched + 1)
