r"""The numerical rank of the difference of two matrices, one of which was made from the other and rounded.

An edit of rank r that was rounded into a checkpoint's dtype differs from it by ``B A + E``, E being rounding noise of full
rank. Rounding to a value w moves it by at most half a unit in its last place, ``ulp(w)``, and by ``ulp²/12`` in the mean
square, so E's norm is known beforehand. A matrix of independent entries has a spectral norm of at most about
``max_i √(Σ_j var) + max_j √(Σ_i var)`` (Bandeira and van Handel 2016, theorem 1.1, without its logarithm): singular values
of the difference above that floor are the edit's, those under it are rounding. A value above it is given up again where an edit
of one rank less, rounded into the same weights, leaves one as large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from steer2edit.checkpoint import DTYPES, Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import FP8, block_size, scales_of, values

# the floor is that of a large matrix; small ones scatter about it
_SAFETY = 1.2
# what is left after the edit may be so many times the rounding of its last step: others round more than once
_EXCESS = 3.0
_OVERSAMPLING = 8
# most edits need no wider sketch
_FIRST_RANK = 4
# bits of the significand after the first, and the exponent of the smallest normal number
PRECISION = {"F64": (52, -1022), "F32": (23, -126), "F16": (10, -14), "BF16": (7, -126), FP8: (3, -6)}


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs, a fused tensor's slice by slice.

    ``norm`` is the difference's Frobenius norm and ``relative`` its part of the base's; ``entries`` the part of the entries
    that differ. Of a matrix also: ``singular`` values above the ``floor`` of rounding, the first one under it (``next``),
    ``rounding`` the norm that rounding alone would leave, ``left`` the norm of what the ``rank`` singular values leave, and
    the factors [out of the file's first axis, rank] and [rank, second axis]. ``rank`` is None where it is not low. ``scaled``
    holds the axis of the file, and a factor for each of its lines, where factors alone explain the difference.
    """

    tensor: str
    shape: tuple[int, ...]
    norm: float
    relative: float
    entries: float
    rank: int | None = None
    singular: tuple[float, ...] = ()
    next: float = 0.0
    floor: float = 0.0
    rounding: float = 0.0
    left: float = 0.0
    factors: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False, compare=False)
    delta: torch.Tensor | None = field(default=None, repr=False, compare=False)
    scaled: tuple[int, torch.Tensor] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Pair:
    """The same matrix, [rows, columns], in two checkpoints."""

    base: Checkpoint
    edited: Checkpoint
    ours: TensorInfo
    theirs: TensorInfo

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """``(rows, base, edited)`` in float64: what is left beside a large edit may be ten million times smaller."""
        sizes = (block_size(checkpoint.config) for checkpoint in (self.base, self.edited))
        tall = math.lcm(*(size[0] for size in sizes if size))
        rows = max((1 << 20) // (4 * max(self.ours.shape[1], 1) * tall), 1) * tall
        pairs = zip(values(self.base, self.ours, rows), values(self.edited, self.theirs, rows), strict=True)
        for (first, a), (_, b) in pairs:
            yield slice(first, first + a.shape[0]), a.double(), b.double()

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """``D x`` [rows, n]."""
        return torch.cat([(b - a) @ x for _, a, b in self.blocks()])

    def transposed_times(self, x: torch.Tensor) -> torch.Tensor:
        """``Dᵀ x`` [columns, n]."""
        total = torch.zeros(self.ours.shape[1], x.shape[1], dtype=torch.float64)
        for rows, a, b in self.blocks():
            total += (b - a).T @ x[rows]
        return total


@dataclass(frozen=True)
class _Rounded(Pair):
    """The base's matrix, and what rounding ``left right`` into it would have made of it."""

    left: torch.Tensor
    right: torch.Tensor

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        scales = scales_of(self.edited, self.theirs)
        dtype = DTYPES[self.theirs.dtype]
        for where, a, _ in super().blocks():
            wanted = a + self.left[where] @ self.right
            factors = 1.0 if scales is None else scales.rows(where.start, len(a), a.shape[1]).double().clamp(min=1e-38)
            yield where, a, (wanted / factors).to(dtype).double() * factors


def matrix_difference(pair: Pair, max_rank: int) -> TensorDifference | None:
    """The rank of a difference and the edit behind it, in the memory of a few blocks.

    None where the numbers are the same.
    """
    for limit in (min(_FIRST_RANK, max_rank), max_rank):
        found = _measured(pair, limit)
        if found is None or found.rank is not None:
            break
    while found is not None and found.rank is not None and found.rank > 1 and _explained(pair, found):
        found = _of_less_rank(found)
    return found


def _explained(pair: Pair, found: TensorDifference) -> bool:
    """Whether an edit of one rank less, once rounded, leaves as large a last value.

    It is rounded into these very weights.

    Where an edit is smaller than half a unit in the last place, rounding drops entries by their size: that is not noise, and
    can stand above the floor.
    """
    assert found.rank is not None and found.factors is not None
    k = found.rank - 1
    left, right = found.factors[0][:, :k].double(), found.factors[1][:k].double()
    cross = total = 0.0
    for where, a, b in _Rounded(pair.base, pair.edited, pair.ours, pair.theirs, left, right).blocks():
        update = left[where] @ right
        cross += float((update * (b - a)).sum())
        total += float(update.square().sum())
    # what was found is what rounding kept: the edit was larger by as much
    kept = min(max(cross / total, 0.1), 1.0)
    again = _measured(_Rounded(pair.base, pair.edited, pair.ours, pair.theirs, left / kept, right), k)
    if again is None:
        return False
    values = [*again.singular, again.next]
    return len(values) > k and found.singular[k] <= _SAFETY * values[k]


def _of_less_rank(found: TensorDifference) -> TensorDifference:
    assert found.rank is not None and found.factors is not None
    k = found.rank - 1
    return replace(
        found,
        rank=k,
        singular=found.singular[:k],
        next=found.singular[k],
        left=math.hypot(found.left, found.singular[k]),
        factors=(found.factors[0][:, :k].contiguous(), found.factors[1][:k].contiguous()),
    )


def _measured(pair: Pair, max_rank: int) -> TensorDifference | None:
    """By a randomised singular value decomposition (Halko, Martinsson and Tropp 2011), in four readings of both files."""
    rows, columns = pair.ours.shape
    width = min(max_rank + 1 + _OVERSAMPLING, rows, columns)
    omega = torch.randn(columns, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sketch = torch.empty(rows, width, dtype=torch.float64)
    noise_rows, noise_columns = torch.zeros_like(sketch[:, 0]), torch.zeros_like(omega[:, 0])
    energy = weight = changed = 0.0
    scales = scales_of(pair.edited, pair.theirs)
    for where, a, b in pair.blocks():
        noise = _rounding_variance(
            b, pair.theirs.dtype, None if scales is None else scales.rows(where.start, len(b), columns)
        )
        noise_rows[where] = noise.sum(dim=1)
        noise_columns += noise.sum(dim=0)
        weight += float(a.square().sum())
        delta = b - a
        changed += float(torch.count_nonzero(delta))
        energy += float(delta.square().sum())
        sketch[where] = delta @ omega
    if not math.isfinite(energy + weight):  # NaN or infinity in either: there is no rank
        return TensorDifference(pair.ours.name, pair.ours.shape, float("nan"), float("nan"), float("nan"))
    if not energy:  # the same values in another dtype, or zeros of another sign
        return None
    floor = _SAFETY * float(noise_rows.max().sqrt() + noise_columns.max().sqrt())
    rounding = float(noise_rows.sum().sqrt())
    # one power iteration: the singular values of the noise lie close together, and the sketch alone mixes them in
    basis = torch.linalg.qr(sketch).Q
    basis = torch.linalg.qr(pair.transposed_times(basis)).Q
    basis = torch.linalg.qr(pair.times(basis)).Q
    U, S, V = torch.linalg.svd(pair.transposed_times(basis).T, full_matrices=False)
    found = S.tolist()
    rank = _rank(found, energy, floor, rounding, max_rank)
    kept = max_rank if rank is None else rank
    factors = None
    if rank:
        root = S[:rank].sqrt()
        factors = ((basis @ U[:, :rank]) * root).float(), (root[:, None] * V[:rank]).float()
    return TensorDifference(
        tensor=pair.ours.name,
        shape=pair.ours.shape,
        norm=energy**0.5,
        relative=(energy / max(weight, 1e-300)) ** 0.5,
        entries=changed / (rows * columns),
        rank=rank,
        singular=tuple(found[:kept]),
        next=found[kept] if kept < len(found) else 0.0,
        floor=floor,
        rounding=rounding,
        left=_left(found[:kept], energy),
        factors=factors,
    )


def _rank(values: list[float], energy: float, floor: float, rounding: float, max_rank: int) -> int | None:
    """The least k whose next singular value lies under the floor.

    The floor is raised to the noise that is really left.

    None where there is none up to ``max_rank``, or where more is left than rounding explains.
    """
    for k in range(min(max_rank, len(values)) + 1):
        left = _left(values[:k], energy)
        excess = left / rounding if rounding else 0.0
        following = values[k] if k < len(values) else 0.0
        raised = floor * max(1.0, excess)
        # beside more noise than one rounding leaves, only values that stand well clear of it are an edit's
        clear = excess <= _SAFETY or (excess <= _EXCESS and k > 0 and values[k - 1] >= _EXCESS * raised)
        if following <= raised and (clear or k == len(values)):
            return k
    return None


def _left(values: list[float], energy: float) -> float:
    return math.sqrt(max(energy - sum(value**2 for value in values), 0.0))


def _rounding_variance(numbers: torch.Tensor, dtype: str, factors: torch.Tensor | None) -> torch.Tensor:
    """``ulp²/12`` of each entry as it is stored; float64. ``factors`` are those of an fp8 matrix's blocks."""
    bits, least = PRECISION[dtype]
    stored = numbers if factors is None else numbers / factors.double().clamp(min=1e-300)
    exponent = torch.frexp(stored).exponent.clamp(min=least + 1) - 1
    variance = torch.ldexp(torch.ones_like(numbers), exponent - bits).square_().div_(12)
    return variance if factors is None else variance.mul_(factors.double().square())
