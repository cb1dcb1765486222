"""Laws of quantised formats: a matrix is read as the numbers that its packing, written apart, stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_models import (
    AWQ,
    GPTQ,
    Tensors,
    awq,
    bit_string,
    compressed,
    e2m1_bytes,
    four_bits,
    gptq,
    levels,
    pack_quantized,
    quantised_copy,
)
from safetensors.torch import load_file, save_file

from steer2edit.architecture import read_spec
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.checkpoint.bits import unpacked
from steer2edit.errors import ArchitectureError, CheckpointError


@given(st.sampled_from((1, 2, 3, 4, 5, 6, 8)), st.integers(1, 70), st.integers(1, 4), st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_numbers_come_out_of_words_as_they_went_in(bits: int, count: int, rows: int, seed: int) -> None:
    numbers = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    words = bit_string(numbers, bits)
    assert torch.equal(unpacked(words, bits, 1)[:, :count].long(), numbers)
    assert torch.equal(unpacked(words.T.contiguous(), bits, 0)[:count].long(), numbers.T)


def one_matrix(folder: Path, config: dict[str, Any], parts: Tensors, name: str = "m.weight") -> Checkpoint:
    """A checkpoint of one quantised matrix."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    save_file(
        {name.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()},
        folder / "model.safetensors",
    )
    return open_checkpoint(folder)


