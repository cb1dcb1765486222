r"""What separates two checkpoints: which tensors differ, by how much, and whether the difference has a low rank.

An edit of rank r that was rounded into a checkpoint's dtype differs from it by ``B A + E``, E being rounding noise of full
rank. Rounding to a value w moves it by at most half a unit in its last place, ``ulp(w)``, and by ``ulp²/12`` in the mean
square, so E's norm is known beforehand. A matrix of independent entries has a spectral norm of at most about
``max_i √(Σ_j var) + max_j √(Σ_i var)`` (Bandeira and van Handel 2016, theorem 1.1, without its logarithm): singular values
of the difference above that floor are the edit's, those under it are rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from steer2edit.architecture import ModelSpec
from steer2edit.checkpoint import Checkpoint, TensorInfo
from steer2edit.fp8 import FP8, SUFFIX, block_size, read_values, scales_of, values
from steer2edit.plan import Base, Bias, Edit, EditPlan, LowRank
from steer2edit.progress import Progress, silent

# the floor is that of a large matrix; small ones scatter about it
_SAFETY = 1.2
# what is left after the edit may be so many times the rounding of its last step: others round more than once
_EXCESS = 3.0
_OVERSAMPLING = 8
# most edits need no wider sketch
_FIRST_RANK = 4
# bits of the significand after the first, and the exponent of the smallest normal number
_PRECISION = {"F64": (52, -1022), "F32": (23, -126), "F16": (10, -14), "BF16": (7, -126), FP8: (3, -6)}


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs, a fused tensor's slice by slice.

    ``norm`` is the difference's Frobenius norm and ``relative`` its part of the base's; ``entries`` the part of the entries
    that differ. Of a matrix also: ``singular`` values above the ``floor`` of rounding, the first one under it (``next``),
    ``rounding`` the norm that rounding alone would leave, ``left`` the norm of what the ``rank`` singular values leave, and
    the factors [out of the file's first axis, rank] and [rank, second axis]. ``rank`` is None where it is not low.
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


@dataclass(frozen=True)
class CheckpointDifference:
    """What :func:`compare` found. ``tensors`` differ in their values, ``dtypes`` in how they are stored (base's, edited's)
    whether or not their values do; ``shapes`` cannot be compared; ``files`` are other files with other bytes.
    """

    same: int
    tensors: tuple[TensorDifference, ...]
    dtypes: Mapping[str, tuple[str, str]]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    only_base: tuple[str, ...]
    only_edited: tuple[str, ...]
    files: tuple[str, ...] = ()


def compare(
    base: Checkpoint,
    edited: Checkpoint,
    parts: Mapping[str, int] | None = None,
    *,
    max_rank: int = 32,
    progress: Progress = silent,
) -> CheckpointDifference:
    """Compare two checkpoints tensor by tensor, by name, however each is divided among shards.

    ``parts`` tells into how many slices a fused tensor falls. A difference of more than ``max_rank`` singular values above
    the floor is not of low rank. Memory is a few blocks and the factors. Raises CheckpointError where a file cannot be read.
    """
    shared = [name for name in base.tensors if name in edited.tensors and not _is_scale(base, edited, name)]
    found, dtypes, shapes, same = [], {}, {}, 0
    with progress("compare", total=sum(base.tensors[name].nbytes for name in shared)) as advance:
        for name in sorted(shared, key=lambda name: (base.tensors[name].shard, base.tensors[name].offset)):
            ours, theirs = base.tensors[name], edited.tensors[name]
            if ours.dtype != theirs.dtype:
                dtypes[name] = (ours.dtype, theirs.dtype)
            if ours.shape != theirs.shape:
                shapes[name] = (ours.shape, theirs.shape)
            else:
                count = (parts or {}).get(name) or (ours.shape[0] if len(ours.shape) == 3 else 1)
                slices = [(ours.part(i, count), theirs.part(i, count)) for i in range(count)] if count > 1 else []
                different = [_difference(base, edited, a, b, max_rank) for a, b in slices or [(ours, theirs)]]
                found += [item for item in different if item is not None]
                same += not any(different)
            advance(ours.nbytes)
    return CheckpointDifference(
        same=same,
        tensors=tuple(found),
        dtypes=dtypes,
        shapes=shapes,
        only_base=tuple(name for name in base.tensors if name not in edited.tensors),
        only_edited=tuple(name for name in edited.tensors if name not in base.tensors),
        files=_other_files(base, edited),
    )


def fused_parts(spec: ModelSpec | None) -> dict[str, int]:
    """Into how many slices the fused tensors of a model fall; a tensor of three axes has one for each row in any case."""
    sites = (site for site in spec.sites if site.part is not None) if spec is not None else ()
    return {name: site.part[1] for site in sites for name in (site.tensor, site.bias) if name and site.part}


@dataclass(frozen=True)
class _Pair:
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


def _difference(
    base: Checkpoint, edited: Checkpoint, ours: TensorInfo, theirs: TensorInfo, max_rank: int
) -> TensorDifference | None:
    if same_numbers(base, edited, ours, theirs):
        return None
    if ours.dtype not in _PRECISION or theirs.dtype not in _PRECISION:
        # other numbers are compared as bytes only
        return TensorDifference(ours.name, ours.shape, float("nan"), float("nan"), float("nan"))
    if len(ours.shape) != 2 or 0 in ours.shape:
        a, b = read_values(base, ours).double(), read_values(edited, theirs).double()
        if torch.equal(a, b):
            return None
        delta = b - a
        relative = float(delta.norm() / a.norm().clamp(min=1e-300))
        changed = float((delta != 0).double().mean())
        return TensorDifference(
            ours.name,
            ours.shape,
            float(delta.norm()),
            relative,
            changed,
            delta=delta.float() if delta.ndim == 1 else None,
        )
    return _matrix_difference(_Pair(base, edited, ours, theirs), max_rank)


def _matrix_difference(pair: _Pair, max_rank: int) -> TensorDifference | None:
    for limit in (min(_FIRST_RANK, max_rank), max_rank):
        found = _measured(pair, limit)
        if found is None or found.rank is not None:
            break
    return found


def _measured(pair: _Pair, max_rank: int) -> TensorDifference | None:
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
    """The least k whose next singular value lies under the floor, which is raised to the noise that is really left.

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
    bits, least = _PRECISION[dtype]
    stored = numbers if factors is None else numbers / factors.double().clamp(min=1e-300)
    exponent = torch.frexp(stored).exponent.clamp(min=least + 1) - 1
    variance = torch.ldexp(torch.ones_like(numbers), exponent - bits).square_().div_(12)
    return variance if factors is None else variance.mul_(factors.double().square())


