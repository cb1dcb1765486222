"""Plans are values: scaling, merging and files do what algebra says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steer2edit.architecture import MatrixRole
from steer2edit.architecture.components import SHORT
from steer2edit.errors import PlanError
from steer2edit.files.atomic import save_tensors
from steer2edit.plan import Base, Bias, EditPlan, LowRank, Measured, Scores, merge

BASE = Base("model", None, "f" * 64)


def random_plan(seed: int, tensors: tuple[str, ...] = ("a", "b"), base: Base = BASE) -> EditPlan:
    generator = torch.Generator().manual_seed(seed)
    edits = [
        LowRank(t, torch.randn(5, 1, generator=generator), torch.randn(1, 7, generator=generator)) for t in tensors
    ]
    bias = Bias("bias", torch.randn(5, generator=generator))
    scores = {"mlp_out.0": Scores(*torch.randn(3, 7, generator=generator))}
    return EditPlan(base, (*edits, bias), scores, {"name": "test", "seed": seed})


def dense(plan: EditPlan, tensor: str) -> torch.Tensor:
    edit = plan.edit_of(tensor)
    assert isinstance(edit, LowRank)
    return edit.dense()


def test_scaling_scales_updates_and_lam() -> None:
    plan = random_plan(0)
    twice = plan.scaled(2.0)
    assert torch.equal(dense(twice, "a"), 2 * dense(plan, "a"))
    assert torch.equal(twice.scores["mlp_out.0"].lam, 2 * plan.scores["mlp_out.0"].lam)
    assert torch.equal(twice.scores["mlp_out.0"].g, plan.scores["mlp_out.0"].g)


def test_norms_are_those_of_the_dense_update() -> None:
    merged = merge([random_plan(0), random_plan(1)])
    edit = merged.edit_of("a")
    assert isinstance(edit, LowRank)
    assert edit.norm == pytest.approx(float(edit.dense().norm()), rel=1e-5)


def test_merging_adds_updates_exactly() -> None:
    one, two = random_plan(0), random_plan(1, ("b", "c"))
    merged = merge([one, two], [1.0, -0.5])
    assert torch.allclose(dense(merged, "b"), dense(one, "b") - 0.5 * dense(two, "b"), atol=1e-6)
    assert torch.equal(dense(merged, "a"), dense(one, "a"))
    assert torch.equal(dense(merged, "c"), -0.5 * dense(two, "c"))


@pytest.mark.parametrize(
    ("plans", "weights"),
    [
        ([], None),
        ([random_plan(0)], [1.0, 2.0]),
        ([random_plan(0), random_plan(1, base=Base("other", None, "0" * 64))], None),
    ],
)
def test_what_cannot_be_merged_is_refused(plans: list[EditPlan], weights: list[float] | None) -> None:
    with pytest.raises(PlanError):
        merge(plans, weights)


def test_a_file_holds_a_plan_exactly(tmp_path: Path) -> None:
    plan = random_plan(3)
    plan.save(tmp_path / "x.plan.safetensors")
    again = EditPlan.load(tmp_path / "x.plan.safetensors")
    assert again.hash == plan.hash and again.base == plan.base and again.method == plan.method
    assert random_plan(4).hash != plan.hash


_COST: dict[str, Any] = {
    "kl": 0.0483, "low": 0.043, "high": 0.054, "tokens": 4080, "base_perplexity": 32.29, "perplexity": 32.84, "quadratic": None,
}  # fmt: skip


_TWO = {key: value for key, value in _COST.items() if key != "quadratic"}
_COSTS = {"chat": {**_TWO, "kl": 0.19, "tokens": 9000}, "prose": _TWO}


def _kl_of(described: dict[str, Any]) -> float | None:
    costs = described.get("costs")
    return None if costs is None else float(costs[described["budget_text"]]["kl"])


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"strength": 2},
        {"selected_on": [], "strength": None},
        {"strength": 0.83, "kl_budget": 0.05, **_COST, "steps": [[1.0, 0.07], [0.83, 0.0483]]},
        {"strength": 1.0, "kl_budget": None, **_COST, "steps": []},
        {"strength": 1.0, **_COST},
        {"selected_on": ["0" * 16], "strength": 0.83, "kl_budget": 0.05, **_COST, "steps": [[0.83, 0.0483]]},
        {
            **{
                "strength": 1.5,
                "kl_budget": None,
                "classes": {"attn": {"strength": 1.5, "kl_budget": 0.1, "kl": 0.09}},
            },
            **{**_COST, "quadratic": 0.05, "steps": []},
        },
        {"strength": 3.1, "kl": 0.1, "trial": 0, "params": {"method": "steering"}, "selected_on": ["a"], **_COST},
        {**_COST, "strength": 1.0, "of another version": [1]},
        {"strength": 0.83, "kl_budget": 0.2, "budget_text": "chat", "costs": _COSTS, "steps": [[0.83, 0.19]]},
        {"strength": 1.0, "budget_text": "prose", "costs": {"prose": _COSTS["prose"]}},
    ],
)
def test_what_was_measured_is_read_and_written_as_it_was(described: dict[str, Any]) -> None:
    """Key by key and in their order: a plan's hash, which its receipts hold, is over these bytes."""
    again = Measured.from_json(json.loads(json.dumps(described)))
    assert json.dumps(again.to_json()) == json.dumps(described)
    assert again.strength == described.get("strength") and again.kl == described.get("kl", _kl_of(described))
    bare = replace(again, costs={})
    assert bare.kl is None and not {"kl", "costs"} & bare.to_json().keys()