def check_reading(checkpoint: Checkpoint, numbers: torch.Tensor, dtype: str = "F32") -> None:
    """The matrix reads as ``numbers``: whole, and in blocks of any size."""
    info = checkpoint.tensors["m.weight"]
    assert (info.shape, info.dtype, list(checkpoint.tensors)) == (tuple(numbers.shape), dtype, ["m.weight"])
    assert torch.equal(checkpoint.read("m.weight"), numbers)
    for size in (1, 3 * info.nbytes // info.shape[0], info.nbytes):
        blocks = [(first, block.clone()) for first, block in checkpoint.blocks("m.weight", size)]
        assert torch.equal(torch.cat([block for _, block in blocks]), numbers)
        assert [first for first, _ in blocks] == [sum(len(b) for _, b in blocks[:i]) for i in range(len(blocks))]
    # content digests cover every byte that the matrix is stored in
    stored = sum(len(block) for block in checkpoint.raw_blocks("m.weight"))
    assert stored == info.stored_bytes == sum(one.nbytes for one in checkpoint.stored.values())


def matrix(rows: int = 24, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("sorted_inputs", [False, True])
def test_gptq(tmp_path: Path, bits: int, version: int, sorted_inputs: bool) -> None:
    W = matrix(32, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)) if sorted_inputs else None
    parts, numbers = gptq(W, bits, 16, version=version, order=order)
    config = {
        **GPTQ,
        "bits": bits,
        "desc_act": sorted_inputs,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    checkpoint = one_matrix(tmp_path / "q", config, parts)
    check_reading(checkpoint, numbers)
    assert checkpoint.quantisation is not None and f"{bits} bits" in checkpoint.quantisation.text


@pytest.mark.parametrize("group", [16, 64])
def test_gptq_without_an_order_of_inputs(tmp_path: Path, group: int) -> None:
    parts, numbers = gptq(matrix(), 4, group)
    del parts["g_idx"]
    check_reading(one_matrix(tmp_path / "q", {**GPTQ, "group_size": -1 if group == 64 else group}, parts), numbers)


def test_gptq_of_outputs_that_do_not_fill_the_last_word(tmp_path: Path) -> None:
    parts, numbers = gptq(matrix(rows=20), 4, 16)
    check_reading(one_matrix(tmp_path / "q", dict(GPTQ), parts), numbers)


def test_a_zero_point_that_the_first_version_cannot_hold_is_refused(tmp_path: Path) -> None:
    parts, _ = gptq(matrix(), 4, 16)
    parts["qzeros"][0, 0] = -1
    with pytest.raises(CheckpointError, match="gptq_v2"):
        one_matrix(tmp_path / "q", dict(GPTQ), parts).read("m.weight")


@pytest.mark.parametrize("group", [16, 64])
def test_awq(tmp_path: Path, group: int) -> None:
    parts, numbers = awq(matrix(), group)
    check_reading(one_matrix(tmp_path / "q", {**AWQ, "group_size": group}, parts), numbers)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("columns", [64, 48])
def test_packed_numbers_of_compressed_tensors(tmp_path: Path, bits: int, columns: int) -> None:
    parts, numbers = pack_quantized(matrix(columns=columns), bits, 16)
    check_reading(one_matrix(tmp_path / "q", compressed(bits), parts), numbers)


def test_packed_numbers_whose_inputs_were_sorted(tmp_path: Path) -> None:
    parts, _ = pack_quantized(matrix(), 4, 16)
    group = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 16
    q, step, z = levels(matrix(), 4, 16)
    numbers = step.float()[:, group] * (q - z[:, group])
    check_reading(one_matrix(tmp_path / "q", compressed(), {**parts, "weight_g_idx": group.int()}), numbers)


@pytest.mark.parametrize("scales", ["tensor", "row", "group"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_values_of_eight_bits(tmp_path: Path, scales: str, dtype: torch.dtype) -> None:
    values = (matrix() * 20).clamp(-100, 100).to(dtype)
    step = {"tensor": torch.tensor([0.25]), "row": torch.rand(24, 1), "group": torch.rand(24, 4)}[scales]
    wide = step.repeat_interleave(16, 1) if scales == "group" else step
    kind = "int-quantized" if dtype == torch.int8 else "float-quantized"
    checkpoint = one_matrix(tmp_path / "q", compressed(8, kind=kind), {"weight": values, "weight_scale": step})
    check_reading(checkpoint, values.float() * wide)


def test_fp8_with_a_scale_for_each_row(tmp_path: Path) -> None:
    values, step = matrix().to(torch.float8_e4m3fn), torch.rand(24, 1)
    checkpoint = one_matrix(tmp_path / "q", {"quant_method": "fbgemm_fp8"}, {"weight": values, "weight_scale": step})
    check_reading(checkpoint, values.float() * step)


@pytest.mark.parametrize("kind", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_four_bit_floats(tmp_path: Path, kind: str) -> None:
    raw, values = e2m1_bytes(24, 64)
    if kind.startswith("nv"):
        step = torch.rand(24, 4).to(torch.float8_e4m3fn)
        parts = {"weight_packed": raw, "weight_scale": step, "weight_global_scale": torch.tensor([3.0])}
        numbers = values * (step.float() / 3).repeat_interleave(16, 1)
    else:
        exponents = torch.randint(118, 131, (24, 2), dtype=torch.uint8)
        parts = {"weight_packed": raw, "weight_scale": exponents}
        numbers = values * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    check_reading(one_matrix(tmp_path / "q", compressed(4, kind=kind), parts), numbers)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("columns", [64, 56])
def test_four_bits_of_bitsandbytes(tmp_path: Path, kind: str, twice: bool, dtype: str, columns: int) -> None:
    parts, numbers = four_bits(24, columns, kind, twice=twice, dtype=dtype)
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    checkpoint = one_matrix(tmp_path / "q", config, parts)
    check_reading(checkpoint, numbers, {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype])
    assert checkpoint.quantisation is not None
    assert kind in checkpoint.quantisation.text and ("again" in checkpoint.quantisation.text) == twice


def test_four_bits_whose_bytes_are_called_another_dtype(tmp_path: Path) -> None:
    # bnb_4bit_quant_storage: the same bytes as numbers of bfloat16
    parts, numbers = four_bits(24, 64, "nf4", twice=False, dtype="bfloat16")
    parts["weight"] = parts["weight"].flatten().view(torch.bfloat16)[:, None]
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}
    check_reading(one_matrix(tmp_path / "q", config, parts), numbers, "BF16")


def test_eight_bits_of_bitsandbytes(tmp_path: Path) -> None:
    q, largest = torch.randint(-127, 128, (24, 64), dtype=torch.int8), torch.rand(24)
    parts = {"weight": q, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    checkpoint = one_matrix(tmp_path / "q", {"load_in_8bit": True, "quant_method": "bitsandbytes"}, parts)
    check_reading(checkpoint, q.float() * (largest / 127)[:, None])


BROKEN: list[tuple[str, dict[str, Any], Callable[[], Tensors], str]] = [
    ("gptq", dict(GPTQ), lambda: {**gptq(matrix())[0], "scales": torch.ones(4, 8).half()}, "do not fit together"),
    ("gptq", {**GPTQ, "checkpoint_format": "marlin"}, lambda: gptq(matrix())[0], "marlin"),
    ("gptq", {**GPTQ, "format": "gptq_p"}, lambda: gptq(matrix())[0], "gptq_p"),
    ("awq", {**AWQ, "version": "gemv"}, lambda: awq(matrix())[0], "gemv"),
    ("awq", dict(AWQ), lambda: {"qweight": awq(matrix())[0]["qweight"]}, "qzeros is missing"),
    ("packed", compressed(kind="marlin-24"), lambda: pack_quantized(matrix())[0], "marlin-24"),
    ("packed", compressed(5), lambda: pack_quantized(matrix())[0], "how many bits"),
    ("packed", {**compressed(), "transform_config": {"R1": {}}}, lambda: pack_quantized(matrix())[0], "transform_config"),
    (
        "nf4",
        {"load_in_4bit": True},
        lambda: {k: v for k, v in four_bits(24, 64, "nf4", twice=True, dtype="bfloat16")[0].items() if "nested_absmax" not in k},
        "nested_absmax is missing",
    ),
    (
        "int8",
        {"load_in_8bit": True},
        lambda: {"weight": torch.zeros(4, 4, dtype=torch.int8), "SCB": torch.ones(3)},
        "a scale for each row",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("_kind", "config", "parts", "message"), BROKEN)
def test_what_is_not_sound_or_not_known_is_refused(
    tmp_path: Path, _kind: str, config: dict[str, Any], parts: Callable[[], Tensors], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        one_matrix(tmp_path / "q", config, parts())


FORMATS: list[tuple[dict[str, Any], Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]]] = [
    (dict(GPTQ), gptq),
    (dict(AWQ), awq),
    (compressed(), pack_quantized),
]


@pytest.mark.parametrize(("config", "pack"), FORMATS)
def test_a_quantised_model_has_the_sites_of_the_unquantised_one(
    tmp_path: Path, tiny_llama: Path, config: dict[str, Any], pack: Any
) -> None:
    numbers = quantised_copy(tiny_llama, tmp_path / "q", config, pack)
    checkpoint, plain = open_checkpoint(tmp_path / "q"), open_checkpoint(tiny_llama)
    ours, theirs = read_spec(checkpoint), read_spec(plain)
    assert (ours.sites, ours.readers, ours.embedding) == (theirs.sites, theirs.readers, theirs.embedding)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {
        n: i.shape for n, i in plain.tensors.items()
    }
    for name, value in numbers.items():
        assert torch.equal(checkpoint.read(name), value)
    # the fingerprint is of what the files hold
    before = checkpoint.fingerprint
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    part = next(name for name in tensors if name.endswith("o_proj.scales") or name.endswith("o_proj.weight_scale"))
    tensors[part] = tensors[part] * 2
    save_file(tensors, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(tmp_path / "q").fingerprint != before


def test_scales_beside_the_matrices_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    # AWQ puts them after some families' activations: they change what a writer reads
    quantised_copy(tiny_llama, tmp_path / "q", AWQ, awq)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.mlp.act.scales": torch.ones(48)},
        tmp_path / "q" / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ArchitectureError, match=r"mlp\.act\.scales"):
        read_spec(open_checkpoint(tmp_path / "q"))


@pytest.mark.parametrize("method", ["hqq", "torchao", "quanto", "aqlm", "auto-round", "nvfp4", "something"])
def test_formats_that_are_not_read_are_refused_by_name(tmp_path: Path, tiny_llama: Path, method: str) -> None:
    quantised_copy(tiny_llama, tmp_path / "q", {"quant_method": method}, lambda W: ({"qdata": W.to(torch.int8)}, W))
    with pytest.raises(ArchitectureError, match=rf"quantised \({method}.*bitsandbytes, gptq, awq"):
        read_spec(open_checkpoint(tmp_path / "q"))


def test_a_config_that_quantises_nothing_is_told(tmp_path: Path, tiny_llama: Path) -> None:
    quantised_copy(tiny_llama, tmp_path / "q", GPTQ, lambda W: ({"weight": W}, W))
    with pytest.raises(ArchitectureError, match=r"none of its tensors is quantised"):
        read_spec(open_checkpoint(tmp_path / "q"))


def test_two_quantised_models_differ_where_their_numbers_do(tiny_llama: Path, tmp_path: Path) -> None:
    from steer2edit.diff.difference import compare

    quantised_copy(tiny_llama, tmp_path / "one", GPTQ, gptq)
    quantised_copy(tiny_llama, tmp_path / "two", GPTQ, lambda W: gptq(2 * W if W.shape[1] == 48 else W))
    one, two, plain = (open_checkpoint(folder) for folder in (tmp_path / "one", tmp_path / "two", tiny_llama))
    found = compare(one, two)
    assert found.same == len(one.tensors) - 3
    assert [item.tensor for item in found.tensors] == [f"model.layers.{n}.mlp.down_proj.weight" for n in range(3)]
    assert all(item.relative == pytest.approx(1, abs=0.01) for item in found.tensors)
    assert not compare(one, one).tensors and len(compare(plain, one).tensors) == 21
