"""What was measured of a behaviour on a model, with the command that gives the numbers.

It is an entry of the behaviour's file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steer2edit.files.schema import NUMBER, faults

_METRIC: Any = {"name": str, "unit?": str, "before": [NUMBER], "after": [NUMBER], "change": [NUMBER]}
_ENTRY: Any = {
    **{"model": str, "command": str, "questions": int, "cost": {"name": str, "value": NUMBER}},
    **{"steerable": bool, "verdict": str, "metrics": [_METRIC]},
}


@dataclass(frozen=True)
class MeasuredMetric:
    """A metric before and after the edit, and the paired change.

    Each is a value with the ends of its 95 % interval: (value, low, high).
    """

    name: str
    unit: str
    before: tuple[float, float, float]
    after: tuple[float, float, float]
    change: tuple[float, float, float]


@dataclass(frozen=True)
class Measurement:
    """One compile of the behaviour: its cost, whether random directions do less, and each metric, losses too.

    ``cost`` is the name and value of the KL in nats per token. ``questions`` is how many the behaviour's metric was measured on.
    """

    model: str
    command: str
    questions: int
    cost: tuple[str, float]
    steerable: bool
    verdict: str
    metrics: tuple[MeasuredMetric, ...]


def read_measurements(value: object) -> tuple[tuple[Measurement, ...], list[str]]:
    """The entries under ``measured`` of a behaviour's file, and what is wrong with them."""
    wrong = faults(value, [_ENTRY], "measured")
    if wrong or not isinstance(value, list):
        return (), wrong
    for at, entry in enumerate(value):
        wrong += _unknown(entry, _ENTRY, f"measured[{at}]")
        for index, metric in enumerate(entry["metrics"]):
            where = f"measured[{at}].metrics[{index}]"
            wrong += _unknown(metric, _METRIC, where)
            for key in ("before", "after", "change"):
                if len(metric[key]) != 3 or not all(map(math.isfinite, metric[key])):
                    wrong.append(f"{where}.{key} is not a value with the two ends of its interval")
    if wrong:
        return (), wrong
    return tuple(_measurement(entry) for entry in value), []


def _measurement(entry: Mapping[str, Any]) -> Measurement:
    metrics = tuple(
        MeasuredMetric(m["name"], m.get("unit", ""), tuple(m["before"]), tuple(m["after"]), tuple(m["change"]))
        for m in entry["metrics"]
    )
    cost = entry["cost"]["name"], float(entry["cost"]["value"])
    return Measurement(
        entry["model"], entry["command"], entry["questions"], cost, entry["steerable"], entry["verdict"], metrics
    )


def _unknown(table: Mapping[str, Any], kind: Mapping[str, Any], where: str) -> list[str]:
    keys = {key.removesuffix("?") for key in kind}
    return [f"{where}.{key} is not a key; expected {', '.join(sorted(keys))}" for key in table if key not in keys]
