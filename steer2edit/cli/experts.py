"""The commands on mixtures of experts: profile, show, mask."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from steer2edit.cli.options import (
    PATH,
    capture_given,
    data_options,
    force_option,
    json_option,
    model_options,
    open_model,
    options,
    print_result,
    progress_bar,
    read_neutral,
    read_runtime,
)

ranking_options = options(
    click.option(
        "--by",
        type=click.Choice(["difference", "mass", "risk", "z", "alignment"]),
        default="difference",
        show_default=True,
        help="How experts are ranked: selection rate, routing mass, pooled rate, z-score, or output along the vector.",
    ),
    click.option(
        "--scope",
        type=click.Choice(["prompt", "response", "all"]),
        default="response",
        show_default=True,
        help="Over which tokens routing is counted.",
    ),
    click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="How many experts."),
    click.option(
        "--side",
        type=click.Choice(["negative", "positive"]),
        default="negative",
        show_default=True,
        help="Of which class the experts are typical; switching off those of the negative class favours the positive.",
    ),
    click.option("--control", type=PATH, help="Statistics of a control (same topics, other behaviour) to subtract."),
    click.option("--plot", type=PATH, help="Draw layers × experts into this PNG, SVG or PDF."),
)


@click.group()
def experts() -> None:
    """Mixtures of experts: which experts carry a behaviour, and checkpoints without them."""


@experts.command()
@click.argument("model")
@data_options
@click.option("-o", "--out", type=PATH, required=True, help="The statistics file, *.stats.safetensors.")
@ranking_options
@model_options
@json_option
def profile(model: str, out: Path, as_json: bool, **given: Any) -> None:
    """Run MODEL over contrast data and rank its experts; the statistics serve every other command too."""
    from steer2edit.experts.ranking import alignments

    checkpoint, spec = open_model(model, given)
    if not spec.routers:
        raise click.UsageError(f"{checkpoint.name} ({spec.model_type}) is no mixture of experts")
    statistics = capture_given(given, checkpoint, spec)
    statistics.save(out)
    aligned = alignments(statistics, spec, checkpoint, progress_bar())
    _print_ranking(statistics, aligned, {"statistics": str(out)}, as_json, given)


@experts.command("show")
@click.argument("stats", type=PATH)
@click.option("--model", help="Read the experts' matrices too, for their alignment.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@ranking_options
@json_option
def show_experts(stats: Path, model: str | None, revision: str | None, as_json: bool, **given: Any) -> None:
    """Rank experts from statistics; runs no model."""
    from steer2edit.capture.statistics import Statistics
    from steer2edit.experts.ranking import alignments

    statistics, aligned = Statistics.load(stats), None
    if model is not None:
        checkpoint, spec = open_model(model, {"revision": revision})
        statistics.check_model(checkpoint)
        aligned = alignments(statistics, spec, checkpoint, progress_bar())
    _print_ranking(statistics, aligned, {"statistics": str(stats)}, as_json, given)


@experts.command()
@click.argument("model")
@click.option("--stats", type=PATH, help="Statistics of a profile: experts are taken by their rank.")
@click.option("--experts", "named", help="These experts instead: 48:176,4:143 (layer:expert).")
@ranking_options
@click.option(
    "--min-stability",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Leave out experts that are among the top in fewer of the resamples.",
)
@click.option("--fdr", type=click.FloatRange(0, 1), help="Leave out experts with a larger false-discovery rate.")
@click.option("--prune", is_flag=True, help="Cut the experts out: --top from every layer.")
@click.option(
    "--how",
    type=click.Choice(["auto", "bias", "constant", "row", "zero"]),
    default="auto",
    show_default=True,
    help="How experts are switched off; auto is the most exact way that the family has.",
)
@click.option("--on", "forced", help="Force these experts on: 3:5,7:12.")
@click.option("--gain", "gains", multiple=True, help="Multiply an expert's output: 3:7=0.5; repeated.")
@click.option("--experts-per-token", type=click.IntRange(1), help="How many experts each token takes from now on.")
@click.option(
    "--max-selected",
    type=click.FloatRange(0, 1),
    default=1e-3,
    show_default=True,
    help="row: the share of held-out tokens that may still choose a masked expert.",
)
@click.option("--calibration", type=PATH, help="row: text to fit on, instead of the packaged one.")
@click.option("--neutral", type=PATH, help="Text that masks are certified on and the KL is measured on.")
@click.option("--no-measure", is_flag=True, help="Run no model where none is needed, and measure no KL.")
@click.option("--to", default="checkpoint", show_default=True, help="The target.")
@click.option("-o", "--out", type=PATH, required=True, help="Folder of the artefact.")
@click.option("--plan", "plan_out", type=PATH, help="Keep the plan in this file too.")
@model_options
@json_option
@force_option
def mask(model: str, to: str, out: Path, plan_out: Path | None, as_json: bool, force: bool, **given: Any) -> None:
    """Switch experts off (or on, or scale them) in MODEL's weights, as exactly as its family allows."""
    from steer2edit.artefact.emit import emit
    from steer2edit.cli.options import quieten_transformers
    from steer2edit.experts.masking import Certification, mask_experts
    from steer2edit.files.atomic import check_new
    from steer2edit.report.experts import render_masks

    check_new(out, force)
    checkpoint, spec = open_model(model, given)
    request, how, data = _request(checkpoint, spec, given)
    quieten_transformers()
    plan = mask_experts(
        checkpoint,
        spec,
        request,
        how=how,
        certification=Certification(
            runtime=read_runtime(given),
            bound=given["max_selected"],
            calibration=_read(given["calibration"]),
            neutral=read_neutral(given),
            measure=not given["no_measure"],
        ),
        data=data,
        progress=progress_bar(),
    )
    lowering = emit(plan, checkpoint, spec, to, out, force=force, progress=progress_bar())
    if plan_out is not None:
        plan.save(plan_out)
    result = {
        "artefact": str(out),
        "exactness": lowering.exactness,
        "grade": plan.method["grade"],
        "experts": plan.method["experts"],
        "measured": plan.measured.to_json(),
        "notes": list(lowering.notes),
    }
    print_result(
        result,
        as_json,
        lambda r: "\n".join([render_masks(plan.method, plan.measured), *r["notes"], f"{to}: {r['artefact']}"]),
    )


