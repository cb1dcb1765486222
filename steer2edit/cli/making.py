"""What ``data`` is asked to make: its groups of flags, checked together, become a request and engines.

Heavy imports happen inside the functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import click

from steer2edit.cli.data_options import TemplateArgumentFlags
from steer2edit.cli.engine_flags import EngineFlags
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.options import ModelFlags, progress_bar
from steer2edit.options import option

if TYPE_CHECKING:
    from steer2edit.data.behavior_file import BehaviorFile
    from steer2edit.data.metric_choice import MetricChoice
    from steer2edit.data.questions import Question
    from steer2edit.pairs.from_trait import FromTrait
    from steer2edit.pairs.make import DataRequest, Engines, Made
    from steer2edit.pairs.ways import Way

SAMPLES = 8
"""Answers to each prompt that are sorted, unless the user says otherwise."""
WRITTEN_QUESTIONS = 40
"""Prompts that a stronger writer writes for a trait, unless the user says otherwise."""


@dataclass(frozen=True)
class WayFlags(FlagGroup):
    """What the behaviour is: a sentence, instructions, a behaviour's file, or what sorts answers."""

    heading: ClassVar[str] = "Behaviour"

    trait: str | None = option(
        None,
        'Trait to show, in a sentence: "blunt: says what is wrong first, no flattery". A model writes the opposite.',
        metavar="NAME: TEXT",
    )
    behavior: str | None = option(
        None, "Behaviour whose instructions to use: the name of a built-in one, or a TOML file.", metavar="NAME|FILE"
    )
    positive: tuple[str, ...] = option(
        (), "Instruction under which a model shows the behaviour. Repeatable: prompts take turns."
    )
    negative: tuple[str, ...] = option((), "Instruction for the opposite. Repeatable.")
    by: Literal["length", "pattern", "function", "judge", "answer"] | None = option(
        None,
        "Sort a model's own answers to each prompt by this, and take the ends; judge asks for --trait and --judge.",
    )
    goal: Literal["more", "less"] | None = option(
        None, "End of the sorted answers that is positive.", shown_default="less for length, else more"
    )
    tails: float = option(0.1, "Share of the sorted answers that is one end.", minimum=0.001, maximum=0.5)
    pattern: str | None = option(None, "Regular expression to look for, with --by pattern.", metavar="REGEX")
    function: str | None = option(
        None, "Score of your own for --by function: file.py:name, called with prompt and answer.", metavar="FILE:NAME"
    )
    only_correct: bool = option(False, "Sort the answers alone that say what their row's answer is.")
    positive_only: bool = option(
        False,
        "Set answers of the positive side against answers to the background prompts. Weaker than pairs. Without an "
        "instruction each row of --prompts brings its response.",
    )


@dataclass(frozen=True)
class PromptFlags(FlagGroup):
    """What is asked."""

    heading: ClassVar[str] = "Prompts"

    prompts: str | None = option(
        None,
        "Prompts: a file or a dataset on the Hub whose rows have a prompt, and may have an answer.",
        metavar="DATA",
        shown_default="those of the behaviour's file, or 200 everyday prompts",
    )
    max_prompts: int | None = option(
        None, "Use at most N prompts; which ones does not depend on their order.", minimum=3
    )
    written_questions: int | None = option(
        None,
        "Number of prompts that a model writes for --trait; others fill up.",
        "--questions",
        minimum=0,
        shown_default=f"{WRITTEN_QUESTIONS} with --writer, else 0",
    )


@dataclass(frozen=True)
class AnswerFlags(TemplateArgumentFlags):
    """How answers are written, and which are left out."""

    heading: ClassVar[str] = "Answers"
    first: ClassVar[tuple[str, ...]] = ("samples",)

    samples: int | None = option(
        None,
        "Number of answers to each prompt, or to each prompt and instruction.",
        minimum=1,
        shown_default=f"{SAMPLES} with --by, else 1",
    )
    max_new_tokens: int = option(256, "Longest answer in tokens, a thought included.", minimum=1)
    temperature: float | None = option(
        None, "Temperature of sampling.", minimum=0, shown_default="0, or 0.8 where a prompt gets several answers"
    )
    top_p: float = option(1.0, "Sample from the likeliest tokens of this total probability.", minimum=0.01, maximum=1)
    seed: int = option(0, "Seed of sampling, and of dealing the prompts out.")
    think: Literal["strip", "keep", "only"] = option(
        "strip", "What of a thinking model's answer goes into a row: the answer, the thought too, or the thought alone."
    )
    keep_cut: bool = option(False, "Keep answers that are cut off at --max-new-tokens.")
    keep_refusals: bool = option(False, "Keep answers that refuse to play along, for behaviours that are refusals.")


