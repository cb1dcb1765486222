"""A checkpoint without the plan's removed experts or layers: shards of the same names, with a new layout.

The kernel copies the pieces that no edit touches, from their place in the base to their place here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from steer2edit.checkpoint import Checkpoint, TensorInfo, read_header, read_json
from steer2edit.checkpoint.fp8 import FP8
from steer2edit.errors import CheckpointError, TargetError
from steer2edit.files.byte_ranges import COPY_BYTES, copy_range, write_at
from steer2edit.lowering import Change, Lowering, Resolved, Writing
from steer2edit.lowering.pruning import NewTensor, Piece, assembled, changed_config, check_structure, header_of
from steer2edit.lowering.rewrite import EditRecord, as_bytes, edited_blocks
from steer2edit.progress import Progress
from steer2edit.targets._compare_shards import header_bytes, raw_blocks

CONFIG = "config.json"


def check(resolved: Resolved) -> None:
    """Raise PlanError where the model cannot be pruned so, and TargetError where what is left cannot be edited too."""
    checkpoint, structure = resolved.checkpoint, resolved.plan.structure
    check_structure(structure, checkpoint, resolved.spec)
    if not structure.removes:
        return
    if scaled := [name for name, (_, site) in resolved.edits.items() if site.locate(checkpoint, name).dtype == FP8]:
        raise TargetError(f"{scaled[0]} is stored in {FP8}: remove the experts or layers first, and edit the result")
    _assembled(resolved)


def write_config(resolved: Resolved, folder: Path) -> None:
    """Write config.json with the plan's numbers of experts and layers."""
    text = json.dumps(_config(resolved), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def rewritten_files(resolved: Resolved) -> dict[str, Mapping[str, Any]]:
    """The JSON files that the structure changes, with their new content."""
    check_structure(resolved.plan.structure, resolved.checkpoint, resolved.spec)
    files: dict[str, Mapping[str, Any]] = {CONFIG: _config(resolved)}
    index = resolved.checkpoint.index
    if resolved.plan.structure.removes and index is not None:
        files[index] = _index(resolved.checkpoint, index, _assembled(resolved))
    return files


def lower_pruned(resolved: Resolved, folder: Path, progress: Progress, writing: Writing) -> Lowering:
    """Write the shards, the index and the config of the model without the plan's removed experts or layers."""
    checkpoint = resolved.checkpoint
    write_config(resolved, folder)
    shards = _assembled(resolved)
    if (index := checkpoint.index) is not None:
        text = json.dumps(_index(checkpoint, index, shards), indent=2)
        (folder / index).write_text(text + "\n", encoding="utf-8")
    changes: list[Change] = []
    with progress("write checkpoint", total=_total(shards)) as advance, ThreadPoolExecutor(writing.workers) as pool:
        jobs = [job for shard, tensors in shards.items() for job in _shard_jobs(checkpoint, shard, tensors, folder)]
        for result in pool.map(lambda job: job(), jobs):
            if isinstance(result, Change):
                changes.append(result)
            else:
                advance(result)
    checkpoint.check_unchanged()
    return _lowering(resolved, shards, changes)


def compare_pruned(resolved: Resolved, folder: Path, progress: Progress) -> tuple[int, Lowering, list[str]]:
    """How many tensors a pruned checkpoint should have, what base and plan give, and what is wrong with its shards."""
    checkpoint, shards = resolved.checkpoint, _assembled(resolved)
    changes: list[Change] = []
    problems: list[str] = []
    with progress("compare tensors", total=_total(shards)) as advance:
        for shard, tensors in shards.items():
            problems += _compare_shard(checkpoint, shard, tensors, folder, changes)
            advance(sum(one.info.nbytes for one in tensors))
    return sum(map(len, shards.values())), _lowering(resolved, shards, changes), problems


def _assembled(resolved: Resolved) -> dict[str, list[NewTensor]]:
    return assembled(resolved.checkpoint, resolved.spec, resolved.plan.structure, resolved.edits)


def _total(shards: Mapping[str, Sequence[NewTensor]]) -> int:
    return sum(one.info.nbytes for tensors in shards.values() for one in tensors)


def _config(resolved: Resolved) -> dict[str, Any]:
    return changed_config(resolved.checkpoint.config, resolved.plan.structure)


def _lowering(resolved: Resolved, shards: Mapping[str, Sequence[NewTensor]], edited: Sequence[Change]) -> Lowering:
    checkpoint, spec, structure = resolved.checkpoint, resolved.spec, resolved.plan.structure
    dtypes = sorted({site.locate(checkpoint, name).dtype for name, (_, site) in resolved.edits.items()})
    exactness = f"exact, the rest up to one rounding to {', '.join(dtypes)}" if dtypes else "exact"
    sizes = {"shards": len(shards), "bytes": _total(shards)}
    if structure.layers:
        details: dict[str, Any] = {
            **sizes,
            "removed_layers": list(structure.layers),
            "layers": spec.layers - len(structure.layers),
        }
        return Lowering(exactness, tuple(edited), (), details)
    remove = structure.remove
    routers = [spec.router(layer) for layer in remove]
    names = [name for router in routers for name in (router.tensor, router.bias) if name]
    changes = [*edited, *(_pruned_change(checkpoint, shards, name) for name in names)]
    experts = spec.routers[0].experts - len(next(iter(remove.values())))
    details = {
        **sizes,
        "removed": {str(layer): list(gone) for layer, gone in remove.items()},
        "experts": experts,
    }
    return Lowering(exactness, tuple(changes), tuple(_engine_notes(experts)), details)


def _engine_notes(experts: int) -> Iterator[str]:
    """What engines ask of a number of experts beyond what the model does."""
    ways = [n for n in (8, 4, 2) if experts % n == 0]
    if not ways:
        yield f"{experts} experts cannot be divided evenly: engines run them with expert parallelism of 1 only"
    else:
        yield f"{experts} experts a layer: expert parallelism divides them by {', '.join(map(str, ways))}"


def _shard_jobs(
    checkpoint: Checkpoint, shard: str, tensors: Sequence[NewTensor], folder: Path
) -> Iterator[Callable[[], Change | int]]:
    source, target = checkpoint.path / shard, folder / shard
    header = header_of(tensors, _metadata(checkpoint, shard))
    with open(target, "xb") as file:
        file.write(header)
        file.truncate(len(header) + sum(one.info.nbytes for one in tensors))
    for one in tensors:
        at = len(header) + one.info.offset
        for run, size in _runs(one.pieces):
            if run.edit is None:
                for done in range(0, size, COPY_BYTES):
                    count = min(COPY_BYTES, size - done)
                    yield (
                        lambda start=run.source.offset + done, to=at + done, count=count: copy_range(  # type: ignore[misc]
                            source, start, target, to, count
                        )
                    )
            else:
                yield lambda run=run, at=at: _rewrite(checkpoint, run, target, at)  # type: ignore[misc]
            at += size


def _runs(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, int]]:
    """Pieces that follow each other in the base as one, with their bytes; edited ones by themselves."""
    run: Piece | None = None
    size = 0
    for piece in pieces:
        follows = run is not None and run.edit is None and run.source.offset + size == piece.source.offset
        if follows and piece.edit is None:
            size += piece.source.nbytes
            continue
        if run is not None:
            yield run, size
        run, size = piece, piece.source.nbytes
    if run is not None:
        yield run, size


