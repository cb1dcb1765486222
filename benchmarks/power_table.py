"""The power table: areas under the fronts, and what the edit does beyond each method."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from power_cells import METHODS, Cell, Journal
from tabulate import tabulate

from steer2edit.bootstrap import Estimate
from steer2edit.evaluation.comparison import INSTRUCTED, direction
from steer2edit.evaluation.evaluate import Evaluation, Row
from steer2edit.evaluation.metrics import Metric, Sample
from steer2edit.evaluation.steerability import steerability
from steer2edit.formatting import interval, number

METRICS = {
    "margin": Metric("margin", "attribute", "more", "nats/token"),
    "length": Metric("length", "attribute", "less", "tokens"),
    "right": Metric("answers right", "utility", "more"),
}
KINDS = {"base": "base", "steering": "steering", "instruction": INSTRUCTED, "sft": "adapter", "dpo": "adapter"}
NAMES = {"edit": "default edit", "component": "component edit", "steering": "activation steering"}
NAMES |= {"sft": "LoRA by SFT", "dpo": "LoRA by DPO"}
WORDS = {1: "ahead", 0: "undecided", -1: "behind"}


@dataclass(frozen=True)
class Front:
    """One method's cells of a behaviour, by rising KL; a method without a strength has one."""

    method: str
    cells: tuple[Cell, ...]
    kind: str

    def area(self, metric: str, low: float, high: float) -> list[float] | None:
        """Each question's mean of the metric over log KL from ``low`` to ``high``; None where it was not measured."""
        cells = [cell for cell in self.cells if metric in cell.values]
        if not cells:
            return None
        weights = [1.0]
        if self.method not in ("base", "instruction"):
            weights = front_weights([cell.kl[self.kind] for cell in cells], low, high)
        columns = zip(*(cell.values[metric] for cell in cells), strict=True)
        # the weights' sum is 1 but for rounding, which must not tell equal answers apart
        return [round(sum(w * value for w, value in zip(weights, column, strict=True)), 9) for column in columns]


def front_weights(kls: Sequence[float], low: float, high: float) -> list[float]:
    """Weights of a front's points in its mean over log KL from ``low`` to ``high``; they sum to 1.

    Between points the front is straight in log KL, beyond the first and the last it is level.
    """
    at = [math.log(kl) for kl in kls]
    ends = (math.log(low), math.log(high))
    order = sorted(range(len(at)), key=lambda i: at[i])

    def shares(x: float) -> dict[int, float]:
        if x <= at[order[0]]:
            return {order[0]: 1.0}
        for left, right in pairwise(order):
            if x <= at[right]:
                part = (x - at[left]) / (at[right] - at[left]) if at[right] > at[left] else 1.0
                return {left: 1 - part, right: part}
        return {order[-1]: 1.0}

    stops = sorted({*ends, *(x for x in at if ends[0] < x < ends[1])})
    weights = [0.0] * len(at)
    for left, right in pairwise(stops):
        for stop in (left, right):
            for index, share in shares(stop).items():
                weights[index] += share * (right - left) / 2 / (ends[1] - ends[0])
    return weights


@dataclass(frozen=True)
class Table:
    """A behaviour's fronts on one model, and the weights of its questions: in how many seeds' halves each is."""

    model: str
    behavior: str
    attribute: str
    seeds: tuple[tuple[int, ...], ...]
    fronts: Mapping[str, Front]
    failed: tuple[Cell, ...]
    budgets: tuple[float, ...]
    kind: str

    def evaluation(
        self, row: str, metrics: Sequence[str], methods: Sequence[str], seed: int | None = None
    ) -> Evaluation:
        """The areas as an evaluation: ``row`` is the edit, and the others are what it is compared with.

        All rows are cut to the questions that every one of them has. With a ``seed`` its reporting half alone counts.
        """
        low, high = min(self.budgets), max(self.budgets)
        rows = []
        for method in ("base", row, *(one for one in methods if one != row)):
            fronts = {name: self.fronts[method].area(name, low, high) for name in metrics}
            areas = {name: area for name, area in fronts.items() if area is not None}
            kind = "edit" if method == row else KINDS.get(method, method.split()[0])
            note = "at equal KL" if kind not in ("base", "edit", INSTRUCTED) else ""
            rows.append((method, kind, note, areas))
        counts = {name: min((len(areas[name]) for *_, areas in rows if name in areas), default=0) for name in metrics}
        made = []
        for method, kind, note, areas in rows:
            samples = {
                METRICS[name].name: self._sample(name, area[: counts[name]], seed) for name, area in areas.items()
            }
            made.append(Row(NAMES.get(method, method), kind, samples, note))
        return Evaluation(tuple(METRICS[name] for name in metrics), tuple(made))

    def _sample(self, metric: str, values: Sequence[float], seed: int | None) -> Sample:
        if metric != self.attribute:
            return Sample(tuple(values))
        owners = self.seeds[: len(values)]
        weights = [float(len(mine) if seed is None else mine.count(seed)) for mine in owners]
        kept = [(w * value, w) for w, value in zip(weights, values, strict=True) if w]
        return Sample(tuple(value for value, _ in kept), tuple(w for _, w in kept))


