"""The logits of an artefact are those of base and plan, up to what rounding explains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, save_tiny

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.numbers import TOLERANCE, compare_numbers, in_words
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import open_checkpoint
from steer2edit.lowering import Resolved, WholeModel, resolve
from steer2edit.lowering.stored import stored_plan
from steer2edit.methods import make_plan
from steer2edit.plan import Base, Bias, EditPlan, LowRank
from steer2edit.runtime.model import Runtime
from steer2edit.scoring.scores import Scoring

FLOAT32 = Runtime(dtype="float32")


@pytest.fixture(scope="module")
def planned(tiny_llama_bf16: Path, statistics_of: Callable[..., Any]) -> Resolved:
    checkpoint = open_checkpoint(tiny_llama_bf16)
    spec = read_spec(checkpoint)
    plan = make_plan(Scoring(checkpoint, spec, statistics_of(tiny_llama_bf16))).scaled(0.5)
    return resolve(plan, checkpoint, spec)


def emitted(planned: Resolved, plan: EditPlan, out: Path) -> WholeModel:
    emit(plan, planned.checkpoint, planned.spec, "checkpoint", out)
    return WholeModel(out)


def test_rounding_explains_the_difference_of_a_rounded_checkpoint(planned: Resolved, tmp_path: Path) -> None:
    numbers, problems = compare_numbers(planned, emitted(planned, planned.plan, tmp_path / "out"), FLOAT32)
    assert not problems
    assert numbers["difference"] > 10 * TOLERANCE > 10 * numbers["unexplained"]
    assert numbers["rounding"] == pytest.approx(numbers["difference"], rel=0.01)
    words = in_words(numbers)
    assert f"differ from base + plan by {numbers['difference']:.3g}" in words
    assert f"which rounding to BF16 explains ({numbers['rounding']:.3g} expected)" in words


@pytest.mark.parametrize("factor", [0.98, 0.9, 0.5, 1.05])
def test_a_checkpoint_of_another_strength_fails_though_it_is_nearer_than_the_base(
    planned: Resolved, tmp_path: Path, factor: float
) -> None:
    other = emitted(planned, planned.plan.scaled(factor), tmp_path / "out")
    numbers, problems = compare_numbers(planned, other, FLOAT32)
    assert numbers["difference"] < numbers["effect"]
    assert len(problems) == 1 and "is unexplained" in problems[0]
    assert "has no explanation" in in_words(numbers)


def test_the_base_itself_fails(planned: Resolved) -> None:
    _, problems = compare_numbers(planned, WholeModel(planned.checkpoint.path), FLOAT32)
    assert any("does not act" in problem for problem in problems)


def test_an_edit_that_rounding_swallows_says_so(planned: Resolved, tmp_path: Path) -> None:
    weak = resolve(planned.plan.scaled(0.02), planned.checkpoint, planned.spec)
    numbers, _ = compare_numbers(weak, emitted(weak, weak.plan, tmp_path / "out"), FLOAT32)
    assert numbers["unexplained"] <= TOLERANCE
    share = numbers["difference"] / numbers["effect"]
    assert share > 0.1 and ("a coarse copy" if share <= 0.5 else "rounding changes most") in in_words(numbers)


def test_a_coarse_computation_is_called_blind(planned: Resolved, tmp_path: Path) -> None:
    model = emitted(planned, planned.plan, tmp_path / "out")
    numbers, problems = compare_numbers(planned, model, Runtime(dtype="bfloat16"))
    assert numbers["computed"] == "bfloat16" and not problems
    assert "verify with --dtype float32" in in_words(numbers)


def test_the_stored_plan_is_what_the_file_holds(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "biased", llama_config(attention_bias=True, num_hidden_layers=1), torch.bfloat16)
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    site = spec.site("attn_out.0")
    torch.manual_seed(0)
    edits = (
        LowRank(site.matrix, torch.randn(site.out_features, 2), 0.1 * torch.randn(2, site.in_features)),
        Bias(str(site.bias), 0.1 * torch.randn(site.out_features)),
    )
    plan = EditPlan(Base.of(checkpoint), edits)
    resolved = resolve(plan, checkpoint, spec)
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    after = open_checkpoint(tmp_path / "out")
    matrix, bias = stored_plan(resolved).edits
    assert isinstance(matrix, LowRank) and isinstance(bias, Bias)
    expected = after.read(site.matrix).float() - checkpoint.read(site.matrix).float()
    assert torch.equal(matrix.dense(), expected)
    assert torch.equal(bias.delta, after.read(str(site.bias)).float() - checkpoint.read(str(site.bias)).float())
    result = verify(tmp_path / "out", folder)
    assert result.ok, result.problems
    assert result.verdict.startswith("the logits differ from base + plan by")
    assert replace(result, numbers={}).verdict == ""
