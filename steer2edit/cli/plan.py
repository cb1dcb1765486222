"""The commands on plans: ``plan``, ``show`` and ``scale``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from steer2edit.cli.command import command
from steer2edit.cli.data_options import ProtectFlags, TemplateFlags, VectorsFlags
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.method import MethodFlags
from steer2edit.cli.options import (
    BudgetFlags,
    JsonFlags,
    ModelFlags,
    ReplaceFlags,
    StrengthFlags,
    UnquantisedFlags,
    progress_bar,
    read_plan,
)
from steer2edit.cli.output import print_result
from steer2edit.options import option

if TYPE_CHECKING:
    from steer2edit.architecture import ModelSpec
    from steer2edit.capture.statistics import Statistics
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.plan import EditPlan


@dataclass(frozen=True)
class PlanSource(FlagGroup):
    """What is planned from."""

    heading: ClassVar[str] = "Data"

    stats: Path | None = option(
        None, "Statistics file that capture wrote; every method needs it, but for silence with --components."
    )

    def read(self, checkpoint: Checkpoint, options: Any) -> Statistics:
        """The statistics. Raises UsageError where a method needs them, and they are not given."""
        from steer2edit.capture.statistics import Statistics
        from steer2edit.methods import needs_no_statistics

        if self.stats is not None:
            return Statistics.load(self.stats)
        if not needs_no_statistics(options):
            raise click.UsageError("Missing option '--stats'.")
        return Statistics.nothing(checkpoint)


@dataclass(frozen=True)
class PlanOut(FlagGroup):
    """Where the plan goes."""

    heading: ClassVar[str] = "Output"

    out: Path = option(..., "Plan file to write, *.plan.safetensors.", "-o", "--out")


@dataclass(frozen=True)
class ShowFlags(FlagGroup):
    """How much is shown."""

    heading: ClassVar[str] = "Output"

    top: int = option(10, "Number of heads and of neurons to list.", minimum=0)
    plot: Path | None = option(None, "Draw the heat-map into this PNG, SVG or PDF file.")


@dataclass(frozen=True)
class FactorFlags(FlagGroup):
    """A factor of the strength."""

    heading: ClassVar[str] = "Strength"

    by: float | None = option(None, "Multiply the plan's strength by this; needs no model.")


@dataclass(frozen=True)
class BaseFlags(ModelFlags):
    """The base that a KL budget is measured on."""

    model: str | None = option(None, "Base model, folder or Hub id, to measure a KL budget on.", metavar="MODEL")


@command(
    source=PlanSource,
    vectors=VectorsFlags,
    protect=ProtectFlags,
    method=MethodFlags,
    strength=StrengthFlags,
    model_flags=ModelFlags,
    unquantised=UnquantisedFlags,
    output=PlanOut,
    replace=ReplaceFlags,
    printed=JsonFlags,
)
@click.argument("model")
def plan(
    model: str,
    source: PlanSource,
    vectors: VectorsFlags,
    protect: ProtectFlags,
    method: MethodFlags,
    strength: StrengthFlags,
    model_flags: ModelFlags,
    unquantised: UnquantisedFlags,
    output: PlanOut,
    replace: ReplaceFlags,
    printed: JsonFlags,
) -> None:
    """Score every component and write the edits as a plan. Runs no model unless a KL budget is given."""
    from steer2edit.architecture.unquantised import planned_from
    from steer2edit.capture.protect import protected
    from steer2edit.capture.vector_kinds import with_vector
    from steer2edit.capture.vectors import substituted
    from steer2edit.methods import edited_layers, make_plan, scaling
    from steer2edit.scoring.scores import Scoring
    from steer2edit.strength.neutral_texts import neutral_texts
    from steer2edit.strength.settle import settle_strength

    options = method.options()
    vectors.check()
    replace.check(output.out, "plan")
    checkpoint, spec = model_flags.open(model)
    statistics, steering = source.read(checkpoint, options), vectors.read(edited_layers(options))
    if source.stats is None and (steering is not None or protect.protect):
        raise click.UsageError("--vectors and --protect change what was captured: give --stats too")
    if steering is not None:
        statistics = substituted(steering, statistics, checkpoint, spec)
    statistics = with_vector(statistics, vectors.vector)
    protected_statistics = protected(statistics, _directions(protect, statistics, checkpoint, spec))
    scoring = Scoring(planned_from(checkpoint, spec, unquantised.unquantised), spec, protected_statistics)
    edits = make_plan(scoring, method=method.method, options=options, progress=progress_bar())
    if strength.measured:
        loaded = model_flags.load(checkpoint, spec)
        edits = settle_strength(
            loaded,
            edits,
            strength=strength.strength,
            kl_budget=strength.kl_budget,
            class_budgets=strength.class_budgets,
            neutral=neutral_texts(
                loaded,
                strength.read_neutral(),
                progress_bar(),
                chat_template_kwargs=statistics.source.get("chat_template_kwargs"),
            ),
            scaled=scaling(edits),
        )
    elif strength.strength is not None:
        edits = edits.at_strength(strength.strength, scaling(edits))
    edits.save(output.out)
    print_plan(edits, output.out, printed.as_json)


def _directions(
    protect: ProtectFlags, statistics: Statistics, checkpoint: Checkpoint, spec: ModelSpec
) -> list[Statistics]:
    """Statistics of the directions to protect; no model is run for them."""
    from steer2edit.capture.statistics import Statistics
    from steer2edit.capture.vectors import Vectors, substituted

    found = []
    for name, one in zip(protect.protect, protect.read(TemplateFlags()), strict=True):
        if isinstance(one, Vectors):
            found.append(substituted(one, statistics, checkpoint, spec))
        elif isinstance(one, Statistics):
            found.append(one)
        else:
            raise click.UsageError(
                f"plan runs no model, and the direction of {name} is captured: steer2edit capture MODEL --behavior {name} "
                f"-o {name}.stats.safetensors, and --protect {name}.stats.safetensors"
            )
    return found


@command(shown=ShowFlags, replace=ReplaceFlags, printed=JsonFlags)
@click.argument("plan_file", metavar="PLAN")
def show(plan_file: str, shown: ShowFlags, replace: ReplaceFlags, printed: JsonFlags) -> None:
    """List what a plan changes, layer by layer and component by component.

    PLAN is a plan's file or an artefact's folder, here or on the Hub.
    """
    from steer2edit.report.figures import heatmap
    from steer2edit.report.plan_text import describe_plan, render_plan

    replace.check(shown.plot, "picture")
    edits = read_plan(plan_file)
    if shown.plot is not None:
        heatmap(edits, shown.plot)
    print_result(describe_plan(edits, shown.top), printed.as_json, lambda _: render_plan(edits, shown.top))


@command(
    factor=FactorFlags,
    budgets=BudgetFlags,
    model_flags=BaseFlags,
    output=PlanOut,
    replace=ReplaceFlags,
    printed=JsonFlags,
)
@click.argument("plan_file", metavar="PLAN")
def scale(
    plan_file: str,
    factor: FactorFlags,
    budgets: BudgetFlags,
    model_flags: BaseFlags,
    output: PlanOut,
    replace: ReplaceFlags,
    printed: JsonFlags,
) -> None:
    """Give a plan another strength: a factor of its present one, or the largest that a KL budget allows."""
    from steer2edit.compose import rescale
    from steer2edit.strength.neutral_texts import neutral_texts

    replace.check(output.out, "plan")
    edits = read_plan(plan_file)
    if factor.by is not None:
        if budgets.measured:
            raise click.UsageError("--by and a KL budget each set the strength; give one of them")
        scaled = rescale(edits, factor=factor.by)
    else:
        if not budgets.measured:
            raise click.UsageError("give --by, or a KL budget")
        if model_flags.model is None:
            raise click.UsageError("a KL budget is measured: name the base with --model")
        checkpoint, spec = model_flags.open(model_flags.model)
        edits.check_base(checkpoint)
        loaded = model_flags.load(checkpoint, spec)
        texts = neutral_texts(loaded, budgets.read_neutral(), progress_bar())
        scaled = rescale(
            edits, kl_budget=budgets.kl_budget, class_budgets=budgets.class_budgets, loaded=loaded, neutral=texts
        )
    scaled.save(output.out)
    print_plan(scaled, output.out, printed.as_json)


def print_plan(edits: EditPlan, out: Path, as_json: bool) -> None:
    """Print what a plan that was written is, and what to do with it next. A plan that edits nothing is told in a notice."""
    from steer2edit.errors import Steer2EditError
    from steer2edit.notices import notice
    from steer2edit.report.plan_text import describe_plan, render_summary
    from steer2edit.strength.settle import check_not_empty

    try:
        check_not_empty(edits)
    except Steer2EditError as nothing:
        notice(str(nothing))

    print_result(
        {"plan": str(out), **describe_plan(edits)},
        as_json,
        lambda _: "\n".join([render_summary(edits), "", f"Written: {out}", "", "Next:", *_next(edits, out)]),
    )


def _next(edits: EditPlan, out: Path) -> list[str]:
    import shlex

    from steer2edit.plan.operations import scales_of

    name = shlex.quote(str(out))
    # factors of all rows or columns are an update of full rank, which no adapter carries
    full = any(len(scale.changed) == len(scale.factors) for edit in edits.edits for scale in scales_of(edit))
    # nor does any the embedding
    embedding = edits.method.get("embedding") is True
    target = "checkpoint" if edits.structure or full or embedding else "lora"
    return [
        f"  steer2edit show {name}",
        f"  steer2edit emit {name} MODEL --to {target} -o FOLDER    (MODEL: {edits.base.name})",
    ]
