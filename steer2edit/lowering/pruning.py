"""A checkpoint with fewer experts or layers: what its tensors are made of, and its config.

Every tensor of the new checkpoint is a sequence of pieces of the base's, some of them edited. Experts that stay keep their
order and are numbered anew; routers lose the rows, biases the entries, of those that go.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steer2edit.architecture.removal import layer_problems, renumbered, set_layers
from steer2edit.architecture.routers import Router, routing_config
from steer2edit.architecture.sites import MatrixRole, ModelSpec, Site
from steer2edit.checkpoint import Checkpoint, TensorInfo
from steer2edit.errors import PlanError, count_of, listing
from steer2edit.plan import Structure
from steer2edit.plan.operations import Edit

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class Piece:
    """Bytes of the base that go into a new tensor, with the edit on them, if there is one."""

    source: TensorInfo
    edit: tuple[Edit, Site] | None = None


@dataclass(frozen=True)
class NewTensor:
    """One tensor of the new checkpoint: where it lies there, and what it is made of."""

    info: TensorInfo
    pieces: tuple[Piece, ...]


def check_structure(structure: Structure, checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raise PlanError, with every problem, unless the experts or layers may be removed from this model."""
    problems = layer_problems(structure.layers, checkpoint, spec) if structure.layers else []
    if structure.layers and (structure.remove or structure.top_k is not None):
        problems.append("a plan removes layers or changes the experts, and not both")
    routers = {router.layer: router for router in spec.routers}
    problems += [f"layer {layer} is not a mixture of experts" for layer in structure.remove if layer not in routers]
    numbers = {layer: len(structure.remove.get(layer, ())) for layer in routers}
    if structure.remove and len(set(numbers.values())) > 1:
        counted = ", ".join(f"{count} in layer {layer}" for layer, count in numbers.items())
        problems.append(f"one number in the config counts every layer's experts, and there would go {counted}")
    for layer, gone in structure.remove.items():
        if layer in routers:
            problems += _removal_problems(routers[layer], gone, structure.top_k)
    if structure.top_k is not None:
        for router in routers.values():
            if structure.top_k > _selectable(router, len(structure.remove.get(router.layer, ()))):
                problems.append(
                    f"layer {router.layer}: {count_of(structure.top_k, 'expert')} per token cannot be selected"
                )
    if problems:
        raise PlanError(f"the model cannot be pruned so:\n{listing(problems)}")


