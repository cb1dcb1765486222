"""The metric of a behaviour: its name, which way is better, and its pattern where it takes one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from steer2edit.errors import shown

Goal = Literal["more", "less"]
Needs = Literal["written answers", "two responses", "choices", "accepted answers"]


@dataclass(frozen=True)
class MetricKind:
    """One metric that a behaviour may name: what it counts, its unit, and what a question must have for it.

    ``goals`` are the directions that make sense; a metric with one of them needs none in the file.
    """

    description: str
    needs: Needs = "written answers"
    unit: str = ""
    goals: tuple[Goal, ...] = get_args(Goal)
    takes_pattern: bool = False


METRICS: Mapping[str, MetricKind] = {
    "margin": MetricKind(
        "log-probability of the positive response minus that of the negative", "two responses", "nats/token", ("more",)
    ),
    "calibrated margin": MetricKind(
        "the margin minus that after a prompt that says nothing", "two responses", "nats/token", ("more",)
    ),
    "preferred": MetricKind("share of questions with a positive margin", "two responses", goals=("more",)),
    "MC1": MetricKind("share of questions whose best true choice is the likeliest", "choices", goals=("more",)),
    "MC2": MetricKind("probability of all true choices together", "choices", goals=("more",)),
    "length": MetricKind("length of the answer in tokens", unit="tokens"),
    "words": MetricKind("length of the answer in words", unit="words"),
    "pattern": MetricKind("share of answers that match the pattern", takes_pattern=True),
    "count": MetricKind("matches of the pattern per 100 words", unit="per 100 words", takes_pattern=True),
    "lists": MetricKind("share of answers with list markers"),
    "same language": MetricKind("share of answers in the language of their prompt", goals=("more",)),
    "exact answers": MetricKind("share of answers that say what is accepted", "accepted answers", goals=("more",)),
}  # fmt: skip
"""The metrics of behaviours by name; ``steer2edit.evaluation`` measures them."""


@dataclass(frozen=True)
class MetricChoice:
    """A behaviour's metric: a name of :data:`METRICS`, which way is better, and the regular expression of pattern and count."""

    name: str
    goal: Goal
    pattern: str | None = None

    @property
    def kind(self) -> MetricKind:
        """What the metric counts."""
        return METRICS[self.name]

    @property
    def label(self) -> str:
        """The metric's name in tables: its own, or its pattern between slashes."""
        if self.pattern is None:
            return self.name
        return f"/{self.pattern}/" + (" per 100 words" if self.name == "count" else "")

    def described(self) -> dict[str, Any]:
        """The choice in plain values, as files hold it."""
        return {"name": self.name, "goal": self.goal, **({"pattern": self.pattern} if self.pattern else {})}


def read_metric(value: object, where: str = "metric") -> tuple[MetricChoice | None, list[str]]:
    """The metric that a file's value names, and what is wrong with it.

    The value is a name, or a table with name, goal and pattern.
    """
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        return None, [f"{where} is {shown(value)}; expected a name or a table with name and goal"]
    faults = [f"{where}.{key} is not a key; expected name, goal or pattern" for key in table if key not in _KEYS]
    name, goal, pattern = (table.get(key) for key in _KEYS)
    kind = METRICS.get(name) if isinstance(name, str) else None
    if kind is None:
        return None, [*faults, f"{where}.name is {shown(name)}; expected one of {', '.join(METRICS)}"]
    if goal is None and len(kind.goals) == 1:
        goal = kind.goals[0]
    if goal not in kind.goals:
        faults.append(f"{where}.goal is {shown(goal)}; expected {' or '.join(kind.goals)} for {name}")
    if kind.takes_pattern:
        faults += pattern_faults(pattern, f"{where}.pattern")
    elif pattern is not None:
        faults.append(f"{where}.pattern is given, and {name} takes none")
    if faults:
        return None, faults
    return MetricChoice(str(name), "more" if goal == "more" else "less", pattern), []


def pattern_faults(pattern: object, where: str) -> list[str]:
    """What is wrong with a regular expression from a file."""
    if not isinstance(pattern, str) or not pattern:
        return [f"{where} is {shown(pattern)}; expected a regular expression"]
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return [f"{where} is {shown(pattern)}, which is not a regular expression: {error}"]
    return []


_KEYS = ("name", "goal", "pattern")
