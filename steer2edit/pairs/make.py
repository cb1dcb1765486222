"""Contrast data on one page: prompts → answers → rows → filters → parts → measures → folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.questions import Question
from steer2edit.data.templates import TemplateArguments
from steer2edit.engines.engine import Engine, Sampling
from steer2edit.errors import DataError
from steer2edit.files.locks import claimed
from steer2edit.notices import notice
from steer2edit.pairs.filters import Allowed, Tally, sift
from steer2edit.pairs.folder import check_folder, clear_folder, clear_rows, question_rows, train_rows, write_folder
from steer2edit.pairs.from_trait import FromTrait
from steer2edit.pairs.journal import JOURNAL, Journal, differing, key_of
from steer2edit.pairs.judging import Judge, Judged
from steer2edit.pairs.lengths import Lengths, lengths
from steer2edit.pairs.measure import Difference, differences, read_separation
from steer2edit.pairs.questions import chosen_questions
from steer2edit.pairs.samples import Row, Think, samples_of
from steer2edit.pairs.separation import Separation
from steer2edit.pairs.split import deal
from steer2edit.pairs.verdict import Verdict, verdict
from steer2edit.pairs.ways import Sorted, Way, prompts_asked
from steer2edit.pairs.writing import BATCH, Pace, Writer, alone, drawn
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel

_ROWS = "rows"
"""The journal's entry with the settings by which rows were last made of its answers."""
_REQUESTS = ("prompts", "number_of_prompts", "samples", "batch")
"""Settings that say which answers are asked for, and not what is in one."""


@dataclass(frozen=True)
class DataRequest:
    """What data to make, and where it goes.

    ``way`` says how rows come about, from answers to ``questions``. ``metric`` is what later commands measure, where it is
    known. ``trait`` is what a judge looks for. ``origin`` holds further plain values for the receipt, such as the file of a
    behaviour. Of the prompts ``max_prompts`` are used at most, the same ones whatever their order.
    """

    out: Path
    name: str
    description: str
    questions: Sequence[Question]
    way: Way | FromTrait
    metric: MetricChoice | None = None
    trait: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    think: Think = "strip"
    allowed: Allowed = field(default_factory=Allowed)
    chat_template_kwargs: TemplateArguments | None = None
    max_prompts: int | None = None
    batch: int = BATCH
    seed: int = 0
    force: bool = False
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Engines:
    """Who writes the answers, the instructions and questions, and who judges; ``loaded`` is the model that the data is for.

    Without ``loaded`` nobody reads the rows. The judge is None where there is none.
    """

    answers: Engine
    writer: Engine
    loaded: LoadedModel | None
    judge: Judge | None = None

    def described(self) -> dict[str, Any]:
        """All of them, for the journal and the receipt."""
        return {
            "engine": self.answers.described(),
            "writer": self.writer.described(),
            "judge": None if self.judge is None else self.judge.described(),
            "read_by": None if self.loaded is None else self.loaded.fingerprint,
        }


@dataclass(frozen=True)
class Made:
    """What came of it. ``reused`` says that every answer was there already."""

    folder: Path
    receipt: dict[str, Any]
    rows: tuple[Row, ...]
    tally: Tally
    answers: Tally | None
    lengths: Lengths | None
    separation: Separation | None
    differences: tuple[Difference, ...]
    verdict: Verdict
    pace: Pace
    reused: bool


def make_data(request: DataRequest, engines: Engines, progress: Progress = silent) -> Made:
    """Write answers, make rows of them, and put the folder in place; a run that was killed goes on.

    With ``force`` the data that is there stays until the first answer of the new run is there. No other run can write the folder
    meanwhile. The files depend on the request and the engines alone, not on interruptions, nor on what was made of the answers
    before: where settings alone have changed that no answer depends on, the rest is done again from the answers that are there.
    Raises DataError where no row is left, where a judge that is to sort the answers failed its trial, where the folder holds
    answers of other settings, and for whatever is wrong with the input.
    """
    questions = chosen_questions(request.questions, request.max_prompts)
    request.way.check(questions, request.sampling)
    sorts = isinstance(request.way, Sorted) and request.way.by == "judge"
    if sorts and engines.judge is not None and not engines.judge.knows_traits:
        raise DataError(
            "the judge cannot sort answers by the trait: it did not tell labelled answers apart; give another --judge"
        )
    with claimed([request.out]):
        check_folder(request.out)
        request.out.mkdir(parents=True, exist_ok=True)
        clear = partial(clear_folder, request.out) if request.force else None
        with Journal(request.out / JOURNAL, _answer_settings(request, engines, questions), clear) as journal:
            _note_changes(journal, _row_settings(request, engines, questions))
            return _made(request, engines, questions, journal, progress)


