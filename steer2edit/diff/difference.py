"""What separates two checkpoints: which tensors differ, by how much, and the plan behind it where its rank is low."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from steer2edit.architecture import ModelSpec
from steer2edit.checkpoint import Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import FP8, SUFFIX, read_values, scales_of
from steer2edit.diff.numerical_rank import PRECISION, Pair, TensorDifference, matrix_difference
from steer2edit.diff.scaled import scaled_lines
from steer2edit.plan import Base, Bias, Edit, EditPlan, LowRank, NewBias, Scale
from steer2edit.progress import Progress, silent


@dataclass(frozen=True)
class CheckpointDifference:
    """What :func:`compare` found. ``tensors`` differ in their values, ``dtypes`` in how they are stored (base's, edited's)
    whether or not their values do; ``shapes`` cannot be compared; ``files`` are other files with other bytes. ``added`` are
    the values of vectors that the edited one alone has, float32.
    """

    same: int
    tensors: tuple[TensorDifference, ...]
    dtypes: Mapping[str, tuple[str, str]]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    only_base: tuple[str, ...]
    only_edited: tuple[str, ...]
    files: tuple[str, ...] = ()
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)


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
        added={
            name: read_values(edited, info).float()
            for name, info in edited.tensors.items()
            if name not in base.tensors and len(info.shape) == 1 and info.dtype in PRECISION
        },
    )


def fused_parts(spec: ModelSpec | None) -> dict[str, int]:
    """The number of slices that each fused tensor of a model has.

    A tensor of three axes has one slice for each row in any case.
    """
    sites = (site for site in (*spec.sites, *spec.readers) if site.part is not None) if spec is not None else ()
    return {name: site.part[1] for site in sites for name in (site.tensor, site.bias) if name and site.part}


def _difference(
    base: Checkpoint, edited: Checkpoint, ours: TensorInfo, theirs: TensorInfo, max_rank: int
) -> TensorDifference | None:
    if same_numbers(base, edited, ours, theirs):
        return None
    if ours.dtype not in PRECISION or theirs.dtype not in PRECISION:
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
    pair = Pair(base, edited, ours, theirs)
    found = matrix_difference(pair, max_rank)
    return found and replace(found, scaled=scaled_lines(pair))


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
    """The plan of all low-rank differences at writers, readers and their biases, and of scaled rows and columns.

    For every other difference, the reason why it is not in the plan.

    An edit is known up to the rounding that hid it: ``TensorDifference.floor`` for each of its singular directions.
    """
    edits: list[Edit] = []
    left_out = {}
    for found in difference.tensors:
        site = spec.owners.get(found.tensor)
        if site is None:
            left_out[found.tensor] = "neither a writer nor a reader of the residual stream"
        elif found.delta is not None:
            edits.append(Bias(found.tensor, found.delta))
        elif found.scaled is not None:
            axis, factors = found.scaled
            along_rows = (axis == 0) == (site.orientation == "out_in")
            edits.append(Scale(found.tensor, factors, "rows" if along_rows else "columns"))
        elif found.factors is None:
            left_out[found.tensor] = "within the rounding" if found.rank == 0 else "not of low rank"
        else:
            left, right = found.factors
            B, A = (left, right) if site.orientation == "out_in" else (right.T, left.T)
            edits.append(LowRank(found.tensor, B.contiguous(), A.contiguous()))
    for name, values in difference.added.items():
        site = spec.owners.get(name)
        if site is not None and name == site.new_bias and values.shape == (site.out_features,):
            edits += [NewBias(name, values)] if bool(values.any()) else []
        elif bool(values.any()):
            left_out[name] = "only in the edited checkpoint"
    ranks = sorted({edit.B.shape[1] for edit in edits if isinstance(edit, LowRank)})
    method = {"name": "recovered", "ranks": ranks, "left_out": left_out}
    return EditPlan(Base.of(base), tuple(edits), method=method), left_out
