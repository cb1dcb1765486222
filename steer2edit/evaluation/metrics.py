"""The metrics of a model: each task runs it over questions.

A task gives one value for every question.

Values stay apart per question, so that intervals and differences between candidates are over questions, paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from steer2edit.bootstrap import Estimate, estimate
from steer2edit.data.answers import LABELS, Label
from steer2edit.data.contrast import Example
from steer2edit.data.metric_choice import Goal, MetricChoice
from steer2edit.data.prompts import Message, Prompt
from steer2edit.data.questions import Question
from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import encode
from steer2edit.evaluation.likelihood import response_log_probabilities
from steer2edit.plan.measured import KL_NAMES
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel
from steer2edit.strength.kl import NeutralText, Windows

MetricRole = Literal["attribute", "utility", "check"]
CONTENT_FREE = "N/A"
"""The prompt that says nothing (Zhao et al. 2021, Calibrate Before Use)."""


@dataclass(frozen=True)
class Metric:
    """A number's name, what it is for, which way is better, and its unit.

    The behaviour's ``own`` metric is the one that its file names.
    ``exponential``: exp of the mean is shown. ``tolerance`` says how much worse than the base's it may be until an edit breaks it
    (evaluation/damage.py); None for what breaks nothing.
    """

    name: str
    role: MetricRole
    goal: Goal
    unit: str = ""
    exponential: bool = False
    tolerance: float | None = None
    own: bool = False


def attributes(metrics: Iterable[Metric]) -> list[Metric]:
    """The metrics of the behaviour, its own one first."""
    return sorted((metric for metric in metrics if metric.role == "attribute"), key=lambda metric: not metric.own)


def marked(metrics: Sequence[Metric], own: MetricChoice | None) -> tuple[Metric, ...]:
    """The metrics, of which the behaviour's own one says so and has the behaviour's direction."""
    if own is None:
        return tuple(metrics)
    return tuple(replace(m, own=True, goal=own.goal) if m.name == own.label else m for m in metrics)


@dataclass(frozen=True)
class Sample:
    """A metric's values, one for each question; with ``weights`` the metric is ``Σ values / Σ weights``.

    ``groups`` name each question's prompt, where a prompt occurs more than once: such questions are not independent.
    """

    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None
    groups: tuple[str, ...] | None = None

    def estimate(self, metric: Metric) -> Estimate:
        """The metric and its interval."""
        return estimate(self.values, self.weights, groups=self.groups, exponential=metric.exponential)

    def change(self, base: Sample, metric: Metric) -> Estimate:
        """What became of ``base``, question by question: the mean difference, or the ratio where the metric is exponential."""
        differences = [a - b for a, b in zip(self.values, base.values, strict=True)]
        return estimate(differences, self.weights, groups=self.groups, exponential=metric.exponential)


@dataclass(frozen=True)
class Outcome:
    """A task's samples by metric name, and the answers, where the model was asked to write."""

    samples: Mapping[str, Sample]
    answers: tuple[str, ...] = ()


class Task(Protocol):
    """Something to run a model on."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What it yields."""

    def measure(self, loaded: LoadedModel, progress: Progress = silent) -> Outcome:
        """Run the model, with whatever hooks are on it."""


