"""Noise is not a behaviour: data that shows no difference is refused, and too little of it is not called certain."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run

from steer2edit.bootstrap import LEAST_DRAWS
from steer2edit.capture.evidence import checked, distinct_prompts, telling_first_word
from steer2edit.capture.run import capture
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vectors import Vectors
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.answers import LABELS
from steer2edit.data.contrast import Example
from steer2edit.data.tokens import encode
from steer2edit.errors import PlanError, Steer2EditError
from steer2edit.methods import component, make_plan, steering
from steer2edit.notices import collected
from steer2edit.plan import Divergence, EditPlan
from steer2edit.plan.measured import LARGEST_STRENGTH
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.scores import Scoring
from steer2edit.strength.line_search import find_strength

SAME = [{**row, "negative": row["positive"]} for row in ROWS]
PADDED = [{**row, "negative": f"  {row['positive']}\n"} for row in ROWS]
SWAPPED = [
    {"prompt": row["prompt"], "response": row["positive"], "label": label} for label in LABELS for row in ROWS[::-1]
]
# as long as the shorter is, both are "the cat"
CUT = [{"prompt": "what is it ?", "positive": "the cat", "negative": "the cat sees the dog"}]
ONE_PAIR = ROWS[:1]
REPEATED = ROWS[:1] * 50
ONE_PROMPT = [{**row, "prompt": "what is it ?"} for row in ROWS]
LABELLED = [{"prompt": "what is it ?", "response": row[label], "label": label} for row in ROWS for label in LABELS]


def examples_of(rows: list[dict[str, str]]) -> list[Example]:
    return [
        Example(row["prompt"], row[label], label, f"line {index + 1}", index)
        for index, row in enumerate(rows)
        for label in LABELS
    ]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compiled(model: Path, data: Path, folder: Path, *more: object) -> Any:
    neutral = folder / "neutral.txt"
    neutral.write_text("the old cat sees a small bird and the river runs . " * 12)
    given = ["--data", data, "--neutral", neutral, "--no-report", "--to", "lora", "--out", folder / "out", *more]
    return run("compile", model, *given)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (SAME, "both classes hold the same responses"),
        (PADDED, "both classes hold the same responses"),
        (SWAPPED, "both classes hold the same responses"),
        (CUT, "token by token"),
    ],
    ids=["same", "white space", "labels", "cut"],
)
@pytest.mark.parametrize("more", [(), ("--all-components",)], ids=["stable", "all"])
def test_classes_that_do_not_differ_are_refused(
    tiny_llama: Path, tmp_path: Path, rows: list[dict[str, str]], said: str, more: tuple[str, ...]
) -> None:
    result = compiled(tiny_llama, write(tmp_path / "x.jsonl", rows), tmp_path, *more)
    assert result.exit_code == 2 and said in result.stderr, result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rows", [ONE_PAIR, REPEATED, ONE_PROMPT, LABELLED], ids=["one pair", "repeated", "one prompt", "labelled"]
)
def test_one_prompt_leaves_no_sign_beyond_doubt(tiny_llama: Path, tmp_path: Path, rows: list[dict[str, str]]) -> None:
    data = write(tmp_path / "x.jsonl", rows)
    refused = compiled(tiny_llama, data, tmp_path)
    assert refused.exit_code == 2 and "1 distinct prompt, and from fewer than 6" in refused.stderr, refused.output
    assert "--all-components" in refused.stderr and not (tmp_path / "out").exists()
    made = compiled(tiny_llama, data, tmp_path, "--all-components", "--json")
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    assert any("1 distinct prompt" in text for text in said["notices"])
    assert any("49 of the data's 50 rows repeat" in text for text in said["notices"]) is (rows is REPEATED)
    plan = EditPlan.load(tmp_path / "out" / "steer2edit" / "plan.safetensors")
    assert plan.edits and not any(bool(table.stable.any()) for table in plan.scores.values())


def test_repeated_rows_change_no_interval_and_no_prompt_count(
    tiny_llama: Path, statistics_of: Callable[..., Any], loaded: LoadedModel
) -> None:
    """The bootstrap is over prompts: it is the same whether every row stands there once or five times."""
    checkpoint = open_checkpoint(tiny_llama)
    tables = []
    for times in (1, 5):
        examples = examples_of(ROWS * times)
        assert distinct_prompts(examples) == {"positive": len(ROWS), "negative": len(ROWS)}
        with collected() as said:
            encoded = checked(examples, encode(examples, loaded.tokenizer))
        assert bool(said) is (times > 1)
        assert len({one.row for one in encoded}) == len(ROWS)
        background = statistics_of(tiny_llama)
        source = {**background.source, "distinct_prompts": distinct_prompts(examples)}
        own = capture(loaded, encoded, source=source)
        scoring = Scoring(checkpoint, loaded.spec, own)
        tables.append([one.table for one in scoring.score(loaded.spec.sites)])
    for once, often in zip(*tables, strict=True):
        assert once.interval is not None and often.interval is not None
        assert torch.allclose(once.interval, often.interval, atol=1e-4) and torch.equal(once.stable, often.stable)
    assert any(bool(table.stable.any()) for table in tables[0])


def test_rows_of_two_sources_with_one_number_keep_their_own_weights(loaded: LoadedModel) -> None:
    both = [*examples_of(ROWS[:3]), *examples_of(ROWS[3:6])]
    encoded = checked(both, encode(both, loaded.tokenizer))
    assert [one.row for one in encoded[::2]] == list(range(6))


def test_some_pairs_that_cancel_out_are_said(loaded: LoadedModel) -> None:
    examples = examples_of([*ROWS[:6], *SAME[6:]])
    with collected() as said:
        checked(examples, encode(examples, loaded.tokenizer))
    assert said == [f"{len(ROWS) - 6} of the data's positive examples are negative examples too, and cancel out"]


@pytest.fixture
def rounded(tiny_llama: Path, statistics_of: Callable[..., Any]) -> Statistics:
    """Statistics whose classes differ by rounding alone: a ten-millionth of what the writers give."""
    statistics: Statistics = statistics_of(tiny_llama)
    moments = dict(statistics.moments)
    for (key, side, label), one in statistics.moments.items():
        if side == "output" and label == "positive":
            other = statistics.moments[key, side, "negative"]
            noise = torch.randn(one.mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            size = float(other.m2.sum().sqrt())
            moments[key, side, label] = replace(one, mean=other.mean + noise * (1e-7 * size / float(noise.norm())))
    return replace(statistics, moments=moments)


@pytest.mark.parametrize("method", ["steering", "component", "ablation"])
def test_statistics_whose_classes_differ_by_rounding_are_refused(
    tiny_llama: Path, loaded: LoadedModel, rounded: Statistics, method: str
) -> None:
    scoring = Scoring(open_checkpoint(tiny_llama), loaded.spec, rounded)
    with pytest.raises(PlanError, match="no behaviour to compile"):
        make_plan(scoring, method=method)


@pytest.mark.parametrize("options", [steering.Options(stable=False), component.Options(top_heads=4, stable=False)])
def test_one_layer_of_rounding_is_left_alone(
    tiny_llama: Path, loaded: LoadedModel, statistics_of: Callable[..., Any], rounded: Statistics, options: Any
) -> None:
    statistics = statistics_of(tiny_llama)
    moments = {key: (rounded if key[0] == "attn_out.1" else statistics).moments[key] for key in statistics.moments}
    scoring = Scoring(open_checkpoint(tiny_llama), loaded.spec, replace(statistics, moments=moments))
    plan = make_plan(scoring, method=type(options).__module__.rsplit(".", 1)[-1], options=options)
    edited = {edit.tensor for edit in plan.edits if edit.norm}
    assert edited and loaded.spec.site("attn_out.1").matrix not in edited
    assert not bool(plan.scores["attn_out.1"].stable.any()) and not bool(plan.scores["attn_out.1"].g.any())


def test_a_narrow_dtype_rounds_more(tiny_llama: Path, statistics_of: Callable[..., Any]) -> None:
    statistics: Statistics = statistics_of(tiny_llama)
    bound = {
        dtype: replace(statistics, source={**statistics.source, "dtype": dtype})._rounding("attn_out.0")
        for dtype in ("float32", "float16", "bfloat16")
    }
    size = math.sqrt(sum(float(statistics.moments["attn_out.0", "output", label].m2.sum()) for label in LABELS) / 2)
    assert 1e-7 * size < bound["float32"] < 1e-5 * size < bound["float16"] < bound["bfloat16"] < 0.02 * size
    # what is real is far above it
    assert float(statistics.difference("attn_out.0").norm()) > bound["bfloat16"]


@pytest.mark.parametrize("size", [0.0, math.nan, 1e-11, 1e-30])
def test_vectors_of_nothing_are_refused(tiny_llama: Path, tmp_path: Path, size: float) -> None:
    Vectors({"residual.1": torch.full((32,), size)}).save(tmp_path / "x.vectors.safetensors")
    result = compiled(
        tiny_llama, write(tmp_path / "x.jsonl", ROWS), tmp_path, "--vectors", tmp_path / "x.vectors.safetensors"
    )
    assert result.exit_code == 2 and not (tmp_path / "out").exists(), result.output
    assert any(
        text in result.stderr for text in ("every vector is zero", "NaN", "hardly changes the model", "no behaviour")
    )


def test_vectors_of_one_size_or_another_give_the_same_edit(tiny_llama: Path, tmp_path: Path) -> None:
    plans = []
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for size in (1.0, 1e-3):
        Vectors({"residual.1": size * direction}).save(tmp_path / "x.vectors.safetensors")
        result = compiled(
            *(tiny_llama, write(tmp_path / "x.jsonl", ROWS), tmp_path, "--force", "--json"),
            *("--vectors", tmp_path / "x.vectors.safetensors"),
        )
        assert result.exit_code == 0, result.output
        plans.append(EditPlan.load(tmp_path / "out" / "steer2edit" / "plan.safetensors"))
    assert plans[1].norm == pytest.approx(plans[0].norm, rel=0.02)


def test_a_search_that_runs_off_is_refused() -> None:
    def measure(strength: float) -> Divergence:
        return Divergence(1e-20 * strength**2, 0.0, 0.0, 1, 1.0, 1.0)

    for start in (1.0, 1e9, math.inf):
        with pytest.raises(Steer2EditError, match="hardly changes the model"):
            find_strength(measure, 0.05, start=start)


@pytest.mark.parametrize("strength", [1e30, -1e30, math.inf, math.nan, 1.01 * LARGEST_STRENGTH])
def test_an_absurd_strength_is_refused(tiny_llama: Path, tmp_path: Path, strength: float) -> None:
    result = compiled(tiny_llama, write(tmp_path / "x.jsonl", ROWS), tmp_path, "--strength", strength)
    assert result.exit_code == 2 and "--strength" in result.stderr and "finite number" in result.stderr, result.output
    with pytest.raises(PlanError, match="expected a finite number"):
        replace(EditPlan(None, ())).at_strength(strength)  # type: ignore[arg-type]


def test_the_least_number_of_prompts_is_that_of_a_sign_test() -> None:
    chance = [2 * 0.5**draws for draws in (LEAST_DRAWS - 1, LEAST_DRAWS)]
    assert chance[0] > 0.05 >= chance[1]


@pytest.mark.parametrize(("yes", "told"), [(0, True), (6, True), (9, False), (12, False)])
def test_a_first_word_that_tells_the_classes_apart_is_said(yes: int, told: bool) -> None:
    examples = [
        Example(
            "q", f"{'No' if (row >= yes) == (label == 'positive') else 'Yes,'} because of {row}", label, "here", row
        )
        for row in range(24)
        for label in LABELS
    ]
    said = telling_first_word(examples)
    assert (said is not None) == told
    if said is not None:
        assert f"{24 - yes} of 24" in said and f"{yes} of 24" in said
    # one class alone, or few responses, show nothing
    assert telling_first_word(examples[::2]) is None
    assert telling_first_word(examples[-8:]) is None


def test_a_first_word_is_a_character_where_words_have_no_spaces_between_them() -> None:
    examples = [
        Example("q", f"{'不' if label == 'positive' else '可'}能说第{row}个", label, "here", row)
        for row in range(24)
        for label in LABELS
    ]
    said = telling_first_word(examples)
    assert said is not None and "24 of 24" in said and "'不'" in said
