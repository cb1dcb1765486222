"""``tune``: the search for the edit with the best trade-off."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import click

from steer2edit import methods
from steer2edit.cli.command import command
from steer2edit.cli.data_options import DataFlags, StatsFlags
from steer2edit.cli.engine_flags import NoServerFlags
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.judge_flags import JudgeFlags
from steer2edit.cli.method import MethodFlags
from steer2edit.cli.options import JsonFlags, ModelFlags, UnquantisedFlags, numbers, progress_bar
from steer2edit.cli.output import print_result
from steer2edit.cli.suite import SuiteFlags, scoring_of
from steer2edit.options import option


@dataclass(frozen=True)
class SearchFlags(FlagGroup):
    """What is searched, and for how long."""

    heading: ClassVar[str] = "Search"

    methods: tuple[str, ...] = option(
        (methods.METHOD,), "Method to try, one of the methods below. Repeatable.", "--method", metavar="METHOD"
    )
    trials: int = option(40, "Number of plans to try.", minimum=1)
    patience: int | None = option(None, "Stop after this many trials that left the front unchanged.", minimum=1)
    kl_range: str = option("0.003,0.3", "Least and largest KL that plans aim at.", metavar="LOW,HIGH")
    max_kl: float = option(1.0, "Evaluate no plan whose KL is above this.")
    attribute: str | None = option(
        None, "Metric to improve.", metavar="METRIC", shown_default="the behaviour's own metric, else its first"
    )
    utility: str = option("KL", "Metric to keep.", "--metric", metavar="METRIC")
    grid: tuple[str, ...] = option(
        (), "Try all combinations in place of a search: 'paper', or OPTION=V1,V2,…. Repeatable.", metavar="GRID"
    )
    strength: float = option(1.0, "Strength of a grid's plans.")
    allow_broken: bool = option(
        False, "Let plans onto the front that break a metric: answers right, repetition, loops, ….", rare=True
    )
    seed: int = option(0, "Seed of the search.", rare=True)
    storage: str | None = option(
        None,
        "Optuna storage URL that many machines can share, in place of the folder's journal.",
        metavar="URL",
        rare=True,
    )
    study: str = option("steer2edit", "Name of the study in the storage.", rare=True)

    @classmethod
    def listed(cls) -> dict[str, list[tuple[str, str]]]:
        """The methods, each with the first line of its docstring."""
        return MethodFlags.listed()


@dataclass(frozen=True)
class StudyOut(FlagGroup):
    """Where the study goes, and what is made of it."""

    heading: ClassVar[str] = "Output"

    out: Path = option(..., "Folder of the study; a study that is there is continued.", "-o", "--out")
    no_report: bool = option(False, "Search only; measure nothing on the reporting split.")
    to: tuple[str, ...] = option(
        (), "Write the knee in this format too, checkpoint or lora. Repeatable.", metavar="TARGET"
    )


@command(
    data=DataFlags,
    stats=StatsFlags,
    asked=SuiteFlags,
    judged=JudgeFlags,
    elsewhere=NoServerFlags,
    searched=SearchFlags,
    model_flags=ModelFlags,
    unquantised=UnquantisedFlags,
    output=StudyOut,
    printed=JsonFlags,
)
@click.argument("model")
def tune(
    model: str,
    data: DataFlags,
    stats: StatsFlags,
    asked: SuiteFlags,
    judged: JudgeFlags,
    elsewhere: NoServerFlags,
    searched: SearchFlags,
    model_flags: ModelFlags,
    unquantised: UnquantisedFlags,
    output: StudyOut,
    printed: JsonFlags,
) -> None:
    """Search for the edit with the best trade-off; keep the front, name its knee, and report it on other questions."""
    from steer2edit.architecture.unquantised import planned_from
    from steer2edit.dry_run import check_targets
    from steer2edit.evaluation.answers import in_this_process
    from steer2edit.report.tables import render_study
    from steer2edit.search.grid import read_grid
    from steer2edit.search.study import run_study, study_work
    from steer2edit.search.tune import Search

    elsewhere.check()
    judged.check()
    low, high = _kl_range(searched.kl_range)
    grid = read_grid(searched.grid)
    only_default = searched.methods == (methods.METHOD,)
    search = Search(
        methods=("component",) if grid and only_default and "rho_attn" in grid else searched.methods,
        trials=searched.trials,
        patience=searched.patience,
        seed=searched.seed,
        kl_range=(low, high),
        max_kl=searched.max_kl,
        grid=grid,
        strength=searched.strength,
        attribute=searched.attribute,
        utility=searched.utility,
        allow_broken=searched.allow_broken,
    )
    for name in search.methods:
        methods.load(name)
    checkpoint, spec = model_flags.open(model)
    questions = asked.read_questions(data)
    kept = output.out / "statistics.safetensors"
    stored = kept if kept.is_file() else stats.stats
    if stored is None and not data.any:
        raise click.UsageError("give --data, --behavior or --stats: exactly one of them")
    judge = judged.choice(data)
    judged.check_reachable()
    check_targets(checkpoint, spec, search.methods, output.to)
    planned = planned_from(checkpoint, spec, unquantised.unquantised)
    loaded = model_flags.load(checkpoint, spec)
    scoring = replace(scoring_of(stored, data, checkpoint, spec, model_flags, loaded), checkpoint=planned)
    suite = asked.suite(loaded, questions, data, scoring.statistics)
    suite = judged.suite(suite, judge, data, in_this_process(loaded), model_flags)
    click.echo(study_work(search, suite, not output.no_report), err=True)
    study = run_study(
        loaded,
        checkpoint,
        scoring,
        suite,
        search,
        output.out,
        storage=searched.storage,
        name=searched.study,
        report=not output.no_report,
        to=output.to,
        progress=progress_bar(),
    )
    print_result(study.described(), printed.as_json, lambda _: render_study(study))


def _kl_range(text: str) -> tuple[float, float]:
    values = numbers(text, "--kl-range")
    if len(values) != 2 or not 0 < values[0] < values[1]:
        raise click.BadParameter(
            "expected two numbers, the least and the largest, such as 0.003,0.3", param_hint="--kl-range"
        )
    return values[0], values[1]
