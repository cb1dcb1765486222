"""What candidates are measured on: held-out questions of a behaviour, questions of general use, neutral text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from steer2edit.data.marking import can_be_named
from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.prompts import prompt_digest
from steer2edit.data.questions import Question, Split, take
from steer2edit.data.templates import TemplateArguments
from steer2edit.errors import DataError
from steer2edit.evaluation.answers import Answers, Generate, through_transformers
from steer2edit.evaluation.judged import TraitJudge
from steer2edit.evaluation.metrics import Choice, Neutral, Preference, Task, prompt_text
from steer2edit.notices import notice
from steer2edit.strength.neutral_texts import NeutralTexts

SAMPLES = 16


@dataclass(frozen=True)
class Suite:
    """Questions that show the behaviour (``attribute``) and that show what must not suffer (``utility``), with neutral text.

    Every question with two responses counts for the margin, every one with choices for MC1 and MC2; the model writes an
    answer to every question that has neither, or, where all have, to the first ``SAMPLES``, so that there is something to
    read. Where the behaviour's own ``metric`` reads written answers, or there are patterns, a function or a judge, it writes
    one to every question. It also writes an answer to every question of general use, which is marked. ``limit`` bounds the
    questions of each split, ``utility_limit`` those of general use where that is another number, and ``utility_tokens`` bounds
    their answers.
    """

    attribute: Sequence[Question]
    utility: Sequence[Question]
    neutral: NeutralTexts
    patterns: Sequence[str] = ()
    function: Callable[[str, str], float] | None = None
    max_new_tokens: int = 160
    system: str | None = None
    chat_template_kwargs: TemplateArguments | None = None
    limit: int | None = None
    utility_limit: int | None = None
    utility_tokens: int | None = None
    seed: int = 0
    run: Generate = through_transformers
    metric: MetricChoice | None = None
    judge: TraitJudge | None = None

    def tasks(self, split: Split) -> list[Task]:
        """What is run on one split, the cheapest first. Raises DataError where the split holds no question."""
        asked, useful = self.questions(split), self.useful(split)
        if not asked:
            raise DataError(f"no question falls into the split {split}; give more questions, or another --split-seed")
        found: list[Task] = [Neutral(text) for text in self.neutral]
        if pairs := [q for q in asked if q.positive]:
            found.append(Preference(pairs, own=self.metric, **self._rendering))
        if choices := [q for q in asked if q.choices]:
            found.append(Choice(choices, own=self.metric, **self._rendering))
        if choices := [q for q in useful if q.choices]:
            found.append(Choice(choices, "utility", **self._rendering))
        # with the attribute's answers first: they are what is shown
        found.append(self._answers(self.written(split)))
        if general := self.general(split):
            found.append(self._answers(general, useful=True))
        self._check_own(metric.own for task in found for metric in task.metrics)
        names = [metric.name for task in found for metric in task.metrics]
        if len(set(names)) < len(names):
            raise DataError(f"two metrics have one name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
        return found

    def useful(self, split: Split) -> list[Question]:
        """The utility's questions of a split."""
        return take(self.utility, split, self.seed)[: self.utility_limit or self.limit]

    def questions(self, split: Split) -> list[Question]:
        """The attribute's questions of a split."""
        return take(self.attribute, split, self.seed)[: self.limit]

    def written(self, split: Split) -> list[Question]:
        """Those that the model writes an answer to."""
        asked = self.questions(split)
        if (
            self.patterns
            or self.function is not None
            or self.judge is not None
            or (self.metric is not None and self.metric.kind.read is not None)
        ):
            return asked
        if self.metric is not None and self.metric.kind.needs == "accepted answers":
            return [q for q in asked if q.answers] or asked
        bare = [q for q in asked if not q.positive and not q.choices]
        return bare or list(islice(asked, SAMPLES))

    def general(self, split: Split) -> list[Question]:
        """The utility's questions that the model writes an answer to: those with accepted answers or short choices."""
        return [question for question in self.useful(split) if question.answers or can_be_named(question)]

    def answers(self, split: Split) -> int:
        """How many answers each candidate writes."""
        return len(self.written(split)) + len(self.general(split))

    def prompts(self, split: Split) -> list[str]:
        """The texts of their prompts."""
        return [prompt_text(q.prompt) for q in self.written(split)]

    def digests(self, split: Split) -> list[str]:
        """Digests of every prompt that numbers of this split rest on."""
        both: Iterator[Question] = iter([*self.questions(split), *self.useful(split)])
        return sorted({prompt_digest(q.prompt) for q in both})

    def context(self, split: Split) -> dict[str, Any]:
        """What an evaluation says of itself."""
        arguments = {"chat_template_kwargs": dict(self.chat_template_kwargs)} if self.chat_template_kwargs else {}
        return {
            "split": split,
            "split_seed": self.seed,
            "questions": len(self.questions(split)),
            "utility_questions": len(self.useful(split)),
            "neutral_tokens": {text.kind: text.tokens for text in self.neutral},
            "max_new_tokens": self.max_new_tokens,
            "system": self.system,
            **arguments,
            **({"judge": self.judge.described()} if self.judge is not None else {}),
        }

    @property
    def _rendering(self) -> dict[str, Any]:
        """How prompts become text, for the tasks."""
        return {"system": self.system, "chat_template_kwargs": self.chat_template_kwargs}

    def _answers(self, questions: Sequence[Question], useful: bool = False) -> Answers:
        if useful:
            limit = self.utility_tokens or self.max_new_tokens
            return Answers(questions, "utility", max_new_tokens=limit, run=self.run, **self._rendering)
        return Answers(
            questions,
            patterns=self.patterns,
            function=self.function,
            max_new_tokens=self.max_new_tokens,
            run=self.run,
            own=self.metric,
            judge=self.judge,
            **self._rendering,
        )

    def _check_own(self, marks: Iterable[bool]) -> None:
        """Say where the questions have not what the behaviour's own metric is measured on."""
        if self.metric is not None and not any(marks):
            notice(
                f"the behaviour's metric, {self.metric.label}, is not measured: it takes questions with "
                f"{self.metric.kind.needs}, and these have none"
            )
