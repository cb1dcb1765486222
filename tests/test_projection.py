"""Written answers stand where the base reads them: at 0 as the negative class, at 1 as the positive one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import save_chat_model

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.answers import LABELS
from steer2edit.data.behavior import Behavior
from steer2edit.data.questions import Question
from steer2edit.evaluation.answers import Answers
from steer2edit.evaluation.candidates import plan_candidate
from steer2edit.evaluation.evaluate import evaluate
from steer2edit.evaluation.projection import PROJECTION, TOKENS, Projection
from steer2edit.methods import make_plan
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Behavior, Scoring]:
    checkpoint = open_checkpoint(save_chat_model(tmp_path_factory.mktemp("model") / "tiny"))
    loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype="float32"))
    whole = Behavior.named("formal", span="response").limited(10)
    short = tuple(replace(one, response=" ".join(one.response.split()[:6])) for one in whole.examples)
    behavior = replace(whole, examples=short)
    read = behavior.encode(loaded.tokenizer, loaded.context)
    assert max(len(one.ids) - one.start for one in read) <= TOKENS
    statistics = capture_statistics(loaded, checkpoint, behavior, background="", chat=[])
    return loaded, behavior, Scoring(checkpoint, loaded.spec, statistics)


def projection_of(setup: tuple[LoadedModel, Behavior, Scoring]) -> Projection:
    found = Projection.of(setup[0], setup[2].statistics)
    assert found is not None
    return found


def test_the_classes_stand_at_0_and_1(setup: tuple[LoadedModel, Behavior, Scoring]) -> None:
    for label, place in zip(LABELS, (1.0, 0.0), strict=True):
        rows = [one for one in setup[1].examples if one.label == label]
        questions = [Question(one.prompt, one.where) for one in rows]
        found = projection_of(setup).samples(questions, [one.response for one in rows])[PROJECTION]
        assert sum(found.values) / len(rows) == pytest.approx(place, abs=1e-4)
        assert max(found.values) - min(found.values) > 0.01  # it is no constant


def test_an_answer_without_a_word_shows_nothing_and_the_rest_keep_their_places(
    setup: tuple[LoadedModel, Behavior, Scoring],
) -> None:
    rows = [one for one in setup[1].examples if one.label == "positive"][:4]
    questions = [Question(one.prompt, one.where) for one in rows]
    projection = projection_of(setup)
    texts = [one.response for one in rows]
    whole = projection.samples(questions, texts)[PROJECTION].values
    some = projection.samples(questions, [texts[0], "  ", *texts[2:]])[PROJECTION].values
    assert some[1] == 0.0 and [*some[:1], *some[2:]] == pytest.approx([*whole[:1], *whole[2:]], abs=1e-5)
    assert projection.samples(questions, [""] * 4)[PROJECTION].values == (0.0,) * 4


def test_later_tokens_than_the_first_are_not_read(setup: tuple[LoadedModel, Behavior, Scoring]) -> None:
    question = Question(setup[1].examples[0].prompt, "")
    projection = projection_of(setup)
    long = "the cat is red . " * TOKENS
    first, second = (projection.samples([question], [long + end])[PROJECTION].values for end in ("", " but why ?" * 20))
    assert first == second


def test_vectors_from_elsewhere_and_classes_that_do_not_differ_have_no_projection(
    setup: tuple[LoadedModel, Behavior, Scoring],
) -> None:
    loaded, _, scoring = setup
    statistics = scoring.statistics
    assert Projection.of(loaded, Statistics.nothing(scoring.checkpoint)) is None
    elsewhere = replace(statistics, source={**statistics.source, "vectors": {"format": "any"}})
    assert Projection.of(loaded, elsewhere) is None
    same = {
        (key, side, population): statistics.moments[key, side, "negative"] if population == "positive" else one
        for (key, side, population), one in statistics.moments.items()
    }
    assert Projection.of(loaded, replace(statistics, moments=same)) is None


def test_the_base_reads_what_an_edit_wrote_and_not_the_edited_model(
    setup: tuple[LoadedModel, Behavior, Scoring],
) -> None:
    loaded, behavior, scoring = setup
    projection = projection_of(setup)
    questions = [Question(one.prompt, one.where) for one in behavior.examples if one.label == "positive"][:6]
    plan = make_plan(scoring, method="component")
    found = evaluate(
        loaded,
        [Answers(questions, max_new_tokens=6, projection=projection)],
        [plan_candidate(loaded, "edit", plan.scaled(50.0))],
    )
    base, edit = found.rows
    assert base.answers != edit.answers
    for row in found.rows:
        again = projection.samples(questions, row.answers[: len(questions)])[PROJECTION]
        assert row.samples[PROJECTION].values == pytest.approx(again.values, abs=1e-6)
