"""The groups of flags for data that is made, and what they say against each other.

Heavy imports happen inside the functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import click

from steer2edit.cli.data_options import TemplateArgumentFlags
from steer2edit.cli.engine_flags import EngineFlags, check_model_name
from steer2edit.cli.flags import FlagGroup
from steer2edit.cli.judge_flags import JudgeNameFlags
from steer2edit.options import option

SAMPLES = 8
"""Answers to each prompt that are sorted, unless the user says otherwise."""
WRITTEN_QUESTIONS = 40
"""Prompts that a stronger writer writes for a trait, unless the user says otherwise."""
TAILS = 0.1
"""Share of the sorted answers that is one end, unless the user says otherwise."""
TEMPERATURE, TOP_P = 0.6, 0.9
"""Sampling of several answers to a prompt: they differ, and small models still write language."""


@dataclass(frozen=True)
class SentenceFlags(FlagGroup):
    """A behaviour in words, and how it is measured."""

    heading: ClassVar[str] = "Behaviour"

    trait: str | None = option(
        None,
        'Trait to show, in a sentence: "blunt: says what is wrong first, no flattery". A model writes the opposite.',
        metavar="NAME: TEXT",
    )
    positive: tuple[str, ...] = option(
        (), "Instruction under which a model shows the behaviour. Repeatable: prompts take turns."
    )
    negative: tuple[str, ...] = option(
        (),
        "Instruction for the opposite. Repeatable.",
        shown_default="with --positive none: the model's own answers",
    )
    metric: str | None = option(
        None,
        "Metric of the behaviour, which later commands measure: length, words, lists, pattern, count, …",
        metavar="NAME",
        shown_default="margin; with --by what it sorts by",
    )
    goal: Literal["more", "less"] | None = option(
        None,
        "Way in which --metric is better, or end of the sorted answers that is positive.",
        shown_default="less for --by length, else more",
    )
    pattern: str | None = option(
        None, "Regular expression to look for, with --by pattern, --metric pattern or --metric count.", metavar="REGEX"
    )


@dataclass(frozen=True)
class WayFlags(SentenceFlags):
    """What the behaviour is: a sentence, instructions, a behaviour's file, or what sorts answers."""

    first: ClassVar[tuple[str, ...]] = ("trait", "behavior", "positive", "negative", "by")

    behavior: str | None = option(
        None, "Behaviour whose instructions to use: the name of a built-in one, or a TOML file.", metavar="NAME|FILE"
    )
    by: Literal["length", "pattern", "function", "judge", "answer"] | None = option(
        None,
        "Sort a model's own answers to each prompt by this, and take the ends; judge asks for --trait and --judge.",
    )
    tails: float = option(TAILS, "Share of the sorted answers that is one end.", minimum=0.001, maximum=0.5)
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
class SamplingFlags(FlagGroup):
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
        None,
        "Temperature of sampling.",
        minimum=0,
        shown_default=f"0, or {TEMPERATURE:g} where a prompt gets several answers",
    )
    top_p: float = option(TOP_P, "Sample from the likeliest tokens of this total probability.", minimum=0.01, maximum=1)
    seed: int = option(0, "Seed of sampling, and of dealing the prompts out.")
    think: Literal["strip", "keep", "only"] = option(
        "strip", "What of a thinking model's answer goes into a row: the answer, the thought too, or the thought alone."
    )
    keep_cut: bool = option(
        False, "Keep answers that are cut off at --max-new-tokens, beside the longer ones of pairs."
    )
    keep_refusals: bool = option(False, "Keep answers that refuse to play along, for behaviours that are refusals.")


@dataclass(frozen=True)
class AnswerFlags(SamplingFlags, TemplateArgumentFlags):
    """How answers are written, with arguments for the chat template."""

    heading: ClassVar[str] = "Answers"


@dataclass(frozen=True)
class WriterFlags(FlagGroup):
    """Who writes, where it is not MODEL."""

    heading: ClassVar[str] = "Engine"
    first: ClassVar[tuple[str, ...]] = ("answers_by", "writer")

    answers_by: str | None = option(
        None,
        "Model that writes the answers in MODEL's place: a folder, a Hub id, or a server's URL.",
        metavar="MODEL|URL",
    )
    writer: str | None = option(
        None, "Model that writes the opposite of a trait, and questions.", metavar="MODEL|URL", shown_default="MODEL"
    )
    writer_model: str | None = option(
        None,
        "Name of the writer on its server.",
        metavar="NAME",
        shown_default="the only one that the server lists",
        rare=True,
    )