def read_tables(folder: Path) -> list[Table]:
    """The tables of one model's folder, of the behaviours that have a base and an edit."""
    settings = json.loads((folder / "settings.json").read_text())
    journal = Journal(folder)
    tables = []
    for behavior in dict.fromkeys(cell.behavior for cell in journal.cells.values()):
        asked = json.loads((folder / f"questions-{behavior}.json").read_text())
        mine = [cell for cell in journal.cells.values() if cell.behavior == behavior]
        whole = [cell for cell in mine if not cell.failed]
        kinds = [kind for cell in whole for kind in cell.kl if kind != "prose"]
        kind = kinds[0] if kinds else "prose"
        fronts = {}
        for method in ("base", *METHODS):
            cells = sorted((c for c in whole if c.method == method), key=lambda c: c.kl.get(kind, 0.0))
            if cells:
                fronts[method] = Front(method, tuple(cells), kind)
        if {"base", "edit"} <= fronts.keys():
            seeds = tuple(tuple(seeds) for seeds in asked["seeds"])
            budgets = tuple(settings["budgets"])
            failed = tuple(cell for cell in mine if cell.failed)
            tables.append(Table(folder.name, behavior, asked["attribute"], seeds, fronts, failed, budgets, kind))
    return tables


@dataclass(frozen=True)
class Against:
    """What the edit does beyond one other method: its area's difference in the attribute, and in answers right."""

    method: str
    attribute: Estimate
    right: Estimate | None
    signs: tuple[int, int]


def against(table: Table, row: str = "edit") -> list[Against]:
    """The edit beside every other method, the losses first; random directions count as their mean."""
    randoms = [method for method in table.fronts if method.startswith("random")]
    singles = [method for method in table.fronts if method not in ("base", row, *randoms)]
    found = []
    for methods, name in [*(([one], one) for one in singles), *([(randoms, "random")] if randoms else [])]:
        metrics = [table.attribute, *(["right"] if name != "random" else [])]
        evaluation = table.evaluation(row, metrics, methods)
        edit, others = evaluation.rows[1], evaluation.rows[2:]
        changes = []
        for metric in evaluation.metrics:
            there = all(metric.name in one.samples for one in (edit, *others))
            changes.append(evaluation.difference(edit, others, metric.name) if there else None)
        first = changes[0]
        assert first is not None
        second = changes[1] if len(changes) > 1 else None
        signs = (
            direction(METRICS[table.attribute], first),
            0 if second is None else direction(METRICS["right"], second),
        )
        found.append(Against(name, first, second, signs))
    return sorted(found, key=lambda one: (one.signs[0], one.signs[1]))


def render(tables: Sequence[Table], row: str = "edit") -> str:
    """All tables as Markdown: the tally, then each behaviour, losses first."""
    parts = [_tally(tables, row)]
    for table in tables:
        parts += ["", _table(table, row)]
    return "\n".join(parts)


