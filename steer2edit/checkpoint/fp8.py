r"""Matrices in fp8 with a scale for each block, as DeepSeek-V3 is published: read as numbers, edited, and written back.

``X.weight`` holds float8_e4m3 values q, ``X.weight_scale_inv`` a factor s for each block of (usually) 128 x 128, and the
matrix is ``W = s q``. An edited block keeps its s as long as ``|W'| <= 464 s``, what rounds to the largest q, 448: then every
entry that the edit does not move to another value keeps its byte. A block that outgrows it gets ``s' = max|W'| / 448``.

e4m3 has three bits after the first: its values lie 6 to 12 % apart, and W lies exactly on them. An update of 1 % would be
rounded away at most entries, and half of what steers with it. So a low-rank update is corrected before it is rounded: with
``E`` the update that would be stored, A gains ``(BᵀB)⁻¹ Bᵀ (B A - E)``, three times. What is stored then pushes along B as
planned, at the least rounding noise that does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steer2edit.checkpoint.header import TensorInfo, split_part_name
from steer2edit.checkpoint.reader import BLOCK_BYTES, Checkpoint
from steer2edit.errors import CheckpointError

FP8 = "F8_E4M3"
SUFFIX = "_scale_inv"
_SCALE_DTYPES = {"F32", "BF16", "F16"}


@dataclass(frozen=True)
class BlockScales:
    """The scales of one fp8 matrix: their place, their values in float32, and the size of a block.

    ``powers`` is whether only powers of two may be written (the ue8m0 format).
    """

    info: TensorInfo
    values: torch.Tensor
    size: tuple[int, int]
    powers: bool = False

    def rows(self, first: int, count: int, columns: int) -> torch.Tensor:
        """Each entry's factor, for ``count`` rows from ``first``, which begins a block; [count, columns]."""
        tall, wide = self.size
        chosen = self.values[first // tall : -(-(first + count) // tall)]
        return chosen.repeat_interleave(tall, dim=0)[:count].repeat_interleave(wide, dim=1)[:, :columns]


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a scale's block, where a checkpoint is quantised in this way; else None."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8" or settings.get("fmt", "e4m3") != "e4m3":
        return None
    size = settings.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n < 1 << 16 for n in size):
        return None
    return size[0], size[1]


def scale_info(checkpoint: Checkpoint, info: TensorInfo) -> TensorInfo:
    """Where the scales of an fp8 matrix lie, or those of a part of a tensor of several. Reads nothing.

    Raises CheckpointError where they are missing, or do not have the shape that the matrix asks for.
    """
    size = block_size(checkpoint.config)
    part = None if info.name in checkpoint.tensors else split_part_name(info.name)
    whole = checkpoint.tensors[part[0]] if part else info
    scales = checkpoint.tensors.get(f"{whole.name}{SUFFIX}")
    if size is None or scales is None or scales.dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{info.name} is stored as {FP8}; expected {whole.name}{SUFFIX} beside it, in {', '.join(sorted(_SCALE_DTYPES))}, "
            "and quantization_config.weight_block_size in config.json"
        )
    count = whole.nbytes // max(info.nbytes, 1)
    if part is not None and scales.shape and scales.shape[0] % count == 0:
        scales = scales.part(part[1], count)
    shape = tuple(-(-n // block) for n, block in zip(info.shape, size, strict=True)) if len(info.shape) == 2 else ()
    if scales.shape != shape:
        raise CheckpointError(f"{scales.name} has the shape {list(scales.shape)}; {info.name} asks for {list(shape)}")
    return scales


def scales_of(checkpoint: Checkpoint, info: TensorInfo) -> BlockScales | None:
    """The scales of an fp8 matrix, read; None for every other dtype. Raises CheckpointError as :func:`scale_info`."""
    size = block_size(checkpoint.config)
    if info.dtype != FP8 or (size is None and f"{info.name}{SUFFIX}" not in checkpoint.tensors):
        return None
    place = scale_info(checkpoint, info)
    assert size is not None
    powers = checkpoint.config["quantization_config"].get("scale_fmt") == "ue8m0"
    return BlockScales(place, checkpoint.read(place).float(), size, powers)


def values(
    checkpoint: Checkpoint, tensor: str | TensorInfo, rows: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor's numbers in blocks of its first axis, ``(first row, block)``: fp8 in float32, others in their stored dtype.

    ``rows`` is how many a block has (of an fp8 matrix, a multiple of what its scales have). A block's memory may be used again
    for the next. Raises CheckpointError where the file ends early.
    """
    info = checkpoint.tensors[tensor] if isinstance(tensor, str) else tensor
    scales = scales_of(checkpoint, info)
    size = block_bytes(checkpoint, info) if rows is None else rows * max(info.nbytes // max(info.shape[0], 1), 1)
    if scales is None:
        yield from checkpoint.blocks(info, size)
        return
    for first, block in checkpoint.blocks(info, size):
        yield first, block.float().mul_(scales.rows(first, len(block), info.shape[1]))


def read_values(checkpoint: Checkpoint, tensor: str | TensorInfo) -> torch.Tensor:
    """All of a tensor's numbers: fp8 in float32, others in their stored dtype."""
    info = checkpoint.tensors[tensor] if isinstance(tensor, str) else tensor
    if info.dtype != FP8:
        return checkpoint.read(info)
    result = torch.empty(info.shape)
    for first, block in values(checkpoint, info):
        result[first : first + len(block)] = block
    return result


def block_bytes(checkpoint: Checkpoint, info: TensorInfo) -> int:
    """Bytes that are read at a time: of an fp8 matrix those of as many rows as whole blocks have."""
    size = block_size(checkpoint.config)
    if info.dtype != FP8 or size is None or len(info.shape) != 2:
        return BLOCK_BYTES
    tall = size[0] * info.shape[1]
    return max(BLOCK_BYTES // tall, 1) * tall