@dataclass(frozen=True)
class AuthorFlags(WriterFlags, JudgeNameFlags):
    """Who writes and judges, where it is not MODEL."""

    heading: ClassVar[str] = "Engine"
    first: ClassVar[tuple[str, ...]] = ("answers_by", "writer", "judge", "writer_model", "judge_model")


def check_way(way: WayFlags, prompts: PromptFlags, authors: AuthorFlags, answers: AnswerFlags) -> None:
    """Raise UsageError where flags contradict each other, or one has nothing to do."""
    told = bool(way.positive or way.negative)
    ways = [("--behavior", way.behavior), ("--by", way.by), ("--positive and --negative", told and not way.trait)]
    chosen = [name for name, given in ways if given]
    if way.by == "judge":
        if way.trait is None or authors.judge is None:
            raise click.UsageError(
                "--by judge needs --trait, which it looks for, and --judge MODEL|URL (or --judge self)"
            )
    elif way.trait:
        chosen.append("--trait")
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join(chosen)} each name a way to the data; give one of them")
    if not chosen and not (way.positive_only and prompts.prompts):
        raise click.UsageError(
            "give --trait, --behavior, --positive with --negative, or --by: what the data is to hold"
        )
    if way.positive_only and (way.by or way.negative):
        raise click.UsageError(
            "--positive-only goes with --trait, --behavior, --positive or --prompts, not with --by or --negative"
        )
    if way.negative and not way.positive and not way.trait:
        raise click.UsageError("--negative is the opposite of --positive, or of --trait; give one of the two")
    if len(way.positive) > 1 and len(way.negative) > 1 and len(way.positive) != len(way.negative):
        raise click.UsageError(
            "--positive and --negative are given unequal numbers of times; expected one of each kind"
        )
    if (way.by == "pattern" and way.pattern is None) or (way.by == "function") != (way.function is not None):
        raise click.UsageError(f"--by {way.by or 'function'} and --{way.by or 'function'} go together")
    if way.metric is not None and (way.by or way.behavior):
        raise click.UsageError(
            f"--metric is for --trait and --positive: {'--by' if way.by else 'the file of --behavior'} names the metric"
        )
    if way.pattern is not None and way.by != "pattern" and way.metric is None:
        raise click.UsageError(
            "--pattern is what --by pattern, --metric pattern or --metric count looks for; give one of them"
        )
    if way.by == "answer" and way.only_correct:
        raise click.UsageError(
            "--by answer compares right answers with wrong ones, and --only-correct leaves no wrong ones"
        )
    if way.by in ("answer",) and prompts.prompts is None:
        raise click.UsageError("--by answer needs --prompts with a column answer")
    _check_unused(way, prompts, authors, answers)


def _check_unused(way: WayFlags, prompts: PromptFlags, authors: AuthorFlags, answers: AnswerFlags) -> None:
    sorts = [("--tails", way.tails != TAILS), ("--only-correct", way.only_correct)]
    if way.by is None and (names := [name for name, given in sorts if given]):
        raise click.UsageError(f"{names[0]} is for answers that are sorted; give --by too")
    if way.goal is not None and way.by is None and way.metric is None:
        raise click.UsageError("--goal is for answers that are sorted, or for a metric; give --by or --metric too")
    if prompts.written_questions and (way.trait is None or way.by is not None):
        raise click.UsageError("--questions are written for a trait; give --trait, and no --by")
    if authors.writer is not None and (way.trait is None or way.by is not None):
        raise click.UsageError("--writer writes the opposite of a trait, and questions; give --trait, and no --by")
    if way.positive_only and (answers.samples or 1) > 1:
        raise click.UsageError("--positive-only takes one answer to each prompt; leave --samples out")
    if not all(text.strip() for text in (*way.positive, *way.negative)):
        raise click.UsageError("an instruction of --positive or --negative is empty")


def check_authors(authors: AuthorFlags, engine: EngineFlags) -> None:
    """Raise UsageError where two flags name what writes the answers, or a server's model is named without its server."""
    if authors.answers_by is None:
        engine.check()
    elif engine.server or engine.engine != "transformers":
        other = "--server" if engine.server else f"--engine {engine.engine}"
        raise click.UsageError(f"--answers-by and {other} both name what writes the answers; give one")
    check_model_name(
        "--server-model", engine.server_model, "--server or --answers-by", engine.url or authors.answers_by
    )
    check_model_name("--writer-model", authors.writer_model, "--writer", authors.writer)
    authors.check_judge_model()
    engine.check_asked(
        {
            "--server": engine.url,
            "--answers-by": authors.answers_by,
            "--writer": authors.writer,
            "--judge": authors.judge,
        }
    )
