"""Rows or columns that were scaled: a difference of two matrices that a factor for each row or column explains."""

from __future__ import annotations

import torch

from steer2edit.checkpoint.fp8 import FP8
from steer2edit.diff.numerical_rank import PRECISION, Pair

_ROUNDINGS = 4.0
"""How many times the mean square of one rounding may be left of a row or column; its entries are dozens at least."""
_LEAST = 8
"""A factor of fewer entries explains too little."""
_NEAR = 1e-3
"""Of a line's energy, more than any dtype's rounding leaves."""


def scaled_lines(pair: Pair) -> tuple[int, torch.Tensor] | None:
    """The file's axis, and a factor for each of its lines, float64, that explain a difference up to one rounding.

    None where there are none. Columns come before rows. In fp8, where a block shares a scale, none are looked for. Both files are
    read once more, and twice where factors come near.
    """
    if FP8 in (pair.ours.dtype, pair.theirs.dtype):
        return None
    sums = [_Sums(size) for size in pair.ours.shape]
    for rows, a, b in pair.blocks():
        sums[0].add(rows, a, b, 1)
        sums[1].add(slice(None), a, b, 0)
    for axis in (1, 0):
        if pair.ours.shape[1 - axis] >= _LEAST and sums[axis].near and _explains(pair, axis, sums[axis].factors):
            return axis, sums[axis].factors
    return None


class _Sums:
    """Of each line: whether it differs, and the sums of a·b, a·a and b·b."""

    def __init__(self, size: int) -> None:
        self.changed = torch.zeros(size, dtype=torch.bool)
        self._cross = torch.zeros(size, dtype=torch.float64)
        self._square = torch.zeros(size, dtype=torch.float64)
        self._edited = torch.zeros(size, dtype=torch.float64)

    def add(self, where: slice, a: torch.Tensor, b: torch.Tensor, axis: int) -> None:
        self.changed[where] |= (a != b).any(dim=axis)
        self._cross[where] += (a * b).sum(dim=axis)
        self._square[where] += a.square().sum(dim=axis)
        self._edited[where] += b.square().sum(dim=axis)

    @property
    def near(self) -> bool:
        """Whether the factors leave little of every line."""
        left = self._edited - self._cross.square() / self._square.clamp(min=1e-300)
        return bool((left <= _NEAR * self._edited).all())

    @property
    def factors(self) -> torch.Tensor:
        ratio = self._cross / self._square.clamp(min=1e-300)
        return torch.where(self.changed & (self._square > 0), ratio, torch.ones_like(ratio))


def _explains(pair: Pair, axis: int, factors: torch.Tensor) -> bool:
    """Whether ``factors`` times the base is the edited matrix, up to rounding, in every line."""
    size = pair.ours.shape[axis]
    left, allowed = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    # the factor itself is known to a rounding of its own, which float32's mantissa makes as small as the entries'
    unit = 2.0 ** -PRECISION[pair.theirs.dtype][0]
    for rows, a, b in pair.blocks():
        wide = factors[rows][:, None] if axis == 0 else factors
        where = rows if axis == 0 else slice(None)
        wanted = a * wide
        left[where] += (wanted - b).square().sum(dim=1 - axis)
        allowed[where] += (wanted * unit).square().sum(dim=1 - axis)
    return bool((left <= _ROUNDINGS * allowed / 12 + 1e-60).all())
