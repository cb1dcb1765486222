"""One plan, measured on questions it has not seen, beside activation steering and control edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steer2edit.data.metric_choice import read_metric
from steer2edit.data.questions import Question, Split, knowledge_questions, refuse_seen
from steer2edit.evaluation.baselines import (
    Match,
    baselines,
    instructed,
    neutral_kl,
    random_directions,
    steering,
    steering_at,
)
from steer2edit.evaluation.candidates import Candidate, plan_candidate
from steer2edit.evaluation.evaluate import Evaluation, evaluate
from steer2edit.evaluation.judged import TraitJudge
from steer2edit.evaluation.projection import Projection
from steer2edit.evaluation.suite import Suite
from steer2edit.files.layout import EVALUATION
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.neutral_texts import NeutralTexts
from steer2edit.strength.settle import Settled

PROOF = 32
"""Questions of each kind behind a compile's own report: enough to see an effect, and a matter of minutes on a CPU."""

GENERAL = 64
"""Questions of general use behind a compile's own report: with fewer, only the loss of many right answers is told from chance."""
GENERAL_TOKENS = 60
"""Tokens of an answer to them: enough to name what is asked for, and a third of the time that long answers take."""


def assess(
    loaded: LoadedModel,
    suite: Suite,
    candidates: Sequence[Candidate],
    *,
    split: Split = "report",
    context: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure candidates on one split. Raises DataError where one of them was made or chosen by a prompt of that split."""
    questions = suite.questions(split)
    for candidate in candidates:
        refuse_seen(questions, candidate.seen, candidate.name)
    described = {**suite.context(split), **(context or {})}
    tasks = suite.tasks(split)
    return evaluate(loaded, tasks, candidates, context=described, prompts=suite.prompts(split), progress=progress)


def with_baselines(
    loaded: LoadedModel,
    scoring: Scoring,
    plan: EditPlan,
    suite: Suite,
    *,
    strengths: Sequence[float] = (),
    match: Match = "kl",
    draws: int = 3,
    progress: Progress = silent,
) -> list[Candidate]:
    """The plan's baselines, and activation steering at the plan's own KL and at each of ``strengths``."""
    kl = neutral_kl(loaded, plan, suite.neutral)
    steered = steering(loaded, scoring, strengths)
    steered.append(steering_at(loaded, scoring, suite.neutral, kl))
    steered.sort(key=lambda candidate: candidate.strength or 0.0)
    controls = baselines(loaded, scoring, plan, suite.neutral, match=match, draws=draws, kl=kl, progress=progress)
    return [*steered, *controls]


def prove(
    loaded: LoadedModel,
    scoring: Scoring,
    settled: Settled,
    neutral: NeutralTexts,
    questions: Sequence[Question],
    folders: Mapping[str, Path],
    progress: Progress = silent,
    *,
    told: str | None = None,
    judge: TraitJudge | None = None,
    penalty: float | None = None,
) -> Evaluation:
    """Evaluate the edit of a compile beside activation steering and random directions, all at the KL of the edit.

    ``settled`` is the edit with its cost on the ``neutral`` texts, which is not measured again. The KL is that on the text which
    budgets are on. With an instruction ``told`` the base is also measured under it, and the edit too. Written answers are
    projected on the contrast data's steering vectors, as the base reads them. A ``judge`` adds its metrics. A repetition
    ``penalty`` takes the place of the model's own. Writes the evaluation into each artefact's folder.
    """
    suite = replace(own_suite(loaded, scoring, neutral, questions, PROOF, penalty=penalty), judge=judge)
    plan = settled.plan
    kl = settled.costs[neutral.budget].divergence().kl
    edit = plan_candidate(loaded, "edit", plan, note=str(plan.method.get("name", "")))
    named = replace(edit, costs=settled.costs)
    controls = random_directions(loaded, plan, neutral, kl)
    context = {
        "model": scoring.checkpoint.name,
        "fingerprint": scoring.checkpoint.fingerprint,
        "behavior": scoring.statistics.source.get("name"),
    }
    candidates = [named, steering_at(loaded, scoring, neutral, kl), *controls]
    if told:
        candidates += instructed(named, loaded, told)
    evaluation = assess(loaded, suite, candidates, context=context, progress=progress)
    for folder in folders.values():
        evaluation.save(folder / EVALUATION)
    return evaluation


def own_suite(
    loaded: LoadedModel,
    scoring: Scoring,
    neutral: NeutralTexts,
    questions: Sequence[Question],
    limit: int,
    *,
    penalty: float | None = None,
) -> Suite:
    """What a compile measures on: ``limit`` questions of the behaviour in each half, asked as its data were captured."""
    source = scoring.statistics.source
    return Suite(
        questions,
        knowledge_questions(),
        neutral,
        system=source.get("system"),
        chat_template_kwargs=source.get("chat_template_kwargs"),
        metric=read_metric(source.get("metric"))[0],
        projection=Projection.of(loaded, scoring.statistics),
        limit=limit,
        utility_limit=GENERAL,
        utility_tokens=GENERAL_TOKENS,
        repetition_penalty=penalty,
    )
