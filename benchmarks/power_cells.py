"""The cells of the power table, and their journal: a method at a KL, question by question."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from greedy import through_transformers
from right_choice import names_right
from train_lora import Loss, train

from steer2edit.data.behavior import Behavior
from steer2edit.data.behavior_file import open_behavior
from steer2edit.data.prompts import prompt_digest
from steer2edit.data.questions import Question, Split, knowledge_questions, take
from steer2edit.data.templates import before_next_turn, render_prompts, templated, without_thought
from steer2edit.data.tokens import beginning, texts_of
from steer2edit.errors import DataError, Steer2EditError
from steer2edit.evaluation.baselines import near, random_direction
from steer2edit.evaluation.instructed import told
from steer2edit.evaluation.metrics import Preference
from steer2edit.methods import METHOD, make_plan
from steer2edit.progress import silent
from steer2edit.runtime.adapters import adapted
from steer2edit.runtime.hooks import edited, steered
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.meet import Apply
from steer2edit.strength.neutral_texts import NeutralTexts

METHODS = ("edit", "component", "steering", "random 1", "random 2", "random 3", "instruction", "sft", "dpo")
UNSCALED = ("base", "instruction")


@dataclass(frozen=True)
class Settings:
    """What decides a cell's numbers; a folder holds cells of one choice of it."""

    fingerprint: str
    dtype: str
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    questions: int
    random_questions: int
    knowledge: int
    answer_tokens: int
    length_tokens: int
    kl_rows: int
    train_seconds: float
    train_steps: int | None = None
    general_split: Split = "report"
    repetition_penalty: float = 1.0


_DEFAULTS = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
"""Settings that a folder of an earlier release does not name."""


@dataclass(frozen=True)
class Cell:
    """One method at one KL: ``values`` by metric, in the order of the behaviour's questions; ``kl`` by kind of text.

    A cell that could not be measured says why in ``failed``.
    """

    behavior: str
    method: str
    budget: float | None
    strength: float | None = None
    kl: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str = ""

    @property
    def key(self) -> tuple[str, str, float | None]:
        return self.behavior, self.method, self.budget


