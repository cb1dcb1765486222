"""``compile``: from contrast data, or from finished plans, to artefacts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.compose import PlansFlags, WeightsCommand, compile_plans
from steer2edit.cli.data_options import CaptureFlags, ProtectFlags, StatsFlags, VectorsFlags
from steer2edit.cli.dry_run import dry_run_compile
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.judge_flags import JudgeFlags
from steer2edit.cli.method import MethodFlags
from steer2edit.cli.missing_data import MissingDataFlags
from steer2edit.cli.options import (
    OWN_PENALTY,
    PENALTY,
    ForceFlags,
    JsonFlags,
    ModelFlags,
    SettledFlags,
    TargetFlags,
    UnquantisedFlags,
    WritingFlags,
    progress_bar,
)
from steer2edit.cli.output import artefact_lines, closing_lines, columns, print_result
from steer2edit.options import option

if TYPE_CHECKING:
    from steer2edit.compiler import Compiled
    from steer2edit.pairs.make import DataRequest


_NOTHING_TO_JUDGE = "--judge reads answers to held-out questions: give them (--eval FILE), and no --no-report"
_NO_EFFECT = (
    "not measured: that takes held-out questions (a behaviour, a folder of data, --eval FILE), and --no-report left out"
)


@dataclass(frozen=True)
class OutFlags(FlagGroup):
    """Where the artefact goes."""

    heading: ClassVar[str] = "Output"

    out: Path = option(..., "Folder of the artefact; with several targets, of a folder for each.", "-o", "--out")


@dataclass(frozen=True)
class ReportFlags(FlagGroup):
    """What is measured on held-out questions."""

    heading: ClassVar[str] = "Report"

    questions: tuple[str, ...] = option(
        (),
        "Held-out questions; a behaviour and a folder of data have their own. With --plan, one file for each plan.",
        "--eval",
        metavar="FILE",
    )
    told: str | None = option(
        None,
        "Compare with the base under this instruction; 'none' for no such row.",
        metavar="TEXT",
        shown_default="that of the behaviour",
    )
    aim: str | None = option(
        None,
        "Take the weakest strength at which a metric of the behaviour (without METRIC: its own) reaches a value on the questions "
        "for selection, such as length=40 or margin=0.2, within --kl-budget.",
        metavar="[METRIC=]VALUE",
        shown_default="no aim; with one, --kl-budget is 0.5 unless given",
    )
    no_report: bool = option(False, "Measure nothing but the KL, and make no report page.")
    repetition_penalty: float | None = option(
        None, PENALTY, minimum=0.1, maximum=10, shown_default=OWN_PENALTY, rare=True
    )


@command(
    cls=WeightsCommand,
    data=CaptureFlags,
    missing=MissingDataFlags,
    stats=StatsFlags,
    vectors=VectorsFlags,
    protect=ProtectFlags,
    method=MethodFlags,
    strength=SettledFlags,
    model_flags=ModelFlags,
    unquantised=UnquantisedFlags,
    report=ReportFlags,
    judged=JudgeFlags,
    plans=PlansFlags,
    output=OutFlags,
    targets=TargetFlags,
    writing=WritingFlags,
    force=ForceFlags,
    printed=JsonFlags,
)
@click.argument("model")
def compile(
    model: str,
    data: CaptureFlags,
    missing: MissingDataFlags,
    stats: StatsFlags,
    vectors: VectorsFlags,
    protect: ProtectFlags,
    method: MethodFlags,
    strength: SettledFlags,
    model_flags: ModelFlags,
    unquantised: UnquantisedFlags,
    report: ReportFlags,
    judged: JudgeFlags,
    plans: PlansFlags,
    output: OutFlags,
    targets: TargetFlags,
    writing: WritingFlags,
    force: ForceFlags,
    printed: JsonFlags,
) -> None:
    """Compile a behaviour into MODEL's weights: capture, plan, settle the strength, write, measure and report.

    With --plan, finished plans are composed into one artefact: their updates add up, each times its --weight.
    """
    from steer2edit import targets as target_formats
    from steer2edit.architecture.unquantised import planned_from
    from steer2edit.artefact.emit import artefact_folders
    from steer2edit.artefact.foresee import foreseen_refusals
    from steer2edit.artefact.request import CompileRequest, check_alone
    from steer2edit.capture.statistics import Statistics
    from steer2edit.compiler import compile as compile_model
    from steer2edit.data.questions import read_questions
    from steer2edit.dry_run import widest_plan
    from steer2edit.evaluation.summary import summary
    from steer2edit.methods import edited_layers, needs_no_statistics
    from steer2edit.strength.aim import Aim

    judged.check(answers_by=missing.answers_by, writer=missing.writer)
    aim = Aim.read(report.aim) if report.aim is not None else None
    if report.repetition_penalty is not None and report.no_report and aim is None:
        raise click.UsageError(
            "--repetition-penalty is for written answers, and --no-report measures none: leave one of the two out"
        )
    if missing.any and (plans.plans or stats.stats is not None or vectors.vectors_file is not None):
        flag = "--trait" if missing.trait else "--positive"
        raise click.UsageError(f"{flag} asks for data to be made; give it without --plan, --stats and --vectors")
    if plans.plans:
        if judged.judge is not None:
            raise click.UsageError(
                "--judge reads the answers of one behaviour, and --plan takes finished plans: judge with eval"
            )
        if protect.protect:
            raise click.UsageError(
                "--protect clears vectors, and the plans of --plan are made: give it where they are planned"
            )
        if unquantised.unquantised is not None:
            raise click.UsageError("--weights is what a plan is computed from, and the plans of --plan are made")
        if aim is not None:
            raise click.UsageError("--aim is for one behaviour, and --plan takes finished plans")
        compile_plans(
            model, plans, data, stats, vectors, method, strength, model_flags, report.questions, report.no_report,
            report.repetition_penalty, output.out, targets.to, writing, force.force, printed.as_json,
        )  # fmt: skip
        return
    if plans.weights:
        raise click.UsageError("--weight belongs to --plan")
    if len(report.questions) > 1:
        raise click.UsageError("several --eval belong to several --plan; give one")
    stats.check(data)
    vectors.check()
    options = method.options()
    without_data = stats.stats is None and not data.any and not missing.any and needs_no_statistics(options)
    if without_data and (vectors.vectors_file is not None or vectors.vector != "mean" or protect.protect):
        raise click.UsageError(
            "--vectors, --vector and --protect change what is captured: give data too (--data, --behavior or --stats)"
        )
    if without_data and (report.questions or aim is not None):
        raise click.UsageError(
            "--eval and --aim compare with steering by the data's vector: give data too (--data or --behavior)"
        )
    # what is wrong with files and folders is said before data is made
    neutral, background, texts_to_keep = strength.read_neutral(), data.read_background(), data.read_keep()
    protected = protect.read(data)
    check_alone(aim, strength.strength, strength.class_budgets)
    if judged.judge is not None and not writing.dry_run:
        if report.no_report:
            raise click.UsageError(_NOTHING_TO_JUDGE)
        judged.check_reachable()
    if not data.data and not writing.dry_run:
        artefact_folders(output.out, targets.to, force.force, [model])
        for source in report.questions:
            read_questions(source)

    def checks(asked: DataRequest) -> None:
        """What can be known to be wrong with the compile before data is made for it."""
        checkpoint, spec = model_flags.open(model)
        for target in targets.to:
            target_formats.check_quantised(target, checkpoint)
        planned_from(checkpoint, spec, unquantised.unquantised)
        foreseen_refusals(widest_plan(checkpoint, spec, method.method, options), checkpoint, spec, targets.to)
        if aim is not None and not report.questions:
            from steer2edit.search.reach import check_aim

            # every question that is held out has both answers
            held_out = [replace(q, positive="yes", negative="no", split="select") for q in asked.questions]
            check_aim(held_out, asked.metric, aim)

    if stats.stats is None and vectors.vectors_file is None and not without_data:
        data = missing.with_data(data, model, model_flags, judged, output.out, writing.dry_run, checks)
    steering = vectors.read(edited_layers(options))
    statistics = Statistics.load(stats.stats) if stats.stats is not None else None
    request = CompileRequest(
        model,
        output.out,
        behavior=data.read_behavior(steering) if statistics is None and not without_data else None,
        statistics=statistics,
        vectors=steering,
        vector=vectors.vector,
        protect=protected,
        to=targets.to,
        revision=model_flags.revision,
        method=method.method,
        options=options,
        strength=strength.strength,
        kl_budget=strength.kl_budget,
        class_budgets=strength.class_budgets,
        neutral=neutral,
        background=background,
        texts_to_keep=texts_to_keep,
        runtime=model_flags.runtime(),
        batch_tokens=data.batch_tokens,
        questions=None if (report.no_report or writing.dry_run) and aim is None else data.questions(report.questions),
        report=not report.no_report,
        told=data.instruction(report.told),
        judge=judged.choice(data),
        aim=aim,
        repetition_penalty=report.repetition_penalty,
        weights=unquantised.unquantised,
        force=force.force,
        writing=writing.writing(),
    )
    if judged.judge is not None and not writing.dry_run and request.questions is None:
        raise click.UsageError(_NOTHING_TO_JUDGE)
    if writing.dry_run:
        dry_run_compile(request, printed.as_json)
        return
    compiled = compile_model(request, progress_bar())
    result = {
        "artefacts": {target: str(folder) for target, folder in compiled.artefacts.items()},
        "exactness": {target: lowering.exactness for target, lowering in compiled.lowerings.items()},
        "changed": len(compiled.plan.edits),
        "method": dict(compiled.plan.method),
        "measured": compiled.plan.measured.to_json(),
        **({"quantised": quantised} if (quantised := compiled.plan.data.get("quantised")) else {}),
        "evaluation": compiled.evaluation and summary(compiled.evaluation),
    }
    print_result(result, printed.as_json, lambda _: _render(compiled, model, model_flags.revision))


def _render(compiled: Compiled, model: str, revision: str | None) -> str:
    from steer2edit.files.layout import REPORT
    from steer2edit.report.method_text import held_out_line, training_line
    from steer2edit.report.plan_text import cost_line, plan_line, strength_line
    from steer2edit.report.tables import breaks_line, effect_line, render_evaluation, steerable_lines

    plan = compiled.plan
    fitted = {"Training": training_line(plan.method), "Held out": held_out_line(plan.method)}
    summary = {
        "Compiled": plan_line(plan),
        **{name: line for name, line in fitted.items() if line},
        "Strength": strength_line(plan.measured),
        "Cost": cost_line(plan.measured),
        "Effect": effect_line(compiled.evaluation) if compiled.evaluation is not None else _NO_EFFECT,
    }
    if compiled.evaluation is not None and (breaks := breaks_line(compiled.evaluation)):
        summary["Breaks"] = breaks
    lines = columns(summary)
    if compiled.evaluation is not None:
        lines += ["", "On held-out questions, which the edit has not seen:", "", render_evaluation(compiled.evaluation)]
    exactness = {target: lowering.exactness for target, lowering in compiled.lowerings.items()}
    lines += ["", "Written:", *artefact_lines(compiled.artefacts, exactness)]
    pages = [folder / REPORT for folder in compiled.artefacts.values() if (folder / REPORT).is_file()]
    lines += [f"  report page  {page}" for page in pages[:1]]
    lines += ["", *closing_lines(compiled.artefacts, model, revision)]
    if compiled.evaluation is not None and (judged := steerable_lines(compiled.evaluation)):
        lines += ["", *judged]
    return "\n".join(lines)
