"""The checkpoint target where experts go: shards of the same names, laid out anew.

Pieces that no edit touches are copied by the kernel, from their place in the base to their place here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open

from steer2edit.architecture import ModelSpec, Site
from steer2edit.checkpoint import INDEX, Checkpoint, TensorInfo, read_json
from steer2edit.checkpoint.fp8 import FP8
from steer2edit.errors import TargetError
from steer2edit.files.byte_ranges import COPY_BYTES, copy_range, write_at
from steer2edit.lowering import Change, Lowering, Writing
from steer2edit.lowering.pruning import Made, Piece, assembled, changed_config, check_structure, header_of
from steer2edit.lowering.rewrite import as_bytes, edited_blocks
from steer2edit.plan import Edit, EditPlan
from steer2edit.progress import Progress


def write_config(plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec, folder: Path) -> None:
    """Write config.json with the plan's numbers of experts. Raises PlanError where the model cannot be pruned so."""
    check_structure(plan.structure, spec)
    text = json.dumps(changed_config(checkpoint.config, plan.structure), indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def lower_pruned(
    plan: EditPlan,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    edits: Mapping[str, tuple[Edit, Site]],
    folder: Path,
    progress: Progress,
    writing: Writing,
) -> Lowering:
    """Write the shards, the index and the config of the model without the plan's removed experts."""
    if scaled := [name for name, (edit, site) in edits.items() if site.locate(checkpoint, name).dtype == FP8]:
        raise TargetError(f"{scaled[0]} is stored in {FP8}: remove the experts first, and edit the result")
    write_config(plan, checkpoint, spec, folder)
    shards = assembled(checkpoint, spec, plan.structure, edits)
    _write_index(checkpoint, shards, folder)
    changes: list[Change] = []
    total = sum(one.info.nbytes for made in shards.values() for one in made)
    with progress("write checkpoint", total=total) as advance, ThreadPoolExecutor(writing.workers) as pool:
        jobs = [job for shard, made in shards.items() for job in _shard_jobs(checkpoint, shard, made, folder)]
        for result in pool.map(lambda job: job(), jobs):
            if isinstance(result, Change):
                changes.append(result)
            else:
                advance(result)
    checkpoint.check_unchanged()
    routers = [spec.router(layer) for layer in plan.structure.remove]
    for name in [name for router in routers for name in (router.tensor, router.bias) if name]:
        changes.append(_pruned_change(checkpoint, shards, name))
    removed = {str(layer): list(gone) for layer, gone in plan.structure.remove.items()}
    kept = spec.routers[0].experts - len(next(iter(removed.values())))
    dtypes = sorted({site.locate(checkpoint, name).dtype for name, (_, site) in edits.items()})
    return Lowering(
        exactness=f"exact, the rest up to one rounding to {', '.join(dtypes)}" if dtypes else "exact",
        changes=tuple(changes),
        notes=tuple(_engine_notes(kept)),
        details={"shards": len(shards), "bytes": total, "removed": removed, "experts": kept},
    )


def _engine_notes(kept: int) -> Iterator[str]:
    """What engines ask of a number of experts beyond what the model does."""
    ways = [n for n in (8, 4, 2) if kept % n == 0]
    if not ways:
        yield f"{kept} experts cannot be divided evenly: engines run them with expert parallelism of 1 only"
    else:
        yield f"{kept} experts a layer: expert parallelism divides them by {', '.join(map(str, ways))}"


def _shard_jobs(
    checkpoint: Checkpoint, shard: str, made: Sequence[Made], folder: Path
) -> Iterator[Callable[[], Change | int]]:
    source, target = checkpoint.path / shard, folder / shard
    with safe_open(source, framework="pt") as opened:
        header = header_of(made, opened.metadata() or {})
    with open(target, "xb") as file:
        file.write(header)
        file.truncate(len(header) + sum(one.info.nbytes for one in made))
    for one in made:
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
    edit, site = piece.edit
    before, after = hashlib.sha256(), hashlib.sha256()
    row_bytes = piece.source.nbytes // max(piece.source.shape[0], 1)
    try:
        with open(target, "r+b", buffering=0) as file:
            for block in edited_blocks(checkpoint, edit, site):
                before.update(as_bytes(block.before))
                data = as_bytes(block.after)
                after.update(data)
                write_at(file.fileno(), data, at + block.first * row_bytes)
    except OSError as error:
        raise TargetError(f"cannot write {edit.tensor}: {error.strerror or error}") from None
    return Change(edit.tensor, type(edit).__name__, edit.norm, before.hexdigest(), after.hexdigest())


def _pruned_change(checkpoint: Checkpoint, shards: Mapping[str, Sequence[Made]], name: str) -> Change:
    made = next(one for one in shards[checkpoint.tensors[name].shard] if one.info.name == name)
    after = hashlib.sha256()
    for piece in made.pieces:
        after.update(as_bytes(checkpoint.read(piece.source)))
    before = hashlib.sha256(as_bytes(checkpoint.read(name))).hexdigest()
    return Change(name, "Removed", None, before, after.hexdigest())


def _write_index(checkpoint: Checkpoint, shards: Mapping[str, Sequence[Made]], folder: Path) -> None:
    if not (folder / INDEX).exists():
        return
    index = read_json(folder / INDEX)
    index["weight_map"] = {one.info.name: shard for shard, made in shards.items() for one in made}
    size = sum(one.info.nbytes for made in shards.values() for one in made)
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def compare_pruned(
    checkpoint: Checkpoint, artefact: Checkpoint, shards: Mapping[str, Sequence[Made]], progress: Progress
) -> tuple[int, list[str]]:
    """How many tensors a pruned checkpoint should have, and what is wrong with those that it has."""
    problems = []
    expected = {one.info.name: one for made in shards.values() for one in made}
    problems += [f"{name} is missing" for name in sorted(expected.keys() - artefact.tensors.keys())]
    problems += [f"{name} should have gone" for name in sorted(artefact.tensors.keys() - expected.keys())]
    with progress("compare tensors", total=sum(one.info.nbytes for one in expected.values())) as advance:
        for name in expected.keys() & artefact.tensors.keys():
            made, found = expected[name], artefact.tensors[name]
            if (found.dtype, found.shape, found.shard) != (made.info.dtype, made.info.shape, made.info.shard):
                problems.append(
                    f"{name} is {found.dtype} {list(found.shape)}, expected {made.info.dtype} {list(made.info.shape)}"
                )
            elif not _same_bytes(checkpoint, artefact, made, found):
                problems.append(f"{name} is not what base and plan give")
            advance(made.info.nbytes)
    return len(expected), problems


def _same_bytes(checkpoint: Checkpoint, artefact: Checkpoint, made: Made, found: TensorInfo) -> bool:
    wanted, got = hashlib.sha256(), hashlib.sha256()
    for piece in made.pieces:
        if piece.edit is None:
            for _, block in checkpoint.blocks(piece.source):
                wanted.update(as_bytes(block))
        else:
            for edited in edited_blocks(checkpoint, *piece.edit):
                wanted.update(as_bytes(edited.after))
    for _, block in artefact.blocks(found):
        got.update(as_bytes(block))
    return wanted.digest() == got.digest()
