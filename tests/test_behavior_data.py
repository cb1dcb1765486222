"""The packaged pairs and questions: their sides differ as the behaviour says, and not by their length."""

from __future__ import annotations

import re
from statistics import mean

import pytest

from steer2edit.data.behavior_file import behavior_files, open_behavior
from steer2edit.data.metric_choice import Written
from steer2edit.data.prompts import prompt_text

# a prompt's text, the response that shows the behaviour, and the one that does not
Sides = tuple[str, str, str]
READ = {name: file.metric.kind.read for name in behavior_files() if (file := open_behavior(name)).metric.kind.read}
WRITTEN_BY_DOMAINS = ("blunt", "fewer-hedges", "less-flattery", "no-lists", "prompt-language", "step-by-step")


def training(name: str) -> list[Sides]:
    examples = open_behavior(name).read_pairs()
    return [
        (prompt_text(positive.prompt), positive.response, negative.response)
        for positive, negative in zip(examples[::2], examples[1::2], strict=True)
    ]


def held_out(name: str) -> list[Sides]:
    found = open_behavior(name).read_questions()
    return [(prompt_text(q.prompt), q.positive, q.negative) for q in found if q.positive]


def value(name: str, prompt: str, response: str) -> float:
    """What the behaviour's own metric says of a response."""
    metric = open_behavior(name).metric
    assert metric.kind.read is not None
    return metric.kind.read(Written(prompt, response, len(response.split())), metric.pattern or "")


@pytest.mark.parametrize("name", sorted(READ))
def test_a_metric_of_written_answers_tells_the_sides_apart(name: str) -> None:
    # function words tell the language of the longer texts; the prompts to train on are as short as people's are
    rows = held_out(name) + (training(name) if name != "prompt-language" else [])
    sign = 1 if open_behavior(name).metric.goal == "more" else -1
    better = [sign * (value(name, p, positive) - value(name, p, negative)) for p, positive, negative in rows]
    assert not rows or mean(one > 0 for one in better) >= (0.7 if name == "prompt-language" else 0.9)
    assert all(one >= 0 for one in better)


@pytest.mark.parametrize("name", WRITTEN_BY_DOMAINS)
@pytest.mark.parametrize("sides", [training, held_out])
def test_lengths_of_the_two_sides_overlap(name: str, sides: object) -> None:
    """A response drawn from one side is longer than one from the other about as often as not."""
    rows: list[Sides] = sides(name)  # type: ignore[operator]
    positive, negative = ([len(row[side].split()) for row in rows] for side in (1, 2))
    area = mean((a > b) + 0.5 * (a == b) for a in positive for b in negative)
    assert 0.3 <= area <= 0.7
    assert all(0.6 <= a / b <= 1.67 for a, b in zip(positive, negative, strict=True))


@pytest.mark.parametrize("name", WRITTEN_BY_DOMAINS)
def test_no_two_prompts_of_a_behaviour_ask_nearly_the_same(name: str) -> None:
    others: list[frozenset[str]] = []
    for prompt, _, _ in training(name) + held_out(name):
        words = frozenset(re.findall(r"\w{4,}", prompt.lower()))
        near = [other for other in others if len(words) > 2 and len(words & other) > 0.75 * len(words | other)]
        assert not near, prompt
        others.append(words)


@pytest.mark.parametrize("name", WRITTEN_BY_DOMAINS)
def test_responses_begin_in_many_ways(name: str) -> None:
    rows = training(name) + held_out(name)
    for side in (1, 2):
        openings = [" ".join(row[side].split()[:3]) for row in rows]
        assert max(map(openings.count, openings)) <= 0.1 * len(rows)
