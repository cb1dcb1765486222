"""The commands on mixtures of experts: profile, show, mask."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steer2edit.cli.command import CommandGroup, command
from steer2edit.cli.data_options import CaptureFlags
from steer2edit.cli.experts_flags import (
    ChosenFlags,
    LabelFlags,
    MaskOut,
    ProfileOut,
    RankingFlags,
    ShowModel,
)
from steer2edit.cli.flags import PATH
from steer2edit.cli.options import (
    ForceFlags,
    JsonFlags,
    ModelFlags,
    NeutralFlags,
    ReplaceFlags,
    progress_bar,
    read_text,
)
from steer2edit.cli.output import artefact_lines, closing_lines, print_result

if TYPE_CHECKING:
    from steer2edit.architecture import ModelSpec
    from steer2edit.capture.statistics import Statistics
    from steer2edit.checkpoint import Checkpoint


@click.group(cls=CommandGroup)
def experts() -> None:
    """Rank the experts of a mixture by a behaviour, and write checkpoints without them."""


@command(
    data=CaptureFlags,
    labels=LabelFlags,
    ranked=RankingFlags,
    model_flags=ModelFlags,
    output=ProfileOut,
    replace=ReplaceFlags,
    printed=JsonFlags,
)
@click.argument("model")
def profile(
    model: str,
    data: CaptureFlags,
    labels: LabelFlags,
    ranked: RankingFlags,
    model_flags: ModelFlags,
    output: ProfileOut,
    replace: ReplaceFlags,
    printed: JsonFlags,
) -> None:
    """Run MODEL over contrast data and rank its experts; the statistics serve every other command too.

    With --labels response MODEL first answers the data's prompts, and the routing of prompts is compared.
    """
    from steer2edit.experts.ranking import alignments

    replace.check(output.out, "statistics")
    replace.check(ranked.plot, "picture")
    checkpoint, spec = model_flags.open(model)
    if not spec.routers:
        raise click.UsageError(f"{checkpoint.name} ({spec.model_type}) is not a mixture of experts")
    statistics = data.capture(checkpoint, spec, model_flags, prepared=labels.labelled)
    statistics.save(output.out)
    aligned = alignments(statistics, spec, checkpoint, progress_bar())
    _print_ranking(statistics, aligned, {"statistics": str(output.out)}, printed.as_json, ranked)


@command("show", ranked=RankingFlags, model_flags=ShowModel, replace=ReplaceFlags, printed=JsonFlags)
@click.argument("stats", type=PATH)
def show_experts(
    stats: Path, ranked: RankingFlags, model_flags: ShowModel, replace: ReplaceFlags, printed: JsonFlags
) -> None:
    """Rank experts from statistics; runs no model."""
    from steer2edit.capture.statistics import Statistics
    from steer2edit.experts.ranking import alignments

    replace.check(ranked.plot, "picture")
    statistics, aligned = Statistics.load(stats), None
    if model_flags.model is not None:
        checkpoint, spec = model_flags.open(model_flags.model)
        statistics.check_model(checkpoint)
        aligned = alignments(statistics, spec, checkpoint, progress_bar())
    _print_ranking(statistics, aligned, {"statistics": str(stats)}, printed.as_json, ranked)


@command(
    chosen=ChosenFlags,
    ranked=RankingFlags,
    text=NeutralFlags,
    model_flags=ModelFlags,
    output=MaskOut,
    force=ForceFlags,
    printed=JsonFlags,
)
@click.argument("model")
def mask(
    model: str,
    chosen: ChosenFlags,
    ranked: RankingFlags,
    text: NeutralFlags,
    model_flags: ModelFlags,
    output: MaskOut,
    force: ForceFlags,
    printed: JsonFlags,
) -> None:
    """Switch experts off (or on, or scale them) in MODEL's weights, as exactly as its family allows."""
    from steer2edit.artefact.emit import emit
    from steer2edit.experts.masking import Certification, mask_experts
    from steer2edit.files.outputs import check_new
    from steer2edit.report.experts import render_masks

    check_new(output.out, force.force)
    ReplaceFlags(force=force.force).check(output.plan, "plan")
    ReplaceFlags(force=force.force).check(ranked.plot, "picture")
    checkpoint, spec = model_flags.open(model)
    request, how, data = _request(checkpoint, spec, chosen, ranked)
    plan = mask_experts(
        checkpoint,
        spec,
        request,
        how=how,
        certification=Certification(
            runtime=model_flags.runtime(),
            bound=chosen.max_selected,
            calibration=read_text(chosen.calibration, "--calibration"),
            neutral=text.read_neutral(),
            measure=not output.no_measure,
        ),
        data=data,
        progress=progress_bar(),
    )
    lowering = emit(plan, checkpoint, spec, output.to, output.out, force=force.force, progress=progress_bar())
    if output.plan is not None:
        plan.save(output.plan)
    result = {
        "artefact": str(output.out),
        "exactness": lowering.exactness,
        "grade": plan.method["grade"],
        "experts": plan.method["experts"],
        "measured": plan.measured.to_json(),
        "notes": list(lowering.notes),
    }
    artefacts = {output.to: output.out}
    lines = ["", "Written:", *artefact_lines(artefacts, {output.to: lowering.exactness}), ""]
    lines += closing_lines(artefacts, model, model_flags.revision)
    print_result(
        result,
        printed.as_json,
        lambda _: "\n".join([render_masks(plan.method, plan.measured), *lowering.notes, *lines]),
    )


