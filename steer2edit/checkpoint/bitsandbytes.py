"""Matrices that bitsandbytes quantised, read as the numbers that it computes with.

In 4 bits ``X.weight`` holds two values a byte, the first in the high bits: each stands for one of 16 numbers (``quant_map``),
times the largest size in its block of the flattened matrix (``absmax``). Quantised twice, ``absmax`` is itself one of 256
numbers times the largest size of its block, plus an offset. In 8 bits ``X.SCB`` holds each row's largest size:
``W = SCB q / 127``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from steer2edit.checkpoint.header import DTYPES, Read, TensorInfo, dequantised
from steer2edit.errors import CheckpointError, shown
from steer2edit.files.untrusted import parse_json

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class FourBits:
    """A matrix in 4 bits: where its parts lie, and what its state says."""

    data: TensorInfo
    absmax: TensorInfo
    levels: TensorInfo
    state: TensorInfo
    shape: tuple[int, int]
    block: int
    dtype: str
    nested: tuple[TensorInfo, TensorInfo] | None = None
    nested_block: int = 0
    offset: float = 0.0

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return (self.data, self.absmax, self.levels, self.state, *(self.nested or ()))

    def decoder(self, read: Read) -> Callable[[int, int], torch.Tensor]:
        """Rows in the dtype that the state names, to which bitsandbytes rounds too."""
        levels, sizes = read(self.levels).float(), read(self.absmax)
        if self.nested is not None:
            largest, inner = (read(one).float() for one in self.nested)
            each = largest.repeat_interleave(self.nested_block)[: len(sizes)]
            sizes = inner[sizes.long()] * each + self.offset
        sizes = sizes.float()
        columns = self.shape[1]

        def rows(first: int, count: int) -> torch.Tensor:
            start, end = first * columns, (first + count) * columns
            raw = read(self.data.rows(start // 2, -(-end // 2) - start // 2)).long()
            codes = torch.stack((raw >> 4, raw & 15), dim=1).flatten()[start % 2 :][: end - start]
            low, high = start // self.block, -(-end // self.block)
            each = sizes[low:high].repeat_interleave(self.block)[start - low * self.block :][: end - start]
            return (levels[codes] * each).to(DTYPES[self.dtype]).view(count, columns)

        return rows


@dataclass(frozen=True)
class EightBits:
    """A matrix in 8 bits with a scale for each row."""

    data: TensorInfo
    scales: TensorInfo
    others: tuple[TensorInfo, ...] = ()

    @property
    def sources(self) -> tuple[TensorInfo, ...]:
        return (self.data, self.scales, *self.others)

    def decoder(self, read: Read) -> Callable[[int, int], torch.Tensor]:
        """Rows in float32."""
        scales = read(self.scales).float().flatten() / 127

        def rows(first: int, count: int) -> torch.Tensor:
            return read(self.data.rows(first, count)).float() * scales[first : first + count, None]

        return rows


def packed_matrices(
    settings: Mapping[str, Any], stored: Mapping[str, TensorInfo], read: Read
) -> tuple[dict[str, TensorInfo], str]:
    """Each quantised matrix by its name, and the format in words. Raises CheckpointError where parts are missing."""
    found: dict[str, TensorInfo] = {}
    kinds = set()
    for name, info in stored.items():
        if match := _STATE.fullmatch(name):
            found[match[1]], kind = _four_bits(stored, match[1], match[2], info, read)
            kinds.add(kind)
        elif name.endswith(".SCB"):
            matrix = name.removesuffix("SCB") + "weight"
            found[matrix] = _eight_bits(stored, matrix, info, read)
            kinds.add("int8 with a scale for each row")
    return found, f"bitsandbytes, {' and '.join(sorted(kinds))}"


def _four_bits(
    stored: Mapping[str, TensorInfo], name: str, kind: str, info: TensorInfo, read: Read
) -> tuple[TensorInfo, str]:
    try:
        state = parse_json(bytes(read(info).view(torch.uint8).tolist()), unique=True)
        shape, block, dtype = tuple(state["shape"]), state["blocksize"], _DTYPES[state["dtype"]]
        nested_block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{info.name} does not hold the state of a matrix in 4 bits: {error!r}") from None
    twice = nested_block is not None
    numbers = (*shape, block, *((nested_block,) if twice else ()))
    if len(shape) != 2 or any(type(n) is not int or n < 1 for n in numbers):
        raise CheckpointError(
            f"{info.name} gives the shape and block {shown(json.dumps(numbers))}; expected whole numbers of a matrix of two axes"
        )
    if twice and (not isinstance(offset, (int, float)) or not math.isfinite(offset)):
        raise CheckpointError(f"{info.name} gives the offset {shown(offset)}; expected a number")
    parts = {part: _part(stored, f"{name}.{part}") for part in ("absmax", "quant_map")}
    blocks = -(-shape[0] * shape[1] // block)
    data = _bytes(_part(stored, name))
    sizes = [(data, -(-shape[0] * shape[1] // 2)), (parts["absmax"], blocks), (parts["quant_map"], 16)]
    nested = None
    if twice:
        nested = (_part(stored, f"{name}.nested_absmax"), _part(stored, f"{name}.nested_quant_map"))
        sizes += [(nested[0], -(-blocks // nested_block)), (nested[1], 256)]
    for part, size in sizes:
        if math.prod(part.shape) != size:
            raise CheckpointError(f"{part.name} holds {math.prod(part.shape)} numbers; {info.name} asks for {size}")
    packed = FourBits(
        data, parts["absmax"], parts["quant_map"], info, shape, block, dtype, nested, nested_block or 0, offset or 0.0
    )
    nbytes = shape[0] * shape[1] * DTYPES[dtype].itemsize
    told = f"{kind} in blocks of {block}{', scales quantised again' if twice else ''}"
    return TensorInfo(name, dtype, shape, data.shard, 0, nbytes, packed), told


def _eight_bits(stored: Mapping[str, TensorInfo], name: str, scales: TensorInfo, read: Read) -> TensorInfo:
    data = _part(stored, name)
    if data.dtype != "I8" or len(data.shape) != 2 or math.prod(scales.shape) != data.shape[0]:
        raise CheckpointError(
            f"{name} is {data.dtype} {list(data.shape)} beside {scales.name} {list(scales.shape)}; expected I8 of two axes, and "
            "a scale for each row"
        )
    layout = stored.get(name.removesuffix("weight") + "weight_format")
    if layout is not None and int(read(layout)):
        raise CheckpointError(
            f"{layout.name} is {int(read(layout))}: that layout is a GPU's own; expected 0 (row by row)"
        )
    packed = EightBits(data, scales, () if layout is None else (layout,))
    return dequantised(name, data.shape, data.shard, packed)


def _part(stored: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    if name not in stored:
        raise CheckpointError(f"{name} is missing, a part of a matrix that bitsandbytes quantised")
    return stored[name]


def _bytes(info: TensorInfo) -> TensorInfo:
    """A tensor as its bytes: bnb_4bit_quant_storage may call them numbers of another dtype."""
    return replace(info, dtype="U8", shape=(info.nbytes,))
