"""The header of a safetensors file: its tensors' names, dtypes, shapes and places.

Headers are checked as strictly as the format allows, because offsets from a file decide later which bytes are copied:
a header that lies is an error here, never a wrong copy.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from steer2edit.errors import CheckpointError, shown
from steer2edit.files.stand_ins import read_failure, stand_in
from steer2edit.files.untrusted import open_regular, parse_json

_MAX_HEADER = 100 << 20
_MAX_AXES = 64
_MAX_COUNT = 1 << 62

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
EDITABLE = frozenset({"F64", "F32", "F16", "BF16"})
# bits of every dtype of the format, also of those that torch may not have
_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_PART = re.compile(r"(.+)\[(\d+)\]")


class Packed(Protocol):
    """How the numbers of a quantised matrix [out, in] lie in a file. ``sources`` are the tensors that it is stored in."""

    @property
    def sources(self) -> tuple[TensorInfo, ...]: ...

    def decoder(self, read: Callable[[TensorInfo], torch.Tensor]) -> Callable[[int, int], torch.Tensor]:
        """A function of a first row and a count, which gives these rows [count, in] as numbers.

        ``read`` gives a stored tensor. What all rows need is read at once, the rest with the rows.
        """
        ...


Read = Callable[["TensorInfo"], torch.Tensor]
"""A function that reads a stored tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``offset`` is from the start of the shard's file, ``nbytes`` its length there.

    A quantised matrix is ``packed``. Then dtype, shape and ``nbytes`` are those of its numbers, and it lies nowhere as it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int
    packed: Packed | None = field(default=None, compare=False)

    @property
    def stored_bytes(self) -> int:
        """How many bytes it takes in the files."""
        return self.nbytes if self.packed is None else sum(one.nbytes for one in self.packed.sources)

    def rows(self, first: int, count: int) -> TensorInfo:
        """``count`` rows of the first axis from ``first``."""
        size = self.nbytes // self.shape[0]
        return replace(self, shape=(count, *self.shape[1:]), offset=self.offset + first * size, nbytes=count * size)

    def part(self, index: int, count: int) -> TensorInfo:
        """The ``index``-th of ``count`` equal parts of the first axis, which goes where there is one part for each row."""
        rows, *rest = self.shape
        if self.packed is not None:
            raise ValueError(f"{self.name} is quantised, and has no parts")
        if rows % count or not 0 <= index < count:
            raise ValueError(f"{self.name} has {rows} rows; it does not have a part {index} of {count}")
        shape = (rows // count, *rest) if rows > count else tuple(rest)
        size = self.nbytes // count
        return replace(
            self, name=part_name(self.name, index), shape=shape, offset=self.offset + index * size, nbytes=size
        )


def dequantised(name: str, shape: tuple[int, ...], shard: str, packed: Packed) -> TensorInfo:
    """A quantised matrix [out, in] as the float32 numbers that it stands for."""
    return TensorInfo(name, "F32", shape, shard, 0, 4 * math.prod(shape), packed)


def part_name(tensor: str, index: int) -> str:
    """What plans call one part of a fused tensor: ``name[3]``."""
    return f"{tensor}[{index}]"


def split_part_name(name: str) -> tuple[str, int] | None:
    """The fused tensor and the index in ``name[3]``; None for the name of a whole tensor."""
    match = _PART.fullmatch(name)
    return None if match is None else (match[1], int(match[2]))


def read_header(path: Path) -> list[TensorInfo]:
    """Parse and check a safetensors header; tensors in the order of their bytes.

    Checked: lengths against the file, JSON, dtypes, shape times dtype against the byte range, and that the
    ranges fill the file without gap or overlap. Raises CheckpointError.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(
                    stand_in(path) or f"{path.name!r} has {size} bytes, too few for a safetensors file"
                )
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    stand_in(path)
                    or f"{path.name!r} is truncated or not a safetensors file: its header claims {length} bytes, "
                    f"the file has {size}"
                )
            raw = file.read(length)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path.name!r} in {path.parent}: {read_failure(path, error)}") from None
    try:
        header = parse_json(raw, unique=True)
        _check_metadata(header.pop("__metadata__", {}))
        infos = [_tensor_info(name, entry, path.name, 8 + length) for name, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path.name!r} has a damaged header: {error}") from None
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = 8 + length
    for info in infos:
        if info.offset != end:
            raise CheckpointError(
                f"{path.name!r} has a damaged header: {info.name!r} begins at byte {info.offset}, expected {end}"
            )
        end += info.nbytes
    if end != size:
        raise CheckpointError(
            f"{path.name!r} is truncated or padded: its header asks for {end} bytes, the file has {size}"
        )
    return infos


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its __metadata__ is not an object of texts")


def _tensor_info(name: str, entry: dict[str, Any], shard: str, base: int) -> TensorInfo:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name!r} has the unknown dtype {shown(dtype)}")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in [*shape, start, end]):
        raise ValueError(f"{name!r} has a shape or offsets that are not whole numbers")
    # also where one extent is 0: no library takes a tensor with more places than an address has
    if len(shape) > _MAX_AXES or math.prod(min(max(n, 1), _MAX_COUNT) for n in shape) >= _MAX_COUNT:
        raise ValueError(f"{name!r} has the shape {shown(shape)}, which no tensor has")
    if math.prod(shape) * _BITS[dtype] != (end - start) * 8:
        raise ValueError(f"{name!r} of shape {shape} in {dtype} does not take the {end - start} bytes it claims")
    return TensorInfo(name, dtype, tuple(shape), shard, base + start, end - start)


def torch_dtype(info: TensorInfo) -> torch.dtype:
    try:
        return DTYPES[info.dtype]
    except KeyError:
        raise CheckpointError(f"{info.name!r} is stored as {info.dtype}, which is copied but not read") from None
