"""Quantised checkpoints for tests: packings written number by number, from the formats' descriptions alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def bit_string(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of unsigned numbers as rows of 32-bit words, each number's bits after those of the one before it; int32."""
    rows = []
    for row in numbers.tolist():
        whole = sum(number << (bits * place) for place, number in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([(whole >> (32 * word)) & 0xFFFFFFFF for word in range(words)])
    return signed(torch.tensor(rows))


def signed(words: torch.Tensor) -> torch.Tensor:
    """Unsigned 32-bit numbers as the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def levels(W: torch.Tensor, bits: int, group: int, *, zero: int | None = None) -> tuple[torch.Tensor, ...]:
    """Round to nearest in groups of inputs: q [out, in], steps [out, groups] float16, zero points [out, groups]."""
    grouped = W.float().view(len(W), -1, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    top = (1 << bits) - 1
    if zero is None:
        step = ((high - low) / top).clamp(min=1e-6).half().float()
        z = (-low / step).round().clamp(1, top)
    else:
        step = (torch.maximum(high / (top - zero), -low / zero)).clamp(min=1e-6).half().float()
        z = torch.full_like(step, zero)
    q = (grouped / step[:, :, None] + z[:, :, None]).round().clamp(0, top)
    return q.flatten(1).long(), step.half(), z.long()


def gptq(
    W: torch.Tensor, bits: int = 4, group: int = 16, *, version: int = 1, order: torch.Tensor | None = None
) -> tuple[Tensors, torch.Tensor]:
    """A matrix in GPTQ's layout, and the numbers that it stands for. ``order`` sorts the inputs before they are grouped."""
    order = torch.arange(W.shape[1]) if order is None else order
    q, step, z = levels(W[:, order], bits, group)
    g_idx = torch.empty(W.shape[1], dtype=torch.int32)
    g_idx[order] = torch.arange(W.shape[1], dtype=torch.int32) // group
    stored = torch.empty_like(q)
    stored[:, order] = q
    numbers = step.float()[:, g_idx.long()] * (stored - z[:, g_idx.long()])
    return {
        "qweight": bit_string(stored, bits).T.contiguous(),
        "qzeros": bit_string(z.T - (2 - version), bits),
        "scales": step.T.contiguous(),
        "g_idx": g_idx,
    }, numbers


def awq(W: torch.Tensor, group: int = 16) -> tuple[Tensors, torch.Tensor]:
    """A matrix in AWQ's layout (gemm), and the numbers that it stands for."""
    q, step, z = levels(W, 4, group)

    def words(numbers: torch.Tensor) -> torch.Tensor:
        mixed = numbers.view(len(numbers), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return bit_string(mixed.flatten(1), 4)

    numbers = step.float().repeat_interleave(group, 1) * (q - z.repeat_interleave(group, 1))
    return {"qweight": words(q.T), "qzeros": words(z.T), "scales": step.T.contiguous()}, numbers


def pack_quantized(W: torch.Tensor, bits: int = 4, group: int = 16) -> tuple[Tensors, torch.Tensor]:
    """A matrix in compressed-tensors' packed format, with zero points, and the numbers that it stands for."""
    q, step, z = levels(W, bits, group)
    numbers = step.float().repeat_interleave(group, 1) * (q - z.repeat_interleave(group, 1))
    return {
        "weight_packed": bit_string(q, bits),
        "weight_scale": step,
        "weight_zero_point": bit_string(z.T, bits).T.contiguous(),
        "weight_shape": torch.tensor(W.shape),
    }, numbers


def symmetric(W: torch.Tensor, bits: int = 4, group: int = 16) -> tuple[Tensors, torch.Tensor]:
    """A matrix in compressed-tensors' packed format, without zero points, and the numbers that it stands for."""
    q, step, z = levels(W, bits, group, zero=1 << (bits - 1))
    numbers = step.float().repeat_interleave(group, 1) * (q - int(z[0, 0]))
    parts = {"weight_packed": bit_string(q, bits), "weight_scale": step, "weight_shape": torch.tensor(W.shape)}
    return parts, numbers


def quantised_copy(
    model: Path,
    folder: Path,
    settings: Mapping[str, Any],
    pack: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]],
) -> Tensors:
    """A copy of a one-shard model whose blocks' matrices are packed; gives the numbers that each stands for."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(settings)}))
    tensors, numbers = load_file(folder / "model.safetensors"), {}
    packed: Tensors = {}
    for name, value in tensors.items():
        if value.ndim == 2 and ".layers." in name:
            parts, numbers[name] = pack(value)
            packed |= {name.removesuffix("weight") + part: stored.contiguous() for part, stored in parts.items()}
        else:
            packed[name] = value
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    return numbers


GPTQ: Mapping[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ: Mapping[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}


def compressed(
    bits: int = 4, group: int = 16, kind: str = "pack-quantized", *, symmetric: bool = False
) -> dict[str, Any]:
    """The config of compressed-tensors for matrices of whole numbers."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""QLoRA's sixteen numbers (Dettmers et al. 2023, appendix E)."""
FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
"""bitsandbytes' eight sizes, in the order of their codes; the highest bit is the sign."""


def four_bits(
    rows: int, columns: int, kind: str, *, twice: bool, dtype: str, block: int = 64
) -> tuple[Tensors, torch.Tensor]:
    """A random matrix in bitsandbytes' 4 bits, and the numbers that it stands for."""
    generator = torch.Generator().manual_seed(rows + columns)
    table = torch.tensor(NF4 if kind == "nf4" else (*FP4, *(-size for size in FP4)), dtype=torch.float32)
    count = rows * columns
    codes = torch.randint(0, 16, (count,), generator=generator)
    raw = (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)
    blocks = -(-count // block)
    sizes = torch.rand(blocks, generator=generator) + 0.1
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": [rows, columns]}
    parts: Tensors = {"weight": raw[:, None], "weight.absmax": sizes, "weight.quant_map": table}
    if twice:
        inner = torch.linspace(-1, 1, 256)
        chosen = torch.randint(0, 256, (blocks,), generator=generator)
        largest = torch.rand(-(-blocks // 4), generator=generator)
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.75}
        sizes = torch.stack([inner[c] * largest[i // 4] + 0.75 for i, c in enumerate(chosen.tolist())])
        parts["weight.absmax"] = chosen.to(torch.uint8)
        parts |= {"weight.nested_absmax": largest, "weight.nested_quant_map": inner}
    written = json.dumps(state).encode()
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(written), dtype=torch.uint8)
    numbers = torch.stack([table[code] * sizes[place // block] for place, code in enumerate(codes.tolist())])
    return parts, numbers.view(rows, columns).to(getattr(torch, dtype))


def e2m1_bytes(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random fp4 values, two a byte with the first in the low bits, and the numbers that they are."""
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(7))

    def number(code: int) -> float:
        sign, exponent, fraction = code >> 3, (code >> 1) & 3, code & 1
        size = fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1)
        return -size if sign else size

    values = torch.tensor([[number(code) for code in row] for row in codes.tolist()])
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8), values
