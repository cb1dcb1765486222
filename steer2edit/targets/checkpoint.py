"""The checkpoint target: the base's folder again, with only the edited tensors' bytes different.

Same shards, names, order, dtypes and metadata. Byte ranges between edited tensors are copied by the kernel; an
edited tensor is read, summed in float32, rounded once and written, block by block.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from steer2edit.architecture import ModelSpec, Site
from steer2edit.checkpoint import Checkpoint
from steer2edit.copying import COPY_BYTES, copy_range, write_at
from steer2edit.errors import TargetError
from steer2edit.files import RECEIPT
from steer2edit.plan import Edit, EditPlan
from steer2edit.progress import Progress
from steer2edit.targets import Change, Lowering, Writing, located, resolve

# other copies of the weights: they would be unedited, and some engines prefer them
_OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot")


def lower(
    plan: EditPlan,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    folder: Path,
    progress: Progress,
    writing: Writing = Writing(),  # noqa: B008
) -> Lowering:
    """Write the edited checkpoint into ``folder``. Raises TargetError where a value does not fit the stored dtype."""
    edits = resolve(plan, checkpoint, spec)
    left_out = copy_other_files(checkpoint, folder)
    sizes = {shard: (checkpoint.path / shard).stat().st_size for shard in checkpoint.shards}
    edited = {located(checkpoint, *one).shard for one in edits.values()}
    linked = [shard for shard in sizes if writing.link and shard not in edited and _link(checkpoint, shard, folder)]
    changes: list[Change] = []
    total = sum(size for shard, size in sizes.items() if shard not in linked)
    with progress("write checkpoint", total=total) as advance, ThreadPoolExecutor(writing.workers) as pool:
        jobs: list[Callable[[], Change | int]] = []
        # in the order of the files' bytes, so that however many jobs run, a disk reads and writes nearly in sequence
        for shard in (shard for shard in sizes if shard not in linked):
            jobs += _shard_jobs(checkpoint, edits, shard, sizes[shard], folder / shard)
        for done in pool.map(lambda job: job(), jobs):
            if isinstance(done, Change):
                changes.append(done)
                advance(located(checkpoint, *edits[done.tensor]).nbytes)
            else:
                advance(done)
    checkpoint.check_unchanged()
    dtypes = sorted({located(checkpoint, *one).dtype for one in edits.values()})
    notes = [f"left out {name}: another copy of the unedited weights" for name in left_out]
    if linked:
        notes.append(
            f"{len(linked)} of {len(sizes)} shards are hard links to the base's files: whoever writes into one of them in place "
            "changes both; copying the folder ends that"
        )
    return Lowering(
        exactness=f"exact up to one rounding to {', '.join(dtypes)}" if edits else "exact",
        changes=tuple(changes),
        notes=tuple(notes),
        details={"shards": len(sizes), "linked": linked, "bytes": sum(sizes.values())},
    )


def _shard_jobs(
    checkpoint: Checkpoint, edits: Mapping[str, tuple[Edit, Site]], shard: str, size: int, target: Path
) -> Iterator[Callable[[], Change | int]]:
    """What makes one shard, in the order of its bytes; the file is there, in its size, before the first job."""
    source = checkpoint.path / shard
    # exclusive: nothing is ever opened for writing here that was not made here, least of all a link
    with open(target, "xb") as file:
        file.truncate(size)
    places = {name: located(checkpoint, *one) for name, one in edits.items()}
    names = [name for name, info in places.items() if info.shard == shard]
    end = 0
    for name in sorted(names, key=lambda name: places[name].offset):
        info = places[name]
        yield from _copies(source, target, end, info.offset)
        yield lambda name=name: _rewrite(checkpoint, *edits[name], target)  # type: ignore[misc]
        end = info.offset + info.nbytes
    yield from _copies(source, target, end, size)


def _link(checkpoint: Checkpoint, shard: str, folder: Path) -> bool:
    """Whether the shard could be linked; a link to a link would point out of the folder, so the file itself is."""
    try:
        os.link(os.path.realpath(checkpoint.path / shard), folder / shard)
    except OSError:  # another file system, or one without hard links: it is copied
        return False
    return True


def updated_blocks(checkpoint: Checkpoint, edit: Edit, site: Site) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """``(first row, block, edited block)`` of a tensor in its stored orientation and dtype.

    The blocks' memory is used again for the next.
    """
    wide, new = torch.empty(0), torch.empty(0)
    for first, block in checkpoint.blocks(site.locate(checkpoint, edit.tensor)):
        if first == 0:
            wide = torch.empty(block.shape, dtype=torch.promote_types(block.dtype, torch.float32))
            new = torch.empty_like(block)
        count = block.shape[0]
        total = wide[:count].copy_(block)
        edit.apply(total, first, site.orientation == "out_in")
        yield first, block, new[:count].copy_(total)


def copy_other_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy every file that is not an indexed shard, byte for byte; the names of those left out."""
    left_out = []
    for source in sorted(checkpoint.path.rglob("*")):
        name = source.relative_to(checkpoint.path)
        if not source.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if str(name) in checkpoint.shards or str(name) in {RECEIPT, "README.md"} or name.parts[0] == "steer2edit":
            continue
        if source.suffix in _OTHER_WEIGHTS or name.match("consolidated*.safetensors"):
            left_out.append(str(name))
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    return left_out


def _rewrite(checkpoint: Checkpoint, edit: Edit, site: Site, target: Path) -> Change:
    info = site.locate(checkpoint, edit.tensor)
    row_bytes = info.nbytes // info.shape[0]
    before, after = hashlib.sha256(), hashlib.sha256()
    with open(target, "r+b", buffering=0) as file:
        for first, block, new in updated_blocks(checkpoint, edit, site):
            if not _finite(new):
                raise TargetError(f"{edit.tensor}: the edited values do not fit {info.dtype}; lower the strength")
            before.update(_bytes(block))
            data = _bytes(new)
            after.update(data)
            try:
                write_at(file.fileno(), data, info.offset + first * row_bytes)
            except OSError as error:
                raise TargetError(f"cannot write {edit.tensor}: {error.strerror or error}") from None
    return Change(edit.tensor, type(edit).__name__, edit.norm, before.hexdigest(), after.hexdigest())


def _finite(values: torch.Tensor) -> bool:
    # the extremes pass NaN on, and take a small part of the time of isfinite().all()
    return all(map(math.isfinite, torch.stack(values.aminmax()).tolist()))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).flatten().numpy().data


def _copies(source: Path, target: Path, start: int, end: int) -> Iterator[Callable[[], Change | int]]:
    for at in range(start, end, COPY_BYTES):
        yield lambda at=at: copy_range(source, at, target, at, min(COPY_BYTES, end - at))  # type: ignore[misc]
