"""The commands that measure: eval, tune, report and chat."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steer2edit.cli.options import (
    PATH,
    capture_given,
    data_options,
    find_plan,
    json_option,
    model_options,
    numbers,
    open_model,
    options,
    print_result,
    progress_bar,
    read_held_out,
    read_neutral,
    read_runtime,
)

if TYPE_CHECKING:
    from steer2edit.evaluation.suite import Suite

suite_options = options(
    click.option("--eval", "questions", help="Held-out questions; those of --behavior come with the package."),
    click.option(
        "--utility", "useful", help="Questions that must not suffer, instead of the packaged ones; 'none' for none."
    ),
    click.option("--neutral", type=PATH, help="Your own neutral text, instead of the packaged one."),
    click.option(
        "--pattern", "patterns", multiple=True, help="Count answers in which this regular expression is found."
    ),
    click.option("--function", help="Score answers by your own function, file.py:name, of (prompt, answer)."),
    click.option("--max-new-tokens", type=click.IntRange(1), default=160, show_default=True, help="Of an answer."),
    click.option(
        "--limit",
        type=click.IntRange(1),
        help="At most so many questions of each kind, and windows of 128 tokens of neutral text (but at least 4).",
    ),
    click.option("--split-seed", type=int, default=0, show_default=True, help="Deals the questions out to the splits."),
)


@click.command("eval")
@click.argument("model")
@click.argument("candidates", nargs=-1, metavar="[PLAN|ADAPTER|CHECKPOINT]...")
@data_options
@suite_options
@click.option("--stats", type=PATH, help="Statistics of a capture, for the baselines.")
@click.option(
    "--split",
    type=click.Choice(["report", "select"]),
    default="report",
    show_default=True,
    help="Which half of the questions.",
)
@click.option("--baselines", is_flag=True, help="Also edits that have no point, and activation steering.")
@click.option("--strengths", default="", help="Strengths of activation steering, such as 0.25,0.5,1,2.")
@click.option(
    "--match",
    type=click.Choice(["kl", "norm"]),
    default="kl",
    show_default=True,
    help="Bring baselines to the first plan's KL, or to its ‖ΔW‖.",
)
@click.option("--draws", type=click.IntRange(1, 8), default=3, show_default=True, help="Random directions, shuffles.")
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What writes the answers; vllm runs checkpoints and adapters.",
)
@click.option("--lm-eval", "tasks", help="Tasks of lm-eval, by name, separated by commas; --limit bounds them too.")
@click.option("--lm-eval-path", help="A folder with task files of your own.")
@click.option("-o", "--out", type=PATH, help="Keep every value and answer in this JSON file.")
@model_options
@json_option
def evaluate(model: str, candidates: tuple[str, ...], as_json: bool, out: Path | None, **given: Any) -> None:
    """Measure plans, adapters and checkpoints beside MODEL, on held-out questions and neutral text."""
    from steer2edit.evaluation.assess import assess, with_baselines
    from steer2edit.evaluation.evaluate import open_candidate
    from steer2edit.evaluation.work import baselines_work, work_of
    from steer2edit.report.tables import render_evaluation
    from steer2edit.runtime.model import load_model

    checkpoint, spec = open_model(model, given)
    questions = _questions(given)
    if given["baselines"] and not candidates:
        raise click.UsageError("--baselines are held against a plan; name one")
    loaded = load_model(checkpoint, spec, read_runtime(given))
    chosen = [open_candidate(loaded, checkpoint, where, read_runtime(given)) for where in candidates]
    suite = _suite(given, loaded, questions)
    strengths = numbers(given["strengths"], "--strengths")
    if given["engine"] == "vllm":
        suite = _through_vllm(suite, given, candidates)
    if given["baselines"] or strengths:
        scoring = _scoring(given, checkpoint, spec, loaded)
        if given["baselines"]:
            more, passes = baselines_work(given["match"], given["draws"], strengths)
            work = work_of(suite, given["split"], len(chosen) + more, passes)
            click.echo(f"evaluation: {work}", err=True)
            chosen += with_baselines(
                loaded,
                scoring,
                _plan_of(candidates[0]),
                suite,
                strengths=strengths,
                match=given["match"],
                draws=given["draws"],
                progress=progress_bar(),
            )
        else:
            from steer2edit.evaluation.baselines import steering

            chosen += steering(loaded, scoring, strengths)
    context = {"model": checkpoint.name, "fingerprint": checkpoint.fingerprint, "behavior": given["behavior"]}
    found = assess(loaded, suite, chosen, split=given["split"], context=context, progress=progress_bar())
    if given["tasks"]:
        from steer2edit.evaluation.lm_eval import lm_eval

        scores = lm_eval(
            loaded, chosen, given["tasks"].split(","), limit=given["limit"], include_path=given["lm_eval_path"]
        )
        found = replace(found, context={**found.context, "lm_eval": scores})
    if out is not None:
        found.save(out)
    print_result(found.described(), as_json, lambda _: render_evaluation(found))


@click.command()
@click.argument("model")
@data_options
@suite_options
@click.option("-o", "--out", type=PATH, required=True, help="The study's folder; a study that is there goes on.")
@click.option("--stats", type=PATH, help="Statistics of an earlier capture, instead of data.")
@click.option("--method", "methods", multiple=True, default=["steering"], show_default=True, help="May be repeated.")
@click.option("--grid", multiple=True, help="'paper', or option=v1,v2,…: all combinations, instead of a search.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Of a grid's plans.")
@click.option("--trials", type=click.IntRange(1), default=40, show_default=True, help="How many plans are tried.")
@click.option("--patience", type=click.IntRange(1), help="Stop when so many trials left the front as it was.")
@click.option("--kl-range", default="0.003,0.3", show_default=True, help="KL that plans aim at, least and most.")
@click.option("--max-kl", type=float, default=1.0, show_default=True, help="Plans above it are not evaluated further.")
@click.option("--allow-degenerate", is_flag=True, help="Let repetitive and empty answers onto the front.")
@click.option("--attribute", help="The metric to improve; the first one of the behaviour's unless given.")
@click.option("--metric", "utility", default="KL", show_default=True, help="The metric to keep.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the search.")
@click.option("--storage", help="Any storage URL of Optuna, shared by many machines, instead of the folder's journal.")
@click.option("--study", default="steer2edit", show_default=True, help="The study's name in the storage.")
@click.option("--no-report", is_flag=True, help="Search only; measure nothing on the reporting split.")
@click.option(
    "--to", multiple=True, help="Emit the knee: checkpoint or lora, into the study's folder; may be repeated."
)
@model_options
@json_option
def tune(model: str, out: Path, as_json: bool, **given: Any) -> None:
    """Search for the edit with the best trade-off; keep the front, name its knee, and report it on other questions."""
    from steer2edit.report.tables import render_study
    from steer2edit.runtime.model import load_model
    from steer2edit.search.study import run_study, study_work
    from steer2edit.search.tune import Search, read_grid

    checkpoint, spec = open_model(model, given)
    kl_range = numbers(given["kl_range"], "--kl-range")
    if len(kl_range) != 2 or not 0 < kl_range[0] < kl_range[1]:
        raise click.BadParameter(
            "expected two numbers, the least and the most, such as 0.003,0.3", param_hint="--kl-range"
        )
    grid = read_grid(given["grid"])
    search = Search(
        methods=("component",)
        if grid and given["methods"] == ("steering",) and "rho_attn" in grid
        else given["methods"],
        trials=given["trials"],
        patience=given["patience"],
        seed=given["seed"],
        kl_range=(kl_range[0], kl_range[1]),
        max_kl=given["max_kl"],
        grid=grid,
        strength=given["strength"],
        attribute=given["attribute"],
        utility=given["utility"],
        allow_degenerate=given["allow_degenerate"],
    )
    questions = _questions(given)
    loaded = load_model(checkpoint, spec, read_runtime(given))
    suite = _suite(given, loaded, questions)
    kept = out / "statistics.safetensors"
    scoring = _scoring({**given, "stats": kept if kept.is_file() else given["stats"]}, checkpoint, spec, loaded)
    click.echo(study_work(search, suite, not given["no_report"]), err=True)
    done = run_study(
        loaded,
        scoring,
        suite,
        search,
        out,
        storage=given["storage"],
        name=given["study"],
        report=not given["no_report"],
        to=given["to"],
        progress=progress_bar(),
    )
    print_result(done.described(), as_json, lambda _: render_study(done))


@click.command()
@click.argument("source", metavar="STUDY|PLAN|DIR", type=PATH)
@click.option("-o", "--out", type=PATH, required=True, help="The page, *.html.")
@click.option("--evaluation", type=PATH, help="What 'eval -o' wrote of this plan.")
@click.option("--png", "pngs", is_flag=True, help="Each figure as a PNG too, beside the page.")
def report(source: Path, out: Path, evaluation: Path | None, pngs: bool) -> None:
    """One page that shows what an edit does: trade-off, changes, answers, how to load and to reproduce it."""
    from steer2edit.report.load import read_report
    from steer2edit.report.page import write_report

    write_report(read_report(source, evaluation), out, pngs=pngs)
    click.echo(str(out))


@click.command()
@click.argument("model", metavar="BASE")
@click.argument("edited", metavar="EDITED")
@click.option("--system", help="A system message put before the chat.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=200, show_default=True, help="Of an answer.")
@model_options
def chat(model: str, edited: str, system: str | None, max_new_tokens: int, **given: Any) -> None:
    """Ask BASE and EDITED (a plan, adapter or checkpoint) the same, and see both answers side by side.

    Reads questions from the terminal, or one a line from a pipe. /reset begins anew, /quit ends.
    """
    from rich.console import Console

    from steer2edit.evaluation.chat import Chat, side_by_side
    from steer2edit.evaluation.evaluate import open_candidate
    from steer2edit.runtime.model import load_model

    checkpoint, spec = open_model(model, given)
    loaded = load_model(checkpoint, spec, read_runtime(given))
    candidate = open_candidate(loaded, checkpoint, edited, read_runtime(given))
    conversation = Chat(loaded, candidate, max_new_tokens, system)
    console = Console(highlight=False)
    asking = sys.stdin.isatty()
    while True:
        try:
            question = input("> ") if asking else next(sys.stdin, "/quit\n").rstrip("\n")
        except (EOFError, KeyboardInterrupt):
            return
        if question.strip() == "/quit":
            return
        if question.strip() == "/reset":
            conversation.reset()
        elif question.strip():
            if not asking:
                console.print(f"> {question}", markup=False)
            console.print(side_by_side(conversation.ask(question), (checkpoint.name, candidate.name)))


def _through_vllm(suite: Suite, given: dict[str, Any], candidates: tuple[str, ...]) -> Suite:
    from steer2edit.evaluation.vllm_engine import VllmEngine

    if given["baselines"] or given["strengths"] or any(Path(where).is_file() for where in candidates):
        raise click.UsageError(
            "vLLM runs checkpoints and adapters: emit plans first (steer2edit emit PLAN MODEL --to lora), and leave "
            "baselines to --engine transformers"
        )
    return replace(suite, run=VllmEngine(given["dtype"]))


def _questions(given: dict[str, Any]) -> Any:
    found = read_held_out(given)
    if found is None:
        raise click.UsageError("give --eval FILE with held-out questions (or --behavior NAME, which brings its own)")
    return found


def _suite(given: dict[str, Any], loaded: Any, questions: Any) -> Suite:
    from steer2edit.data.questions import builtin_questions, read_questions
    from steer2edit.evaluation.metrics import check_patterns, load_function
    from steer2edit.evaluation.suite import Suite
    from steer2edit.strength.settle import neutral_text

    check_patterns(given["patterns"])
    useful = given["useful"]
    return Suite(
        questions,
        [] if useful == "none" else read_questions(useful) if useful else builtin_questions("knowledge") or [],
        neutral_text(loaded, read_neutral(given), progress_bar(), limit=given["limit"]),
        patterns=given["patterns"],
        function=load_function(given["function"]) if given["function"] else None,
        max_new_tokens=given["max_new_tokens"],
        system=given["system"],
        limit=given["limit"],
        seed=given["split_seed"],
    )


def _scoring(given: dict[str, Any], checkpoint: Any, spec: Any, loaded: Any) -> Any:
    from steer2edit.capture.statistics import Statistics
    from steer2edit.scoring.scores import Scoring

    stats = given["stats"]
    return Scoring(
        checkpoint, spec, Statistics.load(stats) if stats else capture_given(given, checkpoint, spec, loaded)
    )


def _plan_of(where: str) -> Any:
    from steer2edit.errors import PlanError
    from steer2edit.plan import EditPlan

    path = find_plan(where)
    if not path.is_file():
        raise PlanError(f"{where} holds no plan; --baselines are held against a plan or an artefact of steer2edit")
    return EditPlan.load(path)
