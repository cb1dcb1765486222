"""The metrics of written answers: the model writes, and each answer is read for what is right, wanted or damaged.

A metric is one entry: a :class:`Reading` gives its value for one answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steer2edit.data.degeneration import is_empty, loops, repetition
from steer2edit.data.language import left_language
from steer2edit.data.marking import is_exact, names_right
from steer2edit.data.metric_choice import MetricChoice, Written
from steer2edit.data.prompts import prompt_text
from steer2edit.data.questions import Question
from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import token_ids
from steer2edit.engines.engine import Answer as Reply
from steer2edit.engines.engine import Engine, Request, Sampling, written
from steer2edit.engines.transformers_engine import TransformersEngine
from steer2edit.errors import DataError
from steer2edit.evaluation.judged import TraitJudge
from steer2edit.evaluation.metrics import Metric, MetricRole, Outcome, Sample, marked
from steer2edit.evaluation.projection import Projection
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel

EngineOf = Callable[[LoadedModel, TemplateArguments | None], Engine]
"""What writes a candidate's answers, with arguments for the chat template."""
ANSWERS_RIGHT = "answers right"
_AT_A_TIME = 256
"""Answers that the loaded model writes at a time."""


def in_this_process(loaded: LoadedModel, chat_template_kwargs: TemplateArguments | None = None) -> Engine:
    """The loaded model itself, under whatever hooks are on it."""
    return TransformersEngine(loaded, chat_template_kwargs=chat_template_kwargs, batch_size=_AT_A_TIME)


@dataclass(frozen=True)
class Answer:
    """An answer to a question: its text without a thought, and whether it ended by itself.

    ``length`` is its number of tokens, and ``tokens`` are they, both with the thought.
    """

    question: Question
    text: str
    ended: bool
    length: int
    tokens: Sequence[int]


@dataclass(frozen=True)
class Reading:
    """A metric of written answers; ``value`` reads one answer."""

    metric: Metric
    value: Callable[[Answer], float]


CHECKS = (
    Reading(Metric("repetition", "check", "less", tolerance=0.05), lambda a: repetition(a.tokens)),
    Reading(Metric("loops", "check", "less", tolerance=0.02), lambda a: loops(a.tokens, a.ended)),
    Reading(Metric("empty", "check", "less", tolerance=0.02), lambda a: is_empty(a.text)),
    Reading(
        Metric("other language", "check", "less", tolerance=0.02),
        lambda a: left_language(prompt_text(a.question.prompt), a.text),
    ),
)
"""Signs of damage, read in every written answer. All but the first are shares of the answers."""


