"""What a judge says of written answers: the share that shows the trait, and the share that makes sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer2edit.data.questions import Question
from steer2edit.engines.judge import AT_A_TIME, Judge
from steer2edit.evaluation.metrics import Metric, Sample
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent

JUDGED, COHERENT = "judged", "coherent"


@dataclass(frozen=True)
class TraitJudge:
    """A judge and the trait that it looks for, in words.

    It has metrics for what it can tell apart alone. It is asked when no candidate is on the model, so that a judge which is the
    model itself judges with the base's weights.
    """

    judge: Judge
    trait: str

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Shares of the answers: of those that show the trait, and of those that make sense."""
        found = []
        if self.judge.on_traits.trusted:
            found.append(Metric(JUDGED, "attribute", "more"))
        if self.judge.on_coherence.trusted:
            found.append(Metric(COHERENT, "utility", "more", tolerance=0.05))
        return tuple(found)

    def samples(
        self, questions: Sequence[Question], answers: Sequence[str], progress: Progress = silent
    ) -> dict[str, Sample]:
        """Of each metric 1 for a yes and 0 for a no, for each answer. Where the judge says neither, it counts as no."""
        prompts = [question.prompt for question in questions]
        found = {}
        for metric in self.metrics:
            likely: list[float] = []
            with progress(f"judge: {metric.name}", total=len(answers)) as advance:
                for first in range(0, len(answers), AT_A_TIME):
                    part = slice(first, first + AT_A_TIME)
                    if metric.name == JUDGED:
                        likely += self.judge.shows(self.trait, prompts[part], answers[part])
                    else:
                        likely += self.judge.coherent(prompts[part], answers[part])
                    advance(len(likely) - first)
            if silent := sum(map(math.isnan, likely)):
                notice(f"the judge says neither yes nor no to {silent} of {len(likely)} answers, which count as no")
            # an answer without a word shows nothing, whatever a judge says
            pairs = zip(likely, answers, strict=True)
            found[metric.name] = Sample(tuple(float(bool(text.strip()) and one > 0.5) for one, text in pairs))
        return found

    def named(self) -> dict[str, Any]:
        """Who judges what, without what was measured of it: for a study that is continued."""
        engine = self.judge.engine.described()
        return {"trait": self.trait, "engine": engine.get("engine"), "model": engine.get("model")}

    def described(self) -> dict[str, Any]:
        """The judge and the trait, in plain values."""
        return {"trait": self.trait, **self.judge.described()}
