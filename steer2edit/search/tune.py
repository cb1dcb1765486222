"""Search for the edit with the best trade-off: many plans, one capture, measured on the selection split alone.

Optuna proposes; every proposal is a plan made from the same scores, brought near a KL by the closed form, and measured by
hooks. What comes back is the Pareto front of (attribute, utility), its knee, and every trial. A study is a folder: its
journal is written trial by trial, so a search that was killed goes on where it stopped, and since a proposal depends on the
seed and the trials that are finished and on nothing else, it finds what an unbroken one finds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from steer2edit import methods
from steer2edit.architecture import MatrixRole
from steer2edit.checkpoint import read_json
from steer2edit.errors import PlanError
from steer2edit.evaluation.candidates import plan_candidate
from steer2edit.evaluation.damage import damages
from steer2edit.evaluation.evaluate import Row, measure
from steer2edit.evaluation.metrics import Metric, Neutral, Sample, Task, attributes
from steer2edit.evaluation.suite import Suite
from steer2edit.files.atomic import write_text
from steer2edit.files.schema import MAYBE, NUMBER, check
from steer2edit.methods import make_plan
from steer2edit.options import AnyLayer, Between, Option, options_of
from steer2edit.plan import Base, EditPlan, Measured
from steer2edit.progress import Progress, silent
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring
from steer2edit.search.journal import Journal, Params, Trial
from steer2edit.search.pareto import front_of, knee_of
from steer2edit.strength.meet import estimate

FORMAT = "steer2edit.study.1"
_ESTIMATE: Any = ({"value": NUMBER, "low?": NUMBER, "high?": NUMBER}, None)
_OBJECTIVE: Any = {"name": str, "goal": str}
_TRIAL: Any = {"number": int, "state": str, "params": {}, "kl": MAYBE, "attribute": _ESTIMATE, "utility": _ESTIMATE}
_STUDY: Any = {
    "settings": {"attribute": _OBJECTIVE, "utility": _OBJECTIVE},
    "trials": [{**_TRIAL, "checks?": {str: NUMBER}, "note?": str, "front": bool, "knee": bool}],
}


@dataclass(frozen=True)
class Search:
    """What is searched, and for how long.

    ``methods`` are proposed with their layers, classes and a KL in ``kl_range`` (log-uniform); or ``grid`` gives values of a
    method's options, all combinations of which are tried at ``strength`` times what the method gives. A plan whose KL is
    above ``max_kl`` is not evaluated further, and one that breaks a metric (evaluation/damage.py) is kept from the front unless
    ``allow_broken``. The search ends after ``trials``, or after ``patience`` trials that left the front as it was. The utility
    "KL" is that on the text which budgets are on, as ``kl_range`` and ``max_kl`` are.
    """

    methods: tuple[str, ...] = ("steering",)
    trials: int = 40
    patience: int | None = None
    seed: int = 0
    kl_range: tuple[float, float] = (0.003, 0.3)
    max_kl: float = 1.0
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    strength: float = 1.0
    attribute: str | None = None
    utility: str = "KL"
    allow_broken: bool = False

    def asked(self, suite: Suite) -> Suite:
        """The suite that the objectives take: with an answer to every question where one of them reads written answers."""
        return suite.chosen_by(self.attribute, self.utility)

    def points(self) -> list[Params]:
        """The grid's combinations, in order."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class StudyResult:
    """Every trial, the numbers of those on the front (from the least KL on), and the knee's."""

    settings: Mapping[str, Any]
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    knee: int | None

    def described(self) -> dict[str, Any]:
        """In plain values, as the report reads it."""
        trials = [
            {
                **asdict(trial),
                "kl": trial.kl if math.isfinite(trial.kl) else None,
                "front": trial.number in self.front,
                "knee": trial.number == self.knee,
            }
            for trial in self.trials
        ]
        return {"format": FORMAT, "settings": dict(self.settings), "trials": trials}

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_text(path, json.dumps(self.described(), indent=1) + "\n", "study")


def read_study(path: Path) -> dict[str, Any]:
    """What :meth:`StudyResult.save` wrote. Raises PlanError for any other file."""
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise PlanError(f"{path} is not a study of steer2edit")
    try:
        check(found, _STUDY, "the study")
    except ValueError as error:
        raise PlanError(f"{path}: {error}") from None
    return found


