"""Any number of candidates on one loaded model, each measured on the same questions, beside the base.

A plan is applied as exact low-rank hooks, so a candidate costs no weight write and no reload; a checkpoint is loaded
beside the base; an adapter goes through PEFT.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from steer2edit.bootstrap import Estimate
from steer2edit.checkpoint import read_json
from steer2edit.data.questions import Question
from steer2edit.errors import PlanError, Steer2EditError, listing, shown
from steer2edit.evaluation.answers import ANSWERS_RIGHT, Answers
from steer2edit.evaluation.candidates import Candidate, base_candidate
from steer2edit.evaluation.damage import Damage, damages
from steer2edit.evaluation.instructed import brief, told
from steer2edit.evaluation.metrics import Metric, Neutral, Outcome, Sample, Task
from steer2edit.files.atomic import write_text
from steer2edit.files.schema import MAYBE, NUMBER, check
from steer2edit.progress import Progress, silent
from steer2edit.runtime.adapters import changed, checksums
from steer2edit.runtime.model import LoadedModel

FORMAT = "steer2edit.evaluation.1"
_ROW: Any = {
    **{"name": str, "kind": str, "note": str, "strength": MAYBE, "answers": [str], "seconds": NUMBER},
    "samples": {str: {"values": [NUMBER], "weights": ([NUMBER], None), "groups?": ([str], None)}},
}
_METRIC: Any = {
    "name": str,
    "role": str,
    "goal": str,
    "unit": str,
    "exponential": bool,
    "tolerance?": MAYBE,
    "own?": bool,
}
_DESCRIBED: Any = {"metrics": [_METRIC], "rows": [_ROW], "context": {}, "prompts": [str]}


@dataclass(frozen=True)
class Row:
    """What one candidate gave: samples by metric name, answers in the questions' order, seconds taken.

    A candidate that was measured in brief, or that a metric says nothing of, lacks some of the metrics.
    """

    name: str
    kind: str
    samples: Mapping[str, Sample]
    note: str = ""
    strength: float | None = None
    answers: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """Rows, the base first; ``context`` says on what: model, split, seed, counts; ``prompts`` go with the answers."""

    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    context: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()

    @property
    def decoding(self) -> str:
        """A sentence on how answers were decoded, where that is not as the model's own settings say; else nothing."""
        penalty = self.context.get("repetition_penalty")
        known = isinstance(penalty, int | float)
        return f"Answers are decoded with a repetition penalty of {penalty:g}." if known else ""

    def metric(self, name: str) -> Metric:
        """The metric called ``name``. Raises PlanError naming those there are."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise PlanError(f"there is no metric {name!r}; there are {', '.join(m.name for m in self.metrics)}")

    def estimate(self, row: Row, name: str) -> Estimate:
        """A row's metric with its interval."""
        return row.samples[name].estimate(self.metric(name))

    def change(self, row: Row, name: str) -> Estimate:
        """A row's metric against the base's, paired by question."""
        return row.samples[name].change(self.rows[0].samples[name], self.metric(name))

    def difference(self, row: Row, other: Row | Sequence[Row], name: str) -> Estimate:
        """A row's metric minus another's, or minus the mean of several others, paired by question, with its interval.

        It is the ratio where the metric is exponential. Questions of one prompt are resampled together. Raises KeyError where
        one of the rows lacks the metric.
        """
        others = [other] if isinstance(other, Row) else list(other)
        columns = zip(*(one.samples[name].values for one in others), strict=True)
        mean = Sample(tuple(sum(values) / len(others) for values in columns))
        return row.samples[name].change(mean, self.metric(name))

    def damages(self, row: Row) -> tuple[Damage, ...]:
        """What a row breaks of the base; see evaluation/damage.py."""
        return damages(self.metrics, row.samples, self.rows[0].samples)

    def described(self) -> dict[str, Any]:
        """The numbers in plain values, without single questions."""
        rows = [
            {
                "name": row.name,
                "kind": row.kind,
                "note": row.note,
                "strength": row.strength,
                "seconds": row.seconds,
                "breaks": [asdict(damage) for damage in self.damages(row)],
                "metrics": {
                    m.name: {**asdict(self.estimate(row, m.name)), "change": asdict(self.change(row, m.name))}
                    for m in self.metrics
                    if m.name in row.samples
                },
            }
            for row in self.rows
        ]
        return {"metrics": [asdict(metric) for metric in self.metrics], "context": dict(self.context), "rows": rows}

    def save(self, path: Path) -> None:
        """Write everything, single questions and answers too, as JSON."""
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", "evaluation")

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read what :meth:`save` wrote. Raises PlanError for any other file."""
        found = read_json(path)
        try:
            if found["format"] != FORMAT:
                raise PlanError(f"{path} has the format {shown(found['format'])}, expected {FORMAT!r}")
            check(found, _DESCRIBED, "the evaluation")
            _check_counts(found)
            rows = []
            for row in found["rows"]:
                samples = {name: _sample(given) for name, given in row.pop("samples").items()}
                rows.append(Row(samples=samples, answers=tuple(row.pop("answers")), **row))
            metrics = tuple(Metric(**metric) for metric in found["metrics"])
            return cls(metrics, tuple(rows), found["context"], tuple(found["prompts"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise PlanError(f"{path} is not an evaluation of steer2edit: {reason}") from None


def evaluate(
    loaded: LoadedModel,
    tasks: Sequence[Task],
    candidates: Sequence[Candidate],
    *,
    context: Mapping[str, Any] | None = None,
    prompts: Sequence[str] = (),
    progress: Progress = silent,
) -> Evaluation:
    """Measure the base and every candidate on every task.

    After each candidate the base's weights are compared with those of before, by their checksums: one pass over them.
    Raises Steer2EditError where a candidate changed them.
    """
    texts = [task.text for task in tasks if isinstance(task, Neutral) and task.text.is_of(loaded)]
    base = base_candidate(loaded, {text: text.unchanged() for text in texts})
    before, rows = checksums(loaded.model), []
    for candidate in (base, *candidates):
        rows.append(measure(candidate, tasks, progress))
        if names := changed(loaded.model, before):
            raise Steer2EditError(
                f"the candidate {candidate.name} changed the base's weights, so that nothing after it would be measured on the "
                f"base:\n{listing(names)}"
            )
    return Evaluation(metrics_of(tasks), tuple(rows), dict(context or {}), tuple(prompts))


def metrics_of(tasks: Sequence[Task]) -> tuple[Metric, ...]:
    """The metrics of all tasks: what it costs the user comes first, then what the behaviour is named for."""
    return tuple(
        sorted((m for task in tasks for m in task.metrics), key=lambda m: (m.name != ANSWERS_RIGHT, not m.own))
    )


def measure(candidate: Candidate, tasks: Sequence[Task], progress: Progress = silent) -> Row:
    """One candidate on every task."""
    outcomes: list[tuple[Task, Outcome]] = []
    started = time.perf_counter()
    with candidate.enter() as model:
        for task in brief(tasks) if candidate.brief else tasks:
            asked = told(task, candidate.told, model) if candidate.told else task
            if asked is None:
                continue  # an instruction has no part in it
            if isinstance(asked, Neutral) and asked.text in candidate.costs:
                outcomes.append((task, asked.outcome(candidate.costs[asked.text])))
            else:
                outcomes.append((task, asked.measure(model, named(progress, candidate.name))))
    seconds = time.perf_counter() - started
    # a judge may be the model itself: it judges with the base's weights
    row = Row(candidate.name, candidate.kind, {}, candidate.note, candidate.strength, (), seconds)
    return with_outcomes(row, outcomes, named(progress, row.name))


def with_outcomes(row: Row, outcomes: Sequence[tuple[Task, Outcome]], progress: Progress) -> Row:
    """The row with what came of each task; a judge is asked here."""
    samples: dict[str, Sample] = {}
    answers: tuple[str, ...] = ()
    for task, outcome in outcomes:
        judged = task.judged(outcome.answers, progress) if isinstance(task, Answers) else {}
        found = {**outcome.samples, **judged}
        samples |= {name: replace(sample, groups=_groups(task, sample)) for name, sample in found.items()}
        answers = answers or outcome.answers
    return replace(row, samples=samples, answers=answers)


def named(progress: Progress, name: str) -> Progress:
    """The progress of a candidate's stages, with its name before each."""
    return lambda stage, total: progress(f"{name}: {stage}", total)