def _removal_problems(router: Router, gone: Sequence[int], top_k: int | None) -> list[str]:
    problems, left = [], router.experts - len(gone)
    if max(gone) >= router.experts:
        return [f"layer {router.layer} has the experts 0-{router.experts - 1}; there is no {max(gone)}"]
    if _selectable(router, len(gone)) < (top_k or router.top_k):
        problems.append(
            f"layer {router.layer}: {count_of(left, 'expert is', 'experts are')} too few to select {top_k or router.top_k}"
        )
    if router.groups > 1:
        size = router.experts // router.groups
        by_group = [sum(expert // size == group for expert in gone) for group in range(router.groups)]
        if len(set(by_group)) > 1:
            problems.append(
                f"layer {router.layer} ranks its experts in {router.groups} groups: as many must go from each, not {by_group}"
            )
    return problems


def _selectable(router: Router, gone: int) -> int:
    left = router.experts - gone
    return left if router.groups <= 1 else left // router.groups * router.top_groups


def assembled(
    checkpoint: Checkpoint, spec: ModelSpec, structure: Structure, edits: Mapping[str, tuple[Edit, Site]]
) -> dict[str, list[NewTensor]]:
    """Every tensor of the new checkpoint by shard, in the order of its bytes; offsets count from the header's end.

    Raises PlanError for edits of routers, whose rows are counted anew, and for edits of layers that go.
    """
    if structure.layers:
        return _without_layers(checkpoint, spec, structure, edits)
    if routed := sorted(name for name, (_, site) in edits.items() if site.role is MatrixRole.ROUTER):
        raise PlanError(f"the plan removes experts and edits {routed[0]}; do one of them")
    routers = {router.layer: router for router in spec.routers}
    owners = _Owners({layer: (routers[layer], gone) for layer, gone in structure.remove.items()})
    result: dict[str, list[NewTensor]] = {}
    for shard in checkpoint.shards:
        infos = sorted((i for i in checkpoint.tensors.values() if i.shard == shard), key=lambda i: (i.offset, i.nbytes))
        tensors, at = [], 0
        for info in infos:
            for name, shape, parts in owners.outcome(info):
                pieces = tuple(Piece(part, edits.get(part.name)) for part in parts)
                size = sum(piece.source.nbytes for piece in pieces)
                tensors.append(NewTensor(TensorInfo(name, info.dtype, shape, shard, at, size), pieces))
                at += size
        result[shard] = tensors
    return result


def _without_layers(
    checkpoint: Checkpoint, spec: ModelSpec, structure: Structure, edits: Mapping[str, tuple[Edit, Site]]
) -> dict[str, list[NewTensor]]:
    if lost := [
        name for name, (_, site) in edits.items() if site.layer in structure.layers and site is not spec.embedding
    ]:
        raise PlanError(f"the plan edits {lost[0]}, whose layer it removes")
    whole = {name: one for name, one in edits.items() if one[1].part is None}
    if len(whole) < len(edits):
        raise PlanError("the plan removes layers and edits experts that share a tensor; remove the layers first")
    result: dict[str, list[NewTensor]] = {}
    for shard in checkpoint.shards:
        infos = sorted((i for i in checkpoint.tensors.values() if i.shard == shard), key=lambda i: (i.offset, i.nbytes))
        tensors, at = [], 0
        for info in infos:
            name = renumbered(info.name, structure.layers, spec)
            if name is not None:
                place = TensorInfo(name, info.dtype, info.shape, shard, at, info.nbytes)
                tensors.append(NewTensor(place, (Piece(info, whole.get(info.name)),)))
                at += info.nbytes
        result[shard] = tensors
    return result


class _Owners:
    """What becomes of each of the base's tensors when experts go."""

    def __init__(self, removed: Mapping[int, tuple[Router, Sequence[int]]]) -> None:
        self._separate: list[tuple[str, Router, dict[int, int | None]]] = []
        self._by_row: dict[str, tuple[Router, list[int]]] = {}
        for router, gone in removed.values():
            staying = [expert for expert in range(router.experts) if expert not in gone]
            number = {expert: staying.index(expert) if expert in staying else None for expert in range(router.experts)}
            if router.folder is not None:
                self._separate.append((router.folder, router, number))
            for name in (*router.fused, router.tensor, router.bias):
                if name is not None:
                    self._by_row[name] = (router, staying)

    def outcome(self, info: TensorInfo) -> Iterator[tuple[str, tuple[int, ...], list[TensorInfo]]]:
        """Name, shape and parts of what is made of a tensor; nothing where it goes."""
        if info.name in self._by_row:
            router, staying = self._by_row[info.name]
            flat = _flat(info) if info.shape[0] == 1 else info
            parts = [flat.part(expert, router.experts) for expert in staying]
            rows = flat.shape[0] // router.experts * len(staying)
            shape = (1, rows) if info.shape[0] == 1 else (rows, *info.shape[1:])
            yield info.name, shape, parts
            return
        for folder, _router, number in self._separate:
            expert, dot, rest = info.name.removeprefix(folder).partition(".")
            if info.name.startswith(folder) and dot and expert.isdigit():
                new = number.get(int(expert))
                if new is not None:
                    yield f"{folder}{new}.{rest}", info.shape, [info]
                return
        yield info.name, info.shape, [info]


def _flat(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=(math.prod(info.shape),))


def header_of(tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> bytes:
    """The header of a shard, its length before it, padded to eight bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for one in tensors:
        start = one.info.offset
        entries[one.info.name] = {
            "dtype": one.info.dtype,
            "shape": list(one.info.shape),
            "data_offsets": [start, start + one.info.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def changed_config(config: Mapping[str, Any], structure: Structure) -> dict[str, Any]:
    """The config with the new number of experts, of experts per token and of layers, wherever it gives them."""
    result: dict[str, Any] = json.loads(json.dumps(config))
    text = next((result[key] for key in _TEXT_CONFIGS if isinstance(result.get(key), dict)), result)
    if structure.layers:
        set_layers(text, structure.layers)
        return result
    counts, per_token = routing_config(text)
    gone = len(next(iter(structure.remove.values()))) if structure.remove else 0
    for path, value in counts.items():
        _set(text, path, value - gone)
    if structure.top_k is not None:
        for path in per_token:
            _set(text, path, structure.top_k)
    return result


def _set(config: dict[str, Any], path: str, value: int) -> None:
    *nested, key = path.split(".")
    for name in nested:
        config = config[name]
    config[key] = [value] * len(config[key]) if isinstance(config[key], list) else value
