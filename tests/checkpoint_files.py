"""Small checkpoints for tests: written whole, dealt over shards, or damaged on purpose."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steer2edit.checkpoint import INDEX, SINGLE, open_checkpoint
from steer2edit.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
TENSORS: Tensors = {f"layer.{i}.weight": torch.randn(3, 4) for i in range(5)} | {"norm": torch.randn(4)}


def write(folder: Path, tensors: Tensors, shards: int = 0, config: Any = None) -> Path:
    """A checkpoint in one file, or dealt over ``shards`` files with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    if not shards:
        save_file(tensors, folder / SINGLE)
        return folder
    weight_map = {}
    for index in range(shards):
        name = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    set_index(folder, weight_map)
    return folder


def set_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return folder


def entry(start: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def refusal(folder: Path | str, revision: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, revision)
    return str(caught.value)