def _groups(task: Task, sample: Sample) -> tuple[str, ...] | None:
    """Digests of the prompts behind a sample's values; None where no prompt occurs twice, or they are not questions."""
    asked: Sequence[Question] = getattr(task, "questions", ())
    answered = [question for question in asked if question.answers]
    for questions in (asked, answered):
        if len(questions) == len(sample.values):
            digests = tuple(question.digest for question in questions)
            return digests if len(set(digests)) < len(digests) else None
    return None


def _check_counts(found: Mapping[str, Any]) -> None:
    """Raise ValueError unless the base has every metric, and each row as many values of a metric as the base."""
    if not found["rows"]:
        raise ValueError("it holds no rows")
    base = found["rows"][0]["samples"]
    for metric in found["metrics"]:
        name = metric["name"]
        if metric["goal"] not in ("more", "less") or metric["role"] not in ("attribute", "utility", "check"):
            raise ValueError(f"the metric {shown(name)} has an unknown goal or role")
        for row in found["rows"]:
            sample = row["samples"].get(name)
            if sample is None and row is not found["rows"][0]:
                continue
            counts = {len(base[name]["values"])} if name in base else set()
            counts |= {len(one) for one in (sample or {}).values() if one is not None}
            if sample is None or len(counts) != 1 or not min(counts):
                raise ValueError(f"the row {shown(row['name'])} has no value of {shown(name)} for each question")


def _sample(given: Mapping[str, Any]) -> Sample:
    weights, groups = given["weights"], given.get("groups")
    return Sample(
        tuple(given["values"]),
        None if weights is None else tuple(weights),
        None if groups is None else tuple(groups),
    )
