"""A plan fits only the weights it was computed from: another revision's matrices are refused, whatever its fingerprint."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from fp8_models import quantise
from safetensors.torch import load_file, save_file

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import SINGLE, Checkpoint, open_checkpoint
from steer2edit.errors import PlanError
from steer2edit.methods import make_plan
from steer2edit.plan import Base, EditPlan, LowRank, merge

DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"


def revision(base: Path, folder: Path, name: str, at: int = 0) -> Checkpoint:
    """Another revision: one value of one tensor differs, far from the bytes that the fingerprint reads."""
    shutil.copytree(base, folder)
    tensors = load_file(base / SINGLE)
    tensors[name].view(-1)[at] += 1
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.fingerprint == open_checkpoint(base).fingerprint
    return checkpoint


@pytest.fixture(scope="module")
def plan(scoring: Any) -> EditPlan:
    plan = make_plan(scoring, method="ablation")  # edits every writer
    assert DOWN in plan.content and plan.content.keys() == {edit.tensor for edit in plan.edits}
    return plan


@pytest.mark.parametrize("target", ["checkpoint", "lora", "gguf"])
def test_another_revision_with_the_same_fingerprint_is_refused(
    plan: EditPlan, tiny_llama: Path, tmp_path: Path, target: str
) -> None:
    other = revision(tiny_llama, tmp_path / "other", DOWN)
    with pytest.raises(PlanError, match=DOWN.replace(".", r"\.")) as caught:
        emit(plan, other, read_spec(other), target, tmp_path / "out")
    assert "1 of the" in str(caught.value) and "fits only the weights" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_verify_and_eval_refuse_it_too(plan: EditPlan, tiny_llama: Path, tmp_path: Path) -> None:
    base = open_checkpoint(tiny_llama)
    emit(plan, base, read_spec(base), "lora", tmp_path / "lora")
    assert verify(tmp_path / "lora", base=tiny_llama, numbers=False).ok
    revision(tiny_llama, tmp_path / "other", DOWN)
    with pytest.raises(PlanError, match="fits only the weights"):
        verify(tmp_path / "lora", base=tmp_path / "other", numbers=False)
    plan.save(tmp_path / "x.plan.safetensors")
    result = run("emit", tmp_path / "x.plan.safetensors", tmp_path / "other", "--to", "lora", "-o", tmp_path / "new")
    assert result.exit_code == 2 and "fits only the weights" in result.output


def test_a_matrix_that_is_not_edited_is_left_to_the_fingerprint(
    plan: EditPlan, tiny_llama: Path, tmp_path: Path
) -> None:
    """What is proved is what the plan was computed from: the matrices that it edits."""
    other = revision(tiny_llama, tmp_path / "other", UP)
    emit(plan, other, read_spec(other), "checkpoint", tmp_path / "out")


def test_the_content_is_what_the_receipt_says_of_the_bytes_before(
    plan: EditPlan, tiny_llama: Path, tmp_path: Path
) -> None:
    base = open_checkpoint(tiny_llama)
    emit(plan, base, read_spec(base), "checkpoint", tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / "steer2edit.json").read_text())
    assert {one["tensor"]: one["sha256_before"] for one in receipt["changed"]} == plan.content
    raw = load_file(tiny_llama / SINGLE)[DOWN]
    assert plan.content[DOWN] == hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def test_the_content_survives_saving_scaling_and_merging(plan: EditPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "x.plan.safetensors")
    again = EditPlan.load(tmp_path / "x.plan.safetensors")
    assert (again.content, again.hash) == (plan.content, plan.hash)
    assert (
        plan.scaled(2).content == plan.at_strength(2).content == merge([plan, plan.scaled(2)]).content == plan.content
    )
    other = replace(plan, content={**plan.content, DOWN: "0" * 64})
    with pytest.raises(PlanError, match="different weights"):
        merge([plan, other])


def test_a_plan_without_content_is_read_and_used(plan: EditPlan, tiny_llama: Path, tmp_path: Path) -> None:
    """As plans were written before it was recorded: with the same hash as then."""
    old = replace(plan, content={})
    assert "content" not in old._parts()[1] and old.hash != plan.hash
    old.save(tmp_path / "x.plan.safetensors")
    base = open_checkpoint(tiny_llama)
    emit(EditPlan.load(tmp_path / "x.plan.safetensors"), base, read_spec(base), "lora", tmp_path / "out")


@pytest.mark.parametrize("content", [{"a": "xyz"}, {"a": "A" * 64}, {"a": 3}, ["a"], "x", None])
def test_content_of_another_form_is_refused(plan: EditPlan, tmp_path: Path, content: Any) -> None:
    tensors, described = plan._parts()
    save_file(
        tensors, tmp_path / "x.plan.safetensors", {"plan": json.dumps({**json.loads(described), "content": content})}
    )
    with pytest.raises(PlanError, match="content"):
        EditPlan.load(tmp_path / "x.plan.safetensors")


def test_a_matrix_in_fp8_is_its_bytes_and_its_scales(tiny_llama: Path, tmp_path: Path) -> None:
    base = open_checkpoint(quantise(tiny_llama, tmp_path / "fp8"))
    spec = read_spec(base)
    name = spec.site("mlp_out.0").tensor
    edit = LowRank(name, torch.ones(spec.hidden_size, 1), torch.ones(1, spec.site("mlp_out.0").in_features))
    plan = EditPlan(Base.of(base), (edit,)).computed_from(base, spec)
    shard = base.path / base.tensors[f"{name}_scale_inv"].shard
    tensors = load_file(shard)
    tensors[f"{name}_scale_inv"].view(-1)[0] *= 2
    save_file(tensors, shard, {"format": "pt"})
    again = open_checkpoint(base.path)
    with pytest.raises(PlanError, match="fits only the weights"):
        plan.check_content(again, spec)


def test_a_checkpoint_is_read_once(plan: EditPlan, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint(tiny_llama)
    plan.check_content(base, read_spec(base))
    monkeypatch.setattr(Checkpoint, "raw_blocks", None)
    plan.check_content(base, read_spec(base))
