"""A checkpoint on disk: config, tensor index, and reads that never load more than was asked for.

Only headers are read on opening. They are checked as strictly as the format allows, because offsets from a
file decide later which bytes are copied: a header that lies is an error here, never a wrong copy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch

from steer2edit.errors import CheckpointError, HubError, listing, shown
from steer2edit.files.hub import read_reference, snapshot
from steer2edit.files.layout import ADAPTER_CONFIG
from steer2edit.files.untrusted import JSON_BYTES, open_regular, parse_json, read_bytes, special_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# large enough that Python's share is small, small enough that a block stays in the processor's cache
BLOCK_BYTES = 1 << 20
_MAX_HEADER = 100 << 20
_MAX_AXES = 64
_MAX_COUNT = 1 << 62
# weights in other formats, which a safetensors compile neither reads nor passes on
_HUB_IGNORE = [
    "*.bin",
    "*.pth",
    "*.pt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
    "*.ot",
    "original/*",
    "onnx/*",
]

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
_PART = re.compile(r"(.+)\[(\d+)\]")
_STAMPED = ("size", "time of writing", "inode")
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


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``offset`` is from the start of the shard's file, ``nbytes`` its length there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int

    def part(self, index: int, count: int) -> TensorInfo:
        """The ``index``-th of ``count`` equal parts of the first axis, which goes where there is one part for each row."""
        rows, *rest = self.shape
        if rows % count or not 0 <= index < count:
            raise ValueError(f"{self.name} has {rows} rows; there is no part {index} of {count}")
        shape = (rows // count, *rest) if rows > count else tuple(rest)
        size = self.nbytes // count
        return replace(
            self, name=part_name(self.name, index), shape=shape, offset=self.offset + index * size, nbytes=size
        )


def part_name(tensor: str, index: int) -> str:
    """What plans call one part of a fused tensor: ``name[3]``."""
    return f"{tensor}[{index}]"


def split_part_name(name: str) -> tuple[str, int] | None:
    """The fused tensor and the index in ``name[3]``; None for the name of a whole tensor."""
    match = _PART.fullmatch(name)
    return None if match is None else (match[1], int(match[2]))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder in the Hugging Face layout, opened by :func:`open_checkpoint`."""

    path: Path
    name: str
    revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    from_hub: bool = field(default=False, compare=False)
    stamps: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    def blocks(self, tensor: str | TensorInfo, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor, or part of one, in blocks of its first axis: ``(first row, block)``, in the stored dtype.

        A scalar or one-row tensor is one block. A block's memory is used again for the next. Raises CheckpointError where
        the file ends early.
        """
        info = self._info(tensor)
        rows, *rest = info.shape or (1,)
        row_bytes = info.nbytes // rows if rows else 0
        step = max(1, min(rows, block_bytes // row_bytes if row_bytes else rows))
        buffer = torch.empty(step * row_bytes, dtype=torch.uint8)
        with _opened(self.path / info.shard) as file:
            for first in range(0, rows, step):
                count = min(step, rows - first)
                raw = buffer[: count * row_bytes]
                _pread(file.fileno(), info.offset + first * row_bytes, raw, info)
                yield first, raw.view(_torch_dtype(info)).view(count, *rest)

    def _info(self, tensor: str | TensorInfo) -> TensorInfo:
        return self.tensors[tensor] if isinstance(tensor, str) else tensor

    def read(self, tensor: str | TensorInfo) -> torch.Tensor:
        """The whole tensor, or part of one, in the stored dtype and shape."""
        info = self._info(tensor)
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        with _opened(self.path / info.shard) as file:
            _pread(file.fileno(), info.offset, raw, info)
        return raw.view(_torch_dtype(info)).view(info.shape)

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a shard is not the file that was opened: another size, time of writing, or inode."""
        changed = []
        for shard, stamp in self.stamps.items():
            try:
                now = _stamp(self.path / shard)
            except OSError as error:
                changed.append(f"{shard}: {error.strerror}")
                continue
            if now != stamp:
                what = zip(_STAMPED, stamp, now, strict=True)
                changed.append(f"{shard}: " + ", ".join(f"{name} {a} -> {b}" for name, a, b in what if a != b))
        if changed:
            raise CheckpointError(
                f"{self.path} was changed while it was read, so nothing made from it can be trusted:\n{listing(changed)}\n"
                "Run again when nothing writes there."
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, dtype and shape and 128 bytes from its middle.

        It does not depend on how tensors are divided among shards, and reads a few kilobytes only.
        """
        digest = hashlib.sha256()
        files: dict[str, int] = {}
        try:
            for name in sorted(self.tensors):
                info = self.tensors[name]
                digest.update(json.dumps([name, info.dtype, list(info.shape)]).encode())
                if info.shard not in files:
                    files[info.shard] = os.open(self.path / info.shard, os.O_RDONLY)
                count = min(128, info.nbytes)
                start = min(info.nbytes // 2, info.nbytes - count)
                digest.update(os.pread(files[info.shard], count, info.offset + start))
        except OSError as error:
            raise CheckpointError(f"cannot read the shards of {self.path}: {error.strerror or error}") from None
        finally:
            for descriptor in files.values():
                os.close(descriptor)
        return digest.hexdigest()


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a folder, or a Hub id ``user/name`` or ``user/name@revision`` (fetched through huggingface_hub into its cache).

    Raises CheckpointError naming every problem found: missing files, an index that does not match its
    shards, damaged headers.
    """
    path, name, commit = _locate(model, revision)
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; expected a checkpoint folder (config.json and *.safetensors)")
    if special := special_files(path):
        raise CheckpointError(
            f"{path} holds what is neither file nor folder; take it out:\n{listing(map(repr, special))}"
        )
    config = read_json(path / "config.json")
    weight_map = _weight_map(path)
    shards = tuple(dict.fromkeys(weight_map.values())) if weight_map else (SINGLE,)
    found: dict[str, TensorInfo] = {}
    stamps = {}
    problems = []
    for shard in shards:
        try:
            # before its header: whatever is written from here on is noticed
            with suppress(OSError, ValueError):
                stamps[shard] = _stamp(path / shard)
            found |= {info.name: info for info in read_header(path / shard)}
        except CheckpointError as error:
            problems.append(str(error))
    if weight_map and not problems:
        problems += [
            f"{INDEX} places {tensor!r} in {shard}, which does not hold it"
            for tensor, shard in weight_map.items()
            if tensor not in found or found[tensor].shard != shard
        ]
        found = {tensor: found[tensor] for tensor in found if tensor in weight_map}
    if problems:
        raise CheckpointError(f"{path} is not a sound checkpoint:\n{listing(problems)}")
    return Checkpoint(path, name, commit, config, found, shards, from_hub=commit is not None, stamps=stamps)


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
                raise CheckpointError(f"{path.name!r} has {size} bytes, too few for a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path.name!r} is truncated or no safetensors file: its header claims {length} bytes, the file has {size}"
                )
            raw = file.read(length)
    except (OSError, ValueError) as error:  # ValueError: a name that no file system takes
        raise CheckpointError(
            f"cannot read {path.name!r} in {path.parent}: {getattr(error, 'strerror', None) or error}"
        ) from None
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError where it is missing or is none."""
    try:
        value = parse_json(read_bytes(path, JSON_BYTES), unique=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def _locate(model: str | Path, revision: str | None) -> tuple[Path, str, str | None]:
    path = Path(os.path.expanduser(model))
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"--revision {revision} was given, but {path} is a local folder")
        return path, path.resolve().name, None
    reference = read_reference(model, revision)
    if reference is None:
        raise CheckpointError(
            f"{model} does not exist (and is not of the form of a Hub id, user/name or user/name@revision)"
        )
    try:
        folder = snapshot(reference, ignore=_HUB_IGNORE)
    except HubError as error:
        raise CheckpointError(f"{model} is neither a folder here nor could be fetched from the Hub: {error}") from None
    return folder, reference.repository, folder.name


def _weight_map(path: Path) -> dict[str, str] | None:
    if not (path / INDEX).exists():
        if (path / SINGLE).exists():
            return None
        others = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".gguf", ".pth", ".safetensors"})
        hint = f" (found {', '.join(others[:4])})" if others else ""
        if (path / ADAPTER_CONFIG).exists():
            hint = " (this is a PEFT adapter: name its base model instead)"
        raise CheckpointError(
            f"{path} holds neither {SINGLE} nor {INDEX}{hint}; other formats are converted with "
            "transformers' save_pretrained"
        )
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    bad = sorted(
        {shown(f) for f in weight_map.values() if not isinstance(f, str) or Path(f).name != f or f in {"", ".", ".."}}
    )
    if bad:
        raise CheckpointError(
            f"{path / INDEX} names files outside the folder:\n{listing(bad)}\nexpected plain file names"
        )
    return weight_map


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its __metadata__ is no object of texts")


def _tensor_info(name: str, entry: dict[str, Any], shard: str, base: int) -> TensorInfo:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name!r} has the unknown dtype {shown(dtype)}")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in [*shape, start, end]):
        raise ValueError(f"{name!r} has a shape or offsets that are not whole numbers")
    # also where one extent is 0: no library takes a tensor with more places than an address has
    if len(shape) > _MAX_AXES or math.prod(min(max(n, 1), _MAX_COUNT) for n in shape) >= _MAX_COUNT:
        raise ValueError(f"{name!r} has the shape {shown(shape)}, which is no tensor's")
    if math.prod(shape) * _BITS[dtype] != (end - start) * 8:
        raise ValueError(f"{name!r} of shape {shape} in {dtype} does not take the {end - start} bytes it claims")
    return TensorInfo(name, dtype, tuple(shape), shard, base + start, end - start)


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    try:
        return DTYPES[info.dtype]
    except KeyError:
        raise CheckpointError(f"{info.name!r} is stored as {info.dtype}, which is copied but not read") from None


def _stamp(path: Path) -> tuple[int, ...]:
    told = path.stat()
    return told.st_size, told.st_mtime_ns, told.st_ino


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None


def _pread(descriptor: int, offset: int, raw: torch.Tensor, info: TensorInfo) -> None:
    view, done = raw.numpy().data, 0
    while done < len(view):
        try:
            got = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot read {info.name!r} in {info.shard}: {error.strerror or error}") from None
        if got == 0:
            raise CheckpointError(f"{info.shard} ended while {info.name!r} was read: it was changed or truncated")
        done += got
