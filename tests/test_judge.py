"""A judge is used where it agrees with labels, and its probabilities are moved to where the labels part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from steer2edit.engines.agreement import LEAST_AUC, LabelledAnswer, agreement_of, labelled_answers
from steer2edit.engines.engine import Answer, Request, Sampling
from steer2edit.engines.judge import Judge, coherence_request, trait_request, tried
from steer2edit.errors import DataError
from steer2edit.notices import collected
from steer2edit.progress import Progress, silent


class Opinions:
    """An engine that says yes with a probability that a function of the question gives."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self.asked: list[Request] = []

    def described(self) -> dict[str, Any]:
        return {"engine": "opinions"}

    def write(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress = silent
    ) -> Iterator[tuple[int, Answer]]:
        raise AssertionError("a judge writes nothing")

    def yes(self, requests: Sequence[Request]) -> list[float]:
        self.asked += requests
        return [self.of(str(request.prompt)) for request in requests]

    def count_tokens(self, text: str) -> int | None:
        return None


LABELLED = [
    LabelledAnswer("kind", f"question {n}", f"{'nice' if n % 2 else 'rude'} answer {n}", n % 2 == 1) for n in range(20)
]
GENERAL = [LabelledAnswer("kind", "q", f"{'sense' if n % 2 else 'noise'} {n}", False, n % 2 == 1) for n in range(20)]


def knowing(prompt: str) -> float:
    """Says yes too often, but oftener where it is right."""
    wrong = "rude" in prompt or "noise" in prompt
    return 0.9 if wrong else 0.97


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    agreement = agreement_of("traits", [0.9, 0.8, 0.4, 0.6, 0.3, 0.2, 0.1, 0.4], [True] * 4 + [False] * 4)
    # of 16 pairs one of 0.4 and 0.4 counts a half
    assert agreement.auc == pytest.approx(15.5 / 16)
    assert agreement.low <= agreement.auc <= agreement.high <= 1
    assert 0.4 < agreement.threshold < 0.6 or 0.3 < agreement.threshold < 0.4


def test_chance_is_not_trusted_whatever_it_says() -> None:
    labels = [True, False] * 30
    same = agreement_of("traits", [0.99] * 60, labels)
    assert same.auc == 0.5 and not same.trusted
    # the threshold is set without the label in question: what says the same of all is right by chance at most
    assert same.right.value <= 0.5
    wrong = agreement_of("traits", [0.0 if label else 1.0 for label in labels], labels)
    assert wrong.auc == 0 and not wrong.trusted
    # few labels that happen to be in order
    few = agreement_of("traits", [0.6, 0.5, 0.3, 0.7, 0.2, 0.5, 0.4, 0.6], [True] * 4 + [False] * 4)
    assert few.auc < LEAST_AUC and not few.trusted


def test_silence_is_no_agreement() -> None:
    labels = [True, False] * 10
    agreement = agreement_of("traits", [math.nan] * 20, labels)
    assert agreement.silent == 20 and agreement.right.value == 0 and not agreement.trusted


def test_too_few_labels() -> None:
    with pytest.raises(DataError, match="at least 4 answers of each kind, and there are 5 and 3"):
        agreement_of("traits", [0.5] * 8, [True] * 5 + [False] * 3)


def test_a_judge_that_says_yes_too_often_is_moved() -> None:
    judge = tried(Opinions(knowing), LABELLED, GENERAL)
    assert judge.on_traits.trusted and judge.on_traits.right.value == 1
    shown = judge.shows("kind", ["q", "q"], ["a nice one", "a rude one"])
    assert shown[0] > 0.5 > shown[1]
    sense = judge.coherent(["q", "q"], ["sense", "noise"])
    assert sense[0] > 0.5 > sense[1]
    assert math.isnan(
        Judge(Opinions(lambda _: math.nan), judge.on_traits, judge.on_coherence).shows("kind", ["q"], ["a"])[0]
    )


def test_a_judge_under_the_bound_is_not_asked_and_says_so() -> None:
    engine = Opinions(lambda prompt: 0.9)
    with collected() as notices:
        judge = tried(engine, LABELLED, GENERAL)
    assert len(notices) == 2 and "is not used for traits: on 20 labelled answers its AUC is 0.50" in notices[0]
    asked = len(engine.asked)
    assert all(map(math.isnan, judge.shows("kind", ["q"], ["a"]) + judge.coherent(["q"], ["a"])))
    assert len(engine.asked) == asked
    assert judge.described()["shows"]["trusted"] is False


def test_the_packaged_labels() -> None:
    rows = labelled_answers()
    assert len(rows) == 60 and len({(row.prompt, row.answer) for row in rows}) == 60
    by_trait = {trait: [row for row in rows if row.trait == trait] for trait in {row.trait for row in rows}}
    assert [len(part) for part in by_trait.values()] == [20, 20, 20]
    for part in by_trait.values():
        assert 8 <= sum(row.shows for row in part) <= 12 and sum(not row.coherent for row in part) == 3
        # what makes no sense shows nothing
        assert not any(row.shows and not row.coherent for row in part)


def test_a_question_to_the_judge_is_short_and_plain() -> None:
    text = str(trait_request("Warm: it greets.", "Hello?", "x" * 9000).prompt)
    assert text.startswith("Trait: Warm: it greets.\n\nQuestion: Hello?\n\nAnswer: xxx") and len(text) < 4300
    assert text.endswith("Yes or No?")
    assert str(coherence_request("Hello?", "Hi.").prompt).endswith("Reply with Yes or No.")
