"""What a compile is asked to do, in one value: the command line, the dry run and ``compile`` share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer2edit.architecture import MatrixRole
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vector_kinds import VectorKind
from steer2edit.capture.vectors import Vectors
from steer2edit.data.behavior import Behavior
from steer2edit.data.metric_choice import MetricChoice, read_metric
from steer2edit.data.neutral import OwnNeutral
from steer2edit.data.questions import Question
from steer2edit.engines.opening import JudgeChoice
from steer2edit.errors import DataError
from steer2edit.lowering import Writing
from steer2edit.methods import METHOD, needs_no_statistics, own_strength
from steer2edit.runtime.model import Runtime
from steer2edit.strength.aim import Aim

Protected = Behavior | Statistics | Vectors
"""Where a direction to protect comes from."""


def check_alone(aim: Aim | None, strength: float | None, class_budgets: Mapping[MatrixRole, float] | None) -> None:
    """Raise DataError where an aim stands beside what decides the strength too."""
    if aim is not None and (strength is not None or class_budgets is not None):
        raise DataError(f"the aim {aim} decides the strength: give no strength, and no budget for one class")


@dataclass(frozen=True)
class CompileRequest:
    """What to compile into ``model``, how strongly, and where the artefacts go.

    Give ``behavior`` or ``statistics`` of an earlier capture; a method whose options ask for nothing captured needs neither.
    ``vectors`` from elsewhere take the place of the captured difference; a behaviour without examples is then enough. Else
    ``vector`` says what is made of the pairs' differences. The edit does not write along the directions to ``protect``, which are
    behaviours, statistics or vectors of the same model, and it has no mean push on ``texts_to_keep``. ``options`` are the
    method's own Options. ``strength`` multiplies the method's edit; without it the largest strength is taken whose mean KL on
    neutral text (nats per token) is within ``kl_budget``, that of ``strength.settle.KL_BUDGETS`` unless given;
    ``class_budgets`` bound attention and MLPs apart. ``neutral`` is a text of the user's, which then carries the budget
    (``strength/neutral_texts.py``). With one target ``out`` is its folder, with several a folder for each inside. Held-out
    ``questions`` ask for an evaluation and a report page, unless ``report`` is False; ``told`` is an instruction that asks for
    the same behaviour: the edit is compared with it. A ``judge`` reads the answers, which are decoded with the model's own
    repetition penalty or with another ``repetition_penalty``. An ``aim`` takes the weakest strength that
    reaches it on the selection half of the questions, within ``kl_budget``. ``weights`` is the unquantised form of a quantised
    ``model``, from whose matrices the plan is computed.

    Raises DataError where behaviour and statistics are both given, or neither although the method needs one, and for an aim
    without questions or beside another strength.
    """

    model: str | Path
    out: str | Path
    behavior: Behavior | None = None
    statistics: Statistics | None = None
    vectors: Vectors | None = None
    vector: VectorKind = "mean"
    protect: Sequence[Protected] = ()
    to: Sequence[str] = ("checkpoint",)
    revision: str | None = None
    method: str = METHOD
    options: Any = None
    strength: float | None = None
    kl_budget: float | None = None
    class_budgets: Mapping[MatrixRole, float] | None = None
    neutral: OwnNeutral | None = None
    background: OwnNeutral | None = None
    texts_to_keep: OwnNeutral | None = None
    runtime: Runtime = field(default_factory=Runtime)
    batch_tokens: int = 4096
    questions: Sequence[Question] | None = None
    told: str | None = None
    judge: JudgeChoice | None = None
    report: bool = True
    aim: Aim | None = None
    repetition_penalty: float | None = None
    weights: str | Path | None = None
    force: bool = False
    writing: Writing = field(default_factory=Writing)

    def __post_init__(self) -> None:
        neither = self.behavior is None and self.statistics is None
        if (self.behavior is not None and self.statistics is not None) or (neither and self.needs_data):
            raise DataError("give a behaviour or the statistics of an earlier capture, exactly one of the two")
        if self.vectors is not None and self.vector != "mean":
            raise DataError(f"a vector of the pairs ({self.vector}) and vectors from elsewhere: give one of the two")
        if self.aim is not None and self.questions is None:
            raise DataError(f"the aim {self.aim} takes held-out questions to measure it on (--eval FILE)")
        check_alone(self.aim, self.strength, self.class_budgets)

    @property
    def needs_data(self) -> bool:
        """Whether something that is captured is needed."""
        return self.vectors is not None or bool(self.protect) or not needs_no_statistics(self.options)

    @property
    def metric(self) -> MetricChoice | None:
        """The behaviour's own metric, where the behaviour or the statistics name one."""
        if self.behavior is not None:
            return self.behavior.metric
        return None if self.statistics is None else read_metric(self.statistics.source.get("metric"))[0]

    @property
    def fixed_strength(self) -> float | None:
        """The strength that is given, or that the method's options ask for; None where a KL budget decides."""
        if self.strength is None and self.kl_budget is None and self.class_budgets is None:
            return own_strength(self.options)
        return self.strength
