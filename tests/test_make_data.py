"""Making data: the folder, its receipt, runs that are killed and go on, and data that holds no behaviour."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import save_chat_model
from fake_engine import NOUNS, FakeEngine

from steer2edit.cli.data import advice
from steer2edit.data.contrast import read_contrast
from steer2edit.data.data_folder import RECEIPT, open_data_folder
from steer2edit.data.metric_choice import MetricChoice
from steer2edit.data.prompts import Message, prompt_digest
from steer2edit.data.questions import Question, read_questions
from steer2edit.engines.engine import Sampling
from steer2edit.errors import DataError, TargetError
from steer2edit.files.locks import claimed
from steer2edit.notices import collected
from steer2edit.pairs import filters
from steer2edit.pairs.folder import FILES
from steer2edit.pairs.from_trait import FromTrait
from steer2edit.pairs.journal import JOURNAL
from steer2edit.pairs.make import DataRequest, Engines, Made, make_data
from steer2edit.pairs.questions import chosen_questions
from steer2edit.pairs.telling import Instructions, told
from steer2edit.pairs.trait import Trait, read_numbered, read_opposite
from steer2edit.pairs.ways import Opposites, PositiveOnly, Sorted

PROMPTS = [f"what is the {a} of the {b}" for a in NOUNS[:8] for b in NOUNS[8:14]]
BRIEF = Opposites(Instructions(("Answer briefly.",), ("Answer at length.",)))


def questions(count: int = 40) -> list[Question]:
    return [Question((Message("user", text),), f"row {i}") for i, text in enumerate(PROMPTS[:count])]


def request(out: Path, **more: Any) -> DataRequest:
    settings: dict[str, Any] = {"way": BRIEF, "metric": MetricChoice("length", "less"), "batch": 8}
    return DataRequest(out, "brief", "in few words", questions(), **{**settings, **more})


def make(out: Path, engine: FakeEngine | None = None, loaded: Any = None, **more: Any) -> Made:
    engine = engine or FakeEngine()
    return make_data(request(out, **more), Engines(engine, engine, loaded))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*FILES.values(), RECEIPT)}


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


def test_answers_that_do_not_differ_have_no_ends(tmp_path: Path) -> None:
    way = Sorted("pattern", "more", samples=2, pattern="nobody writes this")
    with pytest.raises(DataError, match=r"80 answers .* do not differ by pattern"):
        make(tmp_path / "data", way=way, metric=None, sampling=Sampling(temperature=1))


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


# traits


def test_a_sentence_becomes_instructions_questions_and_pairs(tmp_path: Path) -> None:
    trait = Trait.read("brief: answers briefly, with nothing around it.")
    assert trait == Trait("brief", "answers briefly, with nothing around it")
    made = make(tmp_path / "data", way=FromTrait(trait, questions=12))
    assert made.receipt["behavior"]["opposite"] == "answers at length, twice over"
    assert made.receipt["behavior"]["written_questions"] == 12
    assert made.differences[0].obeyed and len(made.receipt["made"]["positive"]) == 3
    prompts = {row.question.where for row in made.rows}
    assert len(prompts) == 40 and sum("of the writer" in where for where in prompts) == 12


@pytest.mark.parametrize("text", ["blunt", "blunt:", ": says it", "a: b", "x" * 80 + ": two words"])
def test_other_texts_are_not_traits(text: str) -> None:
    with pytest.raises(DataError, match="expected"):
        Trait.read(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "Style: uses long words",
        "The opposite of a style is often an extremely detailed and complex language",
        "What is meant?",
        "Beneath the surface of",
        "uses simple everyday words that a child knows",
        "in few words",
    ],
)
def test_what_is_not_an_opposite_is_not_used(text: str) -> None:
    assert read_opposite(text, Trait("brief", "in few words")) is None


def test_a_numbered_list_is_read() -> None:
    text = 'Sure!\n1. "Why is the sky blue?"\n2) Write me a short poem\n3. **Too short**\nthe end'
    assert read_numbered(text) == ["Why is the sky blue?", "Write me a short poem"]


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
