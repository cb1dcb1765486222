"""The groups of flags of a judge.

Heavy imports happen inside the functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from steer2edit.cli.engine_flags import AskingFlags, check_model_name
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import progress_bar
from steer2edit.options import option

if TYPE_CHECKING:
    from collections.abc import Callable

    from steer2edit.cli.data_options import DataFlags
    from steer2edit.cli.options import ModelFlags
    from steer2edit.engines.engine import Engine
    from steer2edit.engines.opening import JudgeChoice
    from steer2edit.evaluation.written_suite import WrittenSuite


Questions = TypeVar("Questions", bound="WrittenSuite")


@dataclass(frozen=True)
class JudgeNameFlags(FlagGroup):
    """Who judges."""

    heading: ClassVar[str] = "Judge"

    judge: str | None = option(
        None,
        "Judge of the written answers by its probabilities of yes and no, after a trial on labelled answers: self for MODEL "
        "without an edit, a folder or Hub id, or a server's URL.",
        metavar="self|MODEL|URL",
        shown_default="no judge",
    )
    judge_model: str | None = option(
        None,
        "Name of the judge on its server.",
        metavar="NAME",
        shown_default="the only one that the server lists",
        rare=True,
    )

    def check_judge_model(self) -> None:
        """Raise UsageError where the name of a model is given, and no server."""
        check_model_name("--judge-model", self.judge_model, "--judge", self.judge)


@dataclass(frozen=True)
class JudgeFlags(JudgeNameFlags, AskingFlags):
    """A judge of written answers, what it looks for, and how servers are asked."""

    heading: ClassVar[str] = "Judge"
    first: ClassVar[tuple[str, ...]] = ("judge", "rubric", "judge_model")

    rubric: str | None = option(
        None,
        "Words that say what the judge looks for in an answer.",
        metavar="TEXT",
        shown_default="those of the behaviour",
    )

    def check(self, **others: str | None) -> None:
        """Raise UsageError where a flag has nothing to do; ``others`` are further flags' values that may be URLs, by name."""
        if self.judge is None and (self.rubric is not None or self.judge_model is not None):
            raise click.UsageError("--rubric and --judge-model are for a judge; give --judge too")
        self.check_judge_model()
        self.check_asked({"--judge": self.judge, **{f"--{n.replace('_', '-')}": where for n, where in others.items()}})

    def check_reachable(self) -> None:
        """Raise an error where the judge cannot be opened: before the work whose answers it is to judge."""
        from steer2edit.engines.opening import SELF, check_named

        if self.judge not in (None, SELF):
            assert self.judge is not None  # for the type checker
            check_named(self.judge, model=self.judge_model, flag="--judge-model", judging=True, **self.asked())

    def choice(self, data: DataFlags) -> JudgeChoice | None:
        """Who judges what; None without --judge. Raises UsageError where it is not known what to look for."""
        from steer2edit.engines.opening import JudgeChoice

        if self.judge is None:
            return None
        traits = [trait for source in data.sources() if (trait := _trait_of(source))]
        if self.rubric is None and len(traits) != 1:
            raise click.UsageError(
                "--judge needs to know what to look for in an answer; say it with --rubric, such as "
                "--rubric 'The answer is short and has no introduction.'"
            )
        return JudgeChoice(self.judge, self.rubric or traits[0], self.judge_model, **self.asked())

    def suite(
        self,
        suite: Questions,
        choice: JudgeChoice | None,
        data: DataFlags,
        own: Engine,
        model: ModelFlags,
        kept: Callable[[Engine], Engine] = lambda engine: engine,
    ) -> Questions:
        """The suite with its judge, tried on the contrast data where there are any.

        The judge "self" is the model's ``own`` engine; ``kept`` makes of another one that which is asked.
        """
        from steer2edit.evaluation.judged import TraitJudge

        if choice is None:
            return suite
        examples = data.read_behavior().examples if data.any else ()
        judge = choice.open(own, model.runtime(), examples, progress_bar(), kept)
        return replace(suite, judge=TraitJudge(judge, choice.trait))


def _trait_of(source: object) -> str:
    """The words of a behaviour or a folder of data for a judge: its rubric, else its description.

    The description of sorted answers says how they were sorted, which is not a trait."""
    found = getattr(source, "receipt", {})
    receipt: dict[str, Any] = found if isinstance(found, dict) else {}
    described = receipt.get("behavior") or {}
    if (receipt.get("made") or {}).get("way") == "sorted":
        return str(described.get("rubric") or "")
    return str(
        getattr(source, "rubric", None)
        or getattr(source, "description", None)
        or described.get("rubric")
        or described.get("description")
        or ""
    )
