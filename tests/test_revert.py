"""Reverts: an artefact is its base again, to the byte, where the receipt vouches for every difference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run
from edited_checkpoint import edited_checkpoint, resharded
from mixture_models import mixture_config, save_mixture
from test_faults import random_plan

from steer2edit.architecture import read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.revert import revert
from steer2edit.checkpoint import open_checkpoint
from steer2edit.diff.difference import compare
from steer2edit.errors import PlanError, TargetError
from steer2edit.files.layout import RECEIPT
from steer2edit.plan import EditPlan, Structure


@pytest.fixture
def emitted(tiny_llama_bf16: Path, tmp_path: Path) -> tuple[Path, Path, EditPlan]:
    """Base, artefact and plan."""
    return tiny_llama_bf16, tmp_path / "edited", edited_checkpoint(tiny_llama_bf16, tmp_path / "edited")


@pytest.mark.parametrize("place", ["in place", "elsewhere"])
def test_revert_restores_every_byte(emitted: tuple[Path, Path, EditPlan], tmp_path: Path, place: str) -> None:
    base, edited, plan = emitted
    (edited / "notes.txt").write_text("mine")
    done = revert(edited, base, None if place == "in place" else tmp_path / "back")
    assert done.proven and set(done.tensors) == {edit.tensor for edit in plan.edits}
    files = {path.name: path.read_bytes() for path in done.folder.iterdir()}
    assert files.pop("notes.txt") == b"mine"
    assert files == {path.name: path.read_bytes() for path in base.iterdir()}
    assert (edited / RECEIPT).exists() == (place == "elsewhere")


def test_a_second_revert_with_force_finds_the_first(emitted: tuple[Path, Path, EditPlan], tmp_path: Path) -> None:
    base, edited, _ = emitted
    back = tmp_path / "back"
    first = revert(edited, base, back)
    with pytest.raises(TargetError, match="exists"):
        revert(edited, base, back)
    before = {path.name: path.read_bytes() for path in back.iterdir()}
    assert revert(edited, base, back, force=True) == first
    assert {path.name: path.read_bytes() for path in back.iterdir()} == before
    # what is not the base's is not taken for an earlier result
    (back / "notes.txt").write_text("mine")
    with pytest.raises(TargetError, match="not an artefact"):
        revert(edited, base, back, force=True)
    (back / "notes.txt").unlink()
    shard = next(edited.glob("*.safetensors"))
    shutil.copy(shard, back / shard.name)
    with pytest.raises(TargetError, match="not an artefact"):
        revert(edited, base, back, force=True)


@pytest.mark.parametrize("target", ["lora", "gguf", "mlx"])
def test_revert_of_an_adapter_says_that_the_base_is_unchanged(
    emitted: tuple[Path, Path, EditPlan], tmp_path: Path, target: str
) -> None:
    base, _, plan = emitted
    checkpoint = open_checkpoint(base)
    emit(plan, checkpoint, read_spec(checkpoint), target, tmp_path / "adapter")
    for place in ([], ["-o", tmp_path / "back"]):
        refused = run("revert", tmp_path / "adapter", "--base", base, *place)
        assert refused.exit_code == 2 and "the base is unchanged" in refused.output


def test_revert_in_place_loses_no_file_that_it_does_not_carry(emitted: tuple[Path, Path, EditPlan]) -> None:
    base, edited, _ = emitted
    (edited / "checkpoint-5").mkdir()
    (edited / "checkpoint-5" / "optimizer.pt").write_bytes(b"mine")
    with pytest.raises(TargetError, match=r"checkpoint-5/optimizer\.pt"):
        revert(edited, base)
    assert (edited / "checkpoint-5" / "optimizer.pt").read_bytes() == b"mine"


def test_revert_refuses_a_model_that_has_lost_experts(tmp_path: Path) -> None:
    base = save_mixture(tmp_path / "base", mixture_config("mixtral"))
    checkpoint = open_checkpoint(base)
    spec = read_spec(checkpoint)
    removed = Structure(remove={router.layer: (0, 3) for router in spec.routers})
    plan = replace(random_plan(base), edits=(), structure=removed)
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "edited")
    with pytest.raises(PlanError, match="lost whole experts"):
        revert(tmp_path / "edited", base)


def tampered(base: Path, edited: Path, what: str) -> None:
    receipt = json.loads((edited / RECEIPT).read_text())
    if what == "another tensor":
        info = open_checkpoint(base).tensors["model.norm.weight"]
    else:
        info = open_checkpoint(base).tensors[receipt["changed"][0]["tensor"]]
    if what == "the receipt":
        receipt["changed"].pop()
        (edited / RECEIPT).write_text(json.dumps(receipt))
        return
    path = edited / info.shard
    data = bytearray(path.read_bytes())
    data[info.offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["another tensor", "an edited tensor", "the receipt"])
def test_revert_refuses_what_the_receipt_does_not_vouch_for(
    emitted: tuple[Path, Path, EditPlan], tmp_path: Path, what: str
) -> None:
    base, edited, _ = emitted
    tampered(base, edited, what)
    before = {path: path.read_bytes() for path in edited.rglob("*") if path.is_file()}
    with pytest.raises(PlanError, match="is not its base with the receipt's changes"):
        revert(edited, base)
    assert {path: path.read_bytes() for path in edited.rglob("*") if path.is_file()} == before
    done = revert(edited, base, tmp_path / "back", unproven=True)
    assert not done.proven and not compare(open_checkpoint(base), open_checkpoint(tmp_path / "back")).tensors


def test_revert_of_a_checkpoint_without_receipt(emitted: tuple[Path, Path, EditPlan], tmp_path: Path) -> None:
    base, edited, plan = emitted
    other = resharded(edited, tmp_path / "other")
    with pytest.raises(PlanError, match=r"holds no steer2edit\.json"):
        revert(other, base)
    with pytest.raises(TargetError, match="-o"):
        revert(other, base, unproven=True)
    done = revert(other, base, tmp_path / "back", unproven=True)
    assert set(done.tensors) == {edit.tensor for edit in plan.edits}
    found = compare(open_checkpoint(base), open_checkpoint(tmp_path / "back"))
    assert found.same == len(open_checkpoint(base).tensors)


def test_revert_refuses_another_base(emitted: tuple[Path, Path, EditPlan], tiny_llama: Path) -> None:
    _, edited, _ = emitted
    with pytest.raises(PlanError, match="fingerprint"):
        revert(edited, tiny_llama)