@pytest.mark.parametrize(
    "damaged",
    [
        {"kl": 0.1},
        {"strength": 1.0, **_COST, "low": "0"},
        {"strength": 1.0, **_COST, "tokens": None},
        {"strength": "1"},
        {"strength": 1.0, **_COST, "steps": [[1.0]]},
        {"strength": 1.0, **_COST, "steps": 7},
        {"strength": 1.0, **_COST, "classes": {"attn": 0.1}},
        {"strength": 1.0, **_COST, "params": []},
        {"strength": 1.0, **_COST, "costs": _COSTS, "budget_text": "chat"},
        {"strength": 1.0, "costs": _COSTS},
        {"strength": 1.0, "costs": _COSTS, "budget_text": "verse"},
        {"strength": 1.0, "costs": {"prose": _COSTS["prose"]}, "budget_text": "chat"},
        {"strength": 1.0, "costs": {"chat": {"kl": 0.1}}, "budget_text": "chat"},
    ],
)
def test_a_plan_with_a_damaged_cost_is_refused(tmp_path: Path, damaged: dict[str, Any]) -> None:
    tensors, described = random_plan(0)._parts()
    described = json.dumps({**json.loads(described), "measured": damaged})
    save_tensors(tmp_path / "x", tensors, {"plan": described})
    with pytest.raises(PlanError):
        EditPlan.load(tmp_path / "x")


def test_one_tensor_has_one_edit() -> None:
    with pytest.raises(PlanError, match="repeated"):
        random_plan(0, ("a", "a"))


@pytest.mark.parametrize(
    "change",
    [
        {"a.A": torch.full((1, 7), float("nan"))},
        {"a.A": torch.zeros(2, 7)},
        {"a.A": torch.zeros(7)},
        {"a.B": torch.zeros(5, 1, dtype=torch.float64)},
    ],
)
def test_a_tampered_plan_is_refused(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    tensors, described = random_plan(0)._parts()
    save_tensors(tmp_path / "x", {**tensors, **change}, {"plan": described})
    with pytest.raises(PlanError, match="for a "):
        EditPlan.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("old", "new"),
    [("low_rank", "eval"), ("steer2edit.plan.1", "steer2edit.plan.9"), ('"tensor": "a"', '"tensor": "z"')],
)
def test_unknown_words_in_a_plan_are_refused(tmp_path: Path, old: str, new: str) -> None:
    tensors, described = random_plan(0)._parts()
    assert old in described
    save_tensors(tmp_path / "x", tensors, {"plan": described.replace(old, new)})
    with pytest.raises(PlanError):
        EditPlan.load(tmp_path / "x")


def test_a_plan_s_text_survives_data_of_another_form() -> None:
    from steer2edit.report.plan_text import data_line

    for examples in (None, 3, "many", ["x"], [1], {"positive": 2}):
        plan = EditPlan(Base("x", None, "0" * 64), (), data={"name": "x", "examples": examples})
        assert data_line(plan).startswith("x")


def test_a_plan_of_statistics_that_name_no_prompts_is_read(tmp_path: Path) -> None:
    plan = replace(random_plan(0), data={"name": "x", "prompts": None})
    plan.save(tmp_path / "x.plan.safetensors")
    again = EditPlan.load(tmp_path / "x.plan.safetensors")
    assert again.hash == plan.hash and again.seen == () and merge([again]).seen == ()


@pytest.mark.parametrize("role", [role.value for role in MatrixRole if role.writes and role is not MatrixRole.EMBED])
def test_scores_of_every_writer_are_described(role: str) -> None:
    from steer2edit.report.plan_text import describe_plan, render_plan

    plan = EditPlan(Base("x", None, "0" * 64), (), {f"{role}.0": Scores(*torch.randn(3, 7))}, {"name": "component"})
    assert len(describe_plan(plan)["components"]) == 6 and f"{SHORT[role]}.0" in render_plan(plan)


def test_a_rank_above_the_matrix_is_refused_when_it_is_read(tmp_path: Path) -> None:
    plan = EditPlan(Base("m", None, "0" * 64), (LowRank("w", torch.ones(4, 9), torch.ones(9, 6)),))
    plan.save(tmp_path / "x.plan.safetensors")
    with pytest.raises(PlanError, match="rank is 9; a matrix of 4 x 6"):
        EditPlan.load(tmp_path / "x.plan.safetensors")