@dataclass(frozen=True)
class Answers:
    """The model writes: length, patterns found, exact answers, a user's own score, and signs of damage.

    The behaviour's ``own`` metric comes first where it is one of written answers.
    ``patterns`` are regular expressions; a rate is the share of answers in which one is found. ``function`` takes the prompt's
    text and the answer and gives a number. ``engine`` gives what writes. As a utility there are ``answers right`` (every
    question has an accepted answer, or choices, which the model is not shown) and the signs of damage, as those of general
    answers. With a ``projection`` or a ``judge`` there is what they say, apart from the model's own measuring: :meth:`judged`.
    Without a ``repetition_penalty`` the model's own is in force.
    """

    questions: Sequence[Question]
    role: MetricRole = "attribute"
    patterns: Sequence[str] = ()
    function: Callable[[str, str], float] | None = None
    max_new_tokens: int = 160
    system: str | None = None
    chat_template_kwargs: TemplateArguments | None = None
    engine: EngineOf = in_this_process
    own: MetricChoice | None = None
    projection: Projection | None = None
    judge: TraitJudge | None = None
    repetition_penalty: float | None = None

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What is read in each answer."""
        if self.role == "utility":
            right = Metric(ANSWERS_RIGHT, "utility", "more", tolerance=0.02)
            general = [
                replace(one, metric=replace(one.metric, name=f"{one.metric.name}, general answers")) for one in CHECKS
            ]
            return Reading(right, _is_right), *general
        choices = [MetricChoice("length", "less"), *(MetricChoice("pattern", "more", one) for one in self.patterns)]
        if self.own is not None and self.own.kind.read is not None:
            choices = [self.own, *(one for one in choices if one.label != self.own.label)]
        found = [_chosen(choice, self.role) for choice in choices]
        if self.function is not None:
            found.append(_own(self.function))
        if any(question.answers for question in self.questions):
            found.append(Reading(Metric("exact answers", self.role, "more"), _is_right))
        metrics = marked([reading.metric for reading in found], self.own)
        own_first = sorted(zip(found, metrics, strict=True), key=lambda pair: not pair[1].own)
        return *(replace(reading, metric=metric) for reading, metric in own_first), *CHECKS

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return *(reading.metric for reading in self.readings), *(m for one in self._judges for m in one.metrics)

    def judged(self, answers: Sequence[str], progress: Progress = silent) -> Mapping[str, Sample]:
        """What the base's projection and the judge say of answers to the questions. No candidate may be on the model."""
        every = [one.samples(self.questions, answers, progress) for one in self._judges]
        return {name: sample for found in every for name, sample in found.items()}

    @property
    def _judges(self) -> list[Projection | TraitJudge]:
        return [one for one in (self.projection, self.judge) if one is not None]

    def measure(self, loaded: LoadedModel, progress: Progress = silent) -> Outcome:
        """Let the candidate's engine write, and read its answers."""
        return self.through(self.engine(loaded, self.chat_template_kwargs), loaded.tokenizer, progress)

    def through(self, engine: Engine, tokenizer: Any, progress: Progress = silent) -> Outcome:
        """The metrics of what an engine writes.

        Where it does not tell the tokens of an answer, they are those that ``tokenizer`` makes of its text.
        """
        requests = [Request(question.prompt, self.system, where=question.where) for question in self.questions]
        sampling = Sampling(self.max_new_tokens, repetition_penalty=self.repetition_penalty)
        replies = written(engine, requests, sampling, progress)
        rows = iter(token_ids(tokenizer, [_whole(one) for one in replies if one.ids is None], False))
        answers = [
            Answer(
                question,
                reply.text,
                reply.ended,
                reply.tokens + reply.thought_tokens,
                next(rows) if reply.ids is None else reply.ids,
            )
            for question, reply in zip(self.questions, replies, strict=True)
        ]
        samples = {}
        for reading in self.readings:
            # where some questions have an accepted answer and others have none, those with one count
            asked = [a for a in answers if a.question.answers] if reading.metric.name == "exact answers" else answers
            samples[reading.metric.name] = Sample(tuple(float(reading.value(answer)) for answer in asked))
        return Outcome(samples, tuple(answer.text for answer in answers))


def _whole(reply: Reply) -> str:
    """All that a model wrote."""
    return reply.text if reply.thought is None else f"{reply.thought}\n{reply.text}"


def _is_right(answer: Answer) -> float:
    """Whether an answer is what is accepted, or names the right choice alone."""
    accepted = answer.question.answers
    return is_exact(answer.text, accepted) if accepted else names_right(answer.text, answer.question)


def _chosen(choice: MetricChoice, role: MetricRole) -> Reading:
    """A metric of ``data.metric_choice`` that reads written answers."""
    metric = Metric(choice.label, role, choice.goal, choice.kind.unit)
    return Reading(metric, lambda a: choice.read(Written(prompt_text(a.question.prompt), a.text, a.length)))


def _own(function: Callable[[str, str], float]) -> Reading:
    """A user's own score."""
    name = str(getattr(function, "__name__", type(function).__name__))

    def value(answer: Answer) -> float:
        score: Any
        try:
            score = float(function(prompt_text(answer.question.prompt), answer.text))
        except Exception as error:  # whatever the user's function raises
            raise DataError(f"{name} failed on an answer: {type(error).__name__}: {error}") from None
        if not math.isfinite(score):
            raise DataError(f"{name} gave {score} for an answer; expected a finite number")
        return float(score)

    return Reading(Metric(name, "attribute", "more"), value)
