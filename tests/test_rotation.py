"""Rotations: another strength is another angle, and what cannot be turned exactly is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny
from family_configs import family_config

from steer2edit.architecture import MatrixRole, read_spec
from steer2edit.checkpoint import open_checkpoint
from steer2edit.compose import rescale
from steer2edit.errors import PlanError
from steer2edit.methods import make_plan, rotation, scaling
from steer2edit.plan import Bias, EditPlan, LowRank, Measured
from steer2edit.scoring.scores import Scoring


def turned(scoring: Scoring, angle: float, **others: Any) -> EditPlan:
    last = scoring.spec.layers - 1
    options = rotation.Options(angle=angle, **{"layers": (0, last), "second_axis": "mean", **others})
    return make_plan(scoring, method="rotation", options=options)


def check_same(one: EditPlan, other: EditPlan) -> None:
    assert [edit.tensor for edit in one.edits] == [edit.tensor for edit in other.edits] and one.edits
    for a, b in zip(one.edits, other.edits, strict=True):
        if isinstance(a, LowRank) and isinstance(b, LowRank):
            assert torch.allclose(a.dense(), b.dense(), atol=2e-5 * float(b.dense().abs().max()))
        else:
            assert isinstance(a, Bias) and isinstance(b, Bias)
            assert torch.allclose(a.delta, b.delta, atol=2e-5 * float(b.delta.abs().max()))


def test_a_strength_is_a_factor_of_the_angle(scoring: Scoring) -> None:
    plan = turned(scoring, 20.0)
    assert scaling(plan) is rotation.scaled
    check_same(rotation.scaled(plan, 3.0), turned(scoring, 60.0))
    check_same(rotation.scaled(plan, -1.0), turned(scoring, -20.0))
    # no further than half a turn
    check_same(rotation.scaled(plan, 50.0), turned(scoring, 180.0))
    # not so many times the update, which would shorten what it turns
    edit, twice = plan.edits[0], rotation.scaled(plan, 2.0).edits[0]
    assert isinstance(edit, LowRank) and isinstance(twice, LowRank)
    assert not torch.allclose(twice.dense(), 2 * edit.dense(), atol=1e-2 * edit.norm)


def test_a_plan_that_has_a_strength_is_turned_on_from_there(scoring: Scoring) -> None:
    plan = rescale(turned(scoring, 10.0), factor=2.0)
    assert plan.measured.strength == 2.0
    check_same(plan, turned(scoring, 20.0))
    again = rescale(plan, factor=1.5)
    assert again.measured.strength == 3.0
    check_same(again, turned(scoring, 30.0))


def test_the_biases_of_layer_norms_turn_along(tmp_path: Path, statistics_of: Callable[..., Any]) -> None:
    folder = save_tiny(tmp_path / "gpt2", family_config("gpt2"))
    checkpoint = open_checkpoint(folder)
    scoring = Scoring(checkpoint, read_spec(checkpoint), statistics_of(folder))
    plan = turned(scoring, 15.0)
    assert sum(isinstance(edit, Bias) for edit in plan.edits) == sum(isinstance(edit, LowRank) for edit in plan.edits)
    check_same(rotation.scaled(plan, 2.0), turned(scoring, 30.0))


def test_all_readers_of_a_norm_are_turned_and_nothing_else(scoring: Scoring) -> None:
    plan = turned(scoring, 30.0, layers=(1, 1))
    owners = scoring.spec.owners
    roles = [owners[edit.tensor].role for edit in plan.edits]
    assert set(roles) == {MatrixRole.Q, MatrixRole.K, MatrixRole.V, MatrixRole.GATE, MatrixRole.UP}
    assert {owners[edit.tensor].layer for edit in plan.edits} == {1}
    assert all(isinstance(edit, LowRank) and len(edit.A) == 2 for edit in plan.edits)


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("olmo2", "reads the stream without a norm"),
        ("stablelm", "is a LayerNorm's reader without a bias"),
        ("modernbert-decoder", "layers.0.attn.q_proj.weight reads the stream"),
    ],
)
def test_blocks_that_cannot_be_turned_exactly_are_refused(tmp_path: Path, model_type: str, told: str) -> None:
    spec = read_spec(open_checkpoint(save_tiny(tmp_path / "model", family_config(model_type))))
    with pytest.raises(PlanError, match=told):
        rotation.readers_of(spec, range(spec.layers))
    if model_type == "modernbert-decoder":
        assert rotation.readers_of(spec, [1])


def test_angles_out_of_range_and_gains_of_zero_are_refused(scoring: Scoring, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--angle is 0"):
        turned(scoring, 0.0)
    with pytest.raises(PlanError, match="--angle is 200"):
        turned(scoring, 200.0)
    with pytest.raises(PlanError, match="--direction-layer 9"):
        turned(scoring, 10.0, direction_layer=9)
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for path in scoring.checkpoint.path.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    silent = replace(scoring, checkpoint=open_checkpoint(folder))
    with pytest.raises(PlanError, match="gains of almost 0"):
        rotation.plan(silent, rotation.Options(layers=(1, 1)))


def test_a_composition_scales_a_rotation_as_an_update(scoring: Scoring) -> None:
    plan = replace(turned(scoring, 20.0), method={"name": "merge"}, measured=Measured())
    assert scaling(plan) is EditPlan.scaled
