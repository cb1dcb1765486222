"""``eval``: any number of candidates on the same questions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from steer2edit.cli.command import command
from steer2edit.cli.data_options import DataFlags, StatsFlags
from steer2edit.cli.evaluate_flags import BaselineFlags, EvaluationOut, HowFlags
from steer2edit.cli.judge_flags import JudgeFlags
from steer2edit.cli.options import (
    JsonFlags,
    ModelFlags,
    ReplaceFlags,
    UnquantisedFlags,
    find_plan,
    numbers,
    progress_bar,
)
from steer2edit.cli.output import print_result
from steer2edit.cli.served import check_served, kept_answers, served_evaluation
from steer2edit.cli.suite import SuiteFlags, scoring_of

if TYPE_CHECKING:
    from steer2edit.evaluation.evaluate import Evaluation
    from steer2edit.evaluation.suite import Suite
    from steer2edit.plan import EditPlan


@command(
    "eval",
    data=DataFlags,
    stats=StatsFlags,
    asked=SuiteFlags,
    judged=JudgeFlags,
    compared=BaselineFlags,
    how=HowFlags,
    model_flags=ModelFlags,
    unquantised=UnquantisedFlags,
    output=EvaluationOut,
    replacing=ReplaceFlags,
    printed=JsonFlags,
)
@click.argument("model")
@click.argument("candidates", nargs=-1, metavar="[PLAN|ADAPTER|CHECKPOINT]...")
def evaluate(
    model: str,
    candidates: tuple[str, ...],
    data: DataFlags,
    stats: StatsFlags,
    asked: SuiteFlags,
    judged: JudgeFlags,
    compared: BaselineFlags,
    how: HowFlags,
    model_flags: ModelFlags,
    unquantised: UnquantisedFlags,
    output: EvaluationOut,
    replacing: ReplaceFlags,
    printed: JsonFlags,
) -> None:
    """Measure plans, adapters and checkpoints beside MODEL, on held-out questions and neutral text.

    --data or --stats are needed for the baselines. --behavior and a folder of data also bring the questions. With baselines or
    --stats the projection of written answers is measured too.
    """
    from steer2edit.architecture.unquantised import planned_from
    from steer2edit.evaluation.answers import in_this_process
    from steer2edit.evaluation.assess import assess, with_baselines
    from steer2edit.evaluation.baselines import steering
    from steer2edit.evaluation.candidates import open_candidate
    from steer2edit.evaluation.work import baselines_work, work_of

    how.check()
    judged.check(server=how.url)
    compared.check()
    replacing.check(output.out, "evaluation")
    if how.server:
        check_served(candidates, stats, asked, judged, compared, how, model_flags, unquantised)
        with kept_answers(output.out) as journal:
            found = served_evaluation(model, data, asked, judged, compared, how, model_flags, journal)
            _print(found, output, printed)
        return
    strengths = numbers(compared.strengths, "--strengths")
    checkpoint, spec = model_flags.open(model)
    questions = asked.read_questions(data)
    if compared.baselines and not candidates:
        raise click.UsageError("--baselines are compared with a plan; name one")
    if (compared.baselines or strengths) and stats.stats is None and not data.any:
        raise click.UsageError("baselines need the contrast data: give --data, --behavior or --stats")
    if unquantised.unquantised is not None and not compared.baselines:
        raise click.UsageError("--weights is what control edits are computed from: give --baselines too")
    planned = planned_from(checkpoint, spec, unquantised.unquantised)
    judge = judged.choice(data)
    judged.check_reachable()
    loaded = model_flags.load(checkpoint, spec)
    chosen = [open_candidate(loaded, checkpoint, where, model_flags.runtime()) for where in candidates]
    scoring = None
    if compared.baselines or strengths or stats.stats is not None:
        scoring = scoring_of(stats.stats, data, checkpoint, spec, model_flags, loaded)
        scoring = replace(scoring, checkpoint=planned)
    suite = asked.suite(loaded, questions, data, None if scoring is None else scoring.statistics)
    suite = judged.suite(suite, judge, data, in_this_process(loaded), model_flags)
    if how.engine == "vllm":
        suite = _through_vllm(suite, compared, model_flags.dtype, candidates)
    if compared.against:
        from steer2edit.evaluation.baselines import adapter_at

        if not chosen:
            raise click.UsageError("--against is compared with a plan, adapter or checkpoint; name one")
        with chosen[0].enter() as changed:
            kl = suite.neutral.budget.measure(changed).kl
        chosen += [adapter_at(loaded, folder, suite.neutral, kl) for folder in compared.against]
    if (compared.told or compared.baselines) and chosen:
        from steer2edit.evaluation.baselines import instructed

        if text := data.instruction(compared.told):
            chosen += instructed(chosen[0], loaded, text)
    if scoring is not None and (compared.baselines or strengths):
        if compared.baselines:
            more, passes = baselines_work(compared.match, compared.draws, strengths)
            work = work_of(suite, how.split, len(chosen) + more, passes)
            click.echo(f"evaluation: {work}", err=True)
            chosen += with_baselines(
                loaded,
                scoring,
                _plan_of(candidates[0]),
                suite,
                strengths=strengths,
                match=compared.match,
                draws=compared.draws,
                progress=progress_bar(),
            )
        else:
            chosen += steering(loaded, scoring, strengths)
    name = " + ".join(source.name for source in data.sources()) or None
    context = {"model": checkpoint.name, "fingerprint": checkpoint.fingerprint, "behavior": name}
    evaluation = assess(loaded, suite, chosen, split=how.split, context=context, progress=progress_bar())
    if how.tasks:
        from steer2edit.evaluation.lm_eval import lm_eval

        tasks = how.tasks.split(",")
        scores = lm_eval(loaded, chosen, tasks, limit=asked.limit, include_path=how.lm_eval_path)
        evaluation = replace(evaluation, context={**evaluation.context, "lm_eval": scores})
    _print(evaluation, output, printed)


def _print(evaluation: Evaluation, output: EvaluationOut, printed: JsonFlags) -> None:
    from steer2edit.evaluation.summary import summary
    from steer2edit.report.tables import render_evaluation, steerable_lines

    if output.out is not None:
        evaluation.save(output.out)
    written = [] if output.out is None else ["", f"Written: {output.out}"]
    print_result(
        summary(evaluation),
        printed.as_json,
        lambda _: "\n".join([render_evaluation(evaluation), *steerable_lines(evaluation), *written]),
    )


def _through_vllm(suite: Suite, compared: BaselineFlags, dtype: str, candidates: tuple[str, ...]) -> Suite:
    from steer2edit.engines.vllm_engine import VllmCandidates

    if (
        compared.baselines
        or compared.strengths
        or compared.against
        or any(Path(where).is_file() for where in candidates)
    ):
        raise click.UsageError(
            "vLLM runs checkpoints and adapters: emit plans first (steer2edit emit PLAN MODEL --to lora), and leave "
            "baselines to --engine transformers"
        )
    return replace(suite, engine=VllmCandidates(dtype))


def _plan_of(where: str) -> EditPlan:
    from steer2edit.errors import PlanError
    from steer2edit.plan import EditPlan

    path = find_plan(where)
    if not path.is_file():
        raise PlanError(f"{where} holds no plan; --baselines are compared with a plan or an artefact of steer2edit")
    return EditPlan.load(path)
