"""The pipeline on one page: contrast data → statistics → plan → strength → artefacts. Read this first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steer2edit.architecture import ModelSpec
from steer2edit.artefact.emit import artefact_folders, check_carried, emit
from steer2edit.artefact.request import CompileRequest, Protected
from steer2edit.capture.affine_maps import contrast_runs
from steer2edit.capture.attribution import by_gradients
from steer2edit.capture.protect import protected
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vector_kinds import with_vector
from steer2edit.capture.vectors import Vectors, substituted
from steer2edit.checkpoint import Checkpoint
from steer2edit.dry_run import check_rooms, opened
from steer2edit.engines.transformers_engine import TransformersEngine
from steer2edit.evaluation.assess import own_suite, prove
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.evaluation.judged import TraitJudge
from steer2edit.files.locks import claimed
from steer2edit.lowering import Lowering
from steer2edit.methods import covariance_layers, make_plan, runs_the_model, scaling
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.report.page import write_pages
from steer2edit.runtime.model import LoadedModel, load_model
from steer2edit.scoring.scores import Scoring
from steer2edit.search.reach import AIM_QUESTIONS, settle_by_aim
from steer2edit.strength.neutral_texts import neutral_texts
from steer2edit.strength.settle import check_not_empty, settle


@dataclass(frozen=True)
class Compiled:
    """The result of a compile: the plan, its statistics, each target's folder and lowering, and the evaluation if asked for."""

    plan: EditPlan
    statistics: Statistics
    artefacts: dict[str, Path]
    lowerings: dict[str, Lowering]
    evaluation: Evaluation | None = None


def compile(request: CompileRequest, progress: Progress = silent) -> Compiled:
    """Compile a behaviour into a model's weights, as ``request`` says.

    With held-out questions the edit is also measured, beside activation steering, random directions and an instruction, and
    each artefact gets the evaluation and a report page. No other run can write the folders meanwhile. Raises a Steer2EditError
    for whatever is wrong with the input.
    """
    folders = artefact_folders(request.out, request.to, request.force, [request.model])
    with claimed(folders.values()):
        # what can be known to be wrong is said before the expensive part
        base = opened(request)
        checkpoint, spec = base.checkpoint, base.spec
        if not request.writing.link:
            check_rooms(base, folders, request.writing)

        loaded = load_model(checkpoint, spec, request.runtime)
        statistics = request.statistics
        if request.behavior is not None:
            statistics = capture_statistics(
                loaded,
                checkpoint,
                request.behavior,
                background=request.background,
                texts_to_keep=request.texts_to_keep,
                batch_tokens=request.batch_tokens,
                stream_moments=covariance_layers(request.method, request.options, spec),
                progress=progress,
            )
        if statistics is None:
            # the method's options ask for nothing that is captured
            statistics = Statistics.nothing(checkpoint)
        vectors = request.vectors
        if request.vector == "gradient" and request.behavior is not None:
            examples = request.behavior.encode(loaded.tokenizer, loaded.context)
            vectors = by_gradients(
                loaded, examples, name=request.behavior.name, batch_tokens=request.batch_tokens, progress=progress
            )
        if vectors is not None:
            statistics = substituted(vectors, statistics, checkpoint, spec)
        else:
            statistics = with_vector(statistics, request.vector)
        others = [_directions(one, loaded, checkpoint, spec, statistics, progress) for one in request.protect]
        runs = contrast_runs(loaded, request.behavior, request.batch_tokens) if runs_the_model(request.method) else None
        scoring = Scoring(base.planned, spec, protected(statistics, others), runs)
        plan = make_plan(scoring, method=request.method, options=request.options, progress=progress)
        check_not_empty(plan)
        check_carried(plan, checkpoint, spec, request.to)
        arguments = statistics.source.get("chat_template_kwargs")
        texts = neutral_texts(loaded, request.neutral, progress, chat_template_kwargs=arguments)
        if request.aim is not None:
            assert request.questions is not None  # the request checks it
            suite = own_suite(
                loaded, scoring, texts, request.questions, AIM_QUESTIONS, penalty=request.repetition_penalty
            )
            settled = settle_by_aim(loaded, plan, suite, request.aim, largest_kl=request.kl_budget, progress=progress)
        else:
            settled = settle(
                loaded,
                plan,
                strength=request.fixed_strength,
                kl_budget=request.kl_budget,
                class_budgets=request.class_budgets,
                neutral=texts,
                scaled=scaling(plan),
            )

        plan = settled.plan
        judge = None
        if request.judge is not None and request.questions is not None and request.report:
            labelled = request.behavior.examples if request.behavior is not None else ()
            judge = TraitJudge(
                request.judge.open(TransformersEngine(loaded), request.runtime, labelled, progress), request.judge.trait
            )

        lowerings = {
            target: emit(
                plan, checkpoint, spec, target, folder, force=request.force, writing=request.writing, progress=progress
            )
            for target, folder in folders.items()
        }
        if request.questions is None or not request.report:
            return Compiled(plan, statistics, folders, lowerings)
        evaluation = prove(
            loaded,
            scoring,
            settled,
            texts,
            request.questions,
            folders,
            progress,
            told=request.told,
            judge=judge,
            penalty=request.repetition_penalty,
        )
        write_pages(plan, evaluation, folders.values(), request.behavior.examples if request.behavior else ())
        return Compiled(plan, statistics, folders, lowerings, evaluation)


def _directions(
    one: Protected,
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    statistics: Statistics,
    progress: Progress,
) -> Statistics:
    """Statistics whose class differences are a direction to protect; a behaviour's are captured, without a background."""
    if isinstance(one, Vectors):
        return substituted(one, statistics, checkpoint, spec)
    if isinstance(one, Statistics):
        return one
    return capture_statistics(loaded, checkpoint, one, background="", chat=(), progress=progress)