def _table(table: Table, row: str) -> str:
    metric = METRICS[table.attribute]
    every = table.evaluation(row, [table.attribute, "right"], [])
    base = every.rows[0]
    count = len(table.seeds)
    own = every.estimate(base, metric.name)
    heading = (
        f"### {table.model}, {table.behavior}\n\n{metric.name} in {metric.unit}, {metric.goal} is better; {count} questions; "
        f"base {interval(own)}"
    )
    if "answers right" in base.samples:
        right = every.estimate(base, "answers right")
        heading += f", answers right {interval(right)} of {right.count} general questions"
    kls = [f"KL {budget:g}" for budget in table.budgets]
    heads = ["", *kls, "mean over log KL", f"{NAMES.get(row, row)} beyond it", "answers right", "mean", "beyond it"]
    ordered = [row, *(one.method for one in against(table, row))]
    beyond = {one.method: one for one in against(table, row)}
    lines = []
    for name in ordered:
        methods = [m for m in table.fronts if m.split()[0] == name] if name == "random" else [name]
        fronts = [table.fronts[method] for method in methods]
        one = beyond.get(name)
        lines.append(
            [
                "random directions" if name == "random" else NAMES.get(name, name),
                *_along(table, fronts, table.attribute),
                _mean(table, methods, table.attribute),
                "" if one is None else f"{interval(one.attribute, signed=True)} {WORDS[one.signs[0]]}",
                " ".join(_along(table, fronts, "right")),
                _mean(table, methods, "right"),
                "" if one is None or one.right is None else f"{interval(one.right, signed=True)} {WORDS[one.signs[1]]}",
            ]
        )
    text = [heading, "", tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True)]
    randoms = [method for method in table.fronts if method.startswith("random")]
    judged = None
    if len(randoms) > 1:
        evaluation = table.evaluation(row, [table.attribute], randoms)
        judged = steerability(evaluation, evaluation.rows[1])
    notes = [] if judged is None else [str(judged)]
    seeds = sorted({seed for mine in table.seeds for seed in mine})
    if len(seeds) > 1:
        notes.append(_by_seed(table, row, seeds))
    lengths = {value for front in table.fronts.values() for c in front.cells for value in c.values.get("length", ())}
    if len(lengths) == 1:
        notes.append("No answer ended before the bound, with an edit or without: the length cannot be read here.")
    failed = {(cell.method, cell.budget): cell.failed for cell in table.failed}
    notes += [f"Not measured: {method} at a KL of {budget}: {why}" for (method, budget), why in failed.items()]
    return "\n".join([*text, *(["", *notes] if notes else [])])


def _along(table: Table, fronts: Sequence[Front], metric: str) -> list[str]:
    """The metric at each KL, the mean over the fronts and over questions."""
    cells = []
    for budget in table.budgets:
        there = [c for f in fronts for c in f.cells if c.budget in (budget, None) and metric in c.values]
        means = [sum(cell.values[metric]) / len(cell.values[metric]) for cell in there]
        cells.append(number(sum(means) / len(means)) if means else "–")
    return cells


def _mean(table: Table, methods: Sequence[str], metric: str) -> str:
    evaluation = table.evaluation("edit", [metric], methods)
    name = METRICS[metric].name
    rows = evaluation.rows[2:] or evaluation.rows[1:2]
    there = [evaluation.estimate(row, name) for row in rows if name in row.samples]
    if not there:
        return "–"
    return interval(there[0]) if len(there) == 1 else number(sum(one.value for one in there) / len(there))


def _by_seed(table: Table, row: str, seeds: Sequence[int]) -> str:
    """The difference to activation steering on each seed's reporting half: the halves overlap."""
    if "steering" not in table.fronts:
        return ""
    told = []
    for seed in seeds:
        evaluation = table.evaluation(row, [table.attribute], ["steering"], seed)
        edit, other = evaluation.rows[1:3]
        told.append(
            f"{seed}: {interval(evaluation.difference(edit, other, METRICS[table.attribute].name), signed=True)}"
        )
    return f"Beyond activation steering by seed of the split (the halves overlap): {'; '.join(told)}."


def _tally(tables: Sequence[Table], row: str) -> str:
    """How often the edit is behind, undecided and ahead, by method."""
    counts: dict[str, list[int]] = {}
    accuracy: dict[str, list[int]] = {}
    for table in tables:
        for one in against(table, row):
            counts.setdefault(one.method, []).append(one.signs[0])
            if one.right is not None:
                accuracy.setdefault(one.method, []).append(one.signs[1])
    lines = []
    for method in sorted(counts, key=lambda name: (-counts[name].count(-1), counts[name].count(1))):
        name = "random directions" if method == "random" else NAMES.get(method, method)
        cells = [[values.count(sign) for sign in (-1, 0, 1)] for values in (counts[method], accuracy.get(method, []))]
        lines.append([name, *(" / ".join(map(str, one)) for one in cells)])
    heads = ["the edit against", "attribute: behind / undecided / ahead", "answers right: behind / undecided / ahead"]
    return str(tabulate(lines, headers=heads, tablefmt="github", disable_numparse=True))


def plain(tables: Sequence[Table], row: str = "edit") -> list[dict[str, Any]]:
    """The comparisons in plain values, for a program to read."""
    return [
        {
            "model": table.model,
            "behavior": table.behavior,
            "metric": METRICS[table.attribute].name,
            "against": one.method,
            "attribute": vars(one.attribute),
            "answers_right": None if one.right is None else vars(one.right),
            "attribute_verdict": WORDS[one.signs[0]],
        }
        for table in tables
        for one in against(table, row)
    ]
