"""What a run will read, change and write: bytes, room on the disk, memory, and time from a short measurement."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steer2edit.architecture.sites import Site
from steer2edit.checkpoint import Checkpoint
from steer2edit.checkpoint.fp8 import FP8, block_bytes
from steer2edit.errors import TargetError
from steer2edit.files.workplace import CONTENT, make_workplace, remove_workplace, sync_file
from steer2edit.lowering.new_biases import new_biases
from steer2edit.lowering.other_files import copied_files
from steer2edit.lowering.resolve import Resolved, Writing, located, update_rank
from steer2edit.lowering.rewrite import copies, places_of, rewrite
from steer2edit.plan import EditPlan

# enough that what the page cache takes in for free does not hide the disk; both take about a second
_COPY_SAMPLE = 256 << 20
_EDIT_SAMPLE = 96 << 20
# tensors of a block's size that are alive at once, in stored bytes: the block, its float32 form, the result
_BLOCK_COPIES, _FP8_COPIES = 6, 40
_FICLONE = 0x40049409


@dataclass(frozen=True)
class DiskUse:
    """Bytes of one target's run. ``edited`` are read, changed and written; ``copied`` by the kernel; ``shared`` with the base.

    ``written`` is the room that is needed and ``free`` what there is. ``seconds`` is None where too little is written for an
    estimate; ``rates`` are the bytes per second that were measured, on how many ``sampled`` bytes.
    """

    target: str
    tensors: int
    edited: int
    copied: int
    shared: int
    written: int
    free: int
    memory: int
    seconds: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    sampled: Mapping[str, int] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.written <= self.free


def disk_use(
    resolved: Resolved,
    to: str,
    out: Path,
    writing: Writing,
    *,
    whole_model: bool,
    measure: bool = True,
) -> DiskUse:
    """What emitting a plan takes, as a whole model or as its factors alone.

    With ``measure`` a sample of the very work is done into a temporary folder beside ``out``, on the files as the page cache
    has them, and removed again.
    """
    plan, checkpoint, edits = resolved.plan, resolved.checkpoint, resolved.edits
    parent = existing_parent(out)
    if not whole_model:
        rank = max((update_rank(edit) for edit, _ in edits.values()), default=0)
        size = sum(4 * rank * (site.out_features + site.in_features) for _, site in edits.values()) + _plan_bytes(plan)
        return DiskUse(to, len(edits), size, 0, 0, size, _free(parent), memory_now() + 2 * size)
    created = new_biases(resolved)
    edits = resolved.rewritten
    places = {name: places_of(checkpoint, *one) for name, one in edits.items()}
    sizes = {shard: (checkpoint.path / shard).stat().st_size for shard in checkpoint.shards}
    edited = sum(info.nbytes for infos in places.values() for info in infos)
    untouched = sizes.keys() - {info.shard for infos in places.values() for info in infos}
    others = sum(path.stat().st_size for path in copied_files(checkpoint))
    total = sum(sizes.values())
    linked = sum(sizes[shard] for shard in untouched) if writing.link and _same_disk(checkpoint.path, parent) else 0
    shared = total - edited if shares_blocks(checkpoint, parent) else linked
    copied = total - edited - linked
    rates: dict[str, float] = {}
    sampled: dict[str, int] = {}
    seconds = None
    if measure and parent.is_dir():
        rates, sampled = _measured(checkpoint, edits, places, out, writing)
        parts = ((copied, rates.get("copy")), (edited, rates.get("edit")))
        seconds = sum(size / rate for size, rate in parts if size and rate)
    block = max((_block(checkpoint, edit, site) for edit, site in edits.values()), default=0)
    return DiskUse(
        target=to,
        tensors=len(edits) + (0 if created is None else len(created.tensors)),
        edited=edited,
        copied=copied,
        shared=shared,
        written=total - shared + others + _plan_bytes(plan) + (0 if created is None else created.nbytes),
        free=_free(parent),
        memory=memory_now() + writing.workers * block,
        seconds=seconds,
        rates=rates,
        sampled=sampled,
    )


def check_room(use: DiskUse, out: Path) -> None:
    """Raise TargetError where the disk has no room for what will be written."""
    if not use.fits:
        hint = " --link writes only the shards that are edited." if use.copied > 0 and not use.shared else ""
        raise TargetError(
            f"{out} would take {use.written / 1e9:.2f} GB as {use.target}, and the disk there has {use.free / 1e9:.2f} GB "
            f"free, {(use.written - use.free) / 1e9:.2f} GB too few. Make room, or give a folder on another disk.{hint}"
        )


def existing_parent(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    path = path.expanduser().absolute().parent
    while not path.exists():
        path = path.parent
    return path


def shares_blocks(checkpoint: Checkpoint, folder: Path) -> bool:
    """Whether the file system lets a copy share the original's blocks (btrfs, XFS and others), tried on a shard."""
    try:
        import fcntl

        with (
            open(checkpoint.path / checkpoint.shards[0], "rb") as source,
            tempfile.TemporaryFile(dir=folder, prefix=".steer2edit-") as target,
        ):
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except (ImportError, OSError):
        return False
    return True


