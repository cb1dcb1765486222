"""The weakest strength that reaches an aim: answers of 40 tokens, a margin of 0.2.

The metric is measured on the selection half of the questions, at strengths that double from an eighth of the largest one that
is allowed; between the last that misses the aim and the first that reaches it, the search goes on by the secant. So the weakest
strength is taken even where a stronger one misses the aim again. The aim is met by the mean over these questions: on others the
metric is another, by what its interval says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.questions import Question
from steer2edit.errors import PlanError
from steer2edit.evaluation.candidates import plan_candidate
from steer2edit.evaluation.evaluate import measure
from steer2edit.evaluation.metrics import Metric, Task, attributes
from steer2edit.evaluation.projection import PROJECTION
from steer2edit.evaluation.suite import Suite
from steer2edit.evaluation.written_suite import WrittenSuite
from steer2edit.methods import scaling
from steer2edit.plan import Base, EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel
from steer2edit.strength.aim import Aim
from steer2edit.strength.meet import meet
from steer2edit.strength.settle import Settled, applying, settle

LARGEST_KL = 0.5
"""The KL, in nats per token, beyond which no strength is tried unless a budget is given."""
AIM_QUESTIONS = 64
"""Questions that an aim is measured on, at most: with fewer, the strength would be chosen by noise."""
_FIRST = 1 / 8
_SECANTS = 4
_CLOSE = 1.1
"""The search ends where the strengths that miss and reach the aim are this near to each other."""


@dataclass(frozen=True)
class Reached:
    """The weakest strength that reaches an aim; ``steps`` are the (strength, value) that were measured, in order."""

    aim: Aim
    strength: float
    value: float
    base: float
    steps: tuple[tuple[float, float], ...]

    def described(self) -> dict[str, Any]:
        """Plain values, as a plan keeps them."""
        steps = [list(step) for step in self.steps]
        return {
            "metric": self.aim.metric,
            "aim": self.aim.value,
            "value": self.value,
            "base": self.base,
            "steps": steps,
        }


def check_aim(questions: Sequence[Question], metric: MetricChoice | None, aim: Aim) -> None:
    """Raise PlanError where questions have no such metric of the behaviour, and DataError where none is for selection.

    ``metric`` is the behaviour's own. No model is needed. Whether there are vectors to project answers on is known later.
    """
    suite = WrittenSuite(questions, [], metric=metric, limit=AIM_QUESTIONS)
    tasks = [*suite.answer_tasks("select"), *suite.likelihood_tasks("select")]
    if aim.metric != PROJECTION:
        _task_of(tasks, aim.metric)


def settle_by_aim(
    loaded: LoadedModel,
    plan: EditPlan,
    suite: Suite,
    aim: Aim,
    *,
    largest_kl: float | None = None,
    progress: Progress = silent,
) -> Settled:
    """The plan at the weakest strength that reaches the aim.

    It holds what was measured, and digests of the prompts that it was chosen by. Raises what :func:`reach` raises.
    """
    reached = reach(loaded, plan, suite, aim, largest_kl=largest_kl, progress=progress)
    settled = settle(loaded, plan, strength=reached.strength, neutral=suite.neutral, scaled=scaling(plan))
    chosen_by = tuple(sorted({question.digest for question in suite.questions("select")}))
    penalty = suite.repetition_penalty
    described = reached.described() | ({} if penalty is None else {"repetition_penalty": penalty})
    measured = replace(settled.plan.measured, aim=described, selected_on=chosen_by)
    return replace(settled, plan=replace(settled.plan, measured=measured))


def reach(
    loaded: LoadedModel,
    plan: EditPlan,
    suite: Suite,
    aim: Aim,
    *,
    largest_kl: float | None = None,
    progress: Progress = silent,
) -> Reached:
    """The weakest strength of ``plan`` at which the metric's mean over the selection half reaches the aim.

    From the base's value on, whichever side of the aim that is. No strength has a KL above ``largest_kl`` on the suite's neutral
    text (``LARGEST_KL`` where None). Raises PlanError where the metric is not one of the behaviour's, and where no such strength
    reaches the aim, with the value that came nearest.
    """
    largest_kl = LARGEST_KL if largest_kl is None else largest_kl
    scaled = scaling(plan)
    task, metric = _task_of(suite.chosen_by(aim.metric).tasks("select"), aim.metric)
    aim = replace(aim, metric=metric.name)

    def value_at(strength: float) -> float:
        at = scaled(plan, strength) if strength else EditPlan(Base("", None, ""), ())
        row = measure(plan_candidate(loaded, f"strength {strength:.3g}", at), [task], progress)
        return row.samples[metric.name].estimate(metric).value

    base = value_at(0.0)
    if base == aim.value:
        raise PlanError(f"the base's {metric.name} is {base:.3g} already, which is the aim")
    largest = meet(applying(loaded, plan, scaled), suite.neutral.budget, largest_kl, f"{aim}").strength
    strength, value, steps = weakest(value_at, base, aim.value, largest)
    if strength is None:
        nearest = min((abs(v - aim.value), v, s) for s, v in steps)
        raise PlanError(
            f"no strength within a KL of {largest_kl:g} reaches {aim}: the base's {metric.name} is {base:.3g}, and the edit "
            f"brings it to {nearest[1]:.3g} at the most, at {nearest[2]:.3g} times its own strength; allow more (--kl-budget), "
            "aim lower, or give other data"
        )
    return Reached(aim, strength, value, base, tuple(steps))


def weakest(
    value_at: Callable[[float], float], base: float, aim: float, largest: float
) -> tuple[float | None, float, list[tuple[float, float]]]:
    """The weakest strength up to ``largest`` that was found to reach ``aim`` from ``base``, its value, and all steps.

    The strength is None where none reached it. At most eight values are measured.
    """
    sign = 1.0 if aim > base else -1.0
    steps: list[tuple[float, float]] = []
    low, high = (0.0, base), None
    strength = largest * _FIRST
    while high is None and strength <= largest * (1 + 1e-9):
        value = value_at(strength)
        steps.append((strength, value))
        if sign * (value - aim) >= 0:
            high = (strength, value)
        else:
            low = (strength, value)
            strength *= 2
    if high is None:
        return None, math.nan, steps
    for _ in range(_SECANTS):
        if (low[0] and high[0] / low[0] <= _CLOSE) or high[1] == aim:
            break
        value = value_at(strength := _between(low, high, aim))
        steps.append((strength, value))
        if sign * (value - aim) >= 0:
            high = (strength, value)
        else:
            low = (strength, value)
    return *high, steps


def _between(low: tuple[float, float], high: tuple[float, float], aim: float) -> float:
    """Where the line through two points meets the aim, but not at their ends."""
    share = (aim - low[1]) / (high[1] - low[1]) if math.isfinite(high[1] - low[1]) else 0.5
    return low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])


def _task_of(tasks: Sequence[Task], name: str) -> tuple[Task, Metric]:
    """The task that measures an attribute, and its metric; without a name, the behaviour's own or first one."""
    task_of = {metric.name: task for task in tasks for metric in task.metrics}
    known = attributes(metric for task in tasks for metric in task.metrics)
    for metric in known:
        if metric.name == name or not name:
            return task_of[metric.name], metric
    raise PlanError(
        f"there is no metric {name!r} of the behaviour to aim at; there are {', '.join(m.name for m in known)}"
    )
