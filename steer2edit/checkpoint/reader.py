"""A checkpoint on disk: its config, where its tensors lie, and reads that never load more than was asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch

from steer2edit.checkpoint.header import TensorInfo, torch_dtype
from steer2edit.errors import CheckpointError, listing

# large enough that Python's share is small, small enough that a block stays in the processor's cache
BLOCK_BYTES = 1 << 20
_STAMPED = ("size", "time of writing", "inode")


@dataclass(frozen=True)
class Quantisation:
    """The format in which a checkpoint's matrices are stored, in words, and how many of them are.

    ``weights`` is the unquantised model that they are read from in their place: its name, revision and fingerprint, and how far
    the quantised matrices are from its own.
    """

    text: str
    matrices: int
    weights: Mapping[str, Any] | None = None

    def described(self) -> dict[str, Any]:
        """The format, and what the matrices are read from, in plain values."""
        return {"format": self.text, "weights": None if self.weights is None else dict(self.weights)}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder in the Hugging Face layout, opened by :func:`open_checkpoint`.

    ``shards`` are the files of the weights and ``index`` the file that lists them, if there is one. ``other_weights`` are
    safetensors files and indexes beside them that are neither read nor copied. ``stamps`` are each shard's size, time of
    writing and inode when it was opened, and ``digests`` SHA-256 of tensors that were computed so far.

    Where matrices are quantised in a format that is read (``quantisation``), ``tensors`` has each under the name and the shape
    that it has unquantised, and reading gives the numbers that it stands for. ``stored`` are the files' own tensors.
    """

    path: Path
    name: str
    revision: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    from_hub: bool = field(default=False, compare=False)
    stamps: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    index: str | None = field(default=None, compare=False)
    other_weights: tuple[str, ...] = field(default=(), compare=False)
    digests: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    stored: Mapping[str, TensorInfo] = field(default_factory=dict, compare=False, repr=False)
    quantisation: Quantisation | None = field(default=None, compare=False)

    def blocks(self, tensor: str | TensorInfo, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor, or part of one, in blocks of its first axis: ``(first row, block)``, in the stored dtype.

        A scalar or one-row tensor is one block. A block's memory is used again for the next. Raises CheckpointError where
        the file ends early.
        """
        info = self._info(tensor)
        if info.packed is not None:
            yield from self._decoded(info, block_bytes)
            return
        rows, *rest = info.shape or (1,)
        row_bytes = info.nbytes // rows if rows else 0
        step = max(1, min(rows, block_bytes // row_bytes if row_bytes else rows))
        buffer = torch.empty(step * row_bytes, dtype=torch.uint8)
        with _opened(self.path / info.shard) as file:
            for first in range(0, rows, step):
                count = min(step, rows - first)
                raw = buffer[: count * row_bytes]
                _pread(file.fileno(), info.offset + first * row_bytes, raw, info)
                yield first, raw.view(torch_dtype(info)).view(count, *rest)

    def _decoded(self, info: TensorInfo, block_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The numbers of a quantised matrix, in blocks of its rows."""
        assert info.packed is not None
        rows = info.shape[0]
        step = max(1, min(rows, block_bytes * rows // max(info.nbytes, 1)))
        decode = info.packed.decoder(self.read)
        for first in range(0, rows, step):
            yield first, decode(first, min(step, rows - first))

    def _info(self, tensor: str | TensorInfo) -> TensorInfo:
        return self.tensors[tensor] if isinstance(tensor, str) else tensor

    def read(self, tensor: str | TensorInfo) -> torch.Tensor:
        """The whole tensor, or part of one, in the stored dtype and shape."""
        info = self._info(tensor)
        if info.packed is not None:
            return info.packed.decoder(self.read)(0, info.shape[0])
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        with _opened(self.path / info.shard) as file:
            _pread(file.fileno(), info.offset, raw, info)
        return raw.view(torch_dtype(info)).view(info.shape)

    def raw_blocks(self, tensor: str | TensorInfo, block_bytes: int = BLOCK_BYTES) -> Iterator[memoryview]:
        """The stored bytes of a tensor, or of a part of one, in blocks. A block's memory is used again for the next.

        A quantised matrix has those of all tensors that it is stored in.
        """
        info = self._info(tensor)
        if info.packed is not None:
            for source in info.packed.sources:
                yield from self.raw_blocks(source, block_bytes)
            return
        buffer = torch.empty(min(block_bytes, info.nbytes), dtype=torch.uint8)
        with _opened(self.path / info.shard) as file:
            for start in range(0, info.nbytes, block_bytes):
                raw = buffer[: min(block_bytes, info.nbytes - start)]
                _pread(file.fileno(), info.offset + start, raw, info)
                yield raw.numpy().data

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a shard is not the file that was opened: another size, time of writing, or inode."""
        changed = []
        for shard, before in self.stamps.items():
            try:
                now = stamp(self.path / shard)
            except OSError as error:
                changed.append(f"{shard}: {error.strerror}")
                continue
            if now != before:
                what = zip(_STAMPED, before, now, strict=True)
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
            tensors = self.stored or self.tensors
            for name in sorted(tensors):
                info = tensors[name]
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


def stamp(path: Path) -> tuple[int, ...]:
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
