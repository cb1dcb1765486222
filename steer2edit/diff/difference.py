"""What separates two checkpoints: which tensors differ, by how much, and the plan behind it where its rank is low."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from steer2edit.architecture import ModelSpec
from steer2edit.checkpoint import Checkpoint, TensorInfo, split_part_name
from steer2edit.checkpoint.fp8 import FP8, SUFFIX, read_values, scales_of
from steer2edit.diff.missing_parts import NOTHING, counterparts, part_of
from steer2edit.diff.numerical_rank import PRECISION, Pair, TensorDifference, matrix_difference
from steer2edit.diff.scaled import scaled_lines
from steer2edit.lowering.pruning import NewTensor
from steer2edit.plan import Base, Bias, Edit, EditPlan, LowRank, NewBias, Scale, Structure
from steer2edit.progress import Progress, silent


@dataclass(frozen=True)
class CheckpointDifference:
    """What :func:`compare` found. ``tensors`` differ in their values, ``dtypes`` in how they are stored (base's, edited's)
    whether or not their values do; ``shapes`` cannot be compared; ``files`` are other files with other bytes. ``added`` are
    the values of vectors that the edited one alone has, float32. ``missing`` are the layers or experts that the edited one has
    lost: every name but those in ``only_edited`` is the base's, and counts its layers and experts.
    """

    same: int
    tensors: tuple[TensorDifference, ...]
    dtypes: Mapping[str, tuple[str, str]]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    only_base: tuple[str, ...]
    only_edited: tuple[str, ...]
    files: tuple[str, ...] = ()
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    missing: Structure = NOTHING


def compare(
    base: Checkpoint,
    edited: Checkpoint,
    spec: ModelSpec | None = None,
    missing: Structure = NOTHING,
    *,
    max_rank: int = 32,
    progress: Progress = silent,
) -> CheckpointDifference:
    """Compare two checkpoints tensor by tensor, by name, however each is divided among shards.

    ``spec`` is the base's, and tells into how many slices a fused tensor falls. ``missing`` are the layers and experts that the
    edited checkpoint has lost (``missing_parts``); what is left is compared with what it was in the base. A difference of more
    than ``max_rank`` singular values above the floor is not of low rank. Memory is a few blocks and the factors. Raises
    CheckpointError where a file cannot be read.
    """
    parts = fused_parts(spec)
    expected = counterparts(base, spec, missing)
    found, dtypes, shapes, only_base, same = [], {}, {}, [], 0
    with progress("compare", total=sum(one.info.nbytes for one in expected)) as advance:
        for one in expected:
            advance(one.info.nbytes)
            theirs, name = edited.tensors.get(one.info.name), _origin(base, one)
            if theirs is None:
                only_base.append(name)
                continue
            if _is_scale(base, edited, name, theirs.name):
                continue
            ours = one.info
            if ours.dtype != theirs.dtype:
                dtypes[name] = (ours.dtype, theirs.dtype)
            if ours.shape != theirs.shape:
                shapes[name] = (ours.shape, theirs.shape)
                continue
            different = [
                _difference(base, edited, a, b, max_rank) for a, b in _pairs(one, theirs, name, parts.get(name))
            ]
            found += [item for item in different if item is not None]
            same += not any(different)
    names = {one.info.name for one in expected}
    return CheckpointDifference(
        same=same,
        tensors=tuple(found),
        dtypes=dtypes,
        shapes=shapes,
        only_base=tuple(only_base),
        only_edited=tuple(name for name in edited.tensors if name not in names),
        files=_other_files(base, edited),
        added={
            name: read_values(edited, info).float()
            for name, info in edited.tensors.items()
            if name not in names and len(info.shape) == 1 and info.dtype in PRECISION
        },
        missing=missing,
    )


def _origin(base: Checkpoint, one: NewTensor) -> str:
    """The base's tensor that a tensor is made of."""
    source = one.pieces[0].source.name
    part = None if source in base.tensors else split_part_name(source)
    return source if part is None else part[0]


def _pairs(one: NewTensor, theirs: TensorInfo, name: str, count: int | None) -> list[tuple[TensorInfo, TensorInfo]]:
    """The parts of a tensor that are compared: the base's, and the edited checkpoint's in its shape."""
    sources = [piece.source for piece in one.pieces]
    if sources[0].name != name:
        return [(source, part_of(theirs, index, one.pieces)) for index, source in enumerate(sources)]
    (ours,) = sources
    quantised = ours.packed is not None or theirs.packed is not None
    count = 1 if quantised else count or (ours.shape[0] if len(ours.shape) == 3 else 1)
    return [(ours.part(i, count), theirs.part(i, count)) for i in range(count)] if count > 1 else [(ours, theirs)]


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
    """Whether two tensors have the same dtype and bytes, read until they differ. Of quantised matrices, all that they lie in."""
    if ours.packed is not None and theirs.packed is not None:
        if len(ours.packed.sources) != len(theirs.packed.sources):
            return False
        stored = zip(ours.packed.sources, theirs.packed.sources, strict=True)
        return all(a.shape == b.shape and equal(base, edited, a, b) for a, b in stored)
    if ours.dtype != theirs.dtype or ours.packed is not theirs.packed:
        return False
    pairs = zip(_bytes_of(base, ours), _bytes_of(edited, theirs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _bytes_of(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[torch.Tensor]:
    raw = TensorInfo(info.name, "U8", (info.nbytes,), info.shard, info.offset, info.nbytes)
    return (block for _, block in checkpoint.blocks(raw))


def _is_scale(base: Checkpoint, edited: Checkpoint, name: str, their_name: str) -> bool:
    # it is compared with its matrix
    matrices = [(base, name.removesuffix(SUFFIX)), (edited, their_name.removesuffix(SUFFIX))]
    return matrices[0][1] != name and all(
        c.tensors[matrix].dtype == FP8 for c, matrix in matrices if matrix in c.tensors
    )


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
    """The plan behind a difference, and for what is not in the plan the reason.

    It has all low-rank differences at writers, readers and their biases, scaled rows and columns, and what is missing.

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
        # with layers or experts missing, the edited checkpoint counts others, and no bias is created beside that
        site = None if difference.missing else spec.owners.get(name)
        if site is not None and name == site.new_bias and values.shape == (site.out_features,):
            edits += [NewBias(name, values)] if bool(values.any()) else []
        elif bool(values.any()):
            left_out[name] = "only in the edited checkpoint"
    ranks = sorted({edit.B.shape[1] for edit in edits if isinstance(edit, LowRank)})
    method = {"name": "recovered", "ranks": ranks, "left_out": left_out}
    return EditPlan(Base.of(base), tuple(edits), method=method, structure=difference.missing), left_out
