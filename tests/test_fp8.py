"""fp8 in, fp8 out: read as the numbers it stands for, edited to the byte where nothing moves, honest about the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, save_tiny
from fp8_models import blockwise, numbers, quantise
from mixture_models import mixture_config, save_mixture

from steer2edit.architecture import read_spec
from steer2edit.architecture.sites import MatrixRole, ModelSpec
from steer2edit.artefact.emit import emit
from steer2edit.artefact.receipt import read_receipt
from steer2edit.artefact.revert import revert
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.checkpoint.fp8 import read_values, values
from steer2edit.diff.difference import compare, recover_plan
from steer2edit.errors import ArchitectureError
from steer2edit.lowering.requantise import requantised
from steer2edit.methods import make_plan
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.plan.operations import Scale
from steer2edit.runtime.model import Runtime, load_weights
from steer2edit.scoring.scores import Scoring, analyse

SIZE = (16, 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in fp8 whose matrices are no multiples of the block."""
    folder = tmp_path_factory.mktemp("fp8")
    config = llama_config(hidden_size=40, intermediate_size=72, num_attention_heads=4, head_dim=12)
    return quantise(save_tiny(folder / "wide", config, torch.bfloat16), folder / "fp8", SIZE)


@pytest.fixture(scope="module")
def opened(base: Path) -> tuple[Checkpoint, ModelSpec]:
    checkpoint = open_checkpoint(base)
    return checkpoint, read_spec(checkpoint)


def planned(checkpoint: Checkpoint, spec: ModelSpec, relative: float, rank: int = 1) -> EditPlan:
    """An update of ``relative`` the size of each matrix."""
    generator = torch.Generator().manual_seed(5)
    edits = []
    for site in spec.sites:
        B = torch.randn(site.out_features, rank, generator=generator)
        A = torch.randn(rank, site.in_features, generator=generator)
        weight = read_values(checkpoint, site.locate(checkpoint)).float().norm()
        edits.append(LowRank(site.matrix, B, A * (relative * weight / (B @ A).norm())))
    return EditPlan(Base(checkpoint.name, None, checkpoint.fingerprint), tuple(edits))


def test_values_are_what_the_format_defines(opened: tuple[Checkpoint, ModelSpec]) -> None:
    checkpoint, spec = opened
    for site in spec.sites:
        q, s = checkpoint.read(site.tensor), checkpoint.read(f"{site.tensor}_scale_inv")
        assert q.dtype == torch.float8_e4m3fn
        assert torch.equal(read_values(checkpoint, site.tensor), numbers(q, s, SIZE))
        x = torch.randn(1, site.out_features)
        found = analyse(checkpoint, site, x)
        assert torch.allclose(found.projection, x @ numbers(q, s, SIZE), atol=1e-5)


