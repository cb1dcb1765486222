"""What was measured of a behaviour on a model, with the command that gives the numbers.

It is an entry of the behaviour's file, written by ``benchmarks/behaviors.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steer2edit.data.metric_choice import Goal
from steer2edit.errors import count_of, shown
from steer2edit.files.schema import NUMBER, faults

Interval = tuple[float, float, float]
"""A value, then the two ends of its 95 % interval."""
_METRIC: Any = {
    **{"name": str, "goal": str, "unit?": str},
    **{"before": [NUMBER], "after": [NUMBER], "change": [NUMBER]},
}
_ENTRY: Any = {
    **{"model": str, "command": str, "questions": int, "cost": {"name": str, "value": NUMBER}},
    **{"steerable?": bool, "pairs_sha256?": str, "metrics": [_METRIC]},
}
DIGITS = 16
"""Of the SHA-256 of the pairs that a measurement was taken with, an entry holds so many hexadecimal digits."""


@dataclass(frozen=True)
class MeasuredMetric:
    """A metric of the base and of the edit, and the change, paired by question."""

    name: str
    goal: Goal
    unit: str
    before: Interval
    after: Interval
    change: Interval

    @property
    def worse(self) -> bool:
        """Whether the whole interval of the change is on the worse side."""
        _, low, high = self.change
        return high < 0 if self.goal == "more" else low > 0

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        value, low, high = self.change
        return f"{self.name} {self.before[0]:.3g} → {self.after[0]:.3g}{unit} ({value:+.3g} [{low:+.3g}, {high:+.3g}])"


@dataclass(frozen=True)
class Measurement:
    """One compile of the behaviour with the defaults: what it costs, and what it does to each metric.

    ``cost`` is the name and value of the KL in nats per token. ``questions`` is how many the behaviour's own metric, the first of
    ``metrics``, was measured on. ``steerable`` says whether the edit does more than random directions at equal KL; None where
    that is not known. ``pairs_sha256`` are the first :data:`DIGITS` digits of the hash of the pairs (``contrast.data_hash``);
    None where the entry does not say them.
    """

    model: str
    command: str
    questions: int
    cost: tuple[str, float]
    steerable: bool | None
    metrics: tuple[MeasuredMetric, ...]
    pairs_sha256: str | None = None

    @property
    def losses(self) -> list[MeasuredMetric]:
        """The metrics, after the behaviour's own, that are worse."""
        return [metric for metric in self.metrics[1:] if metric.worse]

    def __str__(self) -> str:
        judged = {True: "steerable", False: "not steerable here", None: "not compared with random directions"}
        losses = f"; worse: {'; '.join(map(str, self.losses))}" if self.losses else "; no other metric is worse"
        return (
            f"{self.model}: {self.metrics[0]} on {count_of(self.questions, 'question')}, {judged[self.steerable]}, at a "
            f"{self.cost[0]} of {self.cost[1]:.3g}{losses}"
        )


def read_measurements(value: object) -> tuple[tuple[Measurement, ...], list[str]]:
    """The entries under ``measured`` of a behaviour's file, and what is wrong with them."""
    wrong = faults(value, [_ENTRY], "measured")
    if wrong or not isinstance(value, list):
        return (), wrong
    for at, entry in enumerate(value):
        where = f"measured[{at}]"
        wrong += _unknown(entry, _ENTRY, where)
        wrong += [] if entry["metrics"] else [f"{where}.metrics is empty; expected the behaviour's own metric first"]
        pairs = entry.get("pairs_sha256")
        if pairs is not None and not re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", pairs):
            wrong.append(f"{where}.pairs_sha256 is {shown(pairs)}; expected {DIGITS} hexadecimal digits")
        for index, metric in enumerate(entry["metrics"]):
            wrong += _metric_faults(metric, f"{where}.metrics[{index}]")
    return (tuple(map(_measurement, value)), []) if not wrong else ((), wrong)


def as_toml(measurements: Sequence[Measurement]) -> str:
    """The entries as the end of a behaviour's file, which :func:`read_measurements` reads back."""
    return "".join(_entry_text(one) for one in measurements)


def _entry_text(one: Measurement) -> str:
    head = {"model": one.model, "command": one.command, "questions": one.questions}
    lines = ["", "[[measured]]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())]
    lines.append(f"cost = {{ name = {json.dumps(one.cost[0])}, value = {one.cost[1]!r} }}")
    if one.pairs_sha256 is not None:
        lines.append(f"pairs_sha256 = {json.dumps(one.pairs_sha256)}")
    if one.steerable is not None:
        lines.append(f"steerable = {json.dumps(one.steerable)}")
    lines.append("metrics = [")
    for metric in one.metrics:
        texts = {"name": metric.name, "goal": metric.goal, **({"unit": metric.unit} if metric.unit else {})}
        pairs = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in texts.items()]
        pairs += [f"{key} = {[float(x) for x in getattr(metric, key)]}" for key in ("before", "after", "change")]
        lines.append(f"  {{ {', '.join(pairs)} }},")
    return "\n".join([*lines, "]", ""])


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    metrics = tuple(
        MeasuredMetric(
            m["name"], m["goal"], m.get("unit", ""), tuple(m["before"]), tuple(m["after"]), tuple(m["change"])
        )
        for m in entry["metrics"]
    )
    cost = entry["cost"]["name"], float(entry["cost"]["value"])
    steerable, pairs = entry.get("steerable"), entry.get("pairs_sha256")
    return Measurement(entry["model"], entry["command"], entry["questions"], cost, steerable, metrics, pairs)


def _metric_faults(metric: Mapping[str, Any], where: str) -> list[str]:
    wrong = _unknown(metric, _METRIC, where)
    if metric["goal"] not in ("more", "less"):
        wrong.append(f"{where}.goal is not more or less")
    for key in ("before", "after", "change"):
        if len(metric[key]) != 3 or not all(map(math.isfinite, metric[key])):
            wrong.append(f"{where}.{key} is not a value with the two ends of its interval")
    return wrong


def _unknown(table: Mapping[str, Any], kind: Mapping[str, Any], where: str) -> list[str]:
    keys = {key.removesuffix("?") for key in kind}
    return [f"{where}.{key} is not a key; expected {', '.join(sorted(keys))}" for key in table if key not in keys]
