"""Making data: the folder, its receipt, runs that are killed and go on, and the prompts that are asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import save_chat_model
from data_making import BRIEF, contents, make, questions, request
from fake_engine import NOUNS, FakeEngine

from steer2edit.data.contrast import read_contrast
from steer2edit.data.data_folder import RECEIPT, open_data_folder
from steer2edit.data.prompts import Message, prompt_digest
from steer2edit.data.questions import Question, read_questions
from steer2edit.engines.engine import Sampling
from steer2edit.errors import DataError, TargetError
from steer2edit.files.locks import claimed
from steer2edit.pairs.folder import FILES
from steer2edit.pairs.journal import JOURNAL
from steer2edit.pairs.make import Engines, make_data
from steer2edit.pairs.questions import chosen_questions
from steer2edit.pairs.telling import Instructions, told
from steer2edit.pairs.ways import Opposites, PositiveOnly


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from steer2edit.architecture import read_spec
    from steer2edit.checkpoint import open_checkpoint
    from steer2edit.runtime.model import load_model

    checkpoint = open_checkpoint(save_chat_model(tmp_path_factory.mktemp("models") / "chat"))
    return load_model(checkpoint, read_spec(checkpoint))


def test_the_files_are_todays_formats_and_disjoint_by_prompt(tmp_path: Path) -> None:
    made = make(tmp_path / "data")
    examples = read_contrast(tmp_path / "data" / "train.jsonl")
    held_out = {part: read_questions(tmp_path / "data" / FILES[part]) for part in ("select", "report")}
    parts = [{prompt_digest(e.prompt) for e in examples}, *({q.digest for q in found} for found in held_out.values())]
    assert all(parts) and len(set.union(*parts)) == sum(map(len, parts)) == 40
    assert all(q.positive and q.negative for found in held_out.values() for q in found)
    assert made.tally.kept == len(made.rows) == 40
    receipt = dict(open_data_folder(tmp_path / "data").receipt)
    assert receipt == {"format": "steer2edit.data.1", **made.receipt, "files": receipt["files"]}
    assert receipt["rows"] == {"offered": 40, "kept": 40, "left_out": {}, "train": 20, "select": 8, "report": 12}
    assert receipt["metric"] == {"name": "length", "goal": "less"}
    # what made an answer is not in the row
    assert "briefly" not in (tmp_path / "data" / "train.jsonl").read_text()


@pytest.mark.parametrize("after", [0, 1, 30, 79])
def test_a_run_that_is_killed_twice_gives_what_an_unbroken_one_gives(tmp_path: Path, after: int) -> None:
    make(tmp_path / "whole")
    engines = [FakeEngine(dies_after=after), FakeEngine(dies_after=3), FakeEngine()]
    # one more answer tries out the system message
    for engine in engines[:2]:
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "broken", engine)
    # the last line may be half written
    with (tmp_path / "broken" / JOURNAL).open("ab") as file:
        file.write(b'{"key": "12')
    assert not (tmp_path / "broken" / RECEIPT).exists()
    make(tmp_path / "broken", engines[2])
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    # each kill lost a batch at most
    assert sum(engine.seen for engine in engines) <= 80 + 2 * 8 + 3


def test_a_finished_run_is_reused(tmp_path: Path) -> None:
    first = make(tmp_path / "data")
    before = contents(tmp_path / "data")
    # what is installed may have changed meanwhile
    engine = FakeEngine(version="2")
    again = make(tmp_path / "data", engine)
    assert engine.seen <= 1 and again.reused and not first.reused
    del before[RECEIPT]
    assert before.items() <= contents(tmp_path / "data").items()


def test_other_settings_are_refused_and_force_begins_anew(tmp_path: Path) -> None:
    make(tmp_path / "data")
    before = contents(tmp_path / "data")
    with pytest.raises(DataError, match=r"sampling.temperature was 0.0 and is 1.*--force"):
        make(tmp_path / "data", sampling=Sampling(temperature=1))
    with pytest.raises(DataError, match=r"engine.model was \"fake\" and is \"other\""):
        make(tmp_path / "data", FakeEngine("other"))
    assert contents(tmp_path / "data") == before
    make(tmp_path / "data", sampling=Sampling(temperature=1, seed=1), force=True)
    assert contents(tmp_path / "data") != before


def test_another_run_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with claimed([tmp_path / "other"]):
        make(tmp_path / "data")
    (tmp_path / "data" / "mine.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(TargetError, match=r"mine\.txt"):
            make(tmp_path / "data", force=force)
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetError, match="not a folder"):
        make(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / JOURNAL).write_text('{"some": "journal"}\n')
    with pytest.raises(DataError, match="is not a journal"):
        make(tmp_path / "mine")


def test_the_order_of_the_prompts_changes_no_file(tmp_path: Path) -> None:
    way = replace(BRIEF, instructions=Instructions(("Answer briefly.",), ("Answer at length.",)))
    make(tmp_path / "one", way=way, max_prompts=30)
    engine = FakeEngine()
    backwards = replace(request(tmp_path / "two", way=way, max_prompts=30), questions=questions()[::-1])
    make_data(backwards, Engines(engine, engine, None))
    for name in FILES.values():
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_model_that_does_not_obey_is_noticed(tmp_path: Path) -> None:
    way = Opposites(Instructions(("Answer like a pirate.",), ("Answer like a clerk.",)))
    made = make(tmp_path / "data", way=way)
    assert made.verdict.word == "not" and "do not differ in length" in made.verdict.reasons[0]
    assert dict(open_data_folder(tmp_path / "data").receipt)["verdict"]["word"] == "not"
    obeying = make(tmp_path / "two")
    assert obeying.verdict.word == "not measured" and obeying.differences[0].obeyed


def test_the_model_reads_the_rows(tmp_path: Path, chat_model: Any) -> None:
    made = make(tmp_path / "data", loaded=chat_model)
    assert made.separation is not None and made.separation.prompts == 28
    assert made.receipt["separation"]["d_prime"] == made.separation.d_prime
    assert made.verdict.word in ("steerable", "weak", "not")
    same = Opposites(Instructions(("Answer like a pirate.",), ("Answer like a clerk.",)))
    noise = make(tmp_path / "noise", loaded=chat_model, way=same, metric=None)
    assert noise.verdict.word == "not" and "no better than swapped labels" in noise.verdict.reasons[0]


def test_a_template_without_system_messages_gets_the_instruction_in_the_users(tmp_path: Path) -> None:
    made = make(tmp_path / "data", FakeEngine(refuses_system=True))
    assert made.receipt["told_as"] == "beginning of the user's message" and made.differences[0].obeyed
    asked = told((Message("user", "why"),), "Be brief.", system=False)
    assert asked.prompt == (Message("user", "Be brief.\n\nwhy"),) and asked.system is None
    own = told((Message("system", "You are Bob."), Message("user", "why")), "Be brief.")
    assert own.system is None and own.messages[0].content == "You are Bob.\n\nBe brief."


def test_positives_alone_stand_against_the_background(tmp_path: Path) -> None:
    background = [Question((Message("user", f"tell about {noun}"),), noun) for noun in NOUNS]
    way = PositiveOnly(background, ("Answer briefly.",))
    made = make(tmp_path / "data", way=way)
    examples = read_contrast(tmp_path / "data" / "train.jsonl")
    assert {e.label for e in examples} == {"positive", "negative"}
    negative = {prompt_digest(e.prompt) for e in examples if e.label == "negative"}
    assert negative <= {q.digest for q in background}
    assert made.differences[0].obeyed
    # nobody is asked about the background
    held_out = read_questions(tmp_path / "data" / "report.jsonl")
    assert not {q.digest for q in held_out} & {q.digest for q in background}


def test_own_texts_may_be_the_positives(tmp_path: Path) -> None:
    background = [Question((Message("user", f"tell about {noun}"),), noun) for noun in NOUNS]
    replies = [f"it is {a} and {b}" for a in NOUNS[:8] for b in NOUNS[:5]]
    texts = {question.digest: reply for question, reply in zip(questions(), replies, strict=True)}
    # of the prompts some are used: each keeps its own text
    made = make(tmp_path / "data", way=PositiveOnly(background, texts=texts), max_prompts=30)
    positive = [row for row in made.rows if row.side == "positive"]  # type: ignore[union-attr]
    assert positive and all(row.sample.answer.text == texts[row.question.digest] for row in positive)  # type: ignore[union-attr]


# the prompts


def test_prompts_that_repeat_are_asked_once_and_the_choice_does_not_depend_on_the_order() -> None:
    many = questions()
    assert chosen_questions([*many, *many], None) == many
    some = chosen_questions(many, 10)
    # short ones too, where they differ by case, space and punctuation alone
    texts = [
        "What is 2+2?",
        "what is 2+2",
        "What is 2-2?",
        " What is  love",
        '"What is love?"',
        "Name a tree.",
        "Name a river.",
    ]
    short = [Question((Message("user", text),), text) for text in texts]
    assert [short[i].where for i in (0, 2, 3, 5, 6)] == [q.where for q in chosen_questions(short, None)]
    chats = [
        (Message("user", begin), Message("assistant", "yes"), Message("user", "Go on.")) for begin in ("one", "two")
    ]
    assert len(chosen_questions([Question(chat, "") for chat in chats], None)) == 2
    assert len(some) == 10 and {q.digest for q in some} == {q.digest for q in chosen_questions(many[::-1], 10)}
    with pytest.raises(DataError, match="no prompts"):
        chosen_questions([], None)