for one in (profile, show_experts, mask):
    experts.add_command(one)


def _request(
    checkpoint: Checkpoint, spec: ModelSpec, chosen: ChosenFlags, ranked: RankingFlags
) -> tuple[Any, Any, Any]:
    """The request of the command line: what to do, how, and with which data.

    Experts are chosen by name or by rank. Gains and the like may be given without either.
    """
    from steer2edit.capture.statistics import Statistics
    from steer2edit.experts.edits import Request
    from steer2edit.methods import describe_data

    if chosen.stats and chosen.named:
        raise click.UsageError("--stats ranks experts and --experts names them; give one")
    off, data = _pairs(chosen.named, "--experts") if chosen.named else [], None
    if chosen.stats:
        statistics = Statistics.load(chosen.stats)
        statistics.check_model(checkpoint)
        off, data = _ranked_off(checkpoint, spec, statistics, chosen, ranked), describe_data(statistics)
    how = "prune" if chosen.prune else chosen.how
    if chosen.prune and chosen.how != "auto":
        raise click.UsageError("--prune and --how exclude each other")
    request = Request.of(
        off,
        _pairs(chosen.forced, "--on") if chosen.forced else [],
        dict(_gain(text) for text in chosen.gains),
        chosen.experts_per_token,
    )
    return request, how, data


def _ranked_off(
    checkpoint: Checkpoint, spec: ModelSpec, statistics: Statistics, chosen: ChosenFlags, ranked: RankingFlags
) -> list[tuple[int, int]]:
    from steer2edit.experts.ranking import alignments, expert_table, ranking, weakest_for_pruning
    from steer2edit.report.experts import expert_map

    aligned = alignments(statistics, spec, checkpoint, progress_bar()) if ranked.by == "alignment" else None
    table = _table(statistics, aligned, ranked, expert_table)
    if chosen.prune:
        off = weakest_for_pruning(table, ranked.top, ranked.side, max(r.groups for r in spec.routers))
    else:
        found = ranking(table, ranked.top, ranked.side)
        kept = [
            one
            for one in found
            if one.stability >= chosen.min_stability and (chosen.fdr is None or one.q <= chosen.fdr)
        ]
        if len(kept) < ranked.top:
            click.echo(
                f"{len(kept)} of the top {ranked.top} experts are left: the others are not on this side, not stable over "
                "resamples (--min-stability), or too likely by chance (--fdr)",
                err=True,
            )
        off = [(one.layer, one.expert) for one in kept]
    if ranked.plot is not None:
        expert_map(table, ranked.plot, off)
    return off


def _print_ranking(statistics: Any, aligned: Any, result: dict[str, Any], as_json: bool, flags: RankingFlags) -> None:
    from steer2edit.experts.ranking import expert_table, ranking
    from steer2edit.report.experts import describe_ranking, expert_map, render_ranking

    table = _table(statistics, aligned, flags, expert_table)
    ranked = ranking(table, flags.top, flags.side)
    if flags.plot is not None:
        expert_map(table, flags.plot, [(one.layer, one.expert) for one in ranked])
    print_result({**result, **describe_ranking(table, ranked)}, as_json, lambda _: render_ranking(table, ranked))


def _table(statistics: Any, aligned: Any, flags: RankingFlags, make: Any) -> Any:
    from steer2edit.capture.statistics import Statistics

    control = Statistics.load(flags.control) if flags.control is not None else None
    scope = flags.scope or ("prompt" if _labelled_by_responses(statistics) else "response")
    return make(statistics, scope=scope, by=flags.by, control=control, alignment=aligned)


def _labelled_by_responses(statistics: Statistics) -> bool:
    """Whether the labels are of the model's own responses: then the prompts are what is compared."""
    from steer2edit.experts.own_labels import SOURCE

    return any(one.get("labels") == SOURCE for one in statistics.source.get("origin", ()))


def _pairs(text: str, flag: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6}):(\d{1,6})\s*", part, re.ASCII)
        if match is None:
            raise click.BadParameter(f"{part!r} is not a layer:expert such as 48:176", param_hint=flag)
        found.append((int(match.group(1)), int(match.group(2))))
    return found


def _gain(text: str) -> tuple[tuple[int, int], float]:
    pair, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not -1e3 <= number <= 1e3:
        raise click.BadParameter(f"{text!r}: expected layer:expert=factor such as 3:7=0.5", param_hint="--gain")
    return _pairs(pair, "--gain")[0], number
