"""Layers and experts that one checkpoint has lost beside another, and the tensors of both that belong together.

A model without a layer counts the later ones anew, and so do experts of a mixture. Tensors of the same name are then parts of
different layers. Which layers are missing is told by the numbers: two layers of one model have nothing in common, so that their
matrices differ by √2 of their norm, and a layer that was trained on or edited stays near its origin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from steer2edit.architecture import ModelSpec
from steer2edit.architecture.config import layer_count, text_config
from steer2edit.architecture.removal import layer_number, renumbered
from steer2edit.architecture.routers import Router, routing_config
from steer2edit.checkpoint import EDITABLE, Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import FP8, block_size, values
from steer2edit.errors import ArchitectureError, CheckpointError
from steer2edit.lowering.pruning import NewTensor, Piece, assembled
from steer2edit.plan import Structure

NOTHING = Structure()
"""What a checkpoint has lost that has lost nothing."""
NEAR = 0.5
"""A layer is taken for another's where their matrices differ by less of their norm, in the median."""
_SAMPLE = 4096
"""Numbers that are read of each matrix, from its beginning."""


@dataclass(frozen=True)
class Sizes:
    """What config.json counts: layers, experts in a layer (0 without), and experts for each token."""

    layers: int
    experts: int
    top_k: int


def sizes_of(checkpoint: Checkpoint) -> Sizes | None:
    """The sizes that config.json gives; None where it gives no number of layers."""
    text = text_config(checkpoint.config).values
    try:
        counts, per_token = routing_config(text)
        return Sizes(layer_count(text), next(iter(counts.values()), 0), next(iter(per_token.values()), 0))
    except ArchitectureError:
        return None


def missing_parts(
    base: Checkpoint,
    edited: Checkpoint,
    spec: ModelSpec | None,
    told: Callable[[], Structure | None] = lambda: None,
) -> Structure:
    """The layers or experts of ``base`` that ``edited`` has lost.

    It is empty where config.json gives both the same numbers. ``told`` gives what a receipt says, and is believed where it fits
    the shapes. ``spec`` is None for a base whose layout is not understood. Raises CheckpointError where it cannot be told which
    parts are missing: a comparison by name would take a layer for another one.
    """
    ours, theirs = sizes_of(base), sizes_of(edited)
    if ours is None or theirs is None or ours == theirs:
        return NOTHING
    names = f"{edited.name} has {_counted(theirs)}, and {base.name} {_counted(ours)}"
    if theirs.layers > ours.layers or theirs.experts > ours.experts:
        raise CheckpointError(
            f"{names}: give the one that has more as the first, and the one that lost some as the second"
        )
    if theirs.layers == ours.layers and theirs.experts == ours.experts:
        return Structure(top_k=theirs.top_k or None)
    if spec is None:
        raise CheckpointError(f"{names}, and which are missing cannot be told: the layout is not understood")
    receipt = told()
    if receipt is not None and _fits(base, edited, spec, receipt):
        return receipt
    if theirs.layers < ours.layers and theirs.experts < ours.experts:
        raise CheckpointError(
            f"{names}: which are missing can be told of layers or of experts, and not of both at once"
        )
    if theirs.layers < ours.layers:
        kept = _kept(_layer_distances(base, edited, spec, theirs.layers), f"{names}, and which are missing", "layer")
        found = Structure(layers=_others(kept, ours.layers))
    else:
        top_k = theirs.top_k if theirs.top_k != ours.top_k else None
        gone = {router.layer: _experts_gone(base, edited, router, names) for router in spec.routers}
        found = Structure({layer: experts for layer, experts in gone.items() if experts}, top_k)
    if not _fits(base, edited, spec, found):
        raise CheckpointError(f"{names}; the other tensors do not have the shapes that go with that")
    return found


def counterparts(base: Checkpoint, spec: ModelSpec | None, missing: Structure) -> list[NewTensor]:
    """The tensors that a checkpoint without the missing parts has, each with what it is of the base. In the base's order."""
    if missing.removes:
        assert spec is not None
        return [one for tensors in assembled(base, spec, missing, {}).values() for one in tensors]
    infos = sorted(base.tensors.values(), key=lambda info: (info.shard, info.offset))
    return [NewTensor(info, (Piece(info),)) for info in infos]


def _counted(sizes: Sizes) -> str:
    return f"{sizes.layers} layers" + (f" of {sizes.experts} experts" if sizes.experts else "")


def _fits(base: Checkpoint, edited: Checkpoint, spec: ModelSpec, missing: Structure) -> bool:
    """Whether the edited checkpoint has every tensor that is left, in its shape."""
    if any(layer >= spec.layers for layer in missing.layers):
        return False
    experts = {router.layer: router.experts for router in spec.routers}
    if any(expert >= experts.get(layer, 0) for layer, gone in missing.remove.items() for expert in gone):
        return False
    left = {one.info.name: one.info.shape for one in counterparts(base, spec, missing)}
    return all(name in edited.tensors and edited.tensors[name].shape == shape for name, shape in left.items())


