"""Where written answers stand between the classes of the contrast data, as the base reads them.

A margin is read off responses that somebody else wrote. An edit that does most on the negative response, and little on what the
model writes itself, has a large margin and changes few answers. So the base reads the answers that a candidate wrote. The mean
residual stream over an answer is projected on the steering vector of each block's output: 0 is where the negative responses
stand, and 1 where the positive ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from steer2edit.data.contrast import Example
from steer2edit.data.questions import Question
from steer2edit.data.templates import TemplateArguments
from steer2edit.data.tokens import encode
from steer2edit.evaluation.metrics import Metric, Sample
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel

if TYPE_CHECKING:
    import torch

    from steer2edit.capture.statistics import Statistics

PROJECTION = "projection of answers"
TOKENS = 64
"""Of an answer that are read: later ones are more often those of a loop."""


@dataclass(frozen=True)
class Projection:
    """The base and the contrast data's classes, in the deeper half of its blocks.

    ``directions`` [layers, hidden] are ``v / ‖v‖²`` of each block's output, zero in the other half and where the classes do not
    differ; ``negative`` [layers] are the negative class's own projections on them. Prompts are rendered with ``system`` and
    ``chat_template_kwargs``. It reads when no candidate is on the model.
    """

    loaded: LoadedModel
    directions: torch.Tensor
    negative: torch.Tensor
    system: str | None = None
    chat_template_kwargs: TemplateArguments | None = None

    @classmethod
    def of(cls, loaded: LoadedModel, statistics: Statistics) -> Projection | None:
        """From what was captured of the contrast data.

        None where the streams of its classes are not known, or are the same.
        """
        import torch

        if "vectors" in statistics.source:
            return None
        layers = loaded.spec.layers
        directions = torch.zeros(layers, loaded.spec.hidden_size, dtype=torch.float64)
        negative = torch.zeros(layers, dtype=torch.float64)
        for layer in range(layers // 2, layers):
            key = f"residual.{layer}"
            if key in statistics.directions and bool((v := statistics.difference(key)).any()):
                directions[layer] = v / v.square().sum()
                negative[layer] = statistics.mean(key, "output", "negative") @ directions[layer]
        if not bool(directions.any()):
            return None
        source = statistics.source
        return cls(loaded, directions, negative, source.get("system"), source.get("chat_template_kwargs"))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The one metric: more is nearer to the positive class."""
        return (Metric(PROJECTION, "attribute", "more"),)

    def samples(
        self, questions: Sequence[Question], answers: Sequence[str], progress: Progress = silent
    ) -> dict[str, Sample]:
        """The mean projection of each answer over the blocks. An answer without a word shows nothing: it has 0."""
        from steer2edit.capture.per_example import stream_means

        examples = [
            Example(question.prompt, answer, "positive", question.where, place)
            for place, (question, answer) in enumerate(zip(questions, answers, strict=True))
            if answer.strip()
        ]
        read = encode(
            examples,
            self.loaded.tokenizer,
            system=self.system,
            span="response",
            context=self.loaded.context,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        first = [replace(one, ids=one.ids[: one.start + TOKENS]) for one in read]
        values = [0.0] * len(answers)
        if first:
            means = stream_means(self.loaded, first, progress=progress, stage="read the answers").double()
            known = self.directions.any(dim=1)
            projected = ((means * self.directions).sum(dim=2) - self.negative)[:, known].mean(dim=1)
            for one, value in zip(first, projected, strict=True):
                values[one.row] = float(value)
        return {PROJECTION: Sample(tuple(values))}
