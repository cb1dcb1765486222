"""Data from a model's own answers, sorted by what they have or by a judge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_making import BRIEF, make, request
from fake_engine import FakeEngine

from steer2edit.cli.data import advice
from steer2edit.data.contrast import read_contrast
from steer2edit.data.metric_choice import MetricChoice
from steer2edit.engines.engine import Sampling
from steer2edit.errors import DataError
from steer2edit.notices import collected
from steer2edit.pairs import filters
from steer2edit.pairs.folder import FILES
from steer2edit.pairs.make import Engines, Made, make_data
from steer2edit.pairs.telling import Instructions
from steer2edit.pairs.ways import Opposites, Sorted

# sorted answers


def test_the_ends_of_the_models_own_answers_are_pairs_of_one_prompt(tmp_path: Path) -> None:
    made = make(tmp_path / "data", way=Sorted("length", "less", samples=8, share=0.2), sampling=Sampling(temperature=1))
    assert made.receipt["paired"] and 20 <= made.receipt["prompts_with_both_ends"] < 40
    assert made.differences[0].obeyed
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert all(len(row["positive"].split()) < len(row["negative"].split()) for row in rows)


def test_few_prompts_with_both_ends_give_classes(tmp_path: Path) -> None:
    made = make(tmp_path / "data", way=Sorted("length", "less", samples=1, share=0.3), sampling=Sampling(temperature=1))
    assert made.receipt["paired"] is False
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {"positive", "negative"}
    assert read_contrast(tmp_path / "data" / "train.jsonl")
    assert made.differences[0].obeyed
    # every prompt that is held out is a question, of whichever class its answer is; counts are those of the files' lines
    counts = {part: len((tmp_path / "data" / name).read_text().splitlines()) for part, name in FILES.items()}
    assert {part: made.receipt["rows"][part] for part in FILES} == counts
    assert sum(counts.values()) == len({row.question.digest for row in made.rows})


def test_what_helps_depends_on_what_is_wrong(tmp_path: Path) -> None:
    way = Sorted("length", "less", samples=2)
    few = " ".join(advice(make(tmp_path / "few", way=way, sampling=Sampling(temperature=1), max_prompts=6)))
    # the ends of a model's own answers need no obedience
    assert "--max-prompts" in few and "--samples, --tails" in few and "obey" not in few and "--by" not in few
    many = " ".join(advice(make(tmp_path / "many")))
    assert "--max-prompts" not in many and "obeys" in many and "--by" in many


def test_answers_that_do_not_differ_have_no_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    way = Sorted("pattern", "more", samples=2, pattern="nobody writes this")
    with pytest.raises(DataError, match=r"80 answers .* do not differ by pattern.*--prompts"):
        make(tmp_path / "data", way=way, metric=None, sampling=Sampling(temperature=1))
    # nothing is said of ends that are not there
    assert "ends are taken" not in capsys.readouterr().err


def test_counts_are_of_lines_where_a_prompt_has_several_pairs(tmp_path: Path) -> None:
    way = replace(BRIEF, samples=2)
    made = make(tmp_path / "data", way=way, sampling=Sampling(temperature=1))
    counts = {part: len((tmp_path / "data" / name).read_text().splitlines()) for part, name in FILES.items()}
    assert {part: made.receipt["rows"][part] for part in FILES} == counts
    assert counts["select"] + counts["report"] < made.tally.kept - counts["train"]


def test_a_pattern_sorts_and_the_answers_that_are_right_may_be_kept_alone(tmp_path: Path) -> None:
    way = Sorted("pattern", "more", samples=4, pattern=r"\?$")
    metric = MetricChoice("pattern", "more", r"\?$")
    made = make(tmp_path / "data", way=way, sampling=Sampling(temperature=1), metric=metric)
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert rows and all(row["positive"].endswith("?") and row["negative"].endswith(".") for row in rows)
    assert made.answers is not None and made.answers.kept == 160
    with pytest.raises(DataError, match="column answer"):
        make(tmp_path / "x", way=replace(way, only_correct=True), sampling=Sampling(temperature=1))
    with pytest.raises(DataError, match="all the same"):
        make(tmp_path / "y", way=way)


# judges


class FakeJudge:
    """Says yes to short answers; to answers with a certain word it says that they make no sense."""

    def __init__(self, trusted: bool = True) -> None:
        self.trusted, self.asked = trusted, 0

    @property
    def knows_traits(self) -> bool:
        return self.trusted

    def shows(self, trait: str, prompts: Any, answers: Any) -> list[float]:
        assert trait == "in few words"
        self.asked += len(answers)
        return [1 / len(answer.split()) if self.trusted else float("nan") for answer in answers]

    def coherent(self, prompts: Any, answers: Any) -> list[float]:
        self.asked += len(answers)
        return [0.1 if "bell" in answer else 0.9 for answer in answers]

    def described(self) -> dict[str, Any]:
        return {"judge": "fake"}


def judged(out: Path, judge: FakeJudge, **more: Any) -> Made:
    engine = FakeEngine()
    return make_data(request(out, **{"trait": "in few words", **more}), Engines(engine, engine, None, judge))


def test_a_judge_takes_incoherent_rows_and_those_that_contradict_their_label(tmp_path: Path) -> None:
    made = judged(tmp_path / "data", FakeJudge())
    assert 0 < made.tally.reasons[filters.INCOHERENT] < 40 and filters.CONTRADICTS not in made.tally.reasons
    assert not any("bell" in sample.answer.text for row in made.rows for _, sample in row.sides)  # type: ignore[union-attr]
    assert [one.metric for one in made.differences] == ["length", "the judge's yes"] and made.differences[1].obeyed
    swapped = Opposites(Instructions(("Answer at length.",), ("Answer briefly.",)))
    with pytest.raises(DataError, match=filters.CONTRADICTS):
        judged(tmp_path / "swapped", FakeJudge(), way=swapped, metric=None)


def test_a_judge_without_a_trait_judges_coherence_alone_and_that_is_said(tmp_path: Path) -> None:
    with collected() as notices:
        made = judged(tmp_path / "data", FakeJudge(), trait=None)
    assert any("whether answers make sense, and nothing else" in text for text in notices)
    assert "rubric" not in made.receipt["behavior"]


def test_thoughts_that_are_asked_for_and_not_there_are_said(tmp_path: Path) -> None:
    with collected() as notices:
        make(tmp_path / "data", think="only")
    assert any("no answer has a thought: --think only changes nothing" in text for text in notices)


def test_a_judge_is_asked_once(tmp_path: Path) -> None:
    first, second = FakeJudge(), FakeJudge()
    judged(tmp_path / "data", first)
    judged(tmp_path / "data", second)
    assert first.asked > 0 and second.asked == 0


def test_a_judge_without_an_opinion_takes_no_row_and_sorts_nothing(tmp_path: Path) -> None:
    made = judged(tmp_path / "data", FakeJudge(trusted=False))
    assert filters.CONTRADICTS not in made.tally.reasons
    assert [one.metric for one in made.differences] == ["length"]
    way = Sorted("judge", "more", samples=6, share=0.2)
    sampling = Sampling(temperature=1)
    made = judged(tmp_path / "sorted", FakeJudge(), way=way, sampling=sampling)
    assert made.receipt["paired"] and made.differences[0].obeyed
    # a judge that failed its trial is refused before an answer is written
    with pytest.raises(DataError, match="the judge cannot sort answers by the trait"):
        judged(tmp_path / "none", FakeJudge(trusted=False), way=way, sampling=sampling)
    assert not (tmp_path / "none").exists()


def test_the_same_answer_is_not_asked_for_twice(tmp_path: Path) -> None:
    for number, way in enumerate((replace(BRIEF, samples=2), Sorted("length", "less", samples=2))):
        with pytest.raises(DataError, match="at a temperature of 0 are all the same"):
            make(tmp_path / str(number), way=way, sampling=Sampling(temperature=0))


class CutOff(FakeEngine):
    """Ends no answer of more than 15 words."""

    def answer(self, request: Any, sampling: Sampling) -> Any:
        answer = super().answer(request, sampling)
        return replace(answer, ended=answer.tokens <= 15)


def test_answers_that_are_cut_off_are_the_long_end_of_a_length(tmp_path: Path) -> None:
    # one answer to each prompt: the ends are classes
    way = Sorted("length", "less", samples=1, share=0.25)
    made = make(tmp_path / "data", CutOff(), way=way)
    assert not made.receipt["paired"] and made.differences[0].obeyed
    assert filters.CUT not in made.tally.reasons and made.tally.kept == len(made.rows) >= 16
