"""Changes and paired differences as text, the same in the terminal, on the page and on the card."""

from __future__ import annotations

from collections.abc import Sequence

from steer2edit.bootstrap import Estimate
from steer2edit.evaluation.comparison import Comparison, direction
from steer2edit.evaluation.evaluate import Evaluation, Row
from steer2edit.evaluation.metrics import Metric
from steer2edit.formatting import interval, ratio

WORDS = {1: "better", 0: "", -1: "worse"}


def signed(metric: Metric, change: Estimate) -> str:
    """A change with its interval: signed, or a factor where the metric is exponential."""
    return ratio(change) if metric.exponential else interval(change, signed=True)


def change_cell(evaluation: Evaluation, row: Row, metric: Metric) -> str:
    """A row's change from the base, with its word."""
    # the base's own divergence is 0: the change would say the same again
    if metric.name not in row.samples or metric.name.startswith("KL"):
        return ""
    return _worded(metric, evaluation.change(row, metric.name))


def cell(comparison: Comparison, metric: Metric) -> str:
    """A comparison's difference in one metric, with its word; empty where one of the rows lacks the metric."""
    change = comparison.changes.get(metric.name)
    return "" if change is None else _worded(metric, change)


def losses(evaluation: Evaluation, found: Sequence[Comparison]) -> list[str]:
    """A sentence for each baseline that an edit is worse than in some metric, its cost apart."""
    sentences = []
    for one in found:
        signs = one.signs(evaluation.metrics)
        worse = [m for m in evaluation.metrics if signs.get(m.name) == -1 and not m.name.startswith("KL")]
        if worse:
            told = ", ".join(f"{m.name} ({signed(m, one.changes[m.name])})" for m in worse)
            sentences.append(f"{one.row.name} is worse than {one.against} in {told}.")
    return sentences


def _worded(metric: Metric, change: Estimate) -> str:
    return f"{signed(metric, change)} {WORDS[direction(metric, change)]}".rstrip()
