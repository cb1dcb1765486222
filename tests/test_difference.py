"""Differences between checkpoints: an edit's rank survives its rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from edited_checkpoint import edited_checkpoint, resharded
from mixture_models import mixture_config, save_mixture
from reader_laws import single_readers
from test_checkpoint import write
from test_faults import random_plan

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.revert import revert
from steer2edit.checkpoint import open_checkpoint
from steer2edit.diff.difference import CheckpointDifference, compare, recover_plan
from steer2edit.diff.numerical_rank import TensorDifference
from steer2edit.plan import Base, EditPlan, LowRank

FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def compared(folder: Path, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> CheckpointDifference:
    return compare(open_checkpoint(write(folder / "old", old)), open_checkpoint(write(folder / "new", new, shards=2)))


def matrix(rows: int, columns: int) -> torch.Tensor:
    # rows of very different sizes, as trained matrices have
    return torch.randn(rows, columns) * 0.02 * torch.randn(rows, 1).exp()


def update(like: torch.Tensor, rank: int, relative: float) -> torch.Tensor:
    change = torch.randn(like.shape[0], rank) @ torch.randn(rank, like.shape[1])
    return change * (relative * like.float().norm() / change.norm())


@pytest.mark.parametrize("relative", [0.003, 0.03, 0.5])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_the_rank_of_a_rounded_edit_is_that_of_the_edit(tmp_path: Path, dtype: torch.dtype, relative: float) -> None:
    torch.manual_seed(0)
    old, new = {}, {}
    for rank in (1, 2, 5):
        for shape in ((320, 200), (96, 512)):
            base = matrix(*shape).to(dtype)
            old[f"{rank}.{shape}"] = base
            new[f"{rank}.{shape}"] = (base.float() + update(base, rank, relative)).to(dtype)
    found = compared(tmp_path, old, new)
    assert {item.tensor: str(item.rank) for item in found.tensors} == {name: name.split(".")[0] for name in old}
    for item in found.tensors:
        assert item.next <= item.floor < item.singular[-1]
        # the factors are the edit, but for the rounding
        B, A = item.factors  # type: ignore[misc]
        change = new[item.tensor].double() - old[item.tensor].double()
        assert float((change - B.double() @ A.double()).norm()) == pytest.approx(
            item.left,
            rel=0.02,
            abs=2e-7 * item.norm,  # the factors are float32
        )
        assert item.norm == pytest.approx(float(change.norm()), rel=1e-6)


@pytest.mark.parametrize("relative", [0.003, 0.012, 0.03])
def test_what_rounding_drops_of_a_small_edit_adds_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: float
) -> None:
    torch.manual_seed(4)
    base = (torch.randn(600, 500) * 0.02).bfloat16()
    # rows and columns of very different sizes: where an update is small it is lost, elsewhere it is kept
    change = (torch.randn(600, 1) * torch.randn(600, 1).exp()) @ (torch.randn(1, 500) * torch.randn(1, 500).exp())
    new = (base.float() + change * (relative * base.float().norm() / change.norm())).bfloat16()
    (item,) = compared(tmp_path, {"w": base}, {"w": new}).tensors
    assert item.rank == 1
    monkeypatch.setattr("steer2edit.diff.numerical_rank._explained", lambda *_: False)
    (item,) = compare(open_checkpoint(tmp_path / "old"), open_checkpoint(tmp_path / "new")).tensors
    assert item.rank != 1  # what it guards against does happen


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_an_ablation_computed_in_the_stored_dtype_has_rank_one(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    base = matrix(320, 200).to(dtype)
    r_hat = torch.nn.functional.normalize(torch.randn(320), dim=0).to(dtype)
    (item,) = compared(tmp_path, {"w": base}, {"w": base - torch.outer(r_hat, r_hat @ base)}).tensors
    assert item.rank == 1


@pytest.mark.parametrize("size", [0.003, 0.05])
def test_a_dense_difference_is_not_of_low_rank(tmp_path: Path, size: float) -> None:
    torch.manual_seed(2)
    base = matrix(320, 200).bfloat16()
    change = torch.randn(320, 200)
    change *= size * base.float().norm() / change.norm()
    low = update(base, 1, 0.05)
    new = {"dense": (base.float() + change).bfloat16(), "both": (base.float() + low + 3 * change).bfloat16()}
    found = {item.tensor: item for item in compared(tmp_path, {k: base.clone() for k in new}, new).tensors}
    assert found["dense"].rank is None and found["both"].rank is None
    assert found["dense"].left > found["dense"].rounding


def test_the_same_values_otherwise_stored_are_the_same(tmp_path: Path) -> None:
    values = {"a": torch.randn(8, 6).bfloat16(), "b": torch.randn(5).bfloat16(), "n": torch.arange(4)}
    found = compared(tmp_path, values, {**values, "a": values["a"].float()})
    assert found.same == 3 and not found.tensors and found.dtypes == {"a": ("BF16", "F32")}


def test_everything_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    old = {"gone": torch.ones(2), "shape": torch.ones(2, 3), "ids": torch.arange(4), "vector": torch.ones(3)}
    new = {
        "more": torch.ones(2),
        "shape": torch.ones(3, 2),
        "ids": torch.arange(4) * 2,
        "vector": torch.tensor([1.0, 2, 1]),
    }
    (tmp_path / "old").mkdir()
    found = compared(tmp_path, old, new)
    assert (found.only_base, found.only_edited, found.shapes) == (("gone",), ("more",), {"shape": ((2, 3), (3, 2))})
    by_name = {item.tensor: item for item in found.tensors}
    assert by_name.keys() == {"ids", "vector"}
    assert by_name["vector"].norm == 1 and by_name["vector"].entries == pytest.approx(1 / 3)


def test_a_fused_tensor_is_compared_slice_by_slice(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = torch.randn(4, 64, 48)
    new = base.clone()
    new[2] += update(base[2], 1, 0.1)
    (item,) = compared(tmp_path, {"experts": base}, {"experts": new}).tensors
    assert (item.tensor, item.rank, item.shape) == ("experts[2]", 1, (64, 48))


@pytest.fixture
def emitted(tiny_llama_bf16: Path, tmp_path: Path) -> tuple[Path, Path, EditPlan]:
    """Base, artefact and plan."""
    return tiny_llama_bf16, tmp_path / "edited", edited_checkpoint(tiny_llama_bf16, tmp_path / "edited")


@pytest.mark.parametrize("other", [False, True])
def test_the_plan_of_an_artefact_is_recovered(
    emitted: tuple[Path, Path, EditPlan], tmp_path: Path, other: bool
) -> None:
    base, edited, plan = emitted
    if other:
        edited = resharded(edited, tmp_path / "resharded")
    checkpoint = open_checkpoint(base)
    found, left_out = recover_plan(compare(checkpoint, open_checkpoint(edited)), checkpoint, read_spec(checkpoint))
    assert not left_out and {e.tensor for e in found.edits} == {e.tensor for e in plan.edits}
    for edit in found.edits:
        wanted = plan.edit_of(edit.tensor)
        assert isinstance(edit, LowRank) and isinstance(wanted, LowRank) and edit.B.shape[1] == 1
        error = (edit.dense() - wanted.dense()).norm() / wanted.dense().norm()
        assert error < 0.02
    emit(found, checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "again")
    again, edited_again = open_checkpoint(tmp_path / "again"), open_checkpoint(edited)
    equal = [again.read(name) == edited_again.read(name) for name in again.tensors]
    assert sum(int(x.sum()) for x in equal) / sum(x.numel() for x in equal) > 0.97


def test_gpt2s_matrices_are_recovered_in_their_own_orientation(tmp_path: Path) -> None:
    from conftest import save_tiny
    from family_configs import family_config

    base = save_tiny(tmp_path / "gpt2", family_config("gpt2"))
    checkpoint, plan = open_checkpoint(base), random_plan(base, sites=3)
    spec = read_spec(checkpoint)
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "edited")
    found, _ = recover_plan(compare(checkpoint, open_checkpoint(tmp_path / "edited")), checkpoint, spec)
    for edit in found.edits:
        assert isinstance(edit, LowRank)
        assert torch.allclose(edit.dense(), plan.edit_of(edit.tensor).dense(), atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss", "dbrx"])
def test_experts_of_one_tensor_are_recovered_and_reverted_by_themselves(tmp_path: Path, kind: str) -> None:
    base = save_mixture(tmp_path / "base", mixture_config(kind))
    checkpoint = open_checkpoint(base)
    spec = read_spec(checkpoint)
    plan = random_plan(base, sites=len(spec.sites))
    edits = tuple(edit for edit in plan.edits if spec.owners[edit.tensor].expert in (1, 5))
    plan = replace(plan, edits=edits)
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "edited")
    found = compare(checkpoint, open_checkpoint(tmp_path / "edited"), spec)
    assert {item.tensor for item in found.tensors} == {edit.tensor for edit in edits}
    assert {item.rank for item in found.tensors} == {1}
    recovered, left_out = recover_plan(found, checkpoint, spec)
    assert len(recovered.edits) == len(edits) and not left_out
    done = revert(tmp_path / "edited", base)
    assert done.proven
    for path in base.iterdir():
        assert (tmp_path / "edited" / path.name).read_bytes() == path.read_bytes()


def test_the_commands(emitted: tuple[Path, Path, EditPlan], tmp_path: Path) -> None:
    base, edited, plan = emitted
    out = tmp_path / "x.plan.safetensors"
    shown = run("diff", base, edited, "-o", out)
    assert shown.exit_code == 0, shown.output
    assert "4 tensors differ" in shown.stdout and "4 edits recovered" in shown.stdout
    assert len(EditPlan.load(out).edits) == 4
    described: dict[str, Any] = json.loads(run("diff", base, edited, "--json").stdout)
    assert [item["rank"] for item in described["tensors"]] == [1] * 4
    assert {field for item in described["tensors"] for field in item} <= set(TensorDifference.__dataclass_fields__)
    done = run("revert", edited, "--base", base)
    assert done.exit_code == 0 and "4 tensors restored" in done.stdout
    assert "0 tensors differ" in run("diff", base, edited).stdout
    assert run("revert", edited, "--base", base).exit_code == 2
    assert plan.edits


def test_a_fine_tune_that_changed_readers_becomes_a_plan(tiny_llama: Path, tmp_path: Path) -> None:
    base = open_checkpoint(tiny_llama)
    spec = read_spec(base)
    plan = EditPlan(Base.of(base), tuple(single_readers(base, spec)))
    emit(plan, base, spec, "checkpoint", tmp_path / "edited")
    found = compare(base, open_checkpoint(tmp_path / "edited"), spec)
    recovered, left_out = recover_plan(found, base, spec)
    assert not left_out and {edit.tensor for edit in recovered.edits} == {edit.tensor for edit in plan.edits}
    for edit in recovered.edits:
        mine = plan.edit_of(edit.tensor)
        assert isinstance(edit, LowRank) and isinstance(mine, LowRank)
        assert torch.allclose(edit.dense(), mine.dense(), atol=1e-5)