class Journal:
    """Cells as lines of JSON, each written through: a kill loses the one under way."""

    def __init__(self, folder: Path, settings: Settings | None = None) -> None:
        self._path = folder / "cells.jsonl"
        stored = folder / "settings.json"
        folder.mkdir(parents=True, exist_ok=True)
        if settings is not None:
            described = json.loads(json.dumps(asdict(settings)))
            if stored.is_file():
                found = _DEFAULTS | json.loads(stored.read_text())
                if changed := sorted(key for key in described if found.get(key) != described[key]):
                    raise DataError(
                        f"{folder} holds cells with other settings ({', '.join(changed)}): give another --out, or those settings"
                    )
            stored.write_text(json.dumps(described, indent=1) + "\n")
        self.cells: dict[tuple[str, str, float | None], Cell] = {}
        whole = 0
        if self._path.is_file():
            data = self._path.read_bytes()
            # a line that a kill cut short is taken off
            whole = data.rfind(b"\n") + 1
            for line in data[:whole].splitlines():
                cell = Cell(**json.loads(line))
                self.cells[cell.key] = cell
            os.truncate(self._path, whole)

    def add(self, cell: Cell) -> None:
        """Keep a cell."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.cells[cell.key] = cell


@dataclass(frozen=True)
class Asked:
    """A behaviour's questions, in the order of their digests' hash, and the seeds in whose reporting half each is."""

    attribute: str
    questions: tuple[Question, ...]
    seeds: tuple[tuple[int, ...], ...]

    def described(self) -> dict[str, Any]:
        return {
            "attribute": self.attribute,
            "digests": [prompt_digest(q.prompt) for q in self.questions],
            "seeds": [list(seeds) for seeds in self.seeds],
        }


def ask(questions: Sequence[Question], seeds: Sequence[int], count: int) -> Asked:
    """At most ``count`` questions of each seed's reporting half: a question counts once, whatever halves it is in.

    The attribute is the margin where questions have two responses, else the length of a written answer.
    """
    pairs = [q for q in questions if q.positive]
    attribute, usable = ("margin", pairs) if pairs else ("length", list(questions))
    ordered = sorted(usable, key=lambda q: q.digest[::-1])
    halves = {seed: take(ordered, "report", seed)[:count] for seed in seeds}
    owners = [tuple(seed for seed in seeds if q in halves[seed]) for q in ordered]
    kept = [(q, mine) for q, mine in zip(ordered, owners, strict=True) if mine]
    if not kept:
        raise DataError("no question falls into the reporting half of any seed")
    return Asked(attribute, tuple(q for q, _ in kept), tuple(mine for _, mine in kept))


def general_questions(count: int, split: Split = "report") -> list[Question]:
    """General questions with short choices, from one half; the model is not shown the choices."""
    ordered = sorted(knowledge_questions(), key=lambda q: q.digest[::-1])
    return [q for q in take(ordered, split) if q.choices][:count]


@dataclass(frozen=True)
class Bench:
    """A loaded model with one behaviour's scores and questions: all that a cell needs."""

    loaded: LoadedModel
    scoring: Scoring
    behavior: Behavior
    costs: NeutralTexts
    asked: Asked
    general: Sequence[Question]
    settings: Settings
    folder: Path

    @contextmanager
    def opened(self, method: str) -> Iterator[tuple[Apply, str]]:
        """What applies a method at a strength, and the instruction that goes with it."""
        if method in UNSCALED:
            text = open_behavior(self.behavior.name).positive if method == "instruction" else ""
            if text is None:
                raise Steer2EditError(f"there is no instruction for {self.behavior.name}")
            yield (lambda _strength: nullcontext()), text
        elif method in ("sft", "dpo"):
            from peft.helpers import rescale_adapter_scale

            with adapted(self.loaded.model, self._trained(method)) as adapter:  # type: ignore[arg-type]
                yield partial(rescale_adapter_scale, adapter), ""
        elif method == "steering":
            statistics, sites = self.scoring.statistics, self.scoring.spec.sites
            vectors = {site.key: statistics.difference(site.vector_key).float() for site in sites}
            yield partial(steered, self.loaded, vectors), ""
        else:
            plan = make_plan(self.scoring, method="component" if method == "component" else METHOD)
            if method.startswith("random"):
                plan = random_direction(plan, seed=int(method.split()[1]) - 1)
            yield partial(edited, self.loaded, plan), ""

    def _trained(self, loss: Loss) -> Path:
        """The adapter of a training, which is done once."""
        folder = self.folder / "adapters" / f"{self.behavior.name}-{loss}"
        done = folder / "training.json"
        if not done.is_file():
            settings = self.settings
            whole = replace(self.behavior, span="response")
            outcome = train(self.loaded, whole, loss, settings.train_seconds, folder, steps=settings.train_steps)
            done.write_text(json.dumps(asdict(outcome)) + "\n")
        return folder

    def cells(self, method: str, journal: Journal) -> Iterator[Cell]:
        """The method's cells that the journal lacks, one KL after the other."""
        name = self.behavior.name
        budgets: Sequence[float | None] = (None,) if method in UNSCALED else self.settings.budgets
        missing = [budget for budget in budgets if (name, method, budget) not in journal.cells]
        if not missing:
            return
        try:
            with self.opened(method) as (apply, text):
                for budget in missing:
                    yield self._cell(method, budget, apply, text, journal)
        except Steer2EditError as error:
            for budget in missing:
                if (name, method, budget) not in journal.cells:
                    yield Cell(name, method, budget, failed=str(error))

    def _cell(self, method: str, budget: float | None, apply: Apply, text: str, journal: Journal) -> Cell:
        started = time.perf_counter()
        name = self.behavior.name
        strength: float | None = None
        kl: dict[str, float] = {}
        if budget is not None:
            known = [
                (abs(math.log(cell.budget / budget)), cell)
                for cell in journal.cells.values()
                if (cell.behavior, cell.method) == (name, method) and cell.budget and cell.strength
            ]
            start = None
            if known:
                nearest = min(known, key=lambda one: one[0])[1]
                reached = nearest.kl[self.costs.budget.kind]
                start = (nearest.strength or 1.0) * math.sqrt(budget / reached)
            try:
                found = near(apply, self.costs.budget, budget, start, f"{name}, {method}")
            except Steer2EditError as error:
                return Cell(name, method, budget, failed=str(error), seconds=time.perf_counter() - started)
            strength = found.strength
            kl[self.costs.budget.kind] = found.divergence.kl
        with apply(1.0 if strength is None else strength):
            if self.costs.other is not None and budget is not None:
                kl["prose"] = self.costs.other.measure(stage=f"{name}, {method}: KL on prose").kl
            values = self.values(method, text)
        return Cell(name, method, budget, strength, kl, values, time.perf_counter() - started)

    def values(self, method: str, text: str) -> dict[str, list[float]]:
        """The metrics of the model as it is now, with whatever hooks are on it."""
        chance = method.startswith("random")
        asked = self.asked.questions[: self.settings.random_questions if chance else None]
        task = Preference(asked)
        if text:
            task = told(task, text, self.loaded)  # type: ignore[assignment]
        found = {}
        if self.asked.attribute == "margin":
            found["margin"] = task._margins(self.loaded, [q.prompt for q in task.questions], silent)
        else:
            answers, lengths = self._written(task.questions, task.system, self.settings.length_tokens)
            found["length"] = lengths
        if not chance and self.general:
            general = Preference(self.general)
            if text:
                general = told(general, text, self.loaded)  # type: ignore[assignment]
            answers, _ = self._written(general.questions, general.system, self.settings.answer_tokens)
            found["right"] = [float(names_right(answer, q)) for answer, q in zip(answers, self.general, strict=True)]
        return found

    def _written(self, questions: Sequence[Question], system: str | None, tokens: int) -> tuple[list[str], list[float]]:
        """Greedy answers, and their lengths in tokens, the bound where it was met."""
        prompts = render_prompts({q.prompt: q.where for q in questions}, self.loaded.tokenizer, system, writing=True)
        tokenizer = self.loaded.tokenizer
        rows = through_transformers(self.loaded, [prompts[q.prompt] for q in questions], tokens)
        texts = texts_of(tokenizer, rows)
        if not templated(tokenizer):
            texts = [before_next_turn(text) for text in texts]
            rows = [beginning(tokenizer, row, text) for row, text in zip(rows, texts, strict=True)]
        texts = [without_thought(answer).strip() for answer in texts]
        return texts, [float(len(row)) for row in rows]