def tune(
    loaded: LoadedModel,
    scoring: Scoring,
    suite: Suite,
    search: Search,
    *,
    storage: str | Path,
    name: str = "steer2edit",
    progress: Progress = silent,
) -> StudyResult:
    """Run, or go on with, a study.

    ``storage`` is a journal file, or any URL that Optuna takes, which many machines can share. Raises Steer2EditError
    without Optuna, PlanError where the storage holds a study with other settings, or a metric is not measured.
    """
    _check_grid(search)
    tasks = suite.tasks("select")
    attribute, utility = _objectives(tasks, search)
    goals = attribute.goal, utility.goal
    settings = _settings(scoring, suite, search, attribute, utility)
    journal = Journal(storage, name, settings, goals)

    metrics = [metric for task in tasks for metric in task.metrics]

    def measure_base() -> dict[str, Any]:
        row = measure(plan_candidate(loaded, "base", EditPlan(Base("", None, ""), ())), tasks, progress)
        tolerated = {m.name: list(row.samples[m.name].values) for m in metrics if m.tolerance is not None}
        return {"values": {m.name: row.samples[m.name].estimate(m).value for m in metrics}, "samples": tolerated}

    measured = journal.base(measure_base)
    base = measured["values"]
    samples = {name: Sample(tuple(values)) for name, values in measured["samples"].items()}
    bench = _Bench(loaded, scoring, tasks, (attribute, utility), search, samples, progress)
    points = search.points()
    total = len(points) if search.grid else search.trials
    with progress("tune", total=total) as advance:
        advance(len(journal.finished()))
        while len(trials := journal.finished()) < total and not _stale(trials, search.patience, goals):
            trial = journal.ask_point(search.grid, points) if search.grid else journal.ask(search.seed)
            if trial is None:
                break
            params = trial.params if search.grid else _suggest(trial, scoring, search)
            journal.tell(trial, bench.run(trial.number, params))
            advance(1)
    trials = journal.finished()
    front = _front(trials, goals)
    values = {trial.number: trial.values for trial in trials if trial.values is not None}
    knee = knee_of(values, front, goals, (base[attribute.name], base[utility.name]))
    return StudyResult({**settings, "base": dict(base)}, tuple(trials), tuple(front), knee)


def plan_of(scoring: Scoring, loaded: LoadedModel, suite: Suite, trial: Trial, search: Search) -> EditPlan:
    """The plan of a trial, as it was measured; it remembers by what prompts it was chosen."""
    plan = _with_strength(_make(scoring, trial.params, search), float(trial.checks["strength"]))
    measured = Measured(
        strength=trial.checks["strength"],
        budget_text=suite.neutral.budget.kind,
        costs=suite.neutral.costs(partial(edited, loaded, plan)),
        trial=trial.number,
        params=dict(trial.params),
        selected_on=tuple(suite.digests("select")),
    )
    return replace(plan, measured=measured)


@dataclass(frozen=True)
class _Bench:
    """Measures one proposal after another on one loaded model."""

    loaded: LoadedModel
    scoring: Scoring
    tasks: Sequence[Task]
    objectives: tuple[Metric, Metric]
    search: Search
    base: Mapping[str, Sample]
    progress: Progress

    def run(self, number: int, params: Params) -> Trial:
        try:
            plan = _make(self.scoring, params, self.search)
        except PlanError as error:
            return Trial(number, params, "refused", note=str(error))
        if not plan.edits:
            return Trial(number, params, "empty", note="no component is over its threshold")
        neutral = [task for task in self.tasks if isinstance(task, Neutral)]
        strength = self.search.strength
        if "kl" in params:
            strength = estimate(partial(edited, self.loaded, plan), neutral[0].text, params["kl"])
        candidate = plan_candidate(self.loaded, f"trial {number}", _with_strength(plan, strength))
        quick = measure(candidate, neutral, self.progress)
        kl, *others = ((task.kl.name, quick.samples[task.kl.name].estimate(task.kl).value) for task in neutral)
        checks = {"strength": strength, **dict(others)}
        if not kl[1] <= self.search.max_kl:
            note = f"its {kl[0]} is above {self.search.max_kl:g}"
            return Trial(number, params, "over", kl[1], checks=checks, note=note, seconds=quick.seconds)
        rest = measure(candidate, [task for task in self.tasks if task not in neutral], self.progress)
        row = replace(rest, samples={**quick.samples, **rest.samples}, seconds=quick.seconds + rest.seconds)
        return self._judged(number, params, kl[1], row, checks)

    def _judged(self, number: int, params: Params, kl: float, row: Row, checks: dict[str, float]) -> Trial:
        found = [asdict(row.samples[m.name].estimate(m)) for m in self.objectives]
        metrics = [metric for task in self.tasks for metric in task.metrics]
        broken = damages(metrics, row.samples, self.base)
        for metric in metrics:
            if metric.tolerance is not None:
                checks[metric.name] = row.samples[metric.name].estimate(metric).value
        note = f"breaks {'; '.join(map(str, broken))}" if broken else ""
        state = "broken" if broken and not self.search.allow_broken else "complete"
        return Trial(number, params, state, kl, found[0], found[1], checks, note, row.seconds)


def _make(scoring: Scoring, params: Mapping[str, Any], search: Search) -> EditPlan:
    method = params.get("method", search.methods[0])
    module = methods.load(method)
    known = module.Options.__dataclass_fields__
    options = {key: value for key, value in params.items() if key in known}
    # a method that takes one layer is given no range beside it
    if "first_layer" in params and "layers" in known and "layer" not in options:
        options["layers"] = (params["first_layer"], params["last_layer"])
    if search.grid and method == "component":
        # Steer2Edit's own parameters are tried to the letter
        options = {"scale": "absolute", **options}
    plan = make_plan(scoring, method=method, options=module.Options(**options))
    if "mlp_share" in params:
        share = {MatrixRole.ATTN_OUT: 1.0, MatrixRole.MLP_OUT: params["mlp_share"]}
        tensors = {name: share.get(site.role.kind, 1.0) for name, site in scoring.spec.owners.items()}
        plan = plan.reweighted(tensors, {site.key: share[site.role.kind] for site in scoring.spec.sites})
    return plan


