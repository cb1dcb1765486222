"""Answers are written once: what is made of them is made again where a setting changes that no answer depends on.

The law: the same settings give the same files, whether they are reached at once or through others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_making import BRIEF, contents, questions, request
from fake_engine import NOUNS, FakeEngine

from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.prompts import Message
from steer2edit.data.questions import Question
from steer2edit.engines.engine import Answer, Request, Sampling
from steer2edit.errors import DataError
from steer2edit.notices import collected
from steer2edit.pairs.filters import Allowed
from steer2edit.pairs.from_trait import FromTrait
from steer2edit.pairs.journal import key_of
from steer2edit.pairs.make import Engines, Made, make_data
from steer2edit.pairs.trait import Trait
from steer2edit.pairs.ways import PositiveOnly, Sorted
from steer2edit.progress import Progress, silent

BY_LENGTH = Sorted("length", "less", samples=8, share=0.2)
BY_JUDGE = Sorted("judge", "more", samples=8, share=0.2)
DRAWN = Sampling(temperature=1)


class RoundingEngine(FakeEngine):
    """Its answers depend on what is answered with them, as rounding does: a kept answer is that of its own batch.

    Every fourth answer is cut off, and every third has a thought. It begins some answers as refusals.
    """

    def __init__(self, kind: str = "fake", url: str = "") -> None:
        super().__init__()
        self.kind, self.url, self.batch = kind, url, ""

    def described(self) -> dict[str, Any]:
        return {
            **super().described(),
            "engine": self.kind,
            "fingerprint": "f",
            **({"url": self.url} if self.url else {}),
        }

    def write(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = silent
    ) -> Iterator[tuple[int, Answer]]:
        alone = self.kind == "server"
        self.batch = "" if alone else key_of([[list(m) for m in one.messages] for one in requests])
        yield from super().write(requests, sampling, progress)

    def answer(self, request: Request, sampling: Sampling) -> Answer:
        found = super().answer(request, sampling)
        if "numbered from" in request.messages[-1].content or "Write the opposite" in request.messages[-1].content:
            return found
        number = request.seed(sampling.seed if sampling.temperature else 0)
        text = f"{found.text} {self.batch[:4]}".strip()
        if number % 7 == 0:
            text = f"I cannot answer that. {text}"
        thought = "well, let me see" if number % 3 == 0 else None
        return replace(found, text=text, ended=number % 4 > 0, thought=thought, thought_tokens=4 if thought else 0)


class RoundingJudge:
    """Likes short answers, and its numbers depend on what is judged with them. ``asked`` counts its answers."""

    def __init__(self, bias: float = 0.0) -> None:
        self.bias, self.asked = bias, 0

    @property
    def knows_traits(self) -> bool:
        return True

    def shows(self, trait: str, prompts: Any, answers: Sequence[str]) -> list[float]:
        return self._values(answers, len(trait))

    def coherent(self, prompts: Any, answers: Sequence[str]) -> list[float]:
        return [
            0.1 if "bell" in text and self.bias else value + 0.5
            for text, value in zip(answers, self._values(answers, 0), strict=True)
        ]

    def _values(self, answers: Sequence[str], more: int) -> list[float]:
        self.asked += len(answers)
        rounding = int(key_of(sorted(answers))[:4], 16) * 1e-9
        return [1 / (2 + len(text.split()) + more) + self.bias + rounding for text in answers]

    def described(self) -> dict[str, Any]:
        return {"judge": "fake", "bias": self.bias, "engine": {"engine": "fake", "versions": {"a": 1}}}


def with_answers(count: int) -> list[Question]:
    """The questions, of the first of which is known what is right: a cat and not a dog."""
    known = {"choices": ("cat", "dog"), "labels": (True, False)}
    return [replace(q, **known) if i < count else q for i, q in enumerate(questions())]  # type: ignore[arg-type]


def own_texts(word: str) -> PositiveOnly:
    background = [Question((Message("user", f"tell about {noun}"),), noun) for noun in NOUNS]
    return PositiveOnly(background, texts={q.digest: f"it is {word} number {i}" for i, q in enumerate(questions())})


Run = dict[str, Any]
COMMON: Run = {"way": BRIEF, "allowed": Allowed(refusals=True)}
SORTED: Run = {"way": BY_LENGTH, "sampling": DRAWN, "allowed": Allowed(cut=True, refusals=True)}
KEPT: dict[str, tuple[Run, Run]] = {
    "tails": (SORTED, {**SORTED, "way": replace(BY_LENGTH, share=0.4)}),
    "what sorts": (
        SORTED,
        {
            **SORTED,
            "way": Sorted("pattern", "more", samples=8, pattern="cat"),
            "metric": MetricChoice("pattern", "more", "cat"),
        },
    ),
    "the end that is positive": (SORTED, {**SORTED, "way": replace(BY_LENGTH, goal="more"), "metric": None}),
    "right answers alone": (
        {**SORTED, "questions": with_answers(0)},
        {**SORTED, "way": replace(BY_LENGTH, only_correct=True, share=0.5), "questions": with_answers(40)},
    ),
    "what is right": (
        {**SORTED, "way": Sorted("answer", "more", samples=8), "questions": with_answers(30)},
        {**SORTED, "way": Sorted("answer", "more", samples=8), "questions": with_answers(35)},
    ),
    "the metric": (COMMON, {**COMMON, "metric": MetricChoice("words", "less")}),
    "the name": (COMMON, {**COMMON, "name": "terse", "description": "in a word", "origin": {"prompts": "other"}}),
    "cut answers": (COMMON, {**COMMON, "allowed": Allowed(cut=True, refusals=True)}),
    "refusals": (COMMON, {**COMMON, "allowed": Allowed()}),
    "how much of a thought": ({**COMMON, "think": "keep"}, {**COMMON, "think": "only"}),
    "a judge": (COMMON, {**COMMON, "judge": RoundingJudge(), "trait": "in few words"}),
    "another judge": (
        {**COMMON, "judge": RoundingJudge(), "trait": "in few words"},
        {**COMMON, "judge": RoundingJudge(0.01), "trait": "in few words"},
    ),
    "no judge": ({**COMMON, "judge": RoundingJudge(), "trait": "in few words"}, COMMON),
    "the rubric": (
        {**COMMON, "judge": RoundingJudge(), "trait": "in few words"},
        {**COMMON, "judge": RoundingJudge(), "trait": "few words"},
    ),
    "a judge that sorts": (
        {**SORTED, "judge": RoundingJudge(), "trait": "in few words"},
        {**SORTED, "judge": RoundingJudge(), "trait": "in few words", "way": replace(BY_JUDGE, share=0.3)},
    ),
    "tails of a judge": (
        {**SORTED, "judge": RoundingJudge(), "trait": "in few words", "way": BY_JUDGE},
        {**SORTED, "judge": RoundingJudge(), "trait": "in few words", "way": replace(BY_JUDGE, share=0.3)},
    ),
    "how prompts are dealt out": ({**COMMON, "seed": 0}, {**COMMON, "seed": 5}),
    "a seed that draws nothing": (
        {**COMMON, "seed": 0, "sampling": Sampling(top_p=0.9)},
        {**COMMON, "seed": 1, "sampling": Sampling(seed=1)},
    ),
    "own texts": ({**COMMON, "way": own_texts("big")}, {**COMMON, "way": own_texts("small")}),
    "the metric of a trait": (
        {**COMMON, "way": FromTrait(Trait("brief", "answers briefly"), questions=12)},
        {**COMMON, "way": FromTrait(Trait("brief", "answers briefly"), questions=12), "metric": None},
    ),
}


def made(out: Path, settings: Run, engine: FakeEngine | None = None) -> tuple[Made, int]:
    """What was made, and how many answers were written for it, beside the one that tries the system message out."""
    engine = engine or RoundingEngine()
    asked = dict(settings)
    judge, rows = asked.pop("judge", None), asked.pop("questions", None)
    found = request(out, **{key: value for key, value in asked.items() if key not in ("name", "description")})
    found = replace(found, **{key: value for key, value in asked.items() if key in ("name", "description")})
    found = found if rows is None else replace(found, questions=rows)
    return make_data(found, Engines(engine, engine, None, judge)), engine.seen


@pytest.mark.parametrize("change", KEPT)
def test_a_setting_that_no_answer_depends_on_keeps_the_answers(tmp_path: Path, change: str) -> None:
    first, then = KEPT[change]
    made(tmp_path / "changed", first)
    before = contents(tmp_path / "changed")
    with collected() as notices:
        again, seen = made(tmp_path / "changed", then)
    assert again.reused and seen <= 1
    assert any("are kept, and rows are made of them anew" in text for text in notices)
    made(tmp_path / "at once", then)
    assert contents(tmp_path / "changed") == contents(tmp_path / "at once") != before
    # and back
    made(tmp_path / "changed", first)
    assert contents(tmp_path / "changed") == before
    with collected() as notices:
        made(tmp_path / "changed", first)
    assert not any("anew" in text for text in notices)


NEW: dict[str, Callable[[Run], Run]] = {
    "samples": lambda run: {**run, "way": replace(BY_LENGTH, samples=4)},
    "temperature": lambda run: {**run, "sampling": Sampling(temperature=0.5)},
    "seed": lambda run: {**run, "sampling": Sampling(temperature=1, seed=1)},
    "limit": lambda run: {**run, "sampling": Sampling(90, temperature=1)},
    "prompts": lambda run: {**run, "questions": questions(20)},
    "batch": lambda run: {**run, "batch": 16},
    "instructions": lambda run: {**run, "way": BRIEF},
}


@pytest.mark.parametrize("change", NEW)
def test_a_setting_that_answers_depend_on_is_refused(tmp_path: Path, change: str) -> None:
    made(tmp_path / "data", SORTED)
    before = contents(tmp_path / "data")
    with pytest.raises(DataError, match=r"holds answers of other settings.*--force"):
        made(tmp_path / "data", NEW[change](SORTED))
    assert contents(tmp_path / "data") == before


def test_a_writer_that_draws_is_asked_again_with_another_seed(tmp_path: Path) -> None:
    trait = {**COMMON, "way": FromTrait(Trait("brief", "answers briefly"), questions=12)}
    made(tmp_path / "data", trait)
    with pytest.raises(DataError, match="writer_seed was 0 and is 1"):
        made(tmp_path / "data", {**trait, "sampling": Sampling(seed=1)})


@pytest.mark.parametrize("change", ["samples", "prompts", "batch"])
def test_a_server_is_asked_for_what_it_was_not_asked_yet(tmp_path: Path, change: str) -> None:
    """Its answer depends on its request alone, so that more of them may be asked for."""

    def server() -> RoundingEngine:
        return RoundingEngine("server", "http://here")

    less, more = NEW[change](SORTED), SORTED
    _, few = made(tmp_path / "grown", less, server())
    _, rest = made(tmp_path / "grown", more, server())
    _, all_of_them = made(tmp_path / "at once", more, server())
    assert few + rest == all_of_them
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")
    # and with fewer again, none is asked for
    _, none = made(tmp_path / "grown", less, server())
    made(tmp_path / "little", less, server())
    assert none == 0 and contents(tmp_path / "grown") == contents(tmp_path / "little")


@pytest.mark.parametrize("after", [0, 40, 79])
def test_settings_may_change_after_a_kill(tmp_path: Path, after: int) -> None:
    killed = RoundingEngine()
    killed.dies_after = after
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "broken", COMMON, killed)
    then = {**COMMON, "allowed": Allowed(), "metric": MetricChoice("words", "less")}
    made(tmp_path / "broken", then)
    made(tmp_path / "whole", then)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_a_setting_that_leaves_no_row_leaves_the_data_that_is_there(tmp_path: Path) -> None:
    made(tmp_path / "data", SORTED)
    before = contents(tmp_path / "data")
    with pytest.raises(DataError, match="do not differ by pattern"):
        made(tmp_path / "data", {**SORTED, "way": Sorted("pattern", "more", samples=8, pattern="nobody writes this")})
    assert contents(tmp_path / "data") == before


def test_what_a_judge_said_is_kept_where_only_the_metric_changes(tmp_path: Path) -> None:
    judge, again = RoundingJudge(), RoundingJudge()
    made(tmp_path / "data", {**COMMON, "judge": judge, "trait": "in few words"})
    made(tmp_path / "data", {**COMMON, "judge": again, "trait": "in few words", "metric": None})
    assert judge.asked > 0 and again.asked == 0
