"""The checkpoint target: the base's folder again, with only the edited tensors' bytes different.

Same shards, names, order, dtypes and metadata. Byte ranges between edited tensors are copied by the kernel; an
edited tensor is read, summed in float32, rounded once and written, block by block; one in fp8 is quantised again.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import ModelSpec, Site
from steer2edit.checkpoint import Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import FP8, EditedBlock, requantised, scale_info
from steer2edit.errors import TargetError, listing
from steer2edit.files.atomic import RECEIPT
from steer2edit.files.byte_ranges import COPY_BYTES, copy_range, write_at
from steer2edit.lowering.rounding import RoundingMeter
from steer2edit.plan import Edit, EditPlan
from steer2edit.progress import Progress
from steer2edit.targets import Change, Lowering, Writing, located, resolve

_FILE_BLOCK = 4096
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
    places = {name: places_of(checkpoint, *one) for name, one in edits.items()}
    left_out = copy_other_files(checkpoint, folder)
    if plan.structure:
        from steer2edit.targets import _pruned

        if plan.structure.remove:
            return _pruned.lower_cut(plan, checkpoint, spec, edits, folder, progress, writing)
        _pruned.write_config(plan, checkpoint, spec, folder)
    sizes = {shard: (checkpoint.path / shard).stat().st_size for shard in checkpoint.shards}
    edited = {info.shard for infos in places.values() for info in infos}
    linked = [shard for shard in sizes if writing.link and shard not in edited and _link(checkpoint, shard, folder)]
    done: list[_Rewritten] = []
    total = sum(size for shard, size in sizes.items() if shard not in linked)
    with progress("write checkpoint", total=total) as advance, ThreadPoolExecutor(writing.workers) as pool:
        # in the order of the files' bytes, so that however many jobs run, a disk reads and writes nearly in sequence
        jobs = [
            job
            for shard in sizes
            if shard not in linked
            for job in _shard_jobs(checkpoint, edits, places, shard, folder)
        ]
        for result in pool.map(lambda job: job(), jobs):
            if isinstance(result, _Rewritten):
                done.append(result)
            advance(result.nbytes if isinstance(result, _Rewritten) else result)
    checkpoint.check_unchanged()
    dtypes = sorted({infos[0].dtype for infos in places.values()})
    notes = [f"left out {name}: another copy of the unedited weights" for name in left_out]
    if linked:
        notes.append(
            f"{len(linked)} of {len(sizes)} shards are hard links to the base's files: whoever writes into one of them in place "
            "changes both; copying the folder ends that"
        )
    if spec.frozen:
        notes.append(f"left as in the base: {len(spec.frozen)} quantised expert tensors, such as {spec.frozen[0]}")
    requantised = [result.requantised for result in done if result.requantised]
    return Lowering(
        exactness=_exactness(dtypes),
        changes=tuple(change for result in done for change in result.changes),
        notes=tuple(notes),
        details={
            "shards": len(sizes),
            "linked": linked,
            "bytes": sum(sizes.values()),
            **({"requantised": requantised} if requantised else {}),
        },
    )


@dataclass(frozen=True)
class _Rewritten:
    """One edited matrix: its bytes, what changed, and, of an fp8 matrix, what re-quantising it cost."""

    nbytes: int
    changes: tuple[Change, ...]
    requantised: Mapping[str, Any] = field(default_factory=dict)


def _exactness(dtypes: Sequence[str]) -> str:
    rounded = [dtype for dtype in dtypes if dtype != FP8]
    parts = [f"exact up to one rounding to {', '.join(rounded)}"] if rounded else []
    if FP8 in dtypes:
        parts.append("approximate in fp8, with the error of each matrix in the receipt (details.requantised)")
    return "; ".join(parts) or "exact"


def places_of(checkpoint: Checkpoint, edit: Edit, site: Site) -> list[TensorInfo]:
    """The bytes that an edit rewrites: the matrix, and the scales of one in fp8."""
    info = located(checkpoint, edit, site)
    return [info, scale_info(checkpoint, info)] if info.dtype == FP8 else [info]


def _shard_jobs(
    checkpoint: Checkpoint,
    edits: Mapping[str, tuple[Edit, Site]],
    places: Mapping[str, Sequence[TensorInfo]],
    shard: str,
    folder: Path,
) -> Iterator[Callable[[], _Rewritten | int]]:
    """What makes one shard, in the order of its bytes; the file is there, in its size, before the first job."""
    source, target = checkpoint.path / shard, folder / shard
    size = source.stat().st_size
    # exclusive: nothing is ever opened for writing here that was not made here, least of all a link
    with open(target, "xb") as file:
        file.truncate(size)
    here = [(info, name, i) for name, infos in places.items() for i, info in enumerate(infos) if info.shard == shard]
    end = 0
    for info, name, i in sorted(here, key=lambda entry: entry[0].offset):
        yield from copies(source, target, end, info.offset)
        if i == 0:  # scales are written with their matrix, wherever they lie
            yield lambda name=name: rewrite(checkpoint, *edits[name], places[name], folder)  # type: ignore[misc]
        end = info.offset + info.nbytes
    yield from copies(source, target, end, size)


def _link(checkpoint: Checkpoint, shard: str, folder: Path) -> bool:
    """Whether the shard could be linked; a link to a link would point out of the folder, so the file itself is."""
    try:
        os.link(os.path.realpath(checkpoint.path / shard), folder / shard)
    except OSError:  # another file system, or one without hard links: it is copied
        return False
    return True


def edited_blocks(checkpoint: Checkpoint, edit: Edit, site: Site) -> Iterator[EditedBlock]:
    """A tensor in its stored orientation and dtype before and after an edit, block by block.

    The blocks' memory is used again for the next.
    """
    info, out_in = located(checkpoint, edit, site), site.orientation == "out_in"
    if info.dtype == FP8:
        yield from requantised(checkpoint, info, edit, out_in)
        return
    wide, new = torch.empty(0), torch.empty(0)
    for first, block in checkpoint.blocks(info):
        if first == 0:
            wide = torch.empty(block.shape, dtype=torch.promote_types(block.dtype, torch.float32))
            new = torch.empty_like(block)
        count = block.shape[0]
        total = wide[:count].copy_(block)
        edit.apply(total, first, out_in)
        after = new[:count].copy_(total)
        yield EditedBlock(first, block, after, block, after)


def copy_other_files(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy every file that is not an indexed shard, byte for byte; the names of those left out."""
    for source in copied_files(checkpoint):
        name = source.relative_to(checkpoint.path)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    return [str(path.relative_to(checkpoint.path)) for path in _other_files(checkpoint) if _other_weights(path)]


