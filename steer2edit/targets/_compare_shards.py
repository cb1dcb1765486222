"""Compare each shard of an artefact with the base's shard under the plan's edits.

The header is compared, and every byte behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from steer2edit.architecture import Site
from steer2edit.checkpoint import Checkpoint, TensorInfo, part_name, read_header, split_part_name
from steer2edit.checkpoint.fp8 import SUFFIX, block_bytes, scales_of
from steer2edit.errors import CheckpointError
from steer2edit.lowering import Resolved, located
from steer2edit.lowering.compare import same_tensor
from steer2edit.lowering.new_biases import NewBiases
from steer2edit.lowering.rewrite import EditRecord, Rewritten, edited_blocks, places_of
from steer2edit.lowering.rounding import Rounding
from steer2edit.plan import Edit
from steer2edit.progress import Progress

Part = tuple[TensorInfo, tuple[Edit, Site] | None]


@dataclass
class ShardComparison:
    """What the shards hold: how many tensors were compared, what is wrong, and a record of each edited tensor."""

    tensors: int = 0
    problems: list[str] = field(default_factory=list)
    rewritten: list[Rewritten] = field(default_factory=list)
    rounding: list[Rounding] = field(default_factory=list)


def compare_shards(
    resolved: Resolved, folder: Path, progress: Progress, created: NewBiases | None = None
) -> ShardComparison:
    """Compare every shard in ``folder`` with the base's.

    Tensors that the base's index does not name are compared too, since loaders read whole shards.
    """
    checkpoint = resolved.checkpoint
    artefact = replace(checkpoint, path=folder) if created is None else created.artefact(folder)
    renamed = {} if created is None else created.renamed
    result = ShardComparison()
    parts = edited_parts(checkpoint, resolved.rewritten)
    sizes = {shard: (checkpoint.path / shard).stat().st_size for shard in checkpoint.shards}
    with progress("compare tensors", total=sum(sizes.values())) as advance:
        for shard, size in sizes.items():
            expected = read_header(checkpoint.path / shard)
            result.tensors += len(expected)
            comparable, problems = _compare_headers(
                expected, checkpoint.path / shard, folder / renamed.get(shard, shard)
            )
            result.problems += problems
            for info in expected:
                if info.name in comparable:
                    _compare_tensor(checkpoint, artefact, parts.get(info.name, [(info, None)]), result)
            advance(size)
    return result


def edited_parts(checkpoint: Checkpoint, edits: Mapping[str, tuple[Edit, Site]]) -> dict[str, list[Part]]:
    """Every edited tensor of the base in its parts, each with the edit on it, if there is one.

    The scales of an edited fp8 matrix are compared with the matrix. They are not parts by themselves.
    """
    result: dict[str, list[Part]] = {}
    for edit, site in edits.values():
        name = site.tensor if edit.tensor == site.matrix else str(site.bias)
        place = located(checkpoint, edit, site)
        count = 1 if site.part is None else site.part[1]
        if site.part is None:
            result[name] = [(place, (edit, site))]
        elif name not in result:
            parts = [checkpoint.tensors[name].part(i, count) for i in range(count)]
            result[name] = [(part, edits.get(part.name)) for part in parts]
        if scales_of(checkpoint, place) is not None and f"{name}{SUFFIX}" not in result:
            scales = checkpoint.tensors[f"{name}{SUFFIX}"]
            parts = [scales.part(i, count) for i in range(count)] if count > 1 else []
            result[scales.name] = [(part, None) for i, part in enumerate(parts) if part_name(name, i) not in edits]
    return result


def same_bytes(checkpoint: Checkpoint, info: TensorInfo, other: Checkpoint, place: TensorInfo) -> bool:
    """Whether two tensors have the same bytes, whatever their dtype; read until they differ."""
    pairs = zip(raw_blocks(checkpoint, info), raw_blocks(other, place), strict=True)
    return info.nbytes == place.nbytes and all(torch.equal(a, b) for a, b in pairs)


def raw_blocks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[torch.Tensor]:
    """A tensor's bytes in blocks, whatever its dtype. A block's memory is used again for the next."""
    raw = TensorInfo(info.name, "U8", (info.nbytes,), info.shard, info.offset, info.nbytes)
    return (block for _, block in checkpoint.blocks(raw))


def _compare_headers(expected: list[TensorInfo], ours: Path, theirs: Path) -> tuple[set[str], list[str]]:
    """The names of the tensors whose bytes can be compared, and what is wrong with the header."""
    try:
        infos = {info.name: info for info in read_header(theirs)}
    except CheckpointError as error:
        return set(), [str(error)]
    names = {info.name for info in expected}
    places = {name: replace(info, shard=ours.name) for name, info in infos.items()}
    comparable = {info.name for info in expected if places.get(info.name) == info}
    problems = [
        f"{name} is missing, or lies elsewhere or in another dtype than in the base"
        for name in sorted(names - comparable)
    ]
    problems += [f"{name} is not in the base" for name in sorted(infos.keys() - names)]
    if not problems and header_bytes(ours) != header_bytes(theirs):
        problems.append(
            f"{theirs.name}: its header differs from the base's (the metadata, or the order of the tensors)"
        )
    return comparable, problems


def header_bytes(path: Path) -> bytes:
    """The header of a sound safetensors file, with its length."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        return prefix + file.read(int.from_bytes(prefix, "little"))


def _compare_tensor(checkpoint: Checkpoint, artefact: Checkpoint, parts: list[Part], result: ShardComparison) -> None:
    for part, edited in parts:
        if edited is None:
            if not same_bytes(checkpoint, part, artefact, _in_artefact(artefact, part)):
                result.problems.append(f"{part.name} differs from the base, though the plan does not edit it")
            continue
        record = EditRecord(*edited, places_of(checkpoint, *edited), measure=True)
        if not _same_edited(checkpoint, artefact, *edited, record):
            result.problems.append(f"{part.name} is not the base's tensor with the plan's edit")
        result.rewritten.append(record.result())
        result.rounding.append(record.rounding)


def _in_artefact(artefact: Checkpoint, part: TensorInfo) -> TensorInfo:
    """A tensor of the base, or a part of one, in the artefact's shard, which may have another name."""
    whole = split_part_name(part.name)
    return replace(part, shard=artefact.tensors[part.name if whole is None else whole[0]].shard)


def _same_edited(checkpoint: Checkpoint, artefact: Checkpoint, edit: Edit, site: Site, record: EditRecord) -> bool:
    # a vector may be stored with an axis of one
    place = _in_artefact(artefact, located(checkpoint, edit, site))
    scales = scales_of(artefact, place)
    same = True
    stored = artefact.blocks(place, block_bytes(checkpoint, place))
    for block, (_, theirs) in zip(edited_blocks(checkpoint, edit, site), stored, strict=True):
        record.add(block)
        same = same and same_tensor(block.after, theirs)
        if scales is not None and block.scales is not None:
            row = block.first // scales.size[0]
            same = same and torch.equal(block.scales.float(), scales.values[row : row + len(block.scales)])
    return same
