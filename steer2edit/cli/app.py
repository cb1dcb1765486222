"""The command line: thin shells over the library. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import click

from steer2edit import __version__
from steer2edit.cli.capture import capture
from steer2edit.cli.compose import WeightsCommand, compose_given, compose_options, scale
from steer2edit.cli.diff import diff, revert
from steer2edit.cli.dry_run import dry_run_compile, dry_run_emit
from steer2edit.cli.experts import experts
from steer2edit.cli.import_ import import_
from steer2edit.cli.measure import chat, evaluate, report, tune
from steer2edit.cli.options import (
    PATH,
    data_options,
    find_plan,
    force_option,
    json_option,
    method_options,
    model_options,
    only_statistics,
    open_model,
    print_result,
    progress_bar,
    quieten_transformers,
    read_background,
    read_behavior,
    read_budgets,
    read_held_out,
    read_method_options,
    read_neutral,
    read_runtime,
    read_vectors,
    read_writing,
    strength_options,
    vectors_option,
    writing_options,
)
from steer2edit.cli.push import push
from steer2edit.errors import Steer2EditError, printable
from steer2edit.notices import collected
from steer2edit.runtime.launch import process_of


class _Group(click.Group):
    """Turns every error of the library into one message and exit code 2, also where several processes meet it."""

    def invoke(self, ctx: click.Context) -> Any:
        process = process_of(os.environ)
        first = process is None or process.rank == 0
        try:
            with collected(lambda text: click.echo(printable(f"note: {text}"), err=True) if first else None):
                return super().invoke(ctx)
        except (Steer2EditError, click.ClickException) as error:
            if process is not None and process.rank > 0:
                # process 0 says it; torchrun ends all of them as soon as one has failed
                time.sleep(1)
            elif isinstance(error, click.ClickException):
                raise
            else:
                click.echo(printable(f"Error: {error}"), err=True)
            sys.exit(2)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        process = process_of(os.environ)
        if process is not None and name != "capture":
            raise click.UsageError(
                f"{name} runs in one process, and this is one of {process.size}: capture over all of them "
                f"(torchrun … -m steer2edit capture), then start {name} by itself with --stats"
            )
        return name, command, rest


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="steer2edit")
def main() -> None:
    """Compile a steering vector into a model's weights.

    MODEL is a checkpoint folder (config.json and *.safetensors) or a Hub id. Progress goes to stderr, results to stdout.
    Exit codes: 0 done, 1 a check failed, 2 bad usage or input.
    """
    # a polite end, as batch systems ask for one, leaves nothing unfinished behind: what is open is closed and removed
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


@main.command()
@click.option(
    "--behavior",
    "behaviors",
    multiple=True,
    help="reasoning, truthfulness or caution; all three if left out.",
)
@click.option(
    "--out",
    type=PATH,
    default=Path("steer2edit-demo"),
    show_default=True,
    help="Where everything is written.",
)
@click.option("--experts", is_flag=True, help="The embedded mixture: its experts found, and switched off.")
@json_option
@force_option
def demo(behaviors: tuple[str, ...], out: Path, experts: bool, as_json: bool, force: bool) -> None:
    """The whole pipeline on the embedded tiny model, in seconds."""
    quieten_transformers()
    if experts:
        from steer2edit.demo.experts import render, run
    else:
        from steer2edit.demo.run import render, run
    result = run(out, behaviors=behaviors, force=force, progress=progress_bar())
    print_result(result, as_json, render)
    if not result["ok"]:
        sys.exit(1)


@main.command(cls=WeightsCommand)
@click.argument("model")
@data_options
@compose_options
@click.option("--out", type=PATH, required=True, help="Folder of the artefact.")
@click.option(
    "--to",
    multiple=True,
    default=["checkpoint"],
    show_default=True,
    help="checkpoint, lora, gguf or gguf-vector; may be repeated.",
)
@click.option("--stats", type=PATH, help="Statistics of an earlier capture, instead of data.")
@vectors_option
@click.option(
    "--eval",
    "questions",
    multiple=True,
    help="Held-out questions for the report; those of --behavior come with the package. With --plan one file for each.",
)
@click.option("--no-report", is_flag=True, help="Measure nothing but the KL, and make no report page.")
@method_options
@strength_options
@model_options
@writing_options
@json_option
@force_option
def compile(
    model: str, out: Path, to: tuple[str, ...], stats: Path | None, as_json: bool, force: bool, **given: Any
) -> None:
    """Compile a behaviour into MODEL's weights: capture, plan, settle the strength, emit, and report what it does.

    With --plan, finished plans are composed into one artefact instead: their updates add, each times its --weight.
    """
    from steer2edit.artefact.request import CompileRequest
    from steer2edit.capture.statistics import Statistics
    from steer2edit.compiler import compile as compile_model
    from steer2edit.files.layout import REPORT
    from steer2edit.report.tables import render_evaluation, render_plan

    if given["plans"] and given["dry_run"]:
        raise click.UsageError("--dry-run does not go with --plan; emit --dry-run does it for one finished plan")
    if given["plans"]:
        compose_given(model, out, to, force, as_json, {**given, "stats": stats})
        return
    if given["weights"]:
        raise click.UsageError("--weight belongs to --plan")
    if len(given["questions"]) > 1:
        raise click.UsageError("several --eval belong to several --plan; give one")
    given["questions"] = next(iter(given["questions"]), None)
    vectors = read_vectors(given)
    statistics = Statistics.load(stats) if stats and only_statistics(given) else None
    request = CompileRequest(
        model,
        out,
        behavior=read_behavior(given, vectors) if statistics is None else None,
        statistics=statistics,
        vectors=vectors,
        to=to,
        revision=given["revision"],
        method=given["method"],
        options=read_method_options(given),
        **read_budgets(given),
        neutral=read_neutral(given),
        background=read_background(given),
        runtime=read_runtime(given),
        batch_tokens=given["batch_tokens"],
        questions=None if given["no_report"] or given["dry_run"] else read_held_out(given),
        force=force,
        writing=read_writing(given),
    )
    if given["dry_run"]:
        dry_run_compile(request, as_json)
        return
    compiled = compile_model(request, progress_bar())
    result = {
        "artefacts": {target: str(folder) for target, folder in compiled.artefacts.items()},
        "exactness": {target: lowering.exactness for target, lowering in compiled.lowerings.items()},
        "changed": len(compiled.plan.edits),
        "method": dict(compiled.plan.method),
        "measured": compiled.plan.measured.to_json(),
        "evaluation": compiled.evaluation and compiled.evaluation.described(),
    }

    def render(result: dict[str, Any]) -> str:
        lines = [render_plan(compiled.plan, top=5), ""]
        lines += [
            f"{target}: {folder} ({result['exactness'][target]})" for target, folder in result["artefacts"].items()
        ]
        if compiled.evaluation is not None:
            lines[1:1] = ["", render_evaluation(compiled.evaluation)]
            pages = [folder / REPORT for folder in compiled.artefacts.values() if (folder / REPORT).is_file()]
            lines += [f"report: {page}" for page in pages]
        return "\n".join(lines)

    print_result(result, as_json, render)


@main.command()
@click.argument("model")
@click.option("--stats", type=PATH, required=True, help="Statistics made by capture.")
@vectors_option
@click.option("-o", "--out", type=PATH, required=True, help="The plan file, *.plan.safetensors.")
@method_options
@strength_options
@model_options
@json_option
def plan(model: str, stats: Path, out: Path, as_json: bool, **given: Any) -> None:
    """Score every component and lay down the edits. Runs no model unless --kl-budget is given."""
    from steer2edit.capture.statistics import Statistics
    from steer2edit.capture.vectors import substituted
    from steer2edit.methods import make_plan
    from steer2edit.report.tables import describe_plan, render_plan
    from steer2edit.runtime.model import load_model
    from steer2edit.scoring.scores import Scoring
    from steer2edit.strength.settle import neutral_text, settle_strength

    checkpoint, spec = open_model(model, given)
    statistics, vectors = Statistics.load(stats), read_vectors(given)
    if vectors is not None:
        statistics = substituted(vectors, statistics, checkpoint, spec)
    made = make_plan(
        Scoring(checkpoint, spec, statistics),
        method=given["method"],
        options=read_method_options(given),
        progress=progress_bar(),
    )
    if any(given[name] is not None for name in ("kl_budget", "kl_budget_attn", "kl_budget_mlp")):
        loaded = load_model(checkpoint, spec, read_runtime(given))
        neutral = neutral_text(loaded, read_neutral(given), progress_bar())
        made = settle_strength(loaded, made, **read_budgets(given), neutral=neutral)
    elif given["strength"] is not None:
        made = made.at_strength(given["strength"])
    made.save(out)
    print_result(
        {"plan": str(out), **describe_plan(made)},
        as_json,
        lambda r: f"{render_plan(made, top=5)}\n\n{r['plan']}",
    )


@main.command()
@click.argument("plan_file", metavar="PLAN")
@click.option("--top", type=click.IntRange(0), default=10, show_default=True, help="Heads and neurons to list.")
@click.option("--plot", type=PATH, help="Draw the heat-map into this PNG, SVG or PDF.")
@json_option
def show(plan_file: str, top: int, plot: Path | None, as_json: bool) -> None:
    """What a plan, or the plan in an artefact's folder, here or on the Hub, changes."""
    from steer2edit.plan import EditPlan
    from steer2edit.report.figures import heatmap
    from steer2edit.report.tables import describe_plan, render_plan

    loaded = EditPlan.load(find_plan(plan_file))
    if plot is not None:
        heatmap(loaded, plot)
    print_result(describe_plan(loaded, top), as_json, lambda _: render_plan(loaded, top))


