"""Differences of checkpoints that have lost layers or experts: what is left is compared with what it was in the base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, run, save_tiny
from mixture_models import mixture_config, save_mixture
from safetensors.torch import load_file, save_file

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.checkpoint import open_checkpoint
from steer2edit.diff.difference import compare, recover_plan
from steer2edit.diff.missing_parts import missing_parts
from steer2edit.errors import CheckpointError
from steer2edit.files.layout import PLAN, RECEIPT
from steer2edit.plan import Base, EditPlan, LowRank, Structure


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of five layers in bfloat16, over several shards."""
    folder = tmp_path_factory.mktemp("missing") / "base"
    return save_tiny(folder, llama_config(num_hidden_layers=5), torch.bfloat16, max_shard_size="20KB")


@pytest.fixture
def pruned(base: Path, tmp_path: Path) -> Path:
    """The base without its layers 1 and 2, with an edit of its last one."""
    checkpoint = open_checkpoint(base)
    spec = read_spec(checkpoint)
    site = spec.site("mlp_out.4")
    torch.manual_seed(0)
    edit = LowRank(site.matrix, torch.randn(site.out_features, 1), torch.randn(1, site.in_features))
    plan = EditPlan(Base.of(checkpoint), (edit,), structure=Structure(layers=(1, 2)))
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "pruned")
    return tmp_path / "pruned"


def without_receipt(folder: Path) -> Path:
    (folder / RECEIPT).unlink()
    (folder / PLAN).unlink()
    return folder


def rewritten(folder: Path, change: Any) -> None:
    """Each tensor of a checkpoint as ``change(name, tensor)`` gives it."""
    for shard in folder.glob("*.safetensors"):
        tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(shard).items()}
        save_file(tensors, shard, {"format": "pt"})


@pytest.mark.parametrize("receipt", [True, False])
def test_layers_that_are_left_are_compared_with_what_they_were(
    base: Path, pruned: Path, receipt: bool, tmp_path: Path
) -> None:
    edited = pruned if receipt else without_receipt(pruned)
    out = tmp_path / "x.plan.safetensors"
    shown = run("diff", base, edited, "-o", out)
    assert shown.exit_code == 0, shown.output
    assert "has lost the layers 1, 2." in shown.stdout and "numbered as in the base" in shown.stdout
    assert "1 tensor differs" in shown.stdout and "layers.4.mlp.down_proj" in shown.stdout
    assert "only in" not in shown.stdout and "1 edits recovered" in shown.stdout
    told = json.loads(run("diff", base, edited, "--json").stdout)
    assert told["missing"]["layers"] == [1, 2] and [item["rank"] for item in told["tensors"]] == [1]
    # the plan gives the same checkpoint again, but for the rounding of the edit
    plan = EditPlan.load(out)
    checkpoint = open_checkpoint(base)
    emit(plan, checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "again")
    again = compare(open_checkpoint(edited), open_checkpoint(tmp_path / "again"))
    assert not again.shapes and not again.only_base and not again.only_edited
    assert all(item.relative < 0.01 for item in again.tensors)


def test_layers_of_a_fine_tune_in_another_dtype_are_known_by_their_numbers(base: Path, pruned: Path) -> None:
    without_receipt(pruned)
    torch.manual_seed(1)
    rewritten(pruned, lambda _, x: x.float() + 0.2 * x.float().std() * torch.randn(x.shape))
    ours, theirs = open_checkpoint(base), open_checkpoint(pruned)
    spec = read_spec(ours)
    missing = missing_parts(ours, theirs, spec)
    assert missing == Structure(layers=(1, 2))
    found = compare(ours, theirs, spec, missing)
    assert found.same == 0 and len(found.tensors) == len(theirs.tensors)
    edited = [item for item in found.tensors if "layers.4.mlp.down_proj" not in item.tensor and len(item.shape) == 2]
    assert all(0.1 < item.relative < 0.3 for item in edited)