def copied_files(checkpoint: Checkpoint) -> list[Path]:
    """The files beside the shards that an artefact has too: all but other copies of the weights.

    Raises TargetError for links to anywhere but where the weights lie: a stranger's link may lead to the reader's own files,
    which the artefact would make public.
    """
    found = [path for path in _other_files(checkpoint) if not _other_weights(path)]
    home = checkpoint.path.resolve()
    # a folder of links, such as the Hub's cache, has all of its files in one place
    places = {(checkpoint.path / shard).resolve().parent for shard in checkpoint.shards} | {home}
    astray = [
        f"{path.relative_to(checkpoint.path)} -> {path.resolve()}"
        for path in found
        if path.is_symlink() and path.resolve().parent not in places and not path.resolve().is_relative_to(home)
    ]
    if astray:
        raise TargetError(
            f"{checkpoint.path} holds links to files elsewhere, which are not copied into an artefact:\n{listing(astray)}\n"
            "Put the files themselves in their place, or take the links out."
        )
    return found


def _other_files(checkpoint: Checkpoint) -> list[Path]:
    found = []
    for source in sorted(checkpoint.path.rglob("*")):
        name = source.relative_to(checkpoint.path)
        if not source.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if str(name) in checkpoint.shards or str(name) in {RECEIPT, "README.md"} or name.parts[0] == "steer2edit":
            continue
        found.append(source)
    return found


def _other_weights(path: Path) -> bool:
    return path.suffix in _OTHER_WEIGHTS or path.match("consolidated*.safetensors")


def rewrite(checkpoint: Checkpoint, edit: Edit, site: Site, places: Sequence[TensorInfo], folder: Path) -> _Rewritten:
    info = places[0]
    row_bytes = info.nbytes // info.shape[0]
    before, after = hashlib.sha256(), hashlib.sha256()
    meter = RoundingMeter(edit.tensor)
    old_scales: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    kept = 0
    with open(folder / info.shard, "r+b", buffering=0) as file:
        for block in edited_blocks(checkpoint, edit, site):
            if not _finite(block.new):
                raise TargetError(f"{edit.tensor}: the edited values do not fit {info.dtype}; lower the strength")
            before.update(as_bytes(block.before))
            data = as_bytes(block.after)
            after.update(data)
            _write(file.fileno(), data, info.offset + block.first * row_bytes, edit.tensor)
            if block.scales is not None and block.old_scales is not None:
                meter.add(edit, site.orientation == "out_in", block.first, block.old, block.new)
                kept += int((block.before.view(torch.uint8) == block.after.view(torch.uint8)).sum())
                old_scales.append(block.old_scales)
                scales.append(block.scales)
    change = Change(edit.tensor, type(edit).__name__, edit.norm, before.hexdigest(), after.hexdigest())
    if not scales:
        return _Rewritten(info.nbytes, (change,))
    was, now = torch.cat(old_scales), torch.cat(scales)
    with open(folder / places[1].shard, "r+b", buffering=0) as file:
        _write(file.fileno(), as_bytes(now), places[1].offset, places[1].name)
    hashes = [hashlib.sha256(as_bytes(values)).hexdigest() for values in (was, now)]
    found = {
        **asdict(meter.result()),
        "blocks": now.numel(),
        "rescaled": int((was != now).sum()),
        "bytes_kept": kept / info.nbytes,
    }
    return _Rewritten(info.nbytes, (change, Change(places[1].name, f"scales of {edit.tensor}", None, *hashes)), found)


def _write(descriptor: int, data: memoryview, offset: int, name: str) -> None:
    try:
        write_at(descriptor, data, offset)
    except OSError as error:
        raise TargetError(f"cannot write {name}: {error.strerror or error}") from None


def _finite(values: torch.Tensor) -> bool:
    # the extremes pass NaN on, and take a small part of the time of isfinite().all()
    return all(map(math.isfinite, torch.stack(values.aminmax()).tolist()))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's memory."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def copies(source: Path, target: Path, start: int, end: int) -> Iterator[Callable[[], _Rewritten | int]]:
    """The work of copying a byte range in pieces.

    Pieces begin and end at whole blocks of the file system, apart from the first and the last: only those can be shared.
    """
    while start < end:
        unit = _FILE_BLOCK if start % _FILE_BLOCK else COPY_BYTES
        stop = min((start // unit + 1) * unit, end)
        yield lambda at=start, count=stop - start: copy_range(source, at, target, at, count)  # type: ignore[misc]
        start = stop