def _made(
    request: DataRequest, engines: Engines, questions: list[Question], journal: Journal, progress: Progress
) -> Made:
    common: dict[str, Any] = {"journal": journal, "batch": request.batch, "progress": progress}
    writer = Writer(engines.answers, name="answers", alone=alone(engines.answers.described()), **common)
    row_settings, authored = _row_settings(request, engines, questions), Pace()
    way = request.way
    told: dict[str, Any] = {}
    if isinstance(way, FromTrait):
        author = Writer(engines.writer, name="writer", alone=alone(engines.writer.described()), pace=authored, **common)
        way, questions, told = way.resolved(author, questions, request.sampling.seed)
    if engines.judge is not None and request.trait is None:
        notice("the judge is not told of a trait to look for: it judges whether answers make sense, and nothing else")
    judged = None if engines.judge is None else Judged(engines.judge, journal, request.trait, progress)
    if isinstance(way, Sorted) and way.by == "judge" and judged is not None:
        way = replace(way, judge=judged.sorted)
    written = way.rows(questions, writer, request.sampling, request.allowed)
    # of answers that are sorted by their length, those that are cut off are the long end
    allowed = replace(request.allowed, cut=True) if isinstance(way, Sorted) and way.by == "length" else request.allowed
    rows, tally = sift(written.rows, allowed, None if judged is None else judged.faults, request.think)
    if not rows:
        raise DataError(
            f"no row is left to make data of: {_why(written.answers, tally)}; every answer is in {request.out / JOURNAL}. Give "
            "other instructions or prompts, more --max-new-tokens, or a stronger model (--answers-by)"
        )
    samples = [sample for side in ("positive", "negative") for sample in samples_of(rows, side)]
    if request.think != "strip" and not any(sample.answer.thought for sample in samples):
        notice(f"no answer has a thought: --think {request.think} changes nothing, and rows hold the answers alone")
    # in the order of their prompts' digests: a file says nothing about the order of its source
    rows = sorted(rows, key=lambda row: row.question.digest)
    parts = deal([row.question.digest for row in rows], request.seed)
    by_part = {
        part: [row for row in rows if parts[row.question.digest] == part] for part in ("train", "select", "report")
    }
    found = (
        None
        if engines.loaded is None
        else read_separation(
            engines.loaded,
            [*by_part["train"], *by_part["select"]],
            think=request.think,
            chat_template_kwargs=request.chat_template_kwargs,
            seed=request.seed,
            progress=progress,
        )
    )
    differ = differences(rows, request.metric)
    if judged is not None:
        differ += judged.differences(written.rows)
    long = _lengths(rows)
    if long is not None and long.separates:
        notice(
            f"length alone tells the two sides apart: {long.positive:.0f} tokens against {long.negative:.0f}. Unless length is "
            "the behaviour, the vector is of lengths too"
        )
    left = len(samples_of(rows, "positive")), len(samples_of(rows, "negative"))
    captured = min(len(samples_of(by_part["train"], side)) for side in ("positive", "negative"))
    result = verdict(found, differ, left, captured, read=engines.loaded is not None)
    looked_for = {} if request.trait is None else {"rubric": request.trait}
    asked = {question.digest for question in questions}
    files = {
        "train": train_rows(by_part["train"], request.think),
        "select": question_rows(by_part["select"], asked),
        "report": question_rows(by_part["report"], asked),
    }
    receipt = {
        "behavior": {"name": request.name, "description": request.description, **looked_for, **told},
        "metric": None if request.metric is None else request.metric.described(),
        "origin": request.origin,
        "made": way.described(),
        **written.more,
        "prompts": len(questions),
        "sampling": request.sampling.described(),
        "think": request.think,
        "seed": request.seed,
        **({"chat_template_kwargs": dict(request.chat_template_kwargs)} if request.chat_template_kwargs else {}),
        **engines.described(),
        **({"judged": judged.described()} if judged is not None else {}),
        "answers": None if written.answers is None else _counts(written.answers),
        "rows": {**_counts(tally), **{part: len(lines) for part, lines in files.items()}},
        "lengths": None if long is None else long.to_json(),
        "differences": [one.to_json() for one in differ],
        "separation": None if found is None else found.to_json(),
        "verdict": result.to_json(),
    }
    journal.begin()  # where no answer was to be written
    if differing(_last_settings(journal), row_settings):
        # rows of other settings go first: no receipt stands beside files that are not its own
        clear_rows(request.out)
        journal.add(_ROWS, row_settings)
        journal.sync()
    write_folder(request.out, files, receipt)  # type: ignore[arg-type]
    return Made(
        request.out, receipt, tuple(rows), tally, written.answers, long, found, tuple(differ), result, writer.pace,
        not (writer.pace.answers or authored.answers),
    )  # fmt: skip