def _request(checkpoint: Any, spec: Any, given: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What is asked for, how, and of what data; by name, by rank, or neither where only gains and the like are given."""
    from steer2edit.capture.statistics import Statistics
    from steer2edit.experts.edits import Request
    from steer2edit.methods import describe_data

    if given["stats"] and given["named"]:
        raise click.UsageError("--stats ranks experts and --experts names them; give one")
    off, data = _pairs(given["named"], "--experts") if given["named"] else [], None
    if given["stats"]:
        statistics = Statistics.load(given["stats"])
        statistics.check_model(checkpoint)
        off, data = _ranked_off(checkpoint, spec, statistics, given), describe_data(statistics)
    how = "prune" if given["prune"] else given["how"]
    if given["prune"] and given["how"] != "auto":
        raise click.UsageError("--prune and --how exclude each other")
    request = Request.of(
        off,
        _pairs(given["forced"], "--on") if given["forced"] else [],
        dict(_gain(text) for text in given["gains"]),
        given["experts_per_token"],
    )
    return request, how, data


def _ranked_off(checkpoint: Any, spec: Any, statistics: Any, given: dict[str, Any]) -> list[tuple[int, int]]:
    from steer2edit.experts.ranking import alignments, expert_table, ranking, weakest_for_pruning
    from steer2edit.report.experts import expert_map

    aligned = alignments(statistics, spec, checkpoint, progress_bar()) if given["by"] == "alignment" else None
    table = _table(statistics, aligned, given, expert_table)
    if given["prune"]:
        chosen = weakest_for_pruning(table, given["top"], given["side"], max(r.groups for r in spec.routers))
    else:
        found = ranking(table, given["top"], given["side"])
        kept = [
            one
            for one in found
            if one.stability >= given["min_stability"] and (given["fdr"] is None or one.q <= given["fdr"])
        ]
        if len(kept) < given["top"]:
            click.echo(
                f"{len(kept)} of the top {given['top']} experts are left: the others are not on this side, not stable over "
                "resamples (--min-stability), or too likely by chance (--fdr)",
                err=True,
            )
        chosen = [(one.layer, one.expert) for one in kept]
    if given["plot"] is not None:
        expert_map(table, given["plot"], chosen)
    return chosen


def _print_ranking(statistics: Any, aligned: Any, result: dict[str, Any], as_json: bool, given: dict[str, Any]) -> None:
    from steer2edit.experts.ranking import expert_table, ranking
    from steer2edit.report.experts import describe_ranking, expert_map, render_ranking

    table = _table(statistics, aligned, given, expert_table)
    ranked = ranking(table, given["top"], given["side"])
    if given["plot"] is not None:
        expert_map(table, given["plot"], [(one.layer, one.expert) for one in ranked])
    print_result({**result, **describe_ranking(table, ranked)}, as_json, lambda _: render_ranking(table, ranked))


def _table(statistics: Any, aligned: Any, given: dict[str, Any], make: Any) -> Any:
    from steer2edit.capture.statistics import Statistics

    control = Statistics.load(given["control"]) if given["control"] is not None else None
    return make(statistics, scope=given["scope"], by=given["by"], control=control, alignment=aligned)


def _pairs(text: str, flag: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6}):(\d{1,6})\s*", part, re.ASCII)
        if match is None:
            raise click.BadParameter(f"{part!r} is no layer:expert such as 48:176", param_hint=flag)
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


def _read(path: Path | None) -> str | None:
    return read_neutral({"neutral": path})
