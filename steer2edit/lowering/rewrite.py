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
from steer2edit.lowering.rounding import RoundingMeter
from steer2edit.plan import Edit

_FILE_BLOCK = 4096


@dataclass(frozen=True)
class _Rewritten:
    """One edited matrix: its bytes, what changed, and, of an fp8 matrix, what re-quantising it cost."""

    nbytes: int
    changes: tuple[Change, ...]
    requantised: Mapping[str, Any] = field(default_factory=dict)


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


def rewrite(checkpoint: Checkpoint, edit: Edit, site: Site, places: Sequence[TensorInfo], folder: Path) -> _Rewritten:
    info = places[0]
    row_bytes = info.nbytes // info.shape[0]
    before, after = hashlib.sha256(), hashlib.sha256()
    meter = RoundingMeter(edit.tensor)
    old_scales: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    kept = 0
    with open(folder / info.shard, "r+b", buffering=0) as file:
        for block in edited_blocks(checkpoint, edit, site):
            if not _finite(block.new):
                raise TargetError(f"{edit.tensor}: the edited values do not fit {info.dtype}; lower the strength")
            before.update(as_bytes(block.before))
            data = as_bytes(block.after)
            after.update(data)
            _write(file.fileno(), data, info.offset + block.first * row_bytes, edit.tensor)
            if block.scales is not None and block.old_scales is not None:
                meter.add(edit, site.orientation == "out_in", block.first, block.old, block.new)
                kept += int((block.before.view(torch.uint8) == block.after.view(torch.uint8)).sum())
                old_scales.append(block.old_scales)
                scales.append(block.scales)
    change = Change(edit.tensor, type(edit).__name__, edit.norm, before.hexdigest(), after.hexdigest())
    if not scales:
        return _Rewritten(info.nbytes, (change,))
    was, now = torch.cat(old_scales), torch.cat(scales)
    with open(folder / places[1].shard, "r+b", buffering=0) as file:
        _write(file.fileno(), as_bytes(now), places[1].offset, places[1].name)
    hashes = [hashlib.sha256(as_bytes(values)).hexdigest() for values in (was, now)]
    found = {
        **asdict(meter.result()),
        "blocks": now.numel(),
        "rescaled": int((was != now).sum()),
        "bytes_kept": kept / info.nbytes,
    }
    return _Rewritten(info.nbytes, (change, Change(places[1].name, f"scales of {edit.tensor}", None, *hashes)), found)


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


def copies(source: Path, target: Path, start: int, end: int) -> Iterator[Callable[[], _Rewritten | int]]:
    """The work of copying a byte range in pieces.

    Pieces begin and end at whole blocks of the file system, apart from the first and the last: only those can be shared.
    """
    while start < end:
        unit = _FILE_BLOCK if start % _FILE_BLOCK else COPY_BYTES
        stop = min((start // unit + 1) * unit, end)
        yield lambda at=start, count=stop - start: copy_range(source, at, target, at, count)  # type: ignore[misc]
        start = stop
