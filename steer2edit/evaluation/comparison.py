"""What an edit does beyond its baselines: paired differences by question, losses first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steer2edit.bootstrap import LEAST_DRAWS, Estimate
from steer2edit.evaluation.evaluate import Evaluation, Row
from steer2edit.evaluation.metrics import Metric

EQUAL_COST = 0.15
"""Candidates whose KLs differ by no more than this part are said to cost the same."""
EDITS = ("edit", "knee")
INSTRUCTED, BOTH, ADAPTER = "instructed", "edit and instruction", "adapter"
_NAMES = {
    "steering": "activation steering",
    "random": "random directions",
    "shuffled": "shuffled labels",
    "whole": "whole matrices",
    "ablation": "ablation",
    INSTRUCTED: "the instruction",
    ADAPTER: "another adapter",
}


@dataclass(frozen=True)
class Comparison:
    """A row minus another, or minus the mean of several of one kind: ``changes`` by the metrics' names."""

    row: Row
    against: str
    kind: str
    others: tuple[Row, ...]
    changes: Mapping[str, Estimate]

    def signs(self, metrics: Sequence[Metric]) -> dict[str, int]:
        """By metric 1 where the row is better, -1 where it is worse, 0 where that is not decided."""
        return {m.name: direction(m, self.changes[m.name]) for m in metrics if m.name in self.changes}

    def described(self, metrics: Sequence[Metric]) -> dict[str, Any]:
        """The comparison in plain values."""
        words = {1: "better", 0: "undecided", -1: "worse"}
        signs = self.signs(metrics)
        changes = {name: {**asdict(change), "verdict": words[signs[name]]} for name, change in self.changes.items()}
        return {"row": self.row.name, "against": self.against, "rows": len(self.others), "metrics": changes}


def comparisons(evaluation: Evaluation, row: Row) -> list[Comparison]:
    """The row against each kind of baseline that costs as much, those that it loses most metrics to first.

    Random directions, and shuffled labels, count as the mean of their kind. Of activation steering the row whose cost is
    nearest counts. An instruction costs nothing that is measured: it always counts.
    """
    kinds = dict.fromkeys(other.kind for other in evaluation.rows[1:])
    found = []
    for kind in kinds:
        others = equally_costly(evaluation, row, kind)
        if kind in _NAMES and others:
            groups = [[other] for other in others] if kind == ADAPTER else [others]
            found += [_compared(evaluation, row, kind, group) for group in groups]
    both = [other for other in evaluation.rows if other.kind == BOTH]
    instructed = [other for other in evaluation.rows if other.kind == INSTRUCTED]
    if both and instructed and row.kind in EDITS:
        found.append(_compared(evaluation, both[0], INSTRUCTED, instructed[:1]))

    def losses(one: Comparison) -> tuple[int, int]:
        signs = list(one.signs(evaluation.metrics).values())
        return -signs.count(-1), signs.count(1)

    return sorted(found, key=losses)


def compared_rows(evaluation: Evaluation) -> list[Row]:
    """The rows that are compared with the baselines: the edits."""
    return [row for row in evaluation.rows if row.kind in EDITS]


def equally_costly(evaluation: Evaluation, row: Row, kind: str) -> list[Row]:
    """The baselines of a kind that cost as much as ``row``; of activation steering the nearest one."""
    there = [other for other in evaluation.rows if other.kind == kind and other is not row]
    if kind == INSTRUCTED:
        return there[:1]
    there = [other for other in there if other.note.startswith("at ")]
    cost = cost_of(evaluation)
    if cost is None or cost.name not in row.samples:
        return there if kind != "steering" else there[:1]
    own = evaluation.estimate(row, cost.name).value
    gaps = {
        n: abs(evaluation.estimate(other, cost.name).value - own)
        for n, other in enumerate(there)
        if cost.name in other.samples
    }
    equal = [n for n, gap in gaps.items() if gap <= EQUAL_COST * abs(own) or there[n].note.endswith("‖ΔW‖")]
    if kind == "steering":
        equal = sorted(equal, key=lambda n: gaps[n])[:1]
    return [there[n] for n in equal]


def cost_of(evaluation: Evaluation) -> Metric | None:
    """The metric of the cost that candidates are brought to: the first KL."""
    return next((m for m in evaluation.metrics if m.role == "utility" and m.name.startswith("KL")), None)


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


def _compared(evaluation: Evaluation, row: Row, kind: str, others: Sequence[Row]) -> Comparison:
    changes = {
        metric.name: evaluation.difference(row, others, metric.name)
        for metric in evaluation.metrics
        if metric.name in row.samples and all(metric.name in other.samples for other in others)
    }
    name = others[0].name if kind == ADAPTER else _NAMES[kind]
    if kind in ("random", "shuffled"):
        name = f"{name} (mean of {len(others)})" if len(others) > 1 else f"{name} (one)"
    return Comparison(row, name, kind, tuple(others), changes)