def test_blocks_begin_where_scales_do(opened: tuple[Checkpoint, ModelSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, spec = opened
    whole = read_values(checkpoint, spec.sites[1].tensor)
    monkeypatch.setattr("steer2edit.checkpoint.fp8.BLOCK_BYTES", 100)
    parts = list(values(checkpoint, spec.sites[1].tensor))
    assert len(parts) > 2 and torch.equal(torch.cat([block for _, block in parts]), whole)


def test_no_update_changes_no_byte(opened: tuple[Checkpoint, ModelSpec]) -> None:
    checkpoint, spec = opened
    for site in spec.sites:
        edit = LowRank(site.matrix, torch.zeros(site.out_features, 1), torch.zeros(1, site.in_features))
        for block in requantised(checkpoint, site.locate(checkpoint), edit, True):
            assert torch.equal(block.before.view(torch.uint8), block.after.view(torch.uint8))
            assert torch.equal(block.old_scales, block.scales)  # type: ignore[arg-type]


@pytest.mark.parametrize("relative", [0.003, 0.01, 0.1])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_stored_update_pushes_as_planned(tmp_path: Path, relative: float, rank: int) -> None:
    # of the size of a real matrix: the rounding errors of many rows average out
    torch.manual_seed(0)
    size = (128, 128)
    q, s = blockwise(torch.randn(512, 384) * 0.02, size)
    from safetensors.torch import save_file

    save_file({"w": q, "w_scale_inv": s}, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": list(size)}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    checkpoint, weight = open_checkpoint(tmp_path), numbers(q, s, size)
    B, A = torch.randn(512, rank), torch.randn(rank, 384)
    edit = LowRank("w", B, A * (relative * weight.norm() / (B @ A).norm()))
    (block,) = requantised(checkpoint, checkpoint.tensors["w"], edit, True)
    assert torch.equal(block.new, numbers(block.after, block.scales, size))  # type: ignore[arg-type]

    def along(update: torch.Tensor) -> float:
        return float((update * edit.dense()).sum() / edit.dense().square().sum())

    nearest = (weight + edit.dense()) / numbers(torch.ones_like(q), s, size)
    plain = numbers(nearest.clamp(-448, 448).to(torch.float8_e4m3fn), s, size) - weight
    kept, without = along(block.new - weight), along(plain)
    # 12 % of an update of 0.3 % survives plain rounding
    assert abs(kept - 1) < (0.2 if relative == 0.003 else 0.02)
    assert abs(kept - 1) < abs(without - 1) or relative == 0.1
    # a small edit outgrows no scale, though the largest entry of each block was at the format's largest value
    assert torch.equal(block.scales, s) or relative == 0.1  # type: ignore[arg-type]
    # at a noise that is less than what quantising the matrix cost in the first place
    assert float((block.new - weight - edit.dense()).norm()) < 0.03 * float(weight.norm())


def test_a_block_that_outgrows_its_scale_gets_the_next(opened: tuple[Checkpoint, ModelSpec]) -> None:
    checkpoint, spec = opened
    site = spec.sites[0]
    B, A = torch.zeros(site.out_features, 1), torch.zeros(1, site.in_features)
    B[3], A[0, 20] = 1, 50.0  # in block (0, 1)
    (block,) = requantised(checkpoint, site.locate(checkpoint), LowRank(site.matrix, B, A), True)
    assert block.scales is not None and block.old_scales is not None
    moved = (block.scales != block.old_scales).nonzero().tolist()
    assert moved == [[0, 1]]
    assert float(block.new[3, 20]) == pytest.approx(50, rel=0.07)
    outside = torch.ones_like(block.new, dtype=torch.bool)
    outside[:16, 16:32] = False
    assert torch.equal(block.before.view(torch.uint8)[outside], block.after.view(torch.uint8)[outside])


def test_scales_that_are_powers_of_two_stay_so(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ue8m0"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    site = read_spec(checkpoint).sites[0]
    edit = LowRank(site.matrix, torch.ones(site.out_features, 1), torch.full((1, site.in_features), 9.0))
    for block in requantised(checkpoint, site.locate(checkpoint), edit, True):
        assert block.scales is not None and bool((block.scales.log2() % 1 == 0).all())


def test_a_gain_moves_scales_and_no_byte(opened: tuple[Checkpoint, ModelSpec]) -> None:
    checkpoint, spec = opened
    site = spec.sites[1]
    (block,) = requantised(checkpoint, site.locate(checkpoint), Scale.whole(site.matrix, 0.3), True)
    assert torch.equal(block.before.view(torch.uint8), block.after.view(torch.uint8))
    assert torch.allclose(block.new, 0.3 * block.old)


@pytest.mark.parametrize("to", ["checkpoint", "lora"])
def test_artefacts_verify(opened: tuple[Checkpoint, ModelSpec], tmp_path: Path, to: str) -> None:
    checkpoint, spec = opened
    plan = planned(checkpoint, spec, 0.2)
    lowering = emit(plan, checkpoint, spec, to, tmp_path / "out")
    result = verify(tmp_path / "out", checkpoint.path)
    assert result.ok, result.problems
    assert (result.numbers["difference"] <= 1e-4) or to == "checkpoint"
    assert result.numbers["effect"] > 1e-2
    if to == "checkpoint":
        assert lowering.exactness.startswith("approximate in fp8")
        told = lowering.details["requantised"]
        assert {one["tensor"] for one in told} == {edit.tensor for edit in plan.edits}
        by_tensor = {one.tensor: one for one in result.rounding}
        for one in told:
            assert one["relative"] == pytest.approx(by_tensor[one["tensor"]].relative)
            assert 0.9 < one["along_v"] < 1.1 and 0 < one["bytes_kept"] < 1


def test_untouched_tensors_keep_their_bytes_and_revert_restores_the_rest(
    opened: tuple[Checkpoint, ModelSpec], tmp_path: Path
) -> None:
    checkpoint, spec = opened
    plan = planned(checkpoint, spec, 0.5)
    plan = replace(plan, edits=plan.edits[:2])
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    edited = open_checkpoint(tmp_path / "out")
    names = {edit.tensor for edit in plan.edits}
    names |= {f"{name}_scale_inv" for name in names}
    for name in checkpoint.tensors:
        same = torch.equal(checkpoint.read(name).view(torch.uint8), edited.read(name).view(torch.uint8))
        assert same or name in names
    revert(tmp_path / "out", checkpoint.path)
    for shard in checkpoint.shards:
        assert (tmp_path / "out" / shard).read_bytes() == (checkpoint.path / shard).read_bytes()


def test_a_changed_scale_is_named(opened: tuple[Checkpoint, ModelSpec], tmp_path: Path) -> None:
    checkpoint, spec = opened
    plan = planned(checkpoint, spec, 0.2)
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    info = checkpoint.tensors[f"{plan.edits[0].tensor}_scale_inv"]
    path = tmp_path / "out" / info.shard
    data = bytearray(path.read_bytes())
    data[info.offset] ^= 1
    path.write_bytes(data)
    result = verify(tmp_path / "out", checkpoint.path, numbers=False)
    assert any(plan.edits[0].tensor in problem for problem in result.problems)


def test_an_edit_of_rank_one_is_found_under_fp8s_rounding(opened: tuple[Checkpoint, ModelSpec], tmp_path: Path) -> None:
    checkpoint, spec = opened
    plan = planned(checkpoint, spec, 0.5)
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    found = compare(checkpoint, open_checkpoint(tmp_path / "out"))
    assert {item.tensor for item in found.tensors} == {edit.tensor for edit in plan.edits}
    assert {item.rank for item in found.tensors} == {1}
    recovered, left_out = recover_plan(found, checkpoint, spec)
    assert len(recovered.edits) == len(plan.edits) and not left_out


def test_a_loaded_model_has_the_numbers_of_the_file(opened: tuple[Checkpoint, ModelSpec]) -> None:
    checkpoint, spec = opened
    model = load_weights(checkpoint.path, Runtime(dtype="float32"))
    found = dict(model.named_parameters())
    assert {value.dtype for value in found.values()} == {torch.float32}
    for site in spec.sites:
        assert torch.equal(found[f"{site.module}.weight"], read_values(checkpoint, site.tensor))


def test_a_behaviour_compiles_into_fp8(base: Path, statistics_of: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(base)
    spec = read_spec(checkpoint)
    plan = make_plan(Scoring(checkpoint, spec, statistics_of(base)), method="component")
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    assert verify(tmp_path / "out", base).ok


def test_experts_in_fp8_compile(tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "wide", mixture_config("deepseek_v3"), torch.bfloat16)
    checkpoint = open_checkpoint(quantise(source, tmp_path / "fp8", SIZE))
    spec = read_spec(checkpoint)
    assert {MatrixRole.EXPERT_OUT, MatrixRole.SHARED_EXPERT_OUT} <= {site.role for site in spec.sites}
    emit(planned(checkpoint, spec, 0.3), checkpoint, spec, "checkpoint", tmp_path / "out")
    result = verify(tmp_path / "out", checkpoint.path)
    assert result.ok, result.problems


def test_mxfp4_experts_stay_as_they_are(tmp_path: Path, statistics_of: Callable[..., Any]) -> None:
    config = mixture_config("gpt_oss", hidden_size=64, intermediate_size=64, head_dim=16)
    folder = mxfp4(save_mixture(tmp_path / "wide", config, torch.bfloat16), tmp_path / "mxfp4")
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    assert {site.role for site in spec.sites} == {MatrixRole.ATTN_OUT}
    assert spec.frozen == tuple(f"model.layers.{layer}.mlp.experts.down_proj_blocks" for layer in range(spec.layers))
    plan = make_plan(Scoring(checkpoint, spec, statistics_of(folder))).scaled(0.5)
    for to in ("checkpoint", "lora"):
        emit(plan, checkpoint, spec, to, tmp_path / to)
        result = verify(tmp_path / to, folder)
        assert result.ok, result.problems
        assert result.numbers["effect"] > 1e-2 and (result.numbers["difference"] <= 1e-4 or to == "checkpoint")
    assert any("quantised expert tensors" in note for note in read_receipt(tmp_path / "checkpoint")["notes"])


def mxfp4(source: Path, out: Path) -> Path:
    """A copy whose experts have gpt_oss's mxfp4 layout, 32 numbers to a scale; their content is noise."""
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(source)
    tensors = {}
    for name in checkpoint.tensors:
        found = checkpoint.read(name)
        if name.endswith(("experts.down_proj", "experts.gate_up_proj")):
            experts, inputs, outputs = found.shape
            tensors[f"{name}_blocks"] = torch.randint(0, 255, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 122, dtype=torch.uint8)
        else:
            tensors[name] = found
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("wrong", ["no scales", "their shape", "another method", "no block size"])
def test_what_is_not_understood_is_refused(base: Path, tmp_path: Path, wrong: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bad"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    if wrong == "another method":
        config["quantization_config"]["quant_method"] = "compressed-tensors"
    elif wrong == "no block size":
        del config["quantization_config"]["weight_block_size"]
    else:
        tensors = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
        name = "model.layers.1.mlp.down_proj.weight_scale_inv"
        scales = tensors.pop(name)
        if wrong == "their shape":
            tensors[name] = scales[:1].clone()
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    expected = "is quantised" if wrong in ("another method", "no block size") else "down_proj.weight_scale_inv"
    with pytest.raises(ArchitectureError, match=expected):
        read_spec(open_checkpoint(folder))