@dataclass(frozen=True)
class Preference:
    """Positive against negative responses by log-probability.

    ``margin`` is the mean log-probability per token of the positive response minus that of the negative, in nats;
    ``calibrated margin`` is that minus the same after a prompt that says nothing, so that a response which is likely anywhere
    gains nothing by it; ``preferred`` how often the margin is positive.
    """

    questions: Sequence[Question]
    system: str | None = None
    chat_template_kwargs: TemplateArguments | None = None
    own: MetricChoice | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        both = [Metric(name, "attribute", "more", "nats/token") for name in ("margin", "calibrated margin")]
        return marked([*both, Metric("preferred", "attribute", "more")], self.own)

    def measure(self, loaded: LoadedModel, progress: Progress = silent) -> Outcome:
        margins = self._margins(loaded, [q.prompt for q in self.questions], progress)
        bare = self._margins(loaded, [_free(q.prompt) for q in self.questions], progress)
        samples = {
            "margin": margins,
            "calibrated margin": [m - b for m, b in zip(margins, bare, strict=True)],
            "preferred": [float(m > 0) for m in margins],
        }
        return Outcome({name: Sample(tuple(values)) for name, values in samples.items()})

    def _margins(self, loaded: LoadedModel, prompts: Sequence[Prompt], progress: Progress) -> list[float]:
        pairs = list(zip(prompts, self.questions, strict=True))
        examples = [
            Example(prompt, _response(q, label), label, q.where, i)
            for i, (prompt, q) in enumerate(pairs)
            for label in LABELS
        ]
        encoded = encode(
            examples,
            loaded.tokenizer,
            system=self.system,
            span="response",
            context=loaded.context,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        means = [float(x.mean()) for x in response_log_probabilities(loaded, encoded, progress=progress)]
        return [positive - negative for positive, negative in zip(means[::2], means[1::2], strict=True)]


@dataclass(frozen=True)
class Choice:
    """Multiple choice by the log-probability of each choice as the response (Lin et al. 2022, TruthfulQA).

    ``MC1`` is 1 where the best true choice (the first marked true) is likelier than every false one, by total
    log-probability; ``MC2`` is the probability of all true choices together, normalised over the choices. As a utility
    there is ``likeliest choice right`` alone: MC1 by log-probability per token, so that longer choices are at no disadvantage.
    It reads choices and not answers: a model that learned to like short responses gains by it (``answers right`` does not).
    """

    questions: Sequence[Question]
    role: MetricRole = "attribute"
    system: str | None = None
    chat_template_kwargs: TemplateArguments | None = None
    own: MetricChoice | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        if self.role == "utility":
            return (Metric("likeliest choice right", "utility", "more"),)
        return marked([Metric("MC1", self.role, "more"), Metric("MC2", self.role, "more")], self.own)

    def measure(self, loaded: LoadedModel, progress: Progress = silent) -> Outcome:
        label: Label = "positive"
        examples = [
            Example(question.prompt, text, label, question.where, index)
            for index, question in enumerate(self.questions)
            for text in question.choices
        ]
        encoded = encode(
            examples,
            loaded.tokenizer,
            system=self.system,
            span="response",
            context=loaded.context,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        scores = iter(response_log_probabilities(loaded, encoded, progress=progress))
        found: dict[str, list[float]] = {"MC1": [], "MC2": [], "likeliest choice right": []}
        for question in self.questions:
            rows = [next(scores) for _ in question.choices]
            totals = torch.stack([row.sum() for row in rows])
            means = torch.stack([row.mean() for row in rows])
            true = torch.tensor(question.labels)
            best = question.labels.index(True)
            found["MC1"].append(float(totals[best] > totals[~true].max()))
            found["likeliest choice right"].append(float(means[best] > means[~true].max()))
            found["MC2"].append(float(totals.softmax(0)[true].sum()))
        return Outcome({metric.name: Sample(tuple(found[metric.name])) for metric in self.metrics})


@dataclass(frozen=True)
class Neutral:
    """Divergence from the base on one neutral text, over all its tokens, and the perplexity of prose.

    The sampling unit is a window of prose, or an answer.
    """

    text: NeutralText

    @property
    def kl(self) -> Metric:
        """The KL on this text."""
        return Metric(KL_NAMES[self.text.kind], "utility", "less", "nats/token")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        prose = self.text.kind == "prose"
        return self.kl, *([Metric("perplexity", "utility", "less", exponential=True)] if prose else [])

    def measure(self, loaded: LoadedModel, progress: Progress = silent) -> Outcome:
        return self.outcome(self.text.windows(loaded, progress=progress))

    def outcome(self, found: Windows) -> Outcome:
        """The samples of what was measured on the text."""
        weights = tuple(map(float, found.tokens))
        samples = {self.kl.name: Sample(found.kl, weights), "perplexity": Sample(found.loss, weights)}
        return Outcome({metric.name: samples[metric.name] for metric in self.metrics})


def _response(question: Question, label: Label) -> str:
    return question.positive if label == "positive" else question.negative


def _free(prompt: Prompt) -> Prompt:
    if isinstance(prompt, str):
        return CONTENT_FREE
    return (*(m for m in prompt[:-1] if m.role == "system"), Message("user", CONTENT_FREE))
