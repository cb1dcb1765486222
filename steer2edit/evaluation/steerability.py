"""Whether an edit moves a behaviour more than random directions of the same cost do.

What it moves no more is called *not steerable here*: by this model, this data and this cost.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from steer2edit.bootstrap import Estimate
from steer2edit.errors import count_of
from steer2edit.evaluation.comparison import direction, equally_costly
from steer2edit.evaluation.evaluate import Evaluation, Row
from steer2edit.evaluation.metrics import Metric, attributes

LEAST_DIRECTIONS = 3
"""Random directions below which their spread is not known well enough to judge an edit by."""
_STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 97.5 % by degrees of freedom (any table of it)."""
_POWER = (1.96 + 0.84) / 1.96
"""A difference is found four times in five where it is this many times its interval's half width (two-sided 5 %)."""


@dataclass(frozen=True)
class Steerability:
    """An edit minus the mean of random directions at equal KL, and minus the base, on the behaviour's first metric.

    The interval of ``beyond`` covers another draw of questions and another draw of directions. ``steerable`` says whether both
    differences are clear of zero on the better side: an edit that does nothing is ahead of random directions that do harm.
    ``needed`` is how many questions would decide a difference of this size four times in
    five; None where the directions differ so much among themselves that no number would.
    """

    metric: Metric
    beyond: Estimate
    change: Estimate
    directions: int
    steerable: bool
    needed: int | None

    def described(self) -> dict[str, Any]:
        """The judgement in plain values."""
        return {
            "metric": self.metric.name,
            "steerable": self.steerable,
            "beyond_random": asdict(self.beyond),
            "beyond_base": asdict(self.change),
            "random_directions": self.directions,
            "questions_needed": self.needed,
        }

    def __str__(self) -> str:
        metric, found = self.metric, self.beyond
        beyond = f"{metric.name} differs by {self._size(found)} from what {self.directions} random directions at equal KL give"
        if self.steerable:
            return f"Steerable here: {beyond}, on {count_of(found.count, 'question')}."
        sign = direction(metric, found)
        if sign < 0:
            return f"Not steerable here: {beyond}, on {count_of(found.count, 'question')}, and that is the wrong direction."
        if sign > 0:
            why = "the wrong direction" if direction(metric, self.change) < 0 else "what may be nothing"
            own = f"by {self._size(self.change)} from the base, {why}"
            return f"Not steerable here: {beyond}, on {count_of(found.count, 'question')}, but {own}."
        if self.needed is None:
            more = "Random directions differ too much among themselves: a larger effect or more directions would be needed."
        else:
            more = (
                f"To decide a difference of this size would take about {count_of(self.needed, 'question', style=',')}."
            )
        return f"Not steerable here: {beyond}, on {count_of(found.count, 'question')}, which may be nothing. {more}"

    def _size(self, found: Estimate) -> str:
        unit = f" {self.metric.unit}" if self.metric.unit else ""
        return f"{found.value:+.3g} [{found.low:.3g}, {found.high:.3g}]{unit}"


def steerability(evaluation: Evaluation, row: Row) -> Steerability | None:
    """How the row's first attribute metric compares with that of random directions at equal KL.

    None where fewer than ``LEAST_DIRECTIONS`` of them were measured. A random direction moves a metric too, in one way or the
    other, and on any number of questions: the interval is that of the paired bootstrap over questions, widened by Student's
    prediction interval for one more random direction, ``t · s · √(1 + 1/k)`` for k directions with a standard deviation s.
    """
    metric = next((m for m in attributes(evaluation.metrics) if m.name in row.samples), None)
    if metric is None:
        return None
    others = [one for one in equally_costly(evaluation, row, "random") if metric.name in one.samples]
    k = len(others)
    if k < LEAST_DIRECTIONS:
        return None
    paired = evaluation.difference(row, others, metric.name)
    log = math.log if metric.exponential else float
    moves = [log(evaluation.change(other, metric.name).value) for other in others]
    mean = sum(moves) / k
    spread = math.sqrt(sum((move - mean) ** 2 for move in moves) / (k - 1))
    between = _STUDENT.get(k - 1, 1.96) * spread * math.sqrt(1 + 1 / k)
    value, low, high = (log(x) for x in (paired.value, paired.low, paired.high))
    widened = (value, value - math.hypot(value - low, between), value + math.hypot(high - value, between))
    middle, least, most = (math.exp(x) if metric.exponential else x for x in widened)
    beyond = Estimate(middle, least, most, paired.count)
    change = evaluation.change(row, metric.name)
    ahead = direction(metric, beyond) > 0
    needed = None if ahead else _needed(value, (high - low) / 2, between, paired.count)
    return Steerability(metric, beyond, change, k, ahead and direction(metric, change) > 0, needed)


def _needed(value: float, half: float, between: float, count: int) -> int | None:
    """Questions at which a difference of this size is found four times in five.

    The part of the interval that is over questions, ``half``, shrinks with their root; ``between`` stays.
    """
    room = (abs(value) / _POWER) ** 2 - between**2
    if room <= 0 or not math.isfinite(room):
        return None
    return max(count + 1, math.ceil(count * half**2 / room))
