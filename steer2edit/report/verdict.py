"""The verdict: how far an edit moves the behaviour, in words, beside what control edits do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer2edit.bootstrap import LEAST_DRAWS, Estimate
from steer2edit.evaluation.evaluate import Evaluation, Row
from steer2edit.evaluation.metrics import Metric
from steer2edit.formatting import divergence, interval, number, ratio
from steer2edit.plan import EditPlan
from steer2edit.report.tradeoff import chosen_row, objectives

# one of a kind, and several
_CHANCE = {"random": ("a random direction", "random directions"), "shuffled": ("shuffled labels", "shuffled labels")}


def verdict_on(plan: EditPlan, evaluation: Evaluation | None, settings: Mapping[str, Any]) -> str:
    """The result in words: how far the edit moves the behaviour, and how far control edits do."""
    axes, row = objectives(evaluation, settings), chosen_row(evaluation)
    if evaluation is None or axes is None or row is None:
        return _unmeasured(plan)
    utility, attribute = axes
    change = evaluation.change(row, attribute.name)
    cost = evaluation.estimate(row, utility.name)
    at = f"a {utility.name} of {number(cost.value)} {utility.unit}".strip()
    chance = {kind: [other for other in evaluation.rows if other.kind == kind] for kind in _CHANCE}
    beside = [_best_of(evaluation, attribute, kind, rows) for kind, rows in chance.items() if rows]
    equal = _equally_costly(evaluation, row, utility)
    if equal is not None:
        beside.insert(0, _best_of(evaluation, attribute, "steering", [equal]))
    numbers = "; ".join([f"{_moved(attribute, change)} at {at}", *beside])
    changes = {kind: [evaluation.change(row, attribute.name) for row in rows] for kind, rows in chance.items() if rows}
    return f"{numbers}. {_judged(attribute, change, changes)}"


def direction(metric: Metric, change: Estimate) -> int:
    """1 for a change to the better, -1 to the worse, 0 where that is not decided.

    It is not decided where the interval holds both signs, or where the questions are too few.
    """
    if change.count < LEAST_DRAWS:
        return 0
    none = 1.0 if metric.exponential else 0.0
    # not "low <= none <= high": intervals that are not finite decide nothing
    above, below = change.low > none, change.high < none
    if not (above or below):
        return 0
    return 1 if above == (metric.goal == "more") else -1


def _unmeasured(plan: EditPlan) -> str:
    text = f"The plan changes {len(plan.edits)} tensors, by ‖ΔW‖ {number(plan.norm)} in all"
    if plan.measured.divergence is not None:
        text += f", and moves the model by {divergence(plan.measured.divergence.estimate)} on neutral text"
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


def _best_of(evaluation: Evaluation, metric: Metric, kind: str, rows: Sequence[Row]) -> str:
    changes = [(evaluation.change(row, metric.name), row) for row in rows]
    best, row = (max if metric.goal == "more" else min)(changes, key=lambda one: one[0].value)
    one, several = _CHANCE.get(kind, ("activation steering", ""))
    which = one if len(rows) == 1 else f"the best of {len(rows)} {several}"
    note = f" {row.note}" if row.note.startswith("at ") else ""
    return f"{which}{note}: {ratio(best) if metric.exponential else interval(best, signed=True)}"


def _equally_costly(evaluation: Evaluation, row: Row, utility: Metric) -> Row | None:
    """The row of activation steering whose cost is nearest to that of ``row``; None where none is within 15 %."""
    cost = evaluation.estimate(row, utility.name).value
    there = [other for other in evaluation.rows if other.kind == "steering" and other.note.startswith("at ")]
    gaps = [(abs(evaluation.estimate(other, utility.name).value - cost), n) for n, other in enumerate(there)]
    gap, nearest = min(gaps, default=(0.0, -1))
    return there[nearest] if gaps and gap <= 0.15 * abs(cost) else None


def _judged(metric: Metric, change: Estimate, chance: Mapping[str, Sequence[Estimate]]) -> str:
    """Whether the change is certain, goes the right way, and exceeds the changes of the control edits ``chance``."""
    sentences = []
    sign = direction(metric, change)
    if not sign:
        sentences.append("The edit is not distinguishable from no change.")
    elif sign < 0:
        sentences.append(f"That is the wrong direction: {metric.goal} is better.")
    alike, ahead = [], []
    for kind, others in chance.items():
        # a comparison with nan is false: an unknown interval overlaps with every other
        if not all(other.high < change.low or other.low > change.high for other in others):
            alike.append(_CHANCE[kind][0])
        elif any((other.value > change.value) == (metric.goal == "more") for other in others):
            ahead.append(_CHANCE[kind][0])
    if alike:
        sentences.append(f"The edit is not distinguishable from {' or '.join(alike)}.")
    if ahead:
        sentences.append(f"The edit does worse than {' and '.join(ahead)}.")
    if not chance:
        sentences.append("No random direction was measured, so it is not known what any edit of this size does.")
    elif sign > 0 and not alike and not ahead:
        beaten = " or ".join(_CHANCE[kind][0] for kind in chance)
        sentences.append(f"That is more than {beaten} {'gives' if list(chance) == ['random'] else 'give'}.")
    return " ".join(sentences)
