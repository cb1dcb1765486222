"""What ``eval`` and ``tune`` measure on: held-out questions, general questions, neutral text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from steer2edit.cli.data_options import DataFlags
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import NEUTRAL, OWN_PENALTY, PENALTY, ModelFlags, progress_bar, read_own_neutral
from steer2edit.options import option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from steer2edit.architecture import ModelSpec
    from steer2edit.capture.statistics import Statistics
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.data.questions import Question
    from steer2edit.evaluation.suite import Suite
    from steer2edit.evaluation.written_suite import WrittenSuite
    from steer2edit.runtime.model import LoadedModel
    from steer2edit.scoring.scores import Scoring


@dataclass(frozen=True)
class SuiteFlags(FlagGroup):
    """Questions and text, and how answers are scored."""

    heading: ClassVar[str] = "Questions"

    questions: str | None = option(
        None, "Held-out questions; a behaviour and a folder of data have their own.", "--eval", metavar="FILE"
    )
    useful: str | None = option(
        None,
        "Questions that must not suffer, in place of the packaged ones; 'none' for none.",
        "--utility",
        metavar="FILE",
    )
    limit: int | None = option(
        None,
        "Use at most N questions of each kind, N windows of 128 tokens of neutral prose, and N of the base's own answers "
        "(but at least 4 of these).",
        minimum=1,
    )
    max_new_tokens: int = option(160, "Length of an answer in tokens, at most.", minimum=1)
    repetition_penalty: float | None = option(
        None, PENALTY, minimum=0.1, maximum=10, shown_default=OWN_PENALTY, rare=True
    )
    patterns: tuple[str, ...] = option(
        (), "Count the answers that match this regular expression. Repeatable.", "--pattern", metavar="REGEX"
    )
    function: str | None = option(
        None, "Score answers by your own Python function of (prompt, answer).", metavar="FILE.PY:NAME"
    )
    neutral: Path | None = option(None, NEUTRAL)
    split_seed: int = option(0, "Seed that deals the questions out to the two splits.", rare=True)

    def read_questions(self, data: DataFlags) -> Sequence[Question]:
        """The held-out questions. Raises UsageError where there are none, and DataError for a pattern that is none."""
        from steer2edit.data.user_scores import check_patterns

        check_patterns(self.patterns)
        questions = data.questions((self.questions,) if self.questions else ())
        if questions is None:
            raise click.UsageError(
                "give --eval FILE with held-out questions (or --behavior NAME or --data FOLDER, which bring their own)"
            )
        return questions

    def written_suite(self, questions: Sequence[Question], data: DataFlags) -> WrittenSuite:
        """What models are measured on by their written answers alone."""
        from steer2edit.evaluation.written_suite import WrittenSuite

        return WrittenSuite(questions, self._useful(), metric=data.metric, **self._settings(data))

    def suite(
        self,
        loaded: LoadedModel,
        questions: Sequence[Question],
        data: DataFlags,
        statistics: Statistics | None = None,
    ) -> Suite:
        """What candidates are measured on; the metric is that of the data, else the one that ``statistics`` name.

        With ``statistics`` of contrast data written answers are projected on their vectors.
        """
        from steer2edit.data.metric_choice import read_metric
        from steer2edit.evaluation.projection import Projection
        from steer2edit.evaluation.suite import Suite
        from steer2edit.strength.neutral_texts import neutral_texts

        return Suite(
            questions,
            self._useful(),
            neutral_texts(
                loaded,
                read_own_neutral(self.neutral),
                progress_bar(),
                limit=self.limit,
                chat_template_kwargs=data.template_arguments,
            ),
            projection=None if statistics is None else Projection.of(loaded, statistics),
            metric=data.metric or read_metric(None if statistics is None else statistics.source.get("metric"))[0],
            **self._settings(data),
        )

    def _useful(self) -> list[Question]:
        from steer2edit.data.questions import knowledge_questions, read_questions

        if self.useful is None:
            return knowledge_questions()
        return [] if self.useful == "none" else read_questions(self.useful)

    def _settings(self, data: DataFlags) -> dict[str, Any]:
        """The settings of either suite."""
        from steer2edit.data.user_scores import load_function

        return {
            "patterns": self.patterns,
            "function": load_function(self.function) if self.function else None,
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "system": data.system,
            "chat_template_kwargs": data.template_arguments,
            "limit": self.limit,
            "seed": self.split_seed,
        }


def scoring_of(
    stats: Path | None,
    data: DataFlags,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    model: ModelFlags,
    loaded: LoadedModel,
) -> Scoring:
    """Scores from saved statistics, or from a capture of the data."""
    from steer2edit.capture.statistics import Statistics
    from steer2edit.scoring.scores import Scoring

    statistics = Statistics.load(stats) if stats else data.capture(checkpoint, spec, model, loaded)
    statistics.check_model(checkpoint)
    return Scoring(checkpoint, spec, statistics)
