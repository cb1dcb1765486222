"""The pipeline on one page: contrast data → statistics → plan → strength → artefacts. Read this first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer2edit.architecture import MatrixRole, read_spec
from steer2edit.artefact.emit import artefact_folders, emit
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vectors import Vectors, substituted
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior import Behavior
from steer2edit.data.questions import Question
from steer2edit.dry_run import check_rooms
from steer2edit.evaluation.assess import prove
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.files.locks import claimed
from steer2edit.lowering import Lowering, Writing
from steer2edit.methods import METHOD, make_plan, own_strength
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.report.page import write_pages
from steer2edit.runtime.model import Runtime, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.settle import neutral_text, settle_strength


@dataclass(frozen=True)
class Compiled:
    """What a compile gave: the plan, and each target's folder and lowering."""

    plan: EditPlan
    statistics: Statistics
    artefacts: dict[str, Path]
    lowerings: dict[str, Lowering]
    evaluation: Evaluation | None = None


def compile(
    model: str | Path,
    behavior: Behavior | Statistics,
    out: str | Path,
    *,
    vectors: Vectors | None = None,
    to: Sequence[str] = ("checkpoint",),
    revision: str | None = None,
    method: str = METHOD,
    options: Any = None,
    strength: float | None = None,
    kl_budget: float | None = None,
    class_budgets: Mapping[MatrixRole, float] | None = None,
    neutral: str | Sequence[str] | None = None,
    background: str | Sequence[str] | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008
    batch_tokens: int = 4096,
    questions: Sequence[Question] | None = None,
    force: bool = False,
    writing: Writing = Writing(),  # noqa: B008
    progress: Progress = silent,
) -> Compiled:
    """Compile a behaviour into ``model``'s weights.

    ``strength`` multiplies the method's edit; without it, the largest is taken whose measured mean KL on neutral text (nats
    per token) is within ``kl_budget``, 0.05 unless given; options of the method may ask for a strength of their own. With one
    target ``out`` is its folder, with several a folder for each inside.
    With ``vectors`` from elsewhere these take the place of the captured difference, and a behaviour without examples will do.
    ``options`` is the method's own Options. Statistics of an earlier capture may stand for the behaviour. With held-out
    ``questions`` the edit is also measured, beside activation steering and a random direction, and each artefact gets
    the evaluation and a report page. No other run can write the folders meanwhile. Raises a Steer2EditError for whatever is
    wrong with the input.
    """
    folders = artefact_folders(out, to, force)
    with claimed(folders.values()):
        checkpoint = open_checkpoint(model, revision)
        spec = read_spec(checkpoint)
        if vectors is not None:
            vectors.check(spec)
        if not writing.link:
            # before the expensive part
            check_rooms(checkpoint, spec, folders, method, options, writing)
        loaded = load_model(checkpoint, spec, runtime)
        if isinstance(behavior, Statistics):
            statistics = behavior
        else:
            statistics = capture_statistics(
                loaded, checkpoint, behavior, background=background, batch_tokens=batch_tokens, progress=progress
            )
        if vectors is not None:
            statistics = substituted(vectors, statistics, checkpoint, spec)
        scoring = Scoring(checkpoint, spec, statistics)
        plan = make_plan(scoring, method=method, options=options, progress=progress)
        text = neutral_text(loaded, neutral, progress)
        if strength is None and kl_budget is None and class_budgets is None:
            strength = own_strength(options)
        plan = settle_strength(
            loaded, plan, strength=strength, kl_budget=kl_budget, class_budgets=class_budgets, neutral=text
        )

        lowerings = {
            target: emit(plan, checkpoint, spec, target, folder, force=force, writing=writing, progress=progress)
            for target, folder in folders.items()
        }
        if questions is None:
            return Compiled(plan, statistics, folders, lowerings)
        evaluation = prove(loaded, scoring, plan, text, questions, folders, progress)
        write_pages(plan, evaluation, folders.values())
        return Compiled(plan, statistics, folders, lowerings, evaluation)
