"""A metric is broken where the whole paired interval is worse than its tolerance; nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from steer2edit.bootstrap import LEAST_DRAWS
from steer2edit.evaluation.damage import damages
from steer2edit.evaluation.evaluate import Evaluation, Row
from steer2edit.evaluation.metrics import Metric, Sample
from steer2edit.report.tables import breaks_line, render_evaluation

RIGHT = Metric("answers right", "utility", "more", tolerance=0.02)
EMPTY = Metric("empty", "check", "less", tolerance=0.02)
LENGTH = Metric("length", "attribute", "less")


def sample(ones: int, of: int) -> Sample:
    return Sample((1.0,) * ones + (0.0,) * (of - ones))


@pytest.mark.parametrize(
    ("metric", "before", "after", "of", "broken"),
    [
        (RIGHT, 80, 50, 100, True),
        (RIGHT, 80, 79, 100, False),  # may be chance
        (RIGHT, 50, 80, 100, False),  # better
        (RIGHT, 80, 80, 100, False),
        (EMPTY, 0, 30, 100, True),
        (EMPTY, 30, 0, 100, False),
        (EMPTY, 0, 2, 100, False),
        (EMPTY, 0, LEAST_DRAWS, LEAST_DRAWS, True),
        (EMPTY, 0, LEAST_DRAWS - 1, LEAST_DRAWS - 1, False),  # too few to tell
        (replace(EMPTY, tolerance=0.5), 0, 30, 100, False),
        (replace(EMPTY, tolerance=None), 0, 100, 100, False),
    ],
)
def test_the_rule(metric: Metric, before: int, after: int, of: int, broken: bool) -> None:
    row, base = {metric.name: sample(after, of)}, {metric.name: sample(before, of)}
    found = damages([metric], row, base)
    assert bool(found) is broken
    if broken:
        (damage,) = found
        assert damage.change == row[metric.name].change(base[metric.name], metric)
        assert metric.name in str(damage)


def test_differences_are_paired_by_question() -> None:
    # two losses of 1 % each: clear where they are always the same questions, and not where as many others are won
    of = 400
    base = Sample(tuple(float(i % 2) for i in range(of)))
    lost = Sample(tuple(0.0 if i % 10 == 1 else value for i, value in enumerate(base.values)))
    mixed = Sample(tuple(float((i + i // 4) % 2) for i in range(of)))
    assert damages([RIGHT], {RIGHT.name: lost}, {RIGHT.name: base})
    assert not damages([RIGHT], {RIGHT.name: mixed}, {RIGHT.name: base})


def test_tables_mark_what_is_broken() -> None:
    def row(name: str, kind: str, right: int, empty: int) -> Row:
        return Row(
            name, kind, {"answers right": sample(right, 60), "empty": sample(empty, 60), "length": sample(30, 60)}
        )

    rows = (row("base", "base", 40, 0), row("mine", "edit", 10, 0), row("steering", "steering", 40, 30))
    evaluation = Evaluation((RIGHT, LENGTH, EMPTY), rows)
    text = render_evaluation(evaluation)
    assert "mine breaks answers right −0.5" in text and "steering breaks empty +0.5" in text
    assert "base breaks" not in text
    assert breaks_line(evaluation).startswith("answers right −0.5")
    fine = Evaluation(evaluation.metrics, (rows[0], replace(rows[0], name="mine", kind="edit")))
    assert breaks_line(fine) == "nothing that was measured" and "breaks" not in render_evaluation(fine)
    described = evaluation.described()["rows"]
    assert [len(one["breaks"]) for one in described] == [0, 1, 1]
    assert described[1]["breaks"][0]["metric"] == "answers right"


def test_loops_of_greedy_answers_are_said_to_be_that() -> None:
    metric = Metric("loops", "check", "less", tolerance=0.02)
    rows = tuple(Row(kind, kind, {"loops": sample(count, 60)}) for kind, count in (("base", 0), ("edit", 30)))
    found = Evaluation((metric,), rows)
    assert "loops +0.5" in breaks_line(found) and "--repetition-penalty 1.1" in breaks_line(found)
    assert "--repetition-penalty" not in breaks_line(replace(found, context={"repetition_penalty": 1.1}))
