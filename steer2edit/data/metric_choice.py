"""The metric of a behaviour: its name, which way is better, and its pattern where it takes one.

A metric is one entry of :data:`METRICS`. Those of written answers say how one answer is read; the others are measured by
likelihood (``evaluation/metrics.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from steer2edit.data.answer_text import has_list, matches, per_hundred_words, words
from steer2edit.data.degeneration import is_empty
from steer2edit.data.language import left_language
from steer2edit.errors import DataError, shown

Goal = Literal["more", "less"]
Needs = Literal["written answers", "two responses", "choices", "accepted answers"]


@dataclass(frozen=True)
class Written:
    """One written answer as metrics read it: the prompt's text, the answer's text without a thought, and its tokens."""

    prompt: str
    text: str
    tokens: int


@dataclass(frozen=True)
class MetricKind:
    """One metric that a behaviour may name: what it counts, its unit, and what a question must have for it.

    ``goals`` are the directions that make sense; a metric with one of them needs none in the file. ``read`` gives the number of
    one written answer, with the pattern where the metric ``takes_pattern``, else "".
    """

    description: str
    needs: Needs = "written answers"
    unit: str = ""
    goals: tuple[Goal, ...] = get_args(Goal)
    read: Callable[[Written, str], float] | None = None
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
    "exact answers": MetricKind("share of answers that say what is accepted", "accepted answers", goals=("more",)),
    "length": MetricKind("length of the answer in tokens", unit="tokens", read=lambda a, _: float(a.tokens)),
    "words": MetricKind("length of the answer in words", unit="words", read=lambda a, _: float(words(a.text))),
    "pattern": MetricKind(
        "share of answers in which the pattern is found",
        read=lambda a, pattern: float(matches(pattern, a.text) > 0),
        takes_pattern=True,
    ),
    "count": MetricKind(
        "matches of the pattern per 100 words of the answer",
        unit="per 100 words",
        read=lambda a, pattern: per_hundred_words(matches(pattern, a.text), a.text),
        takes_pattern=True,
    ),
    "lists": MetricKind("share of answers with a list", read=lambda a, _: float(has_list(a.text))),
    "same language": MetricKind(
        "share of answers in the language of their prompt",
        goals=("more",),
        read=lambda a, _: float(not (left_language(a.prompt, a.text) or is_empty(a.text))),
    ),
}
"""The metrics of behaviours by name."""


@dataclass(frozen=True)
class MetricChoice:
    """A behaviour's metric: a name of :data:`METRICS` and which way is better.

    ``pattern`` is the regular expression of pattern and count. ``title`` is the name in tables in place of the metric's own, for
    metrics of written answers.
    """

    name: str
    goal: Goal
    pattern: str | None = None
    title: str | None = None

    @property
    def kind(self) -> MetricKind:
        """What the metric counts."""
        return METRICS[self.name]

    @property
    def label(self) -> str:
        """The metric's name in tables: its title, its own name, or its pattern between slashes."""
        if self.title is not None or self.pattern is None:
            return self.title or self.name
        return f"/{self.pattern}/" if self.name == "pattern" else f"{self.name} of /{self.pattern}/"

    def read(self, answer: Written) -> float:
        """The metric's number of one written answer. Raises DataError for a metric that is not of written answers."""
        if self.kind.read is None:
            raise DataError(f"{self.name} is measured on {self.kind.needs}, not on written answers")
        return self.kind.read(answer, self.pattern or "")

    def described(self) -> dict[str, Any]:
        """The choice in plain values, as files hold it."""
        given = {"pattern": self.pattern, "title": self.title}
        return {
            "name": self.name,
            "goal": self.goal,
            **{key: value for key, value in given.items() if value is not None},
        }


def table() -> str:
    """The metrics as a table in Markdown, for docs/data.md."""
    rows = ["| metric | what it is | better | it is measured on |", "|---|---|---|---|"]
    for name, kind in METRICS.items():
        unit = f", {kind.unit}" if kind.unit else ""
        pattern = "; takes `pattern`" if kind.takes_pattern else ""
        rows.append(f"| `{name}` | {kind.description}{unit}{pattern} | {' or '.join(kind.goals)} | {kind.needs} |")
    return "\n".join(rows)


def read_metric(value: object, where: str = "metric") -> tuple[MetricChoice | None, list[str]]:
    """The metric that a file's value names, and what is wrong with it.

    The value is a name, or a table with name, goal, pattern and title.
    """
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        return None, [f"{where} is {shown(value)}; expected a name or a table with name and goal"]
    faults = [f"{where}.{key} is not a key; expected name, goal, pattern or title" for key in table if key not in _KEYS]
    name, goal, pattern, title = (table.get(key) for key in _KEYS)
    kind = METRICS.get(name) if isinstance(name, str) else None
    if kind is None:
        return None, [*faults, f"{where}.name is {_given(name)}; expected one of {', '.join(METRICS)}"]
    if goal is None and len(kind.goals) == 1:
        goal = kind.goals[0]
    if goal not in kind.goals:
        faults.append(f"{where}.goal is {_given(goal)}; expected {' or '.join(kind.goals)} for {name}")
    if kind.takes_pattern:
        faults += pattern_faults(pattern, f"{where}.pattern")
    elif pattern is not None:
        faults.append(f"{where}.pattern is given, and {name} takes none")
    if title is not None and (not isinstance(title, str) or not re.fullmatch(r"[^\W_](?:[\w \-]{0,38}\w)?", title)):
        faults.append(f"{where}.title is {shown(title)}; expected a few words, up to 40 characters")
    elif title is not None and kind.read is None:
        faults.append(f"{where}.title is given, and only metrics of written answers take one: {name} keeps its name")
    elif title in METRICS:
        faults.append(f"{where}.title is {shown(title)}, which is another metric's name")
    if faults:
        return None, faults
    return MetricChoice(str(name), "more" if goal == "more" else "less", pattern, title), []


def shared_metric(choices: Iterable[MetricChoice | None]) -> MetricChoice | None:
    """The metric that all have; None where they have several or one has none."""
    distinct = set(choices)
    return distinct.pop() if len(distinct) == 1 else None


def pattern_faults(pattern: object, where: str) -> list[str]:
    """What is wrong with a regular expression from a file."""
    if not isinstance(pattern, str) or not pattern:
        return [f"{where} is {_given(pattern)}; expected a regular expression"]
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return [f"{where} is {shown(pattern)}, which is not a regular expression: {error}"]
    return []


def _given(value: object) -> str:
    """A value of a file for a message, which may not be there."""
    return "missing" if value is None else shown(value)


_KEYS = ("name", "goal", "pattern", "title")