def _rewrite(checkpoint: Checkpoint, piece: Piece, target: Path, at: int) -> Change:
    assert piece.edit is not None
    record = EditRecord(*piece.edit, [piece.source])
    row_bytes = piece.source.nbytes // max(piece.source.shape[0], 1)
    try:
        with open(target, "r+b", buffering=0) as file:
            for block in edited_blocks(checkpoint, *piece.edit):
                write_at(file.fileno(), record.add(block), at + block.first * row_bytes)
    except OSError as error:
        raise TargetError(f"cannot write {piece.edit[0].tensor}: {error.strerror or error}") from None
    return record.result().changes[0]


def _pruned_change(checkpoint: Checkpoint, shards: Mapping[str, Sequence[NewTensor]], name: str) -> Change:
    tensor = next(one for one in shards[checkpoint.tensors[name].shard] if one.info.name == name)
    after = hashlib.sha256()
    for piece in tensor.pieces:
        after.update(as_bytes(checkpoint.read(piece.source)))
    before = hashlib.sha256(as_bytes(checkpoint.read(name))).hexdigest()
    return Change(name, "Removed", None, before, after.hexdigest())


def _index(checkpoint: Checkpoint, name: str, shards: Mapping[str, Sequence[NewTensor]]) -> dict[str, Any]:
    """The base's index, the file called ``name``, with the tensors that stay, under their new names."""
    index = read_json(checkpoint.path / name)
    index["weight_map"] = {one.info.name: shard for shard, tensors in shards.items() for one in tensors}
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": _total(shards)}
    return index


def _compare_shard(
    checkpoint: Checkpoint, shard: str, tensors: Sequence[NewTensor], folder: Path, changes: list[Change]
) -> list[str]:
    """What is wrong with one shard; the changes of its edited tensors are added to ``changes``."""
    header = header_of(tensors, _metadata(checkpoint, shard))
    try:
        infos = {info.name: info for info in read_header(folder / shard)}
    except CheckpointError as error:
        return [str(error)]
    expected = {one.info.name: replace(one.info, offset=len(header) + one.info.offset) for one in tensors}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - infos.keys())]
    problems += [f"{name} should have gone" for name in sorted(infos.keys() - expected.keys())]
    for one in tensors:
        info, place = expected[one.info.name], infos.get(one.info.name)
        if place is None:
            continue
        if place != info:
            problems.append(
                f"{info.name} is {place.dtype} {list(place.shape)}, expected {info.dtype} {list(info.shape)}"
            )
        elif not _same_tensor(checkpoint, folder, one, place, changes):
            problems.append(f"{info.name} is not what base and plan give")
    if not problems and header_bytes(folder / shard) != header:
        problems.append(f"{shard}: its header is not the one that base and plan give")
    return problems


def _same_tensor(
    checkpoint: Checkpoint, folder: Path, tensor: NewTensor, place: TensorInfo, changes: list[Change]
) -> bool:
    digest, expected = hashlib.sha256(), hashlib.sha256()
    for piece in tensor.pieces:
        if piece.edit is None:
            for block in raw_blocks(checkpoint, piece.source):
                expected.update(as_bytes(block))
            continue
        record = EditRecord(*piece.edit, [piece.source])
        for edited in edited_blocks(checkpoint, *piece.edit):
            expected.update(record.add(edited))
        changes.append(record.result().changes[0])
    for block in raw_blocks(replace(checkpoint, path=folder), place):
        digest.update(as_bytes(block))
    return expected.digest() == digest.digest()


def _metadata(checkpoint: Checkpoint, shard: str) -> dict[str, str]:
    with safe_open(checkpoint.path / shard, framework="pt") as opened:
        return dict(opened.metadata() or {})
