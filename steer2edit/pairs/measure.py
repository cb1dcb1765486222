"""What rows are worth: they are read by their model, and compared by the behaviour's own metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steer2edit.bootstrap import Estimate, estimate
from steer2edit.capture.per_example import stream_means
from steer2edit.data.contrast import Example
from steer2edit.data.metric_choice import Goal, MetricChoice, Written
from steer2edit.data.prompts import prompt_digest, prompt_text
from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import encode
from steer2edit.pairs.samples import Labelled, Pair, Row, Sample, Think, samples_of
from steer2edit.pairs.separation import Separation, separation
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel

PAIRS = 128
"""Of so many pairs at most the activations are read, which takes less time than it took to write them."""


@dataclass(frozen=True)
class Difference:
    """Positive minus negative answers in one metric, with its interval over prompts, and which way is wanted."""

    metric: str
    goal: Goal
    found: Estimate

    @property
    def obeyed(self) -> bool:
        """Whether the answers differ as they should, beyond doubt."""
        return self.found.low > 0 if self.goal == "more" else self.found.high < 0

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "metric": self.metric,
            "goal": self.goal,
            "difference": self.found.value,
            "interval": [self.found.low, self.found.high],
            "prompts": self.found.count,
            "as_wanted": self.obeyed,
        }


def read_separation(
    loaded: LoadedModel,
    rows: Sequence[Row],
    *,
    think: Think = "strip",
    chat_template_kwargs: TemplateArguments | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Separation | None:
    """How far both sides lie apart in the model; None for rows of too few prompts.

    Two answers to one prompt are read up to the shorter's length, as a capture reads them. Of rows with one answer each, any
    positive one is set beside any negative one.
    """
    pairs = [row for row in rows if isinstance(row, Pair)]
    if not pairs:
        sides = [samples_of(rows, side) for side in ("positive", "negative")]
        pairs = [Pair(good, bad) for good, bad in zip(*sides, strict=False)]
    pairs = pairs[:PAIRS]
    paired = any(isinstance(row, Pair) for row in rows)
    examples = [
        Example(sample.question.prompt, sample.response(think), side, sample.question.where, index)
        for index, pair in enumerate(pairs)
        for side, sample in pair.sides
    ]
    if not examples:
        return None
    encoded = encode(
        examples,
        loaded.tokenizer,
        span="matched" if paired else "response",
        context=loaded.context,
        chat_template_kwargs=chat_template_kwargs,
    )
    means = stream_means(loaded, encoded, progress=progress)
    first, last = loaded.spec.deeper_half
    both = torch.stack([means[::2], means[1::2]], dim=1)[:, :, first : last + 1]
    return separation(both, [prompt_digest(pair.question.prompt) for pair in pairs], seed, paired)


def differences(rows: Sequence[Row], metric: MetricChoice | None) -> list[Difference]:
    """Both sides by the behaviour's own metric, where it can be read off an answer."""
    if metric is None or metric.kind.read is None:
        return []
    found = difference(rows, lambda sample: metric.read(written(sample)))
    return [] if found is None else [Difference(metric.label, metric.goal, found)]


def written(sample: Sample) -> Written:
    """An answer as metrics read it."""
    return Written(prompt_text(sample.question.prompt), sample.answer.text, sample.answer.tokens)


def difference(rows: Sequence[Row], value: Callable[[Sample], float]) -> Estimate | None:
    """Positive minus negative answers, with the interval over prompts; None where a side has no number.

    Pairs are differences of one prompt. Answers of one side alone count by their deviation from the other side's mean.
    """
    pairs = [row for row in rows if isinstance(row, Pair)]
    if pairs:
        each = [value(pair.positive) - value(pair.negative) for pair in pairs]
        known = [(number, pair) for number, pair in zip(each, pairs, strict=True) if not math.isnan(number)]
        groups = [prompt_digest(pair.question.prompt) for _, pair in known]
        return estimate([number for number, _ in known], groups=groups) if known else None
    sides = [
        [(number, row) for row in rows if isinstance(row, Labelled) and row.side == side
         if not math.isnan(number := value(row.sample))]
        for side in ("positive", "negative")
    ]  # fmt: skip
    if not all(sides):
        return None
    means = [sum(number for number, _ in side) / len(side) for side in sides]
    half = (means[0] + means[1]) / 2
    # the mean of these is the difference of the means, whatever the sizes of the sides
    total = sum(map(len, sides))
    each = [
        sign * (number - half) * total / len(side)
        for sign, side in zip((1, -1), sides, strict=True)
        for number, _ in side
    ]
    return estimate(each, groups=[prompt_digest(row.question.prompt) for side in sides for _, row in side])
