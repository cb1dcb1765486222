"""What ``data`` is asked to make: its groups of flags, checked together, become a request and engines.

Heavy imports happen inside the functions, so that ``--help`` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steer2edit.cli.engine_flags import EngineFlags
from steer2edit.cli.making_flags import (
    SAMPLES,
    TEMPERATURE,
    TOP_P,
    WRITTEN_QUESTIONS,
    AnswerFlags,
    AuthorFlags,
    PromptFlags,
    WayFlags,
    check_authors,
    check_way,
)
from steer2edit.cli.options import ModelFlags, progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable

    from steer2edit.data.behavior_file import BehaviorFile
    from steer2edit.data.metric_choice import MetricChoice
    from steer2edit.data.questions import Question
    from steer2edit.pairs.from_trait import FromTrait
    from steer2edit.pairs.make import DataRequest, Engines, Made
    from steer2edit.pairs.ways import Way


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

    def run(self, out: Path, force: bool, check: Callable[[DataRequest], None] = lambda asked: None) -> Made:
        """Check the flags, load what is needed, and make the data; ``check`` raises what else is wrong with the request."""
        from steer2edit.pairs.folder import check_folder
        from steer2edit.pairs.make import make_data

        check_way(self.way, self.prompts, self.authors, self.answers)
        check_authors(self.authors, self.engine)
        # what is wrong with files is said before a model is loaded
        request = self.request(out, force)
        check(request)
        check_folder(request.out)
        return make_data(request, self.engines(), progress_bar())

    def engines(self) -> Engines:
        """Who writes, judges and reads."""
        from steer2edit.engines.opening import open_engine, open_named
        from steer2edit.pairs.make import Engines

        checkpoint, spec = self.model_flags.open(self.model)
        arguments, think = self.answers.template_arguments, self.answers.think != "strip"

        def named(where: str | None, model: str | None, **more: Any) -> Any:
            return (
                None
                if where is None
                else open_named(where, self.model_flags.runtime(), model=model, **self.engine.asked(), **more)
            )

        template: dict[str, Any] = {"chat_template_kwargs": arguments, "think": think}
        # a server that is not there, or a program that is not installed, is said before a model is loaded
        answers = named(self.authors.answers_by, self.engine.server_model, **template)
        if answers is None and self.engine.server:
            answers = self.engine.open(None, **template)
        elif answers is None:
            self.engine.check_installed()
        writer = named(self.authors.writer, self.authors.writer_model, flag="--writer-model")
        judge = self.authors.judge
        judging = None if judge == "self" else named(judge, self.authors.judge_model, flag="--judge-model")
        loaded = self.model_flags.load(checkpoint, spec)
        answers = answers or self.engine.open(loaded, **template)
        if judge is None:
            return Engines(answers, writer or answers, loaded)
        from steer2edit.engines.judge import tried

        trial = tried(judging or open_engine(loaded=loaded), progress=progress_bar())
        return Engines(answers, writer or answers, loaded, trial)

    def request(self, out: Path, force: bool) -> DataRequest:
        """What is to be made."""
        from steer2edit.engines.engine import Sampling
        from steer2edit.pairs.filters import Allowed
        from steer2edit.pairs.make import DataRequest

        file = self._file()
        samples = self.answers.samples or (SAMPLES if self.way.by else 1)
        temperature = self.answers.temperature
        temperature = (TEMPERATURE if samples > 1 else 0.0) if temperature is None else temperature
        if not temperature and self.answers.top_p != TOP_P:
            raise click.UsageError(
                "--top-p bounds what is drawn, and at a temperature of 0 nothing is; give --temperature"
            )
        sampling = Sampling(self.answers.max_new_tokens, temperature, self.answers.top_p, self.answers.seed)
        name, description, looked_for = self._named(file)
        questions, texts = self._questions(file)
        way = self._way(file, samples, texts)
        way.check(questions, sampling)
        return DataRequest(
            out.expanduser(),
            name,
            description,
            questions,
            way,
            self._metric(file),
            looked_for,
            sampling,
            self.answers.think,
            Allowed(self.answers.keep_cut, self.answers.keep_refusals),
            self.answers.template_arguments,
            self.prompts.max_prompts,
            seed=self.answers.seed,
            force=force,
            origin={"behavior": self.way.behavior, "prompts": self.prompts.prompts or "everyday"},
        )

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
        if way.positive:
            return "instructed", way.positive[0], way.positive[0]
        return "instructed", "own texts", None

    def _questions(self, file: BehaviorFile | None) -> tuple[list[Question], dict[str, str]]:
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
            asked = [Question(chat.prompt, chat.where) for chat in chats.chats]
            # of a prompt's responses the first counts, as of repeated prompts the first row does
            texts = {q.digest: chat.answer for q, chat in reversed(list(zip(asked, chats.chats, strict=True)))}
            return asked, texts
        if source is not None:
            return read_questions(source, "prompts to answer"), {}
        prompts = everyday_prompts("pairs") if file is None else file.read_prompts()
        return [Question(prompt, f"prompt {i}") for i, prompt in enumerate(prompts, start=1)], {}

    @property
    def _own_texts(self) -> bool:
        way = self.way
        return way.positive_only and not (way.trait or way.behavior or way.positive)

    def _way(self, file: BehaviorFile | None, samples: int, texts: dict[str, str]) -> Way | FromTrait:
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
        return Opposites(Instructions(positive, negative or ("",)), samples)

    def _metric(self, file: BehaviorFile | None) -> MetricChoice | None:
        from steer2edit.data.metric_choice import MetricChoice
        from steer2edit.pairs.sorting import goal_of

        way = self.way
        if file is not None:
            return file.metric
        if way.metric is not None:
            return _named_metric(way)
        if way.by == "length":
            return MetricChoice("length", way.goal or goal_of("length"))
        if way.by == "pattern":
            return MetricChoice("pattern", way.goal or "more", way.pattern)
        if way.by == "answer":
            return MetricChoice("exact answers", "more")
        return None if way.positive_only or way.by else MetricChoice("margin", "more")


def _named_metric(way: WayFlags) -> MetricChoice:
    """The metric of --metric, with its goal and its pattern. Raises UsageError."""
    from steer2edit.data.metric_choice import read_metric

    given = {"name": way.metric, "goal": way.goal, "pattern": way.pattern}
    choice, faults = read_metric({key: value for key, value in given.items() if value is not None}, "--metric")
    if choice is None:
        # the faults are those of a table in a file
        words = {"--metric.name": "--metric", "--metric.goal": "--goal", "--metric.pattern": "--pattern"}
        text = "; ".join(faults).replace(" is missing", " is not given")
        for key, flag in words.items():
            text = text.replace(key, flag)
        raise click.UsageError(text)
    return choice