@main.command()
@click.argument("plan_file", metavar="PLAN")
@click.argument("model")
@click.option("--to", required=True, help="checkpoint, lora, gguf or gguf-vector.")
@click.option("-o", "--out", type=PATH, required=True, help="Folder of the artefact.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@writing_options
@json_option
@force_option
def emit(
    plan_file: str, model: str, to: str, out: Path, revision: str | None, as_json: bool, force: bool, **given: Any
) -> None:
    """Lower a plan, from here or from the Hub, into a checkpoint, an adapter or a control vector. Runs no model."""
    from steer2edit.artefact.emit import emit as emit_plan
    from steer2edit.plan import EditPlan

    checkpoint, spec = open_model(model, {"revision": revision})
    edits = EditPlan.load(find_plan(plan_file))
    if given["dry_run"]:
        dry_run_emit(edits, checkpoint, spec, to, out, force, read_writing(given), as_json)
        return
    lowering = emit_plan(
        edits,
        checkpoint,
        spec,
        to,
        out,
        force=force,
        writing=read_writing(given),
        progress=progress_bar(),
    )
    result = {
        "artefact": str(out),
        "exactness": lowering.exactness,
        "changed": len(lowering.changes),
        "notes": lowering.notes,
    }
    print_result(result, as_json, lambda r: f"{r['artefact']}: {r['changed']} tensors changed, {r['exactness']}")


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--base", help="The base's folder or Hub id, if it is not where the receipt says.")
@click.option(
    "--level",
    type=click.Choice(["bytes", "numbers"]),
    default="numbers",
    show_default=True,
    help="How far to go.",
)
@model_options
@json_option
def verify(folder: str, base: str | None, level: str, as_json: bool, **given: Any) -> None:
    """Check an artefact, here or on the Hub, against its base and plan: bytes, then logits. Exit code 1 if a check fails."""
    from dataclasses import asdict

    from steer2edit.artefact.verify import verify as verify_artefact
    from steer2edit.files.hub import fetch
    from steer2edit.report.tables import render_verification

    runtime = read_runtime({**given, "dtype": "float32" if given["dtype"] == "auto" else given["dtype"]})
    result = verify_artefact(fetch(folder), base, numbers=level == "numbers", runtime=runtime, progress=progress_bar())
    print_result({"ok": result.ok, **asdict(result)}, as_json, lambda _: render_verification(result))
    if not result.ok:
        sys.exit(1)


for command in (
    capture,
    chat,
    diff,
    evaluate,
    experts,
    import_,
    push,
    report,
    revert,
    scale,
    tune,
):
    main.add_command(command)
