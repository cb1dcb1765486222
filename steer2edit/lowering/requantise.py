"""Quantising an edited fp8 matrix again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from steer2edit.checkpoint import DTYPES, Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import BlockScales, block_bytes, scales_of
from steer2edit.plan.operations import Edit, LowRank, Scale

_LARGEST = 448.0


# half a unit in the last place above it: until there the largest entry is rounded no worse than any other
_OUTGROWN = 464.0


_CORRECTIONS = 3


@dataclass(frozen=True)
class EditedBlock:
    """Rows of an edited tensor from ``first`` on: as stored ``before`` and ``after``, and as the numbers ``old`` and ``new``.

    Of an fp8 matrix ``scales`` are the blocks' new factors in their stored dtype, and ``old_scales`` those they had.
    """

    first: int
    before: torch.Tensor
    after: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor
    old_scales: torch.Tensor | None = None
    scales: torch.Tensor | None = None


def requantised(checkpoint: Checkpoint, info: TensorInfo, edit: Edit, out_in: bool) -> Iterator[EditedBlock]:
    """The edited matrix, block by block; what is yielded does not depend on the number of threads."""
    scales = scales_of(checkpoint, info)
    assert scales is not None, info
    if isinstance(edit, LowRank):
        edit = _corrected(checkpoint, info, scales, edit, out_in)
    yield from _edited(checkpoint, info, scales, edit, out_in)


def _corrected(checkpoint: Checkpoint, info: TensorInfo, scales: BlockScales, edit: LowRank, out_in: bool) -> LowRank:
    B, A = edit.B.double(), edit.A.double()
    inverse = torch.linalg.pinv(B.T @ B)
    corrected = edit
    for _ in range(_CORRECTIONS):
        stored = torch.zeros_like(A)  # Bᵀ E
        for block in _edited(checkpoint, info, scales, corrected, out_in):
            rows = slice(block.first, block.first + len(block.new))
            change = (block.new - block.old).double()
            if out_in:
                stored += B[rows].T @ change
            else:
                stored[:, rows] = (change @ B).T
        missing = inverse @ ((B.T @ B) @ A - stored)
        # rounded, so that sums in another order of threads give the same correction
        corrected = replace(corrected, A=(corrected.A.double() + missing.bfloat16().double()).float())
    return corrected


def _edited(
    checkpoint: Checkpoint, info: TensorInfo, scales: BlockScales, edit: Edit, out_in: bool
) -> Iterator[EditedBlock]:
    dtype = DTYPES[scales.info.dtype]
    columns, tall = info.shape[1], scales.size[0]
    for first, block in checkpoint.blocks(info, block_bytes(checkpoint, info)):
        factor = scales.rows(first, len(block), columns)
        old = block.float().mul_(factor)
        wanted = old.clone()
        edit.apply(wanted, first, out_in)
        before = scales.values[first // tall : -(-(first + len(block)) // tall)]
        if isinstance(edit, Scale) and edit.axis == "whole" and not scales.powers:
            # a gain belongs into the factors: no byte of the matrix moves
            after, stored = (before * float(edit.factors)).to(dtype).float(), block
        else:
            after = _new_scales(wanted, before, scales, dtype)
            factor = replace(scales, values=after).rows(0, len(block), columns)
            stored = (wanted / factor.clamp(min=1e-38)).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        new = stored.float().mul_(replace(scales, values=after).rows(0, len(block), columns))
        yield EditedBlock(first, block, stored, old, new, before.to(dtype), after.to(dtype))


def _new_scales(wanted: torch.Tensor, before: torch.Tensor, scales: BlockScales, dtype: torch.dtype) -> torch.Tensor:
    tall, wide = scales.size
    rows, columns = wanted.shape
    padded = torch.nn.functional.pad(wanted.abs(), (0, -columns % wide, 0, -rows % tall))
    largest = padded.view(padded.shape[0] // tall, tall, padded.shape[1] // wide, wide).amax(dim=(1, 3))
    least = largest / _LARGEST
    if scales.powers:
        grown = torch.exp2(least.log2().ceil())
    else:
        grown = least.to(dtype).float()
        above = torch.nextafter(least.to(dtype), torch.full_like(least, torch.inf, dtype=dtype)).float()
        grown = torch.where(grown < least, above, grown)
    return torch.where(largest <= _OUTGROWN * before, before, grown)
