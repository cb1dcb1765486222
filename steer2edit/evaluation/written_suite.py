"""What models are asked to answer in writing: held-out questions of a behaviour, and questions of general use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from steer2edit.data.marking import can_be_named
from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.prompts import prompt_digest, prompt_text
from steer2edit.data.questions import Question, Split, take
from steer2edit.data.templates import TemplateArguments
from steer2edit.errors import DataError
from steer2edit.evaluation.answers import Answers, EngineOf, in_this_process
from steer2edit.evaluation.judged import TraitJudge
from steer2edit.evaluation.metrics import Choice, Preference, Task
from steer2edit.evaluation.projection import Projection


@dataclass(frozen=True)
class WrittenSuite:
    """Questions that show the behaviour (``attribute``) and that show what must not suffer (``utility``), answered in writing.

    The model writes an answer to every question of the behaviour, and to every question of general use that can be marked.
    ``limit`` bounds the questions of each split, ``utility_limit`` those of general use where that is another number, and
    ``utility_tokens`` bounds their answers. ``metric`` is the behaviour's own. Answers are greedy, with the model's own
    repetition penalty or another ``repetition_penalty``.
    """

    attribute: Sequence[Question]
    utility: Sequence[Question]
    _: KW_ONLY
    patterns: Sequence[str] = ()
    function: Callable[[str, str], float] | None = None
    max_new_tokens: int = 160
    system: str | None = None
    chat_template_kwargs: TemplateArguments | None = None
    limit: int | None = None
    utility_limit: int | None = None
    utility_tokens: int | None = None
    seed: int = 0
    engine: EngineOf = in_this_process
    metric: MetricChoice | None = None
    projection: Projection | None = None
    judge: TraitJudge | None = None
    repetition_penalty: float | None = None

    def answer_tasks(self, split: Split) -> list[Answers]:
        """What is written on one split, the behaviour's answers first: they are what is shown.

        Raises DataError where the split holds no question.
        """
        if not self.questions(split):
            raise DataError(f"no question falls into the split {split}; give more questions, or another --split-seed")
        general = self.general(split)
        return [self._answers(self.written(split)), *([self._answers(general, useful=True)] if general else [])]

    def likelihood_tasks(self, split: Split) -> list[Task]:
        """What is measured on one split by the log-probabilities of responses and choices."""
        asked, useful = self.questions(split), self.useful(split)
        found: list[Task] = []
        if pairs := [q for q in asked if q.positive]:
            found.append(Preference(pairs, own=self.metric, **self._rendering))
        if choices := [q for q in asked if q.choices]:
            found.append(Choice(choices, own=self.metric, **self._rendering))
        if choices := [q for q in useful if q.choices]:
            found.append(Choice(choices, "utility", **self._rendering))
        return found

    def useful(self, split: Split) -> list[Question]:
        """The utility's questions of a split."""
        return take(self.utility, split, self.seed)[: self.utility_limit or self.limit]

    def questions(self, split: Split) -> list[Question]:
        """The attribute's questions of a split."""
        return take(self.attribute, split, self.seed)[: self.limit]

    def written(self, split: Split) -> list[Question]:
        """Those that the model writes an answer to."""
        return self.questions(split)

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
            "max_new_tokens": self.max_new_tokens,
            "system": self.system,
            **arguments,
            **({"judge": self.judge.described()} if self.judge is not None else {}),
            **({} if self.repetition_penalty is None else {"repetition_penalty": self.repetition_penalty}),
        }

    @property
    def _rendering(self) -> dict[str, Any]:
        """How prompts become text, for the tasks."""
        return {"system": self.system, "chat_template_kwargs": self.chat_template_kwargs}

    def _answers(self, questions: Sequence[Question], useful: bool = False) -> Answers:
        writing = {"engine": self.engine, "repetition_penalty": self.repetition_penalty, **self._rendering}
        if useful:
            limit = self.utility_tokens or self.max_new_tokens
            return Answers(questions, "utility", max_new_tokens=limit, **writing)
        return Answers(
            questions,
            patterns=self.patterns,
            function=self.function,
            max_new_tokens=self.max_new_tokens,
            own=self.metric,
            projection=self.projection,
            judge=self.judge,
            **writing,
        )


def check_names(tasks: Iterable[Task]) -> None:
    """Raise DataError where two metrics of the tasks have one name."""
    names = [metric.name for task in tasks for metric in task.metrics]
    if len(set(names)) < len(names):
        raise DataError(f"two metrics have one name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
