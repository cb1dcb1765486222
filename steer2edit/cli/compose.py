"""Composing and re-dosing plans: `compile --plan … --plan …` and `scale`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from steer2edit.cli.options import (
    PATH,
    find_plan,
    json_option,
    model_options,
    open_model,
    options,
    print_result,
    progress_bar,
    read_budgets,
    read_neutral,
    read_runtime,
    read_writing,
)

compose_options = options(
    click.option(
        "--plan",
        "plans",
        multiple=True,
        help="Compile this plan, with the others given, instead of new data; repeated.",
    ),
    click.option(
        "--weight",
        "weights",
        type=float,
        multiple=True,
        help="Of each --plan, in their order: --weight 1 --weight 0.5, or --weight 1 0.5.  [default: 1 for each]",
    ),
)
_NOT_WITH_PLANS = ("data", "behavior", "system", "stats", "vectors_file", "kl_budget_attn", "kl_budget_mlp")


class WeightsCommand(click.Command):
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


def compose_given(
    model: str, out: Path, to: tuple[str, ...], force: bool, as_json: bool, given: dict[str, Any]
) -> None:
    """What ``compile`` does with --plan."""
    from steer2edit.compose import compose
    from steer2edit.data.questions import read_questions

    plans, weights = given["plans"], given["weights"]
    if strange := [name for name in _NOT_WITH_PLANS if given[name] is not None]:
        flags = ", ".join(f"--{name.removesuffix('_file').replace('_', '-')}" for name in strange)
        raise click.UsageError(f"--plan compiles finished plans, and takes no {flags}")
    if weights and len(weights) != len(plans):
        raise click.UsageError(f"{len(plans)} plans and {len(weights)} weights: give one --weight for each --plan")
    asked = given["questions"]
    if asked and len(asked) != len(plans):
        raise click.UsageError(
            f"{len(plans)} plans and {len(asked)} files of questions: give one --eval for each --plan"
        )
    composed = compose(
        model,
        [read_plan(where) for where in plans],
        weights or [1.0] * len(plans),
        out,
        to=to,
        revision=given["revision"],
        strength=given["strength"],
        kl_budget=given["kl_budget"],
        neutral=read_neutral(given),
        runtime=read_runtime(given),
        questions=[read_questions(source) for source in asked] if asked else None,
        measure=not given["no_report"],
        force=force,
        writing=read_writing(given),
        progress=progress_bar(),
    )
    result = {
        "artefacts": {target: str(folder) for target, folder in composed.artefacts.items()},
        "exactness": {target: lowering.exactness for target, lowering in composed.lowerings.items()},
        "changed": len(composed.plan.edits),
        "measured": composed.plan.measured.to_json(),
        "interference": composed.described(),
    }
    print_result(result, as_json, lambda result: _render(composed, result))


@click.command()
@click.argument("plan_file", metavar="PLAN")
@click.option("--by", type=float, help="Multiply the plan's present dose.")
@click.option("--model", help="The base, on which a KL budget is measured.")
@click.option(
    "--kl-budget", type=float, help="The largest dose within this mean KL per token on neutral text, in nats."
)
@click.option("--kl-budget-attn", type=float, help="The same for attention's edits alone.")
@click.option("--kl-budget-mlp", type=float, help="The same for the MLPs' edits alone.")
@click.option("--neutral", type=PATH, help="Your own neutral text, instead of the packaged one.")
@click.option("-o", "--out", type=PATH, required=True, help="The new plan file, *.plan.safetensors.")
@model_options
@json_option
def scale(plan_file: str, by: float | None, model: str | None, out: Path, as_json: bool, **given: Any) -> None:
    """Give a plan another dose: a factor of the present one, or what a KL budget allows."""
    from steer2edit.compose import rescale
    from steer2edit.report.tables import describe_plan, render_plan
    from steer2edit.runtime.model import load_model
    from steer2edit.strength.settle import neutral_text

    plan = read_plan(plan_file)
    if by is not None:
        scaled = rescale(plan, factor=by)
    else:
        budgets = read_budgets({**given, "strength": None})
        if budgets["kl_budget"] is None and budgets["class_budgets"] is None:
            raise click.UsageError("give --by, or a KL budget")
        if model is None:
            raise click.UsageError("a KL budget is measured: name the base with --model")
        checkpoint, spec = open_model(model, given)
        plan.check_base(checkpoint)
        loaded = load_model(checkpoint, spec, read_runtime(given))
        text = neutral_text(loaded, read_neutral(given), progress_bar())
        del budgets["strength"]
        scaled = rescale(plan, **budgets, loaded=loaded, neutral=text)
    scaled.save(out)
    print_result(
        {"plan": str(out), **describe_plan(scaled)}, as_json, lambda r: f"{render_plan(scaled, top=5)}\n\n{r['plan']}"
    )


def read_plan(where: str) -> Any:
    """A plan, here or on the Hub, alone or in an artefact's folder."""
    from steer2edit.plan import EditPlan

    return EditPlan.load(find_plan(where))


def _render(composed: Any, result: dict[str, Any]) -> str:
    from tabulate import tabulate

    from steer2edit.report.tables import render_evaluation, render_plan

    called = result["interference"]["plans"]
    heads = ["", "update, cosine", "direction, cosine", "same components"]
    lines = [render_plan(composed.plan, top=5), ""]
    for overlap in composed.overlaps:
        if overlap.site is None:
            pair = f"{called[overlap.first]} and {called[overlap.second]}"
            rows = [["all sites", *_numbers(overlap)]]
            mine = [o for o in composed.overlaps if o.site and (o.first, o.second) == (overlap.first, overlap.second)]
            most = sorted(mine, key=lambda o: -abs(o.update))[:5]
            rows += [[o.site, *_numbers(o)] for o in most]
            lines += [
                f"{pair} meet at {len(mine)} sites; the most at",
                tabulate(rows, heads, disable_numparse=True),
                "",
            ]
    for name, found in composed.evaluations.items():
        lines += [f"on the questions of {name}", render_evaluation(found), ""]
    lines += [f"{target}: {folder} ({result['exactness'][target]})" for target, folder in result["artefacts"].items()]
    return "\n".join(lines)


def _numbers(overlap: Any) -> list[str]:
    return [f"{overlap.update:+.3f}", f"{overlap.direction:+.3f}", f"{overlap.components:.0%}"]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
