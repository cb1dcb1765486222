"""The verdict: how far an edit moves the behaviour, in words, beside what control edits do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer2edit.bootstrap import Estimate
from steer2edit.errors import count_of
from steer2edit.evaluation.comparison import Comparison, comparisons, direction
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.evaluation.metrics import Metric
from steer2edit.evaluation.steerability import steerability
from steer2edit.formatting import divergence, interval, number, ratio
from steer2edit.plan import EditPlan
from steer2edit.plan.measured import KL_NAMES
from steer2edit.report.differences import signed
from steer2edit.report.plan_text import removal_lines
from steer2edit.report.tradeoff import chosen_row, objectives

_CHANCE = ("random", "shuffled")


def verdict_on(plan: EditPlan, evaluation: Evaluation | None, settings: Mapping[str, Any]) -> str:
    """The result in words: how far the edit moves the behaviour, and how far control edits do."""
    axes, row = objectives(evaluation, settings), chosen_row(evaluation)
    if evaluation is None or axes is None or row is None:
        return _unmeasured(plan)
    utility, attribute = axes
    change = evaluation.change(row, attribute.name)
    cost = evaluation.estimate(row, utility.name)
    article = "a " if utility.name.startswith("KL") else ""
    at = f"{article}{utility.name} of {number(cost.value)} {utility.unit}".strip()
    beside = [one for one in comparisons(evaluation, row) if one.row is row and attribute.name in one.changes]
    differences = [f"beyond {one.against}: {signed(attribute, one.changes[attribute.name])}" for one in beside]
    numbers = "; ".join([f"{_moved(attribute, change)} at {at}", *differences])
    judged = steerability(evaluation, row)
    more = [] if judged is None or judged.steerable else [str(judged)]
    broken = "; ".join(map(str, evaluation.damages(row)))
    breaks = [f"The edit breaks {broken}."] if broken else []
    return " ".join([f"{numbers}.", *breaks, *_judged(attribute, change, beside), *more])


def _unmeasured(plan: EditPlan) -> str:
    text = f"The plan changes {count_of(len(plan.edits), 'tensor')}, by ‖ΔW‖ {number(plan.norm)} in all"
    text += "".join(f", {line}" for line in removal_lines(plan))
    if plan.measured.costs:
        costs = (f"{KL_NAMES[kind]} {divergence(cost.estimate)}" for kind, cost in plan.measured.costs.items())
        text += f", and moves the model from the base ({', '.join(costs)})"
    if plan.measured.selected_on:
        return f"{text}. It was chosen on the selection split. Its effect on other questions was not measured."
    return f"{text}. Its effect on the behaviour was not measured."


def _moved(metric: Metric, change: Estimate) -> str:
    name, unit = metric.name[:1].upper() + metric.name[1:], f" {metric.unit}" if metric.unit else ""
    if metric.exponential:
        return f"{name} is {ratio(change)} the base's"
    if not direction(metric, change):
        return f"{name} changes by {interval(change, signed=True)}{unit}, which may be no change,"
    ends = sorted(map(abs, (change.low, change.high)))
    size = f"{number(abs(change.value))}{unit} [{number(ends[0])}, {number(ends[1])}]"
    return f"{name} {'rises' if change.value > 0 else 'falls'} by {size}"


def _judged(metric: Metric, change: Estimate, beside: Sequence[Comparison]) -> list[str]:
    """Whether the change is certain, goes the right way, and exceeds those of the baselines; losses first."""
    sentences = []
    sign = direction(metric, change)
    if not sign:
        sentences.append("The edit is not distinguishable from no change.")
    elif sign < 0:
        sentences.append(f"That is the wrong direction: {metric.goal} is better.")
    by_sign: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for one in beside:
        by_sign[direction(metric, one.changes[metric.name])].append(one.against)
    if by_sign[-1]:
        sentences.append(f"The edit does worse than {_listed(by_sign[-1])}.")
    if by_sign[0]:
        sentences.append(f"The edit is not distinguishable from {_listed(by_sign[0])}.")
    if not any(one.kind in _CHANCE for one in beside):
        sentences.append("No random direction was measured, so it is not known what any edit of this size does.")
    if by_sign[1]:
        sentences.append(f"That is more than {_listed(by_sign[1])} give.")
    return sentences


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
