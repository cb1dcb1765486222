"""Labels from a model's own answers: the prompts whose answer shows the behaviour, against those whose answer does not.

This is how functional token resonance imaging labels prompts (Mixture of Tunable Experts, arXiv 2502.11096): routing is then
counted over the tokens of the prompt alone, before a word of the answer is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steer2edit.data.answers import LABELS, Label
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import Example, as_chats
from steer2edit.data.metric_choice import METRICS, MetricChoice, Written
from steer2edit.data.prompts import Prompt, prompt_digest, prompt_text
from steer2edit.data.questions import Question
from steer2edit.engines.engine import Engine, Request, Sampling, written
from steer2edit.errors import DataError
from steer2edit.pairs.filters import Allowed, sample_fault
from steer2edit.pairs.samples import Sample
from steer2edit.progress import Progress, silent

LEAST = 5
"""Prompts that a class has at least."""
SOURCE = "response"
"""How statistics name such labels in their origin."""


@dataclass(frozen=True)
class OwnLabels:
    """The prompts with the model's own answers as labelled examples.

    An answer shows the behaviour where its ``metric`` is beyond ``bound``, the middle between the data's two sides. ``left_out``
    counts answers that are not labelled.
    """

    examples: tuple[Example, ...]
    metric: MetricChoice
    bound: float
    left_out: int

    def count(self, label: Label) -> int:
        """How many prompts have this label."""
        return sum(example.label == label for example in self.examples)

    def __str__(self) -> str:
        told = "over" if self.metric.goal == "more" else "under"
        text = (
            f"of the model's own answers {self.count('positive')} show the behaviour ({self.metric.label} {told} "
            f"{self.bound:.3g}) and {self.count('negative')} do not"
        )
        return text + (f"; {self.left_out} are empty or go round in a loop" if self.left_out else "")


def own_labels(behavior: Behavior, engine: Engine, sampling: Sampling, progress: Progress = silent) -> OwnLabels:
    """Let the model answer each prompt of the behaviour once, without an instruction, and label the prompt by the answer.

    The behaviour's metric reads the answers and, for the bound, the data's own responses. Raises DataError where the metric is
    not of written answers, where the data's two sides do not differ in it, and where a class gets fewer than :data:`LEAST`
    prompts.
    """
    metric = _metric(behavior)
    bound = _bound(behavior.examples, metric, engine)
    # what the engine answers is a chat, so that the prompts are read as chats too
    prompts = {prompt_digest(example.prompt): example for example in as_chats(behavior.examples)}
    questions = [Question(example.prompt, example.where) for example in prompts.values()]
    answers = written(engine, [_asked(question.prompt, behavior.system) for question in questions], sampling, progress)
    examples = []
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if sample_fault(Sample(question, answer), Allowed(cut=True, refusals=True)) is None:
            value = metric.read(Written(prompt_text(question.prompt), answer.text, answer.tokens))
            label = _label(value, bound, metric)
            examples.append(Example(question.prompt, answer.text.strip(), label, question.where, row))
    found = OwnLabels(tuple(examples), metric, bound, len(questions) - len(examples))
    if min(found.count(label) for label in LABELS) < LEAST:
        raise DataError(
            f"{found}: expected {LEAST} prompts or more of each kind. Give data with more or other prompts, or one whose metric "
            "tells this model's answers apart"
        )
    return found


def _metric(behavior: Behavior) -> MetricChoice:
    metric = behavior.metric
    if metric is None or metric.kind.read is None:
        readable = ", ".join(name for name, kind in METRICS.items() if kind.read is not None)
        told = "names no metric" if metric is None else f"has the metric {metric.name}, which no written answer has"
        raise DataError(
            f"{behavior.name} {told}: the model's own answers are labelled by one of {readable}. Make the data with "
            "steer2edit data --metric, or give a behaviour whose file names one"
        )
    return metric


def _bound(examples: Sequence[Example], metric: MetricChoice, engine: Engine) -> float:
    """The middle between the means of both sides, in the metric. Raises DataError where they do not differ as they should."""

    def mean(label: Label) -> float:
        values = [
            metric.read(Written(prompt_text(e.prompt), e.response, engine.count_tokens(e.response) or 0))
            for e in examples
            if e.label == label
        ]
        return sum(values) / len(values)

    good, bad = mean("positive"), mean("negative")
    if (good > bad) != (metric.goal == "more") or good == bad:
        raise DataError(
            f"the data's positive responses have {good:.3g} in {metric.label} and the negative ones {bad:.3g}; expected "
            f"{metric.goal} in the positive ones, so that the middle tells answers apart"
        )
    return (good + bad) / 2


def _label(value: float, bound: float, metric: MetricChoice) -> Label:
    shows = value > bound if metric.goal == "more" else value < bound
    return "positive" if shows else "negative"


def _asked(prompt: Prompt, system: str | None) -> Request:
    """A request for the plain answer; a system message that the prompt brings takes the place of ``system``."""
    own = not isinstance(prompt, str) and prompt[0].role == "system"
    return Request(prompt, None if own else system)