def _others(kept: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(sorted(set(range(count)) - set(kept)))


def _kept(distances: torch.Tensor, names: str, what: str) -> list[int]:
    """The base's part that each part of the edited checkpoint is, from their distances [edited, base].

    Raises CheckpointError unless each is near one of the base's, in the same order.
    """
    kept: list[int] = []
    for number, row in enumerate(distances):
        near = (row < NEAR).nonzero().flatten().tolist()
        if len(near) != 1:
            nearest = int(row.argmin())
            reason = (
                f"is near {len(near)} of the first's, such as {near[0]} and {near[1]}"
                if near
                else f"is near none of the first's; the nearest is {nearest}, at {float(row[nearest]):.2f} of its norm"
            )
            raise CheckpointError(f"{names} cannot be told: the second's {what} {number} {reason}")
        if kept and near[0] <= kept[-1]:
            raise CheckpointError(f"{names} cannot be told: those that are left stand in another order")
        kept += near
    return kept


def _experts_gone(base: Checkpoint, edited: Checkpoint, router: Router, names: str) -> tuple[int, ...]:
    """The experts of one layer that are missing, by the rows of its router."""
    old, new = base.tensors[router.tensor], edited.tensors.get(router.tensor)
    if new is None or len(new.shape) != 2 or new.shape[1] != old.shape[1] or new.dtype not in EDITABLE:
        raise CheckpointError(f"{names}; the second has no matrix {router.tensor} of {old.shape[1]} columns")
    distances = _distances(edited.read(new).double(), base.read(old).double())
    return _others(
        _kept(distances, f"{names}, and which of layer {router.layer} are missing", "expert"), router.experts
    )


def _layer_distances(base: Checkpoint, edited: Checkpoint, spec: ModelSpec, left: int) -> torch.Tensor:
    """How far each layer of the edited checkpoint is from each of the base's [left, layers].

    The median over the matrices that both have in one shape, of experts none; infinite where there are none.
    """
    ours, theirs = _matrices(base, spec, spec.layers), _matrices(edited, spec, left)
    alone = sorted(set(ours) & set(theirs))
    found = torch.full((len(alone), left, spec.layers), torch.nan, dtype=torch.float64)
    for index, name in enumerate(alone):
        for shape in {info.shape for info in ours[name].values()}:
            old = {layer: info for layer, info in ours[name].items() if info.shape == shape}
            new = {layer: info for layer, info in theirs[name].items() if info.shape == shape}
            if not new:
                continue
            samples = [torch.stack(list(_samples(one, two))) for one, two in ((edited, new), (base, old))]
            places = torch.tensor(list(new))[:, None], torch.tensor(list(old))[None]
            found[index][places] = _distances(*samples)
    median = found.nanmedian(dim=0).values if alone else torch.full((left, spec.layers), torch.nan)
    return median.nan_to_num(nan=torch.inf)


def _matrices(checkpoint: Checkpoint, spec: ModelSpec, count: int) -> dict[str, dict[int, TensorInfo]]:
    """The layers' matrices by what follows the layer's number in their names, then by layer. Those of experts are left out."""
    experts = tuple(router.folder for router in spec.routers if router.folder is not None)
    found: dict[str, dict[int, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        layer = layer_number(name, spec)
        known = info.dtype in EDITABLE or info.dtype == FP8
        if layer is None or layer >= count or len(info.shape) != 2 or not known or name.startswith(experts):
            continue
        # as it would be called in the first layer
        plain = renumbered(name, range(layer), spec)
        assert plain is not None
        found.setdefault(plain, {})[layer] = info
    return found


def _samples(checkpoint: Checkpoint, infos: Mapping[int, TensorInfo]) -> Iterator[torch.Tensor]:
    """The first numbers of each matrix, in whole rows."""
    size = block_size(checkpoint.config)
    for info in infos.values():
        rows = size[0] if size and info.dtype == FP8 else max(_SAMPLE // max(info.shape[1], 1), 1)
        _, block = next(iter(values(checkpoint, info, rows)))
        yield block[: max(_SAMPLE // max(info.shape[1], 1), 1)].double().flatten()


def _distances(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """‖new − old‖ / ‖old‖ for each pair of rows [new, old]."""
    apart: torch.Tensor = torch.cdist(new, old) / old.norm(dim=1).clamp(min=1e-300)
    return apart


def part_of(theirs: TensorInfo, index: int, pieces: Sequence[Piece]) -> TensorInfo:
    """What of the edited checkpoint's tensor belongs to one piece of the base, in its shape."""
    if len(pieces) == 1:
        return replace(theirs, shape=pieces[0].source.shape)
    flat = replace(theirs, shape=theirs.shape[1:]) if theirs.shape[0] == 1 else theirs
    return replace(flat.part(index, len(pieces)), shape=pieces[index].source.shape)
