"""Composing plans: ``compile --plan … --plan …``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from steer2edit.cli.command import Command
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import progress_bar, read_plan
from steer2edit.cli.output import artefact_lines, closing_lines, columns, print_result
from steer2edit.options import option

if TYPE_CHECKING:
    from steer2edit.cli.data_options import CaptureFlags, StatsFlags, VectorsFlags
    from steer2edit.cli.method import MethodFlags
    from steer2edit.cli.options import ModelFlags, StrengthFlags, WritingFlags
    from steer2edit.compose import Composed


@dataclass(frozen=True)
class PlansFlags(FlagGroup):
    """Finished plans in place of data."""

    heading: ClassVar[str] = "Composition of finished plans, in place of data"

    plans: tuple[str, ...] = option(
        (), "Plan, or folder of an artefact, to compile with the others. Repeatable.", "--plan", metavar="PLAN"
    )
    weights: tuple[float, ...] = option(
        (), "Weight of each --plan, in their order: --weight 1 0.5.", "--weight", shown_default="1 for each"
    )


class WeightsCommand(Command):
    """A command whose ``--weight`` may be followed by several numbers."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        inside = False
        for arg in args:
            number = _is_number(arg)
            if inside and number and spread[-1] != "--weight":
                spread.append("--weight")
            inside = arg == "--weight" or (inside and number)
            spread.append(arg)
        return super().parse_args(ctx, spread)


def compile_plans(
    model: str,
    plans: PlansFlags,
    data: CaptureFlags,
    stats: StatsFlags,
    vectors: VectorsFlags,
    method: MethodFlags,
    strength: StrengthFlags,
    model_flags: ModelFlags,
    questions: tuple[str, ...],
    no_report: bool,
    repetition_penalty: float | None,
    out: Path,
    to: tuple[str, ...],
    writing: WritingFlags,
    force: bool,
    as_json: bool,
) -> None:
    """Compose finished plans into one artefact, and print what became of each."""
    from steer2edit.compose import compose
    from steer2edit.data.questions import read_questions

    if writing.dry_run:
        raise click.UsageError("--dry-run does not go with --plan; emit --dry-run does it for one finished plan")
    given = {
        "--data": data.data,
        "--behavior": data.behavior,
        "--system": data.system,
        "--chat-template-kwargs": data.chat_template_kwargs,
        "--limit": data.limit,
        "--background": data.background_file,
        "--stats": stats.stats,
        "--vectors": vectors.vectors_file,
        "--vector": None if vectors.vector == "mean" else vectors.vector,
        "--kl-budget-attn": strength.kl_budget_attn,
        "--kl-budget-mlp": strength.kl_budget_mlp,
        "the options of --method": method.values,
    }
    if strange := [flag for flag, value in given.items() if value not in (None, (), {})]:
        raise click.UsageError(f"--plan compiles finished plans, and takes no {', '.join(strange)}")
    weights = plans.weights or (1.0,) * len(plans.plans)
    if len(weights) != len(plans.plans):
        raise click.UsageError(
            f"{len(plans.plans)} plans and {len(weights)} weights: give one --weight for each --plan"
        )
    if questions and len(questions) != len(plans.plans):
        raise click.UsageError(
            f"{len(plans.plans)} plans and {len(questions)} files of questions: give one --eval for each --plan"
        )
    composed = compose(
        model,
        [read_plan(where) for where in plans.plans],
        weights,
        out,
        to=to,
        revision=model_flags.revision,
        strength=strength.strength,
        kl_budget=strength.kl_budget,
        neutral=strength.read_neutral(),
        runtime=model_flags.runtime(),
        questions=[read_questions(source) for source in questions] if questions else None,
        measure=not no_report,
        repetition_penalty=repetition_penalty,
        force=force,
        writing=writing.writing(),
        progress=progress_bar(),
    )
    result = {
        "artefacts": {target: str(folder) for target, folder in composed.artefacts.items()},
        "exactness": {target: lowering.exactness for target, lowering in composed.lowerings.items()},
        "changed": len(composed.plan.edits),
        "measured": composed.plan.measured.to_json(),
        "interference": composed.described(),
    }
    print_result(result, as_json, lambda result: _render(composed, result, model, model_flags.revision))


def _render(composed: Composed, result: dict[str, Any], model: str, revision: str | None) -> str:
    from tabulate import tabulate

    from steer2edit.report.plan_text import cost_line, plan_line, strength_line
    from steer2edit.report.tables import render_evaluation

    plan = composed.plan
    summary = {"Composed": plan_line(plan), "Strength": strength_line(plan.measured), "Cost": cost_line(plan.measured)}
    lines = [*columns(summary), ""]
    called = result["interference"]["plans"]
    heads = ["matrix", "cosine of the updates", "cosine of the directions", "energy on the same components"]
    for overlap in composed.overlaps:
        if overlap.site is None:
            pair = f"{called[overlap.first]} and {called[overlap.second]}"
            rows = [["all", *_numbers(overlap)]]
            mine = [
                o
                for o in composed.overlaps
                if o.site is not None and (o.first, o.second) == (overlap.first, overlap.second)
            ]
            known = [o for o in mine if o.update is not None]
            most = sorted(known, key=lambda o: -abs(o.update or 0.0))[:5]
            rows += [[str(o.site), *_numbers(o)] for o in most]
            lines += [
                f"{pair} edit {len(mine)} of the same matrices and biases (0: they do not meet, 1: they do the same); the "
                "closest:",
                tabulate(rows, heads, disable_numparse=True),
                *_not_compared([str(o.site) for o in mine if o.update is None]),
                "",
            ]
    for name, found in composed.evaluations.items():
        lines += [f"Effect on the held-out questions of {name}:", "", render_evaluation(found), ""]
    lines += ["Written:", *artefact_lines(composed.artefacts, result["exactness"])]
    return "\n".join([*lines, "", *closing_lines(composed.artefacts, model, revision)])


def _not_compared(places: list[str], limit: int = 6) -> list[str]:
    if not places:
        return []
    more = f" and {len(places) - limit} more" if len(places) > limit else ""
    return [f"Not compared, since one of both scales or sets what is there: {', '.join(places[:limit])}{more}"]


def _numbers(overlap: Any) -> list[str]:
    components = "–" if overlap.components is None else f"{overlap.components:.0%}"
    return [f"{overlap.update:+.3f}", f"{overlap.direction:+.3f}", components]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