def test_layers_that_cannot_be_told_apart_are_refused_without_a_receipt(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "twins", llama_config(num_hidden_layers=4))
    first = {name: x for name, x in load_file(folder / "model.safetensors").items() if ".layers.1." in name}
    rewritten(folder, lambda name, x: first.get(name.replace(".layers.2.", ".layers.1."), x).clone())
    checkpoint = open_checkpoint(folder)
    plan = EditPlan(Base.of(checkpoint), (), structure=Structure(layers=(2,)))
    emit(plan, checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "pruned")
    assert "has lost layer 2." in run("diff", folder, tmp_path / "pruned").stdout
    refused = run("diff", folder, without_receipt(tmp_path / "pruned"))
    assert refused.exit_code == 2 and "layer 1 is near 2 of the first's, such as 1 and 2" in refused.stderr


def test_a_receipt_of_another_model_is_not_believed(base: Path, pruned: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    torch.manual_seed(2)
    rewritten(other, lambda _, x: x + 0.01 * torch.randn_like(x))
    plan = EditPlan.load(pruned / PLAN)
    replace(plan, structure=Structure(layers=(0, 3))).save(pruned / PLAN)
    assert "has lost the layers 1, 2." in run("diff", other, pruned).stdout
    (pruned / RECEIPT).write_text("{}")
    told = run("diff", base, pruned)
    assert "has lost the layers 1, 2." in told.stdout and "does not tell what is missing" in told.stderr


def test_other_models_and_the_other_order_are_refused(base: Path, pruned: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", llama_config(num_hidden_layers=2), seed=5)
    refused = run("diff", base, other)
    assert refused.exit_code == 2 and "layer 0 is near none of the first's" in refused.stderr
    refused = run("diff", pruned, base, "-o", tmp_path / "x.plan.safetensors")
    assert refused.exit_code == 2 and "give the one that has more as the first" in refused.stderr
    assert not (tmp_path / "x.plan.safetensors").exists()
    ours, theirs = open_checkpoint(base), open_checkpoint(pruned)
    with pytest.raises(CheckpointError, match="the layout is not understood"):
        missing_parts(ours, theirs, None)


@pytest.mark.parametrize("receipt", [True, False])
@pytest.mark.parametrize(("kind", "left"), [("mixtral", 4), ("granitemoe", 5), ("granitemoe", 1), ("dbrx", 6)])
def test_experts_that_are_left_are_compared_with_what_they_were(
    tmp_path: Path, kind: str, left: int, receipt: bool
) -> None:
    folder = save_mixture(tmp_path / "base", mixture_config(kind))
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    count = spec.routers[0].experts
    stays = count - 1
    gone = {router.layer: tuple(n for n in range(count) if n != stays)[: count - left] for router in spec.routers}
    top_k = min(spec.routers[0].top_k, left)
    structure = Structure(gone, None if top_k == spec.routers[0].top_k else top_k)
    site = next(site for site in spec.sites if site.expert == stays)
    torch.manual_seed(0)
    edit = LowRank(site.matrix, torch.randn(site.out_features, 1), torch.randn(1, site.in_features))
    plan = EditPlan(Base.of(checkpoint), (edit,), structure=structure)
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "edited")
    if not receipt:
        without_receipt(tmp_path / "edited")
    edited = open_checkpoint(tmp_path / "edited")
    missing = missing_parts(checkpoint, edited, spec, lambda: structure if receipt else None)
    assert missing == structure
    found = compare(checkpoint, edited, spec, missing)
    assert [(item.tensor, item.rank) for item in found.tensors] == [(site.matrix, 1)]
    assert not found.shapes and not found.only_base and not found.only_edited
    recovered, left_out = recover_plan(found, checkpoint, spec)
    assert recovered.structure == structure and len(recovered.edits) == 1 and not left_out
    assert f"Layer {spec.routers[0].layer} has lost the expert" in run("diff", folder, tmp_path / "edited").stdout


def test_experts_for_each_token_are_named(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path / "base", mixture_config("mixtral"))
    checkpoint = open_checkpoint(folder)
    plan = EditPlan(Base.of(checkpoint), (), structure=Structure(top_k=1))
    emit(plan, checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "one")
    shown = run("diff", folder, tmp_path / "one", "-o", tmp_path / "x.plan.safetensors")
    assert "Each token passes through 1 expert of" in shown.stdout and "0 tensors differ" in shown.stdout
    assert EditPlan.load(tmp_path / "x.plan.safetensors").structure == Structure(top_k=1)
