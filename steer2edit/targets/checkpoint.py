"""The checkpoint target: the base's folder again, with only the edited tensors' bytes different.

Same shards, names, order, dtypes and metadata. Byte ranges between edited tensors are copied by the kernel; an
edited tensor is read, summed in float32, rounded once and written, block by block; one in fp8 is quantised again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from steer2edit.architecture import ModelSpec, Site
from steer2edit.checkpoint import Checkpoint, TensorInfo
from steer2edit.checkpoint.fp8 import FP8
from steer2edit.lowering import Lowering, Writing, resolve
from steer2edit.lowering.other_files import copy_other_files
from steer2edit.lowering.rewrite import _Rewritten, copies, places_of, rewrite
from steer2edit.plan import Edit, EditPlan
from steer2edit.progress import Progress

SUMMARY = "The whole model with edited weights, for transformers, vLLM and everything that reads the base."


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
            return _pruned.lower_pruned(plan, checkpoint, spec, edits, folder, progress, writing)
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


def _exactness(dtypes: Sequence[str]) -> str:
    rounded = [dtype for dtype in dtypes if dtype != FP8]
    parts = [f"exact up to one rounding to {', '.join(rounded)}"] if rounded else []
    if FP8 in dtypes:
        parts.append("approximate in fp8, with the error of each matrix in the receipt (details.requantised)")
    return "; ".join(parts) or "exact"


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
