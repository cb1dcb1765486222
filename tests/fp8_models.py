"""Tiny checkpoints in fp8 with block scales, quantised as DeepSeek-V3 is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from steer2edit.checkpoint import open_checkpoint

KEPT = ("embed", "lm_head", "norm", "gate.weight", "conv")


def blockwise(values: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """q and s of a matrix, the largest entry of each block at 448; written out block by block, as the format is defined."""
    rows, columns = values.shape
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    s = torch.empty(-(-rows // size[0]), -(-columns // size[1]))
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            block = (slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1]))
            s[i, j] = values[block].abs().max() / 448
            q[block] = (values[block] / s[i, j]).to(torch.float8_e4m3fn)
    return q, s


def numbers(q: torch.Tensor, s: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What q and s stand for."""
    wide = s.repeat_interleave(size[0], 0)[: q.shape[0]].repeat_interleave(size[1], 1)[:, : q.shape[1]]
    return q.float() * wide


def quantise(source: Path, out: Path, size: tuple[int, int] = (16, 16), **settings: object) -> Path:
    """A copy of a checkpoint whose linear layers are in fp8 and everything else in bf16."""
    checkpoint = open_checkpoint(source)
    tensors = {}
    for name in checkpoint.tensors:
        values = checkpoint.read(name)
        if values.ndim != 2 or any(part in name for part in KEPT):
            tensors[name] = values.bfloat16() if values.is_floating_point() else values
        else:
            tensors[name], tensors[f"{name}_scale_inv"] = blockwise(values.float(), size)
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(source, out, ignore=ignored)
    names = sorted(tensors)
    # scales and matrices in different shards
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, out / shard, {"format": "pt"})
    weight_map = {name: shard for shard, inside in shards.items() for name in inside}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(size), **settings,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return out