def _check_grid(search: Search) -> None:
    """Raise PlanError where the grid names an option that none of the methods has."""
    known = {name for method in search.methods for name in methods.load(method).Options.__dataclass_fields__}
    if unknown := sorted(set(search.grid) - known):
        raise PlanError(
            f"--grid names {', '.join(unknown)}, which {' and '.join(search.methods)} does not have; its options: "
            f"{', '.join(sorted(known))}"
        )


def _suggest(trial: Any, scoring: Scoring, search: Search) -> Params:
    """A proposal: the method, the KL aimed at, the layers, how much the MLPs take part, and the method's own."""
    layers = scoring.spec.layers
    params: Params = {
        "method": trial.suggest_categorical("method", list(search.methods)),
        "kl": trial.suggest_float("kl", *search.kl_range, log=True),
        "first_layer": trial.suggest_int("first_layer", 0, layers // 2),
        "last_layer": trial.suggest_int("last_layer", layers // 2, layers - 1),
    }
    method = str(params["method"])
    options = {one: methods.load(one).Options for one in search.methods}
    searched = {one: [o for o in options_of(options[one]) if o.search is not None] for one in search.methods}
    for one in searched[method]:
        shared = any(one.name == other.name for name in search.methods if name != method for other in searched[name])
        params[one.name] = _suggest_option(trial, f"{method}_{one.name}" if shared else one.name, one, layers)
    if getattr(options[method], "search_mlp_share", False):
        share = trial.suggest_float("mlp_share" if method == methods.METHOD else f"{method}_mlp_share", 0.0, 1.0)
        if any(one.name == "sites" for one in options_of(options[method])):
            params["sites"] = "attn" if share < 0.2 else "both"
            share = 0.0 if share < 0.2 else share
        params["mlp_share"] = share
    return params


def _suggest_option(trial: Any, name: str, option: Option, layers: int) -> Any:
    """A value of one option from the range that its method declares."""
    match option.search:
        case Between(low, high, log) if option.kind is int:
            return trial.suggest_int(name, int(low), int(high), log=log)
        case Between(low, high, log):
            return trial.suggest_float(name, low, high, log=log)
        case AnyLayer():
            return trial.suggest_int(name, 0, layers - 1)
        case _:
            return trial.suggest_categorical(name, list(option.choices or (False, True)))


def _with_strength(plan: EditPlan, strength: float) -> EditPlan:
    return methods.scaling(plan)(plan, strength) if strength != 1 else plan


def _objectives(tasks: Sequence[Task], search: Search) -> tuple[Metric, Metric]:
    metrics = [metric for task in tasks for metric in task.metrics]
    chosen = attributes(metrics)[0] if search.attribute is None else _metric(tasks, search.attribute)
    # "KL" is that on the text which budgets are on
    costs = [task.kl for task in tasks if isinstance(task, Neutral)]
    return chosen, costs[0] if search.utility == "KL" else _metric(tasks, search.utility)


def _metric(tasks: Sequence[Task], name: str) -> Metric:
    metrics = [metric for task in tasks for metric in task.metrics]
    found = next((metric for metric in metrics if metric.name == name), None)
    if found is None:
        raise PlanError(f"{name!r} is not measured; there are {', '.join(metric.name for metric in metrics)}")
    return found


def _settings(scoring: Scoring, suite: Suite, search: Search, attribute: Metric, utility: Metric) -> dict[str, Any]:
    source = scoring.statistics.source
    origin = scoring.checkpoint.quantisation and scoring.checkpoint.quantisation.weights
    settings = {
        **asdict(search),
        "attribute": {"name": attribute.name, "goal": attribute.goal},
        "utility": {"name": utility.name, "goal": utility.goal},
        "model": scoring.checkpoint.name,
        "fingerprint": scoring.checkpoint.fingerprint,
        "weights": origin and {"name": origin["name"], "fingerprint": origin["fingerprint"]},
        "behavior": source.get("name"),
        "data": source.get("data"),
        "split_seed": suite.seed,
        "selected_on": hashlib.sha256(" ".join(suite.digests("select")).encode()).hexdigest(),
        **({"judge": suite.judge.named()} if suite.judge is not None else {}),
        **({"write_all": True} if suite.write_all else {}),
        **({} if suite.repetition_penalty is None else {"repetition_penalty": suite.repetition_penalty}),
        "sampler": "grid" if search.grid else "TPE",
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=list))
    return plain


def _front(trials: Sequence[Trial], goals: tuple[str, str]) -> list[int]:
    return front_of({trial.number: trial.values for trial in trials if trial.values is not None}, goals)


def _stale(trials: Sequence[Trial], patience: int | None, goals: tuple[str, str]) -> bool:
    """Whether the last ``patience`` trials left the front as it was."""
    if patience is None or len(trials) <= patience:
        return False
    return _front(trials, goals) == _front(trials[:-patience], goals)
