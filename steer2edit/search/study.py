"""A study's folder: search on one half of the questions, then report the front on the other half, once.

statistics.safetensors   what was captured          study.journal     Optuna's journal
study.json               every trial, front, knee   evaluation.json   the front and its baselines, reporting split
knee.plan.safetensors, front/<trial>.plan.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import Checkpoint
from steer2edit.data.questions import refuse_seen
from steer2edit.evaluation.assess import assess, with_baselines
from steer2edit.evaluation.baselines import steering_at
from steer2edit.evaluation.candidates import plan_candidate
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.evaluation.suite import Suite
from steer2edit.evaluation.summary import summary
from steer2edit.evaluation.work import baselines_work, work_of
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring
from steer2edit.search.pareto import spread
from steer2edit.search.tune import Search, StudyResult, plan_of, tune
from steer2edit.strength.line_search import USUAL_PASSES

JOURNAL, RESULT, STATISTICS, KNEE = "study.journal", "study.json", "statistics.safetensors", "knee.plan.safetensors"
_SHOWN = 8
_STEERING_POINTS = 4
_DRAWS = 3


@dataclass(frozen=True)
class Study:
    """A finished search: its trials, the knee's plan, and the front's evaluation.

    The front is evaluated on the reporting split, where that was measured.
    """

    folder: Path
    result: StudyResult
    knee: EditPlan | None = None
    evaluation: Evaluation | None = None

    def described(self) -> dict[str, Any]:
        """Plain values, for a program to read."""
        found = {"folder": str(self.folder), "front": list(self.result.front), "knee": self.result.knee}
        return {**self.result.described(), **found, "report": self.evaluation and summary(self.evaluation)}


def run_study(
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    scoring: Scoring,
    suite: Suite,
    search: Search,
    folder: Path,
    *,
    storage: str | None = None,
    name: str = "steer2edit",
    report: bool = True,
    to: Sequence[str] = (),
    progress: Progress = silent,
) -> Study:
    """Search, or go on searching, and save the front as plans.

    ``checkpoint`` is that of the loaded model; ``scoring`` may read the matrices of its unquantised form. The front is measured
    on the reporting split, and the knee is emitted ``to`` targets.

    Raises DataError, before any work, where a prompt of the reporting split is in the contrast data.
    """
    suite = search.asked(suite)
    if report:
        refuse_seen(suite.questions("report"), scoring.statistics.source.get("prompts", ()), "the steering vector")
        suite.tasks("report")
    if not (folder / STATISTICS).is_file():
        scoring.statistics.save(folder / STATISTICS)
    place = storage if storage is not None else folder / JOURNAL
    result = tune(loaded, scoring, suite, search, storage=place, name=name, progress=progress)
    result.save(folder / RESULT)
    trials = {trial.number: trial for trial in result.trials}
    plans = {number: plan_of(scoring, loaded, suite, trials[number], search) for number in result.front}
    for number, plan in plans.items():
        plan.save(folder / "front" / f"{number}.plan.safetensors")
    if result.knee is None:
        return Study(folder, result)
    knee = plans[result.knee]
    knee.save(folder / KNEE)
    evaluation = None
    if report:
        evaluation = _report(loaded, scoring, suite, plans, result, progress)
        evaluation.save(folder / "evaluation.json")
    for target in to:
        emit(knee, checkpoint, scoring.spec, target, folder / target, force=True, progress=progress)
    return Study(folder, result, knee, evaluation)


def study_work(search: Search, suite: Suite, report: bool = True) -> str:
    """What a study runs at most, in words: its trials, and the report on the other half of the questions."""
    suite = search.asked(suite)
    trials = len(search.points()) if search.grid else search.trials
    lines = [f"search: {work_of(suite, 'select', trials)}"]
    if report:
        controls, passes = baselines_work("kl", _DRAWS)
        # each plan of the front is measured once more, and steering is brought to some of their KLs
        passes += trials + USUAL_PASSES * _STEERING_POINTS
        most = min(trials, _SHOWN) + _STEERING_POINTS + controls
        lines.append(f"report: at most {work_of(suite, 'report', most, passes)}")
    return "\n".join(lines)


def _report(
    loaded: LoadedModel,
    scoring: Scoring,
    suite: Suite,
    plans: dict[int, EditPlan],
    result: StudyResult,
    progress: Progress,
) -> Evaluation:
    assert result.knee is not None
    knee = plans[result.knee]
    chosen = [plan_candidate(loaded, f"knee (trial {result.knee})", knee, "knee", str(knee.method.get("name")))]
    shown = [number for number in spread(result.front, _SHOWN) if number != result.knee]
    chosen += [plan_candidate(loaded, f"trial {number}", plans[number], "front") for number in shown]
    # along the front's own range of KL, so that both curves can be read at the same cost
    costs = sorted(kl for plan in plans.values() if (kl := plan.measured.kl) is not None)
    points = [costs[round(i * (len(costs) - 1) / (_STEERING_POINTS - 1))] for i in range(_STEERING_POINTS)]
    # the knee's own cost comes with its baselines
    points = [kl for kl in dict.fromkeys(points) if kl > 0 and kl != knee.measured.kl]
    chosen += [steering_at(loaded, scoring, suite.neutral, kl) for kl in points]
    chosen += with_baselines(loaded, scoring, knee, suite, draws=_DRAWS, progress=progress)
    source = scoring.statistics.source
    context = {
        "model": scoring.checkpoint.name,
        "fingerprint": scoring.checkpoint.fingerprint,
        "behavior": source.get("name"),
    }
    return assess(loaded, suite, chosen, context=context, progress=progress)
