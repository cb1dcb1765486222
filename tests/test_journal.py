"""The journal of made data: what a kill leaves is taken up, and what is there stays until a new run has begun."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
from data_making import contents, make, questions
from fake_engine import NOUNS, FakeEngine

from steer2edit.data.prompts import Message
from steer2edit.data.questions import Question
from steer2edit.engines.engine import Sampling
from steer2edit.errors import DataError, EngineError
from steer2edit.pairs.journal import JOURNAL, Journal, differing
from steer2edit.pairs.ways import PositiveOnly
from steer2edit.pairs.writing import drawn

SEEDED = Sampling(temperature=1, seed=1)


def test_the_journal_drops_what_is_half_written_anywhere(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    with Journal(path, {"a": 1}) as journal:
        for number in range(5):
            journal.add(str(number), {"text": "é" * number})
        journal.sync()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Journal(path, {"a": 1}) as journal:
            lines = whole[:cut].count(b"\n")
            assert len(journal) == max(0, lines - 1)
            journal.add("new", 1)
        with Journal(path, {"a": 1}) as journal:
            assert len(journal) == max(0, lines - 1) + 1


def test_force_loses_nothing_where_the_new_run_fails_before_its_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    make(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for error in (KeyboardInterrupt(), EngineError("the server is down")):
        engine = FakeEngine()
        monkeypatch.setattr(engine, "answer", Mock(side_effect=error))
        with pytest.raises(type(error)):
            make(folder, engine, sampling=SEEDED, force=True)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        make(folder, FakeEngine(dies_after=20), sampling=SEEDED, force=True)
    # from its first answer on the folder is the new run's, which goes on
    assert [path.name for path in folder.iterdir()] == [JOURNAL]
    made = make(folder, sampling=SEEDED)
    assert not made.reused and contents(folder).keys() | {JOURNAL} == before.keys()
    # and where there is no answer to write, with its files
    background = [Question((Message("user", f"tell about {noun}"),), noun) for noun in NOUNS]
    texts = {question.digest: f"it is {question.prompt[-1]}" for question in questions()}
    make(folder, way=PositiveOnly(background, texts=texts), force=True)
    assert make(folder, way=PositiveOnly(background, texts=texts)).reused


def test_a_journal_of_another_time_or_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    for line, message in (
        ('{"format": "steer2edit.journal.1", "settings": {}}', "an older steer2edit's.*give another place"),
        ('{"format": "x", "settings": {}}', "not a journal of steer2edit: give another place"),
        ('{"format": "steer2edit.journal.2", "settings": {"a": 2}}', "a was 2 and is 1.*give another place"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(DataError, match=message):
            Journal(path, {"a": 1}, otherwise="give another place")


def test_settings_that_are_set_as_a_whole_are_one_line() -> None:
    without, with_judge = {"judge": None, "tails": 0.1}, {"judge": {"model": "m", "engine": {"of": "f"}}, "tails": 0.1}
    assert differing(without, with_judge) == ["judge was none and is set"]
    assert differing(with_judge, without) == ["judge was set and is none"]
    other = {"judge": {"model": "n", "engine": {"of": "f"}}, "tails": 0.2}
    assert differing(with_judge, other) == ['judge.model was "m" and is "n"', "tails was 0.1 and is 0.2"]
    assert not differing(with_judge, {**with_judge, "versions": {"torch": "9"}})


def test_what_answers_depend_on_has_the_names_that_older_journals_know() -> None:
    assert drawn(Sampling(9, 0.5, 0.9, 3)) == {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    # at a temperature of 0 nothing is drawn, but a penalty acts
    assert drawn(Sampling(9, 0.0, 0.9, 3)) == drawn(Sampling(9)) != drawn(Sampling(9, repetition_penalty=1.1))
