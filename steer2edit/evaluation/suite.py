"""What candidates are measured on: held-out questions of a behaviour, questions of general use, neutral text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from itertools import islice
from typing import Any

from steer2edit.data.questions import Question, Split
from steer2edit.evaluation.metrics import Neutral, Task
from steer2edit.evaluation.written_suite import WrittenSuite, check_names
from steer2edit.notices import notice
from steer2edit.strength.neutral_texts import NeutralTexts

SAMPLES = 16


@dataclass(frozen=True)
class Suite(WrittenSuite):
    """The questions of a :class:`~steer2edit.evaluation.written_suite.WrittenSuite`, with neutral text.

    Every question with two responses counts for the margin, every one with choices for MC1 and MC2; the model writes an
    answer to every question that has neither, or, where all have, to the first ``SAMPLES``, so that there is something to
    read. Where the behaviour's own ``metric`` reads written answers, or there are patterns, a function or a judge, it writes
    one to every question; ``write_all`` asks for that. It also writes an answer to every question of general use, which is
    marked.
    """

    neutral: NeutralTexts
    _: KW_ONLY
    write_all: bool = False

    def chosen_by(self, *names: str | None) -> Suite:
        """The suite for a choice by the metrics ``names``.

        Where one of them reads the behaviour's written answers, every question gets an answer. Raises DataError where no
        question is for selection.
        """
        read = {metric.name for metric in self.answer_tasks("select")[0].metrics}
        return replace(self, write_all=self.write_all or not read.isdisjoint(names))

    def tasks(self, split: Split) -> list[Task]:
        """What is run on one split, the cheapest first. Raises DataError where the split holds no question."""
        answers = self.answer_tasks(split)
        found: list[Task] = [*map(Neutral, self.neutral), *self.likelihood_tasks(split), *answers]
        self._check_own(metric.own for task in found for metric in task.metrics)
        check_names(found)
        return found

    def written(self, split: Split) -> list[Question]:
        """Those that the model writes an answer to."""
        asked = self.questions(split)
        if (
            self.write_all
            or self.patterns
            or self.function is not None
            or self.judge is not None
            or (self.metric is not None and self.metric.kind.read is not None)
        ):
            return asked
        if self.metric is not None and self.metric.kind.needs == "accepted answers":
            return [q for q in asked if q.answers] or asked
        bare = [q for q in asked if not q.positive and not q.choices]
        return bare or list(islice(asked, SAMPLES))

    def context(self, split: Split) -> dict[str, Any]:
        """What an evaluation says of itself."""
        return {**super().context(split), "neutral_tokens": {text.kind: text.tokens for text in self.neutral}}

    def _check_own(self, marks: Iterable[bool]) -> None:
        """Say where the questions have not what the behaviour's own metric is measured on."""
        if self.metric is not None and not any(marks):
            notice(
                f"the behaviour's metric, {self.metric.label}, is not measured: it takes questions with "
                f"{self.metric.kind.needs}, and these have none"
            )