def same_numbers(base: Checkpoint, edited: Checkpoint, ours: TensorInfo, theirs: TensorInfo) -> bool:
    """Whether two tensors have the same dtype and bytes, and the same scales, where they are in fp8."""
    if not equal(base, edited, ours, theirs):
        return False
    scales = [scales_of(checkpoint, info) for checkpoint, info in ((base, ours), (edited, theirs))]
    return scales[0] is None or scales[1] is None or torch.equal(scales[0].values, scales[1].values)


def equal(base: Checkpoint, edited: Checkpoint, ours: TensorInfo, theirs: TensorInfo) -> bool:
    """Whether two tensors have the same dtype and bytes, read until they differ."""
    if ours.dtype != theirs.dtype:
        return False
    pairs = zip(_bytes_of(base, ours), _bytes_of(edited, theirs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _bytes_of(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[torch.Tensor]:
    raw = TensorInfo(info.name, "U8", (info.nbytes,), info.shard, info.offset, info.nbytes)
    return (block for _, block in checkpoint.blocks(raw))


def _is_scale(base: Checkpoint, edited: Checkpoint, name: str) -> bool:
    # it is compared with its matrix
    matrix = name.removesuffix(SUFFIX)
    return matrix != name and all(c.tensors[matrix].dtype == FP8 for c in (base, edited) if matrix in c.tensors)


def _other_files(base: Checkpoint, edited: Checkpoint) -> tuple[str, ...]:
    """Files beside the weights that both have and whose bytes differ."""

    def names(folder: Path) -> set[str]:
        kept = {".json", ".jinja", ".txt", ".model", ".py"}
        return {path.name for path in folder.iterdir() if path.is_file() and path.suffix in kept}

    shared = sorted(names(base.path) & names(edited.path))
    weights = [name for name in shared if name.endswith(".safetensors.index.json")]
    return tuple(
        name
        for name in shared
        if name not in weights and (base.path / name).read_bytes() != (edited.path / name).read_bytes()
    )


def recover_plan(
    difference: CheckpointDifference, base: Checkpoint, spec: ModelSpec
) -> tuple[EditPlan, dict[str, str]]:
    """The plan whose edits are the differences of low rank at residual writers and their biases; why each other is not in it.

    An edit is known up to the rounding that hid it: ``TensorDifference.floor`` for each of its singular directions.
    """
    edits: list[Edit] = []
    left_out = {}
    for found in difference.tensors:
        site = spec.owners.get(found.tensor)
        if site is None:
            left_out[found.tensor] = "no residual writer"
        elif found.delta is not None:
            edits.append(Bias(found.tensor, found.delta))
        elif found.factors is None:
            left_out[found.tensor] = "within the rounding" if found.rank == 0 else "not of low rank"
        else:
            left, right = found.factors
            B, A = (left, right) if site.orientation == "out_in" else (right.T, left.T)
            edits.append(LowRank(found.tensor, B.contiguous(), A.contiguous()))
    ranks = sorted({edit.B.shape[1] for edit in edits if isinstance(edit, LowRank)})
    method = {"name": "recovered", "ranks": ranks, "left_out": left_out}
    return EditPlan(Base(base.name, base.revision, base.fingerprint), tuple(edits), method=method), left_out