def memory_now() -> int:
    """Bytes of memory that this process has taken; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_free() -> int | None:
    """Bytes of memory that a process can still take without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _measured(
    checkpoint: Checkpoint,
    edits: Mapping[str, tuple[Any, Site]],
    places: Mapping[str, Sequence[Any]],
    out: Path,
    writing: Writing,
) -> tuple[dict[str, float], dict[str, int]]:
    """Bytes per second of copying and of editing, forced to the disk, and how many were measured."""
    rates, sampled = {}, {}
    workplace = make_workplace(existing_parent(out) / out.name)
    scratch = workplace / CONTENT
    try:
        scratch.mkdir()
        for shard in checkpoint.shards:
            with open(scratch / shard, "xb") as file:
                file.truncate((checkpoint.path / shard).stat().st_size)
        largest = max(checkpoint.shards, key=lambda shard: (checkpoint.path / shard).stat().st_size)
        size = (checkpoint.path / largest).stat().st_size
        count = min(_COPY_SAMPLE, size)
        start = (size - count) // 2
        work: list[Callable[[], Any]] = list(copies(checkpoint.path / largest, scratch / largest, start, start + count))
        rates["copy"], sampled["copy"] = _timed(work, writing, scratch, count), count
        chosen, count = [], 0
        for name in edits:
            if count < _EDIT_SAMPLE:
                chosen.append(name)
                count += places[name][0].nbytes
        if chosen:
            work = [lambda name=name: rewrite(checkpoint, *edits[name], places[name], scratch) for name in chosen]  # type: ignore[misc]
            rates["edit"], sampled["edit"] = _timed(work, writing, scratch, count), count
    finally:
        with suppress(OSError):
            remove_workplace(workplace)
    return rates, sampled


def _timed(work: Sequence[Callable[[], Any]], writing: Writing, scratch: Path, count: int) -> float:
    start = time.perf_counter()
    with ThreadPoolExecutor(writing.workers) as pool:
        list(pool.map(lambda job: job(), work))
    for path in scratch.iterdir():
        sync_file(path)
    return count / (time.perf_counter() - start)


def _block(checkpoint: Checkpoint, edit: Any, site: Site) -> int:
    info = located(checkpoint, edit, site)
    row = info.nbytes // max(info.shape[0], 1)
    size = max(min(block_bytes(checkpoint, info), info.nbytes), row)
    return size * (_FP8_COPIES if info.dtype == FP8 else _BLOCK_COPIES)


def _plan_bytes(plan: EditPlan) -> int:
    edits = sum(value.numel() * value.element_size() for edit in plan.edits for value in edit.parts().values())
    tables = sum(4 * table.g.numel() * 6 for table in plan.scores.values())
    return edits + tables + (1 << 20)


def _same_disk(a: Path, b: Path) -> bool:
    return a.resolve().stat().st_dev == b.stat().st_dev


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
