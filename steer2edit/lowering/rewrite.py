"""Rewriting the bytes of an edited tensor, block by block; all other bytes are copied."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import Site
from steer2edit.checkpoint import Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import FP8, scale_info
from steer2edit.errors import TargetError
from steer2edit.files.byte_ranges import COPY_BYTES, copy_range, write_at
from steer2edit.lowering.requantise import EditedBlock, requantised
from steer2edit.lowering.resolve import Change, located
from steer2edit.lowering.rounding import Rounding, RoundingMeter
from steer2edit.plan import Edit

_FILE_BLOCK = 4096


@dataclass(frozen=True)
class Rewritten:
    """One edited matrix: its bytes, what changed, and, of an fp8 matrix, the error of quantising it again."""

    nbytes: int
    changes: tuple[Change, ...]
    requantised: Mapping[str, Any] = field(default_factory=dict)


class EditRecord:
    """What a receipt says of one edited tensor, gathered block by block.

    ``rounding`` is measured for an fp8 matrix, and for every matrix where ``measure`` is set.
    """

    def __init__(self, edit: Edit, site: Site, places: Sequence[TensorInfo], *, measure: bool = False) -> None:
        self._edit, self._out_in, self._places, self._measure = edit, site.orientation == "out_in", places, measure
        self._before, self._after = hashlib.sha256(), hashlib.sha256()
        self._meter = RoundingMeter(edit.tensor)
        self._old_scales: list[torch.Tensor] = []
        self._scales: list[torch.Tensor] = []
        self._unchanged = 0

    def add(self, block: EditedBlock) -> memoryview:
        """Take in the next block; its bytes after the edit."""
        self._before.update(as_bytes(block.before))
        after = as_bytes(block.after)
        self._after.update(after)
        quantised = block.scales is not None and block.old_scales is not None
        if quantised or self._measure:
            self._meter.add(self._edit, self._out_in, block.first, block.old, block.new)
        if block.scales is not None and block.old_scales is not None:
            self._unchanged += int((block.before.view(torch.uint8) == block.after.view(torch.uint8)).sum())
            self._old_scales.append(block.old_scales)
            self._scales.append(block.scales)
        return after

    @property
    def scales(self) -> torch.Tensor | None:
        """The new scales of an fp8 matrix, in their stored dtype; None for others."""
        return torch.cat(self._scales) if self._scales else None

    @property
    def rounding(self) -> Rounding:
        """How much of the update the stored dtype kept."""
        return self._meter.result()

    def result(self) -> Rewritten:
        """The finished record."""
        edit, nbytes = self._edit, self._places[0].nbytes
        change = Change(edit.tensor, type(edit).__name__, edit.norm, self._before.hexdigest(), self._after.hexdigest())
        if not self._scales:
            return Rewritten(nbytes, (change,))
        before, after = torch.cat(self._old_scales), torch.cat(self._scales)
        hashes = [hashlib.sha256(as_bytes(values)).hexdigest() for values in (before, after)]
        requantised = {
            **asdict(self.rounding),
            "blocks": after.numel(),
            "rescaled": int((before != after).sum()),
            "bytes_kept": self._unchanged / nbytes,
        }
        scales = Change(self._places[1].name, f"scales of {edit.tensor}", None, *hashes)
        return Rewritten(nbytes, (change, scales), requantised)


def places_of(checkpoint: Checkpoint, edit: Edit, site: Site) -> list[TensorInfo]:
    """The bytes that an edit rewrites: the matrix, and the scales of one in fp8."""
    info = located(checkpoint, edit, site)
    return [info, scale_info(checkpoint, info)] if info.dtype == FP8 else [info]


def edited_blocks(checkpoint: Checkpoint, edit: Edit, site: Site) -> Iterator[EditedBlock]:
    """A tensor in its stored orientation and dtype before and after an edit, block by block.

    The blocks' memory is used again for the next.
    """
    info, out_in = located(checkpoint, edit, site), site.orientation == "out_in"
    if info.dtype == FP8:
        yield from requantised(checkpoint, info, edit, out_in)
        return
    wide, new = torch.empty(0), torch.empty(0)
    for first, block in checkpoint.blocks(info):
        if first == 0:
            wide = torch.empty(block.shape, dtype=torch.promote_types(block.dtype, torch.float32))
            new = torch.empty_like(block)
        count = block.shape[0]
        total = wide[:count].copy_(block)
        edit.apply(total, first, out_in)
        after = new[:count].copy_(total)
        yield EditedBlock(first, block, after, block, after)


def rewrite(checkpoint: Checkpoint, edit: Edit, site: Site, places: Sequence[TensorInfo], folder: Path) -> Rewritten:
    """Write an edited tensor, and its scales if it has some, into the shards in ``folder``.

    Raises TargetError where a value does not fit the stored dtype, or the disk is full.
    """
    info = places[0]
    row_bytes = info.nbytes // info.shape[0]
    record = EditRecord(edit, site, places)
    with open(folder / info.shard, "r+b", buffering=0) as file:
        for block in edited_blocks(checkpoint, edit, site):
            if not _finite(block.new):
                raise TargetError(f"{edit.tensor}: the edited values do not fit {info.dtype}; lower the strength")
            _write(file.fileno(), record.add(block), info.offset + block.first * row_bytes, edit.tensor)
    if (scales := record.scales) is not None:
        with open(folder / places[1].shard, "r+b", buffering=0) as file:
            _write(file.fileno(), as_bytes(scales), places[1].offset, places[1].name)
    return record.result()


def _write(descriptor: int, data: memoryview, offset: int, name: str) -> None:
    try:
        write_at(descriptor, data, offset)
    except OSError as error:
        raise TargetError(f"cannot write {name}: {error.strerror or error}") from None


def _finite(values: torch.Tensor) -> bool:
    # the extremes pass NaN on, and take a small part of the time of isfinite().all()
    return all(map(math.isfinite, torch.stack(values.aminmax()).tolist()))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def copies(source: Path, target: Path, start: int, end: int) -> Iterator[Callable[[], Rewritten | int]]:
    """The work of copying a byte range in pieces, as functions.

    Pieces begin and end at whole blocks of the file system, apart from the first and the last: only whole blocks can be shared.
    """
    while start < end:
        unit = _FILE_BLOCK if start % _FILE_BLOCK else COPY_BYTES
        stop = min((start // unit + 1) * unit, end)
        yield lambda at=start, count=stop - start: copy_range(source, at, target, at, count)  # type: ignore[misc]
        start = stop
