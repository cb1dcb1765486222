"""The groups of flags of ``eval``: what candidates are compared with, what writes the answers, and where it all goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import click

from steer2edit.cli.engine_flags import EngineNameFlags
from steer2edit.cli.flags import FlagGroup
from steer2edit.options import option

DRAWS = 3
"""Random directions, and shuffled labels, unless the user says otherwise."""


@dataclass(frozen=True)
class BaselineFlags(FlagGroup):
    """What candidates are compared with."""

    heading: ClassVar[str] = "Baselines"

    baselines: bool = option(
        False, "Evaluate the baselines too: control edits of the same size, and activation steering."
    )
    told: str | None = option(
        None,
        "Compare with the base under this instruction; 'none' for no such row.",
        metavar="TEXT",
        shown_default="that of the behaviour",
    )
    against: tuple[Path, ...] = option(
        (),
        "Folder of a LoRA adapter to compare with, scaled to the first candidate's KL. Repeatable.",
        metavar="ADAPTER",
    )
    strengths: str = option("", "Strengths of activation steering to evaluate, such as 0.25,0.5,1,2.", metavar="LIST")
    match: Literal["kl", "norm"] = option("kl", "Bring the baselines to the first plan's KL, or to its Frobenius norm.")
    draws: int = option(DRAWS, "Number of random directions, and of shuffled labels.", minimum=1, maximum=8)

    def check(self) -> None:
        """Raise UsageError where a flag has nothing to do."""
        if not self.baselines and (self.match != "kl" or self.draws != DRAWS):
            raise click.UsageError("--match and --draws are for --baselines; give it too")


@dataclass(frozen=True)
class HowFlags(EngineNameFlags):
    """How answers are written, and further benchmarks."""

    heading: ClassVar[str] = "Evaluation"
    first: ClassVar[tuple[str, ...]] = ("split", "tasks", "engine", "server", "server_model", "served")

    split: Literal["report", "select"] = option(
        "report", "Half of the questions to use; tune selects on the other half."
    )
    tasks: str | None = option(
        None, "Tasks of lm-eval, by name, separated by commas; --limit bounds them too.", "--lm-eval", metavar="LIST"
    )
    lm_eval_path: str | None = option(None, "Folder with lm-eval task files of your own.", metavar="PATH", rare=True)
    served: tuple[str, ...] = option(
        (),
        "Model to compare with --server's: its name there, or the URL of another server, with #NAME where that serves several. "
        "Repeatable.",
        metavar="[LABEL=]NAME|URL",
    )

    def check(self) -> None:
        """Raise UsageError where a flag has nothing to do, or two contradict each other."""
        super().check()
        if self.lm_eval_path is not None and self.tasks is None:
            raise click.UsageError("--lm-eval-path holds files of tasks; name the tasks with --lm-eval")
        if self.served and not self.server:
            raise click.UsageError("--served is compared with a base that a server serves; give --server URL too")


@dataclass(frozen=True)
class EvaluationOut(FlagGroup):
    """Where the evaluation goes."""

    heading: ClassVar[str] = "Output"

    out: Path | None = option(None, "JSON file to save every value and answer in.", "-o", "--out")