def _answer_settings(request: DataRequest, engines: Engines, questions: Sequence[Question]) -> dict[str, Any]:
    """What the written answers depend on, in plain values: a run that goes on has the same.

    A server's answer depends on its request alone. There it may be asked for more answers, or to more prompts.
    """
    answers, writes = engines.answers.described(), isinstance(request.way, FromTrait)
    found = {**request.way.asked(questions), "batch": request.batch}
    if alone(answers) and not writes:
        found = {key: value for key, value in found.items() if key not in _REQUESTS}
    # a program of its own that names no fingerprint runs the model that reads the rows
    known = "fingerprint" in answers or "url" in answers
    return {
        **found,
        "sampling": drawn(request.sampling),
        "engine": answers,
        **({} if known else {"read_by": engines.described()["read_by"]}),
        # the writer draws its tries by the seed, whatever the temperature of the answers
        **({"writer": engines.writer.described(), "writer_seed": request.sampling.seed} if writes else {}),
    }


def _row_settings(request: DataRequest, engines: Engines, questions: Sequence[Question]) -> dict[str, Any]:
    """What else the files depend on, in plain values: they are made again of the same answers where it changes."""
    accepted = [[list(q.answers), list(q.choices), list(q.labels)] for q in questions]
    described = engines.described()
    return {
        "name": request.name,
        "trait": request.trait,
        "made": request.way.described(),
        "metric": None if request.metric is None else request.metric.described(),
        **prompts_asked(questions),
        "right_answers": key_of(accepted),
        "think": request.think,
        "chat_template_kwargs": dict(request.chat_template_kwargs or {}),
        "allowed": asdict(request.allowed),
        "seed": request.seed,
        "judge": described["judge"],
        "read_by": described["read_by"],
    }


def _last_settings(journal: Journal) -> Mapping[str, Any]:
    """The settings by which rows were last made; none where they never were."""
    found = journal.get(_ROWS)
    return found if isinstance(found, dict) else {}


def _note_changes(journal: Journal, settings: Mapping[str, Any]) -> None:
    """Say which settings were others when rows were last made of the journal's answers."""
    last = _last_settings(journal)
    if last and (other := differing(last, settings)):
        notice(
            f"the answers in {journal.path.name} are kept, and rows are made of them anew, because settings are others: "
            f"{'; '.join(other[:5])}"
        )


def _lengths(rows: Sequence[Row]) -> Lengths | None:
    sides = [[sample.length for sample in samples_of(rows, side)] for side in ("positive", "negative")]
    return lengths(*sides) if all(sides) else None


def _counts(tally: Tally) -> dict[str, Any]:
    return {"offered": tally.offered, "kept": tally.kept, "left_out": dict(tally.reasons)}


def _why(answers: Tally | None, rows: Tally) -> str:
    return f"of the answers, {answers}; of the rows, {rows}" if answers is not None else str(rows)
