"""What is emitted is base plus plan, and nothing else."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, save_tiny

from steer2edit.architecture import ModelSpec, read_spec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.receipt import read_receipt
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import Checkpoint, open_checkpoint, read_header
from steer2edit.errors import PlanError, Steer2EditError, TargetError
from steer2edit.files.atomic import new_folder
from steer2edit.files.layout import PLAN, RECEIPT
from steer2edit.lowering import Lowering
from steer2edit.methods import make_plan
from steer2edit.plan import Base, EditPlan, LowRank, merge
from steer2edit.scoring.scores import Scoring


class Case:
    def __init__(self, folder: Path, statistics: Any) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.spec: ModelSpec = read_spec(self.checkpoint)
        self.plan: EditPlan = make_plan(Scoring(self.checkpoint, self.spec, statistics)).scaled(0.5)

    def emit(self, to: str, out: Path, plan: EditPlan | None = None, force: bool = False) -> Lowering:
        return emit(plan or self.plan, self.checkpoint, self.spec, to, out, force=force)


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_llama_bf16"])
def case(request: pytest.FixtureRequest, statistics_of: Callable[..., Any]) -> Case:
    folder = request.getfixturevalue(request.param)
    return Case(folder, statistics_of(folder))


@pytest.fixture(scope="module")
def bf16(tiny_llama_bf16: Path, statistics_of: Callable[..., Any]) -> Case:
    return Case(tiny_llama_bf16, statistics_of(tiny_llama_bf16))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_empty_plan_changes_no_byte(case: Case, tmp_path: Path) -> None:
    empty = replace(case.plan, edits=(), scores={})
    case.emit("checkpoint", tmp_path / "out", empty)
    ours, theirs = contents(tmp_path / "out"), contents(case.checkpoint.path)
    assert {name: data for name, data in ours.items() if name in theirs} == theirs
    assert set(ours) - set(theirs) == {"README.md", RECEIPT, PLAN}


def test_edited_tensors_are_base_plus_update_and_others_keep_their_bytes(case: Case, tmp_path: Path) -> None:
    lowering = case.emit("checkpoint", tmp_path / "out")
    edited = open_checkpoint(tmp_path / "out")
    assert edited.tensors == case.checkpoint.tensors
    for name in case.checkpoint.tensors:
        old, new = case.checkpoint.read(name), edited.read(name)
        edit = case.plan.edit_of(name)
        expected = old if edit is None else (old.float() + edit.dense()).to(old.dtype)  # type: ignore[union-attr]
        if old.dtype == torch.float32 and edit is not None:
            assert torch.allclose(new, expected, atol=1e-6)
        else:
            assert torch.equal(new, expected)
    assert {change.tensor for change in lowering.changes} == {edit.tensor for edit in case.plan.edits}


def test_headers_are_copied_verbatim(case: Case, tmp_path: Path) -> None:
    case.emit("checkpoint", tmp_path / "out")
    for shard in case.checkpoint.shards:
        start = read_header(case.checkpoint.path / shard)[0].offset
        old, new = (folder / shard for folder in (case.checkpoint.path, tmp_path / "out"))
        assert old.read_bytes()[:start] == new.read_bytes()[:start]


def test_the_receipt_names_every_change_with_its_hashes(case: Case, tmp_path: Path) -> None:
    case.emit("checkpoint", tmp_path / "out")
    receipt = read_receipt(tmp_path / "out")
    edited = open_checkpoint(tmp_path / "out")
    differing = {name for name in edited.tensors if not torch.equal(edited.read(name), case.checkpoint.read(name))}
    assert {change["tensor"] for change in receipt["changed"]} == differing
    for change in receipt["changed"]:
        for checkpoint, key in ((case.checkpoint, "sha256_before"), (edited, "sha256_after")):
            raw = checkpoint.read(change["tensor"]).view(torch.uint8).numpy().tobytes()
            assert change[key] == hashlib.sha256(raw).hexdigest()
    assert str(case.checkpoint.path.parent) not in json.dumps(receipt)


def test_a_plan_reproduces_its_artefact_byte_for_byte(case: Case, tmp_path: Path) -> None:
    case.emit("checkpoint", tmp_path / "one")
    case.emit("checkpoint", tmp_path / "two", EditPlan.load(tmp_path / "one" / PLAN))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name for name in one if one[name] != two.get(name)} == set() and one.keys() == two.keys()


@pytest.mark.parametrize("to", ["checkpoint", "lora"])
def test_artefacts_verify_by_bytes_and_numbers(case: Case, tmp_path: Path, to: str) -> None:
    case.emit(to, tmp_path / "out")
    result = verify(tmp_path / "out", case.checkpoint.path)
    assert result.ok, result.problems
    assert result.numbers["effect"] > 100 * 1e-4
    exact = to == "lora" or case.checkpoint.tensors[case.plan.edits[0].tensor].dtype == "F32"
    assert (result.numbers["difference"] <= 1e-4) or not exact


def test_two_behaviours_are_one_adapter_of_rank_two(bf16: Case, tmp_path: Path) -> None:
    other = replace(bf16.plan, edits=tuple(LowRank(e.tensor, e.B.flip(0), e.A.flip(1)) for e in bf16.plan.edits))
    both = merge([bf16.plan, other], [1.0, -0.7])
    lowering = bf16.emit("lora", tmp_path / "out", both)
    assert lowering.details["rank"] == 2
    assert verify(tmp_path / "out", bf16.checkpoint.path).ok


def test_verify_names_a_changed_byte(case: Case, tmp_path: Path) -> None:
    case.emit("checkpoint", tmp_path / "out")
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"):
        info = case.checkpoint.tensors[name]
        path = tmp_path / "out" / info.shard
        data = bytearray(path.read_bytes())
        data[info.offset + 1] ^= 1
        path.write_bytes(data)
        result = verify(tmp_path / "out", case.checkpoint.path)
        assert not result.ok and any(name in problem for problem in result.problems)


def test_verify_names_a_changed_adapter(bf16: Case, tmp_path: Path) -> None:
    bf16.emit("lora", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8}))
    result = verify(tmp_path / "out", bf16.checkpoint.path, numbers=False)
    assert result.problems == ("adapter_config.json differs from the one that the plan gives",)


@pytest.mark.parametrize("to", ["checkpoint", "lora"])
def test_the_base_may_be_moved_and_renamed(bf16: Case, tmp_path: Path, to: str) -> None:
    bf16.emit(to, tmp_path / "out")
    shutil.copytree(bf16.checkpoint.path, tmp_path / "elsewhere")
    assert verify(tmp_path / "out", tmp_path / "elsewhere", numbers=False).problems == ()


def test_verify_refuses_another_base(bf16: Case, tiny_llama: Path, tmp_path: Path) -> None:
    bf16.emit("lora", tmp_path / "out")
    with pytest.raises(PlanError, match="fingerprint"):
        verify(tmp_path / "out", tiny_llama)


@pytest.mark.parametrize("to", ["checkpoint", "lora"])
def test_a_local_base_is_found_again_and_its_path_is_in_no_file(bf16: Case, tmp_path: Path, to: str) -> None:
    shutil.copytree(bf16.checkpoint.path, tmp_path / "models" / "mine")
    checkpoint = open_checkpoint(tmp_path / "models" / "mine")
    plan = replace(bf16.plan, base=Base.of(checkpoint))
    emit(plan, checkpoint, bf16.spec, to, tmp_path / "out")
    found = verify(tmp_path / "out", numbers=False)
    assert found.ok and found.base == str((tmp_path / "models" / "mine").resolve())
    assert not any(str(tmp_path).encode() in data for data in contents(tmp_path / "out").values())
    (tmp_path / "models" / "mine").rename(tmp_path / "models" / "moved")
    with pytest.raises(
        PlanError, match="called mine, and it is not known where it lies now; name it with --base FOLDER"
    ):
        verify(tmp_path / "out")
    assert verify(tmp_path / "out", tmp_path / "models" / "moved", numbers=False).ok


def test_a_base_with_other_weights_is_not_taken(bf16: Case, tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(bf16.checkpoint.path, tmp_path / "mine")
    checkpoint = open_checkpoint(tmp_path / "mine")
    emit(replace(bf16.plan, base=Base.of(checkpoint)), checkpoint, bf16.spec, "lora", tmp_path / "out")
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(tiny_llama, tmp_path / "mine")
    with pytest.raises(PlanError, match="mine has other weights now"):
        verify(tmp_path / "out")


def test_an_emit_needs_no_place_for_its_note(bf16: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("STEER2EDIT_CACHE", str(tmp_path / "file"))
    bf16.emit("lora", tmp_path / "out")
    with pytest.raises(PlanError, match="--base"):
        verify(tmp_path / "out")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_snippet_of_an_adapter_runs_for_a_local_base(bf16: Case, tmp_path: Path) -> None:
    bf16.emit("lora", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert block is not None and "AutoPeft" not in block[1]
    code = block[1].replace("path/to/the/base", str(bf16.checkpoint.path))
    scope: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "out")), scope)
    assert type(scope["model"]).__name__ == "PeftModelForCausalLM"


def test_a_plan_for_another_model_is_refused(bf16: Case, tiny_llama: Path, tmp_path: Path) -> None:
    other = open_checkpoint(tiny_llama)
    with pytest.raises(PlanError, match="only the weights it was computed from"):
        emit(bf16.plan, other, read_spec(other), "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_other_file_travels_and_stale_weights_do_not(bf16: Case, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bf16.checkpoint.path, base)
    kept = {"LICENSE": b"licence", "modeling_x.py": b"code", "mtp/model-mtp.safetensors": b"draft", "chat.jinja": b"{}"}
    dropped = {"pytorch_model.bin": b"old", "consolidated.00.safetensors": b"old", ".git/config": b"x"}
    for name, data in {**kept, **dropped}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(data)
    lowering = emit(bf16.plan, open_checkpoint(base), bf16.spec, "checkpoint", tmp_path / "out")
    out = contents(tmp_path / "out")
    assert {name: out[name] for name in kept} == kept
    assert not set(dropped) & set(out)
    assert len(lowering.notes) == 2


def test_an_existing_folder_is_safe(bf16: Case, tmp_path: Path) -> None:
    bf16.emit("lora", tmp_path / "out")
    with pytest.raises(TargetError, match="--force"):
        bf16.emit("lora", tmp_path / "out")
    bf16.emit("lora", tmp_path / "out", force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(TargetError, match="is not an artefact"):
        bf16.emit("lora", tmp_path / "mine", force=True)
    with pytest.raises(TargetError, match="is the input"):
        bf16.emit("checkpoint", bf16.checkpoint.path, force=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("to", ["checkpoint", "lora"])
def test_a_full_disk_leaves_nothing_behind(
    bf16: Case, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    monkeypatch.setattr("os.copy_file_range", full)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(Steer2EditError, match="No space left"):
        bf16.emit(to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_replacing_keeps_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / RECEIPT).write_text("old")
    with pytest.raises(RuntimeError), new_folder(out, force=True) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert contents(out) == {RECEIPT: b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_values_too_large_for_the_dtype_are_refused(tmp_path: Path, statistics_of: Callable[..., Any]) -> None:
    folder = save_tiny(tmp_path / "half", llama_config(num_hidden_layers=1), torch.float16)
    case = Case(folder, statistics_of(folder))
    with pytest.raises(TargetError, match="do not fit F16"):
        case.emit("checkpoint", tmp_path / "out", case.plan.scaled(1e8))
    assert not (tmp_path / "out").exists()


def test_adapter_files_hold_a_pair_for_every_layer(bf16: Case, tmp_path: Path) -> None:
    one = replace(bf16.plan, edits=bf16.plan.edits[:1])
    bf16.emit("lora", tmp_path / "out", one)
    names = {info.name for info in read_header(tmp_path / "out" / "adapter_model.safetensors")}
    leaf = "self_attn.o_proj" if "o_proj" in one.edits[0].tensor else "mlp.down_proj"
    assert names == {
        f"base_model.model.model.layers.{layer}.{leaf}.lora_{factor}.weight" for layer in range(3) for factor in "AB"
    }
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 1
    assert config["target_modules"] == [leaf.rsplit(".", 1)[1]]