@dataclass(frozen=True)
class AuthorFlags(FlagGroup):
    """Who writes and judges, where it is not MODEL."""

    heading: ClassVar[str] = "Engine"

    answers_by: str | None = option(
        None,
        "Model that writes the answers in MODEL's place: a folder, a Hub id, or a server's URL.",
        metavar="MODEL|URL",
    )
    writer: str | None = option(
        None, "Model that writes the opposite of a trait, and questions.", metavar="MODEL|URL", shown_default="MODEL"
    )
    judge: str | None = option(
        None,
        "Model that judges answers by its probability of yes, after a trial on labelled answers; 'self' for MODEL.",
        metavar="MODEL|URL",
        shown_default="no judge",
    )


@dataclass(frozen=True)
class Making:
    """All that is asked for on the command line, and what comes of it: a request, engines, data."""

    model: str
    way: WayFlags = field(default_factory=WayFlags)
    prompts: PromptFlags = field(default_factory=PromptFlags)
    answers: AnswerFlags = field(default_factory=AnswerFlags)
    authors: AuthorFlags = field(default_factory=AuthorFlags)
    engine: EngineFlags = field(default_factory=EngineFlags)
    model_flags: ModelFlags = field(default_factory=ModelFlags)

    def run(self, out: Path, force: bool) -> Made:
        """Check the flags, load what is needed, and make the data."""
        from steer2edit.pairs.make import make_data

        self._check()
        # what is wrong with files is said before a model is loaded
        request = self.request(out, force)
        return make_data(request, self.engines(), progress_bar())

    def engines(self) -> Engines:
        """Who writes, judges and reads."""
        from steer2edit.engines.opening import open_engine, open_named
        from steer2edit.pairs.make import Engines

        checkpoint, spec = self.model_flags.open(self.model)
        loaded = self.model_flags.load(checkpoint, spec)
        arguments, think = self.answers.template_arguments, self.answers.think != "strip"

        def named(where: str | None) -> Any:
            return where and open_named(where, self.model_flags.runtime(), **self.engine.asked())

        answers = named(self.authors.answers_by) or self.engine.open(
            loaded, chat_template_kwargs=arguments, think=think
        )
        writer = named(self.authors.writer) or answers
        judge = self.authors.judge
        if judge is None:
            return Engines(answers, writer, loaded)
        from steer2edit.engines.judge import tried

        return Engines(answers, writer, loaded, tried(open_engine(loaded=loaded) if judge == "self" else named(judge)))

    def request(self, out: Path, force: bool) -> DataRequest:
        """What is to be made."""
        from steer2edit.engines.engine import Sampling
        from steer2edit.pairs.filters import Allowed
        from steer2edit.pairs.make import DataRequest

        file = self._file()
        samples = self.answers.samples or (SAMPLES if self.way.by else 1)
        temperature = self.answers.temperature
        temperature = (0.8 if samples > 1 else 0.0) if temperature is None else temperature
        name, description, looked_for = self._named(file)
        questions, texts = self._questions(file)
        return DataRequest(
            out.expanduser(),
            name,
            description,
            questions,
            self._way(file, samples, texts),
            self._metric(file),
            looked_for,
            Sampling(self.answers.max_new_tokens, temperature, self.answers.top_p, self.answers.seed),
            self.answers.think,
            Allowed(self.answers.keep_cut, self.answers.keep_refusals),
            self.answers.template_arguments,
            self.prompts.max_prompts,
            seed=self.answers.seed,
            force=force,
            origin={"behavior": self.way.behavior, "prompts": self.prompts.prompts or "everyday"},
        )

    def _check(self) -> None:
        way = self.way
        told = bool(way.positive or way.negative)
        ways = [("--behavior", way.behavior), ("--by", way.by), ("--positive and --negative", told and not way.trait)]
        chosen = [name for name, given in ways if given]
        if way.by == "judge":
            if way.trait is None or self.authors.judge is None:
                raise click.UsageError(
                    "--by judge needs --trait, which it looks for, and --judge MODEL|URL (or --judge self)"
                )
        elif way.trait:
            chosen.append("--trait")
        if len(chosen) > 1:
            raise click.UsageError(f"{' and '.join(chosen)} each name a way to the data; give one of them")
        if not chosen and not (way.positive_only and self.prompts.prompts):
            raise click.UsageError(
                "give --trait, --behavior, --positive with --negative, or --by: what the data is to hold"
            )
        if way.positive_only and (way.by or way.negative):
            raise click.UsageError(
                "--positive-only goes with --trait, --behavior, --positive or --prompts, not with --by or --negative"
            )
        if told and not way.trait and not way.positive_only and not (way.positive and way.negative):
            raise click.UsageError("--positive and --negative go together: an instruction for each side")
        if len(way.positive) > 1 and len(way.negative) > 1 and len(way.positive) != len(way.negative):
            raise click.UsageError(
                "--positive and --negative are given unequal numbers of times; expected one of each kind"
            )
        needs = {"pattern": way.pattern, "function": way.function}
        for by, value in needs.items():
            if (way.by == by) != (value is not None):
                raise click.UsageError(f"--by {by} and --{by} go together")
        if way.by == "answer" and way.only_correct:
            raise click.UsageError(
                "--by answer compares right answers with wrong ones, and --only-correct leaves no wrong ones"
            )
        if way.by in ("answer",) and self.prompts.prompts is None:
            raise click.UsageError("--by answer needs --prompts with a column answer")

    def _file(self) -> BehaviorFile | None:
        from steer2edit.data.behavior_file import open_behavior

        return None if self.way.behavior is None else open_behavior(self.way.behavior)

    def _named(self, file: BehaviorFile | None) -> tuple[str, str, str | None]:
        """The behaviour's name and description, and what a judge looks for."""
        from steer2edit.pairs.trait import Trait

        way = self.way
        if file is not None:
            return file.name, file.description, file.rubric or file.description
        if way.trait is not None:
            trait = Trait.read(way.trait)
            return trait.name, trait.description, f"{trait.name}: {trait.description}"
        if way.by is not None:
            by = {"pattern": way.pattern, "function": way.function}.get(way.by)
            return f"by {way.by}", f"the model's own answers, sorted by {way.by}" + (f" {by}" if by else ""), None
        return "instructed", way.positive[0] if way.positive else "own texts", None

    def _questions(self, file: BehaviorFile | None) -> tuple[list[Question], tuple[str, ...]]:
        """What is asked, and the responses of the rows where these are the positive side."""
        from steer2edit.data.everyday import everyday_prompts
        from steer2edit.data.neutral import NeutralChats, read_neutral
        from steer2edit.data.questions import Question, read_questions

        source = self.prompts.prompts
        if self._own_texts and source is not None:
            chats = read_neutral(source)
            if not isinstance(chats, NeutralChats) or not all(chat.answer for chat in chats.chats):
                raise click.UsageError(
                    f"--positive-only without an instruction: {source} needs a prompt and a response in each row"
                )
            return [Question(chat.prompt, chat.where) for chat in chats.chats], tuple(
                chat.answer for chat in chats.chats
            )
        if source is not None:
            return read_questions(source), ()
        prompts = everyday_prompts("pairs") if file is None else file.read_prompts()
        return [Question(prompt, f"prompt {i}") for i, prompt in enumerate(prompts, start=1)], ()

    @property
    def _own_texts(self) -> bool:
        way = self.way
        return way.positive_only and not (way.trait or way.behavior or way.positive)

    def _way(self, file: BehaviorFile | None, samples: int, texts: tuple[str, ...]) -> Way | FromTrait:
        from steer2edit.data.everyday import everyday_prompts
        from steer2edit.data.questions import Question
        from steer2edit.data.user_scores import check_patterns, load_function
        from steer2edit.pairs.from_trait import FromTrait
        from steer2edit.pairs.sorting import goal_of
        from steer2edit.pairs.telling import Instructions
        from steer2edit.pairs.trait import Trait
        from steer2edit.pairs.ways import Opposites, PositiveOnly, Sorted

        way = self.way
        if way.by is not None:
            check_patterns([way.pattern] if way.pattern else [])
            function = load_function(way.function) if way.function else None
            goal = way.goal or goal_of(way.by)
            return Sorted(
                way.by, goal, samples, way.tails, way.pattern, function, way.function, only_correct=way.only_correct
            )
        background = [
            Question(p, f"background prompt {i}") for i, p in enumerate(everyday_prompts("background"), start=1)
        ]
        others = background if way.positive_only else []
        if way.trait is not None:
            count = self.prompts.written_questions
            count = (WRITTEN_QUESTIONS if self.authors.writer else 0) if count is None else count
            return FromTrait(Trait.read(way.trait), way.positive, way.negative, count, samples, others)
        positive, negative = (way.positive, way.negative) if file is None else ((file.positive,), (file.negative,))
        if way.positive_only:
            return PositiveOnly(background, positive, texts)
        return Opposites(Instructions(positive, negative), samples)

    def _metric(self, file: BehaviorFile | None) -> MetricChoice | None:
        from steer2edit.data.metric_choice import MetricChoice
        from steer2edit.pairs.sorting import goal_of

        way = self.way
        if file is not None:
            return file.metric
        if way.by == "length":
            return MetricChoice("length", way.goal or goal_of("length"))
        if way.by == "pattern":
            return MetricChoice("pattern", way.goal or "more", way.pattern)
        if way.by == "answer":
            return MetricChoice("exact answers", "more")
        return None if way.positive_only or way.by else MetricChoice("margin", "more")
