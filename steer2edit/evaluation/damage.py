"""Damage that KL does not see: which metrics an edit breaks, against the base, question by question.

A metric may have a ``tolerance``. An edit breaks it where the whole 95 % interval of the paired difference is worse than the base
by more than the tolerance, on at least ``LEAST_DRAWS`` questions. So what a few questions could show by chance is not held
against an edit, and a small loss on many questions is. An edit that breaks a metric is marked wherever it is shown, and is not
chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from steer2edit.bootstrap import LEAST_DRAWS, Estimate
from steer2edit.evaluation.metrics import Metric, Sample
from steer2edit.formatting import interval


@dataclass(frozen=True)
class Damage:
    """A metric that is worse than the base's by more than ``tolerance``; ``change`` is the paired difference."""

    metric: str
    change: Estimate
    tolerance: float

    def __str__(self) -> str:
        return f"{self.metric} {interval(self.change, signed=True)}"


def damages(metrics: Iterable[Metric], row: Mapping[str, Sample], base: Mapping[str, Sample]) -> tuple[Damage, ...]:
    """What ``row`` breaks of ``base``, both by metric name; see the rule above."""
    broken = []
    for metric in metrics:
        if metric.tolerance is None or metric.name not in row or metric.name not in base:
            continue
        change = row[metric.name].change(base[metric.name], metric)
        # the end of the interval that is kindest to the edit; nan decides nothing
        least = change.low if metric.goal == "less" else -change.high
        if change.count >= LEAST_DRAWS and least > metric.tolerance:
            broken.append(Damage(metric.name, change, metric.tolerance))
    return tuple(broken)
