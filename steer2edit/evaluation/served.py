"""An evaluation of what servers serve: the base and others under their names there, by their written answers alone.

A server gives answers. It has no weights to compare with the base's, and the OpenAI API does not say how likely a text is that
somebody else wrote. What is measured by these is left out, and the evaluation says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from steer2edit.data.questions import Split
from steer2edit.engines.engine import Engine
from steer2edit.engines.server_engine import ServerEngine
from steer2edit.evaluation.answers import Answers
from steer2edit.evaluation.comparison import BOTH, INSTRUCTED
from steer2edit.evaluation.evaluate import Evaluation, Row, metrics_of, named, with_outcomes
from steer2edit.evaluation.instructed import told
from steer2edit.evaluation.metrics import Outcome, Task
from steer2edit.evaluation.written_suite import WrittenSuite, check_names
from steer2edit.notices import notice
from steer2edit.pairs.journal import Journal
from steer2edit.pairs.kept_engine import KeptEngine
from steer2edit.plan.measured import KL_NAMES
from steer2edit.progress import Progress, silent

NO_PROBABILITIES = "a server gives answers, and no log-probabilities of given texts"


class CountingEngine(Engine, Protocol):
    """An engine that says who counted the tokens of its answers."""

    def counted(self) -> str:
        """Who counted the tokens of the answers so far."""


class KeptServer(KeptEngine):
    """A server whose answers go through a journal."""

    def __init__(self, engine: ServerEngine, journal: Journal) -> None:
        super().__init__(engine, journal)
        self._server = engine

    def counted(self) -> str:
        """Who counted the tokens of the answers so far, those of the journal included."""
        return self._server.counted(self.estimated)


@dataclass(frozen=True)
class ServedModel:
    """A model under its name on a server. ``kind`` is as a candidate's; ``told`` is an instruction before every prompt."""

    name: str
    engine: CountingEngine
    kind: str = "edit"
    note: str = ""
    told: str = ""


@dataclass(frozen=True)
class _Served:
    """What an instruction needs to know of a served model."""

    tokenizer: Any


def evaluate_served(
    base: CountingEngine,
    candidates: Sequence[ServedModel],
    suite: WrittenSuite,
    tokenizer: Any,
    *,
    split: Split = "report",
    context: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure the served base and every candidate by their answers to the questions of one split.

    ``tokenizer`` is the model's own: it tells whether its template takes a system message, and the tokens that repetition is
    read in. Raises EngineError where a server fails for good, and DataError where the split holds no question.
    """
    tasks = suite.answer_tasks(split)
    check_names(tasks)
    rows = [_measured(one, tasks, tokenizer, progress) for one in (ServedModel("base", base, "base"), *candidates)]
    about = {
        **suite.context(split),
        **(context or {}),
        "server": base.described(),
        "served": {one.name: one.engine.described() for one in candidates},
        "lengths": {"base": base.counted(), **{one.name: one.engine.counted() for one in candidates}},
        "not_measured": not_measured(suite, split),
    }
    return Evaluation(metrics_of(tasks), tuple(rows), about, tuple(suite.prompts(split)))


def not_measured(suite: WrittenSuite, split: Split) -> list[str]:
    """The metrics that a model in this process would have and one on a server has not."""
    scored = [metric.name for task in suite.likelihood_tasks(split) for metric in task.metrics]
    # a server answers in chat, so that these would be the texts
    return [KL_NAMES["chat"], KL_NAMES["prose"], "perplexity", *scored]


def note_unmeasured(suite: WrittenSuite, split: Split) -> None:
    """Say before the work begins which metrics are left out, and why."""
    own = suite.metric
    lacking = own is not None and own.kind.needs in ("two responses", "choices")
    told = f" ({own.label} is the behaviour's own)" if own is not None and lacking else ""
    notice(f"{NO_PROBABILITIES}, so these are not measured: {', '.join(not_measured(suite, split))}{told}")


def with_instruction(
    base: CountingEngine, candidates: Sequence[ServedModel], instruction: str | None
) -> list[ServedModel]:
    """The candidates, the base under an instruction, and the first candidate under it too."""
    if not instruction:
        return list(candidates)
    note = f"told: {instruction}"
    found = [*candidates, ServedModel("instruction", base, INSTRUCTED, note, instruction)]
    for first in candidates[:1]:
        found.append(replace(first, name=f"{first.name} and instruction", kind=BOTH, note=note, told=instruction))
    return found


def _measured(one: ServedModel, tasks: Sequence[Task], tokenizer: Any, progress: Progress) -> Row:
    outcomes: list[tuple[Task, Outcome]] = []
    started = time.perf_counter()
    for task in tasks:
        asked = told(task, one.told, _Served(tokenizer)) if one.told else task
        assert isinstance(asked, Answers)
        outcomes.append((task, asked.through(one.engine, tokenizer, named(progress, one.name))))
    seconds = time.perf_counter() - started
    return with_outcomes(Row(one.name, one.kind, {}, one.note, None, (), seconds), outcomes, named(progress, one.name))
