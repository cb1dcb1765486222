"""Undo: the base's bytes again in place of every edited tensor, after proof that nothing else was changed."""

from __future__ import annotations

import filecmp
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from steer2edit.architecture import ModelSpec, read_spec
from steer2edit.artefact.emit import inputs_of
from steer2edit.artefact.receipt import read_receipt
from steer2edit.checkpoint import Checkpoint, TensorInfo, open_checkpoint, split_part_name
from steer2edit.checkpoint.fp8 import SUFFIX
from steer2edit.diff.difference import equal, fused_parts
from steer2edit.errors import PlanError, Steer2EditError, TargetError, listing
from steer2edit.files.atomic import new_folder
from steer2edit.files.byte_ranges import COPY_BYTES, copy_range
from steer2edit.files.layout import CARD, RECEIPT
from steer2edit.files.outputs import check_apart
from steer2edit.lowering.other_files import copied_files, copy_other_files, refuse_links
from steer2edit.progress import Progress, silent
from steer2edit.targets import load


@dataclass(frozen=True)
class Reverted:
    """What was restored: the folder, the tensors, whether a receipt proves it, and what still differs from the base."""

    folder: Path
    tensors: tuple[str, ...]
    proven: bool
    remaining: tuple[str, ...] = ()


def revert(
    edited: str | Path,
    base: str | Path,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    unproven: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Reverted:
    """Write ``edited`` with the base's bytes into ``out``, or in its own place.

    The receipt must vouch for every difference: the base's tensor has the hash it had before the edit, the edited one the
    hash it had after, and every other tensor is the base's. Raises PlanError, with all that does not agree, otherwise.
    ``unproven`` restores whatever differs instead, also in checkpoints made by others, and then ``out`` must be given. With
    ``force`` a folder ``out`` that holds the same result already stays as it is.
    """
    folder = Path(edited).expanduser()
    if unproven and out is None:
        raise TargetError("what no receipt proves is not replaced: give a folder for the result with -o")
    _refuse_adapters(folder)
    ours, theirs = open_checkpoint(base, revision), open_checkpoint(folder)
    different = _different(ours, theirs, progress)
    if unproven:
        unlike = tuple(name for name in different if not _alike(ours.tensors.get(name), theirs.tensors.get(name)))
    else:
        _prove(folder, ours, theirs, different)
        unlike = ()
    created = [] if unproven else [name for name in different if name not in ours.tensors]
    restored = [name for name in different if name not in unlike and name not in created]
    place = folder if out is None else Path(out).expanduser()
    check_apart(place, [*inputs_of(ours), *([] if out is None else inputs_of(theirs))])
    # in its own place, a folder keeps the files of its owner that are copied
    carried = [path.relative_to(theirs.path).as_posix() for path in copied_files(theirs)] if out is None else []
    # a base in one file has no index
    dropped = theirs.index if created and ours.index is None else None
    carried = [name for name in carried if name != dropped]
    if out is not None and force and _holds(place, ours, theirs, unlike):
        # an earlier revert wrote it, and it has no receipt by which it would be known
        return Reverted(place, (*restored, *created), not unproven, unlike)
    with new_folder(place, force or out is None, carried) as made:
        _write(ours, theirs, set(restored), set(created), made, progress)
        copy_other_files(theirs, made)
        if dropped is not None:
            (made / dropped).unlink()
        if not unproven:
            copy_other_files(ours, made)
            card = ours.path / CARD
            if card.is_file():
                refuse_links(ours, [card])
                shutil.copyfile(card, made / CARD)
        for checkpoint in (ours, theirs):
            checkpoint.check_unchanged()
    return Reverted(place, (*restored, *created), not unproven, unlike)


def _refuse_adapters(folder: Path) -> None:
    """Raise TargetError for an artefact beside its base: nothing in the base was changed."""
    if (folder / RECEIPT).is_file() and not (folder / "config.json").is_file():
        target = read_receipt(folder)["target"]
        if not load(target).WHOLE_MODEL:
            raise TargetError(
                f"{folder} is written by --to {target}: the base is unchanged beside it. Load the base without it"
            )


def _holds(place: Path, ours: Checkpoint, theirs: Checkpoint, unlike: tuple[str, ...]) -> bool:
    """Whether a folder has the base's tensors, but for ``unlike``, and beside them only files of the two checkpoints."""
    if (place / RECEIPT).is_file() or not place.is_dir():
        return False
    try:
        there = open_checkpoint(place)
        if not set(_different(ours, there, silent)) <= set(unlike):
            return False
        weights = {*there.shards, there.index}
        names = [path.relative_to(place).as_posix() for path in place.rglob("*") if not path.is_dir()]
        return all(name in weights or _same_file(place, name, (ours, theirs)) for name in names)
    except (OSError, Steer2EditError):
        return False


def _same_file(place: Path, name: str, checkpoints: tuple[Checkpoint, ...]) -> bool:
    sources = [one.path / name for one in checkpoints]
    return any(one.is_file() and filecmp.cmp(place / name, one, shallow=False) for one in sources)


def _different(ours: Checkpoint, theirs: Checkpoint, progress: Progress) -> list[str]:
    names = list(dict.fromkeys([*theirs.tensors, *ours.tensors]))
    found = []
    with progress("compare", total=len(names)) as advance:
        for name in names:
            a, b = ours.tensors.get(name), theirs.tensors.get(name)
            if a is None or b is None or not _alike(a, b) or not equal(ours, theirs, a, b):
                found.append(name)
            advance(1)
    return found


def _alike(a: TensorInfo | None, b: TensorInfo | None) -> bool:
    return a is not None and b is not None and (a.dtype, a.shape) == (b.dtype, b.shape)


def _prove(folder: Path, ours: Checkpoint, theirs: Checkpoint, different: list[str]) -> None:
    receipt = read_receipt(folder)
    if receipt.get("target") != "checkpoint":
        raise PlanError(f"{folder} is {receipt.get('target')!r}, which changes no weights: there is nothing to restore")
    lost = [
        what
        for key, what in (("removed", "experts"), ("removed_layers", "layers"))
        if receipt.get("details", {}).get(key)
    ]
    if lost:
        raise PlanError(
            f"{folder} has lost whole {lost[0]}, and no bytes of it are left to restore them in: use {ours.name} itself"
        )
    if receipt["base"]["fingerprint"] != ours.fingerprint:
        raise PlanError(
            f"{folder} was made from {receipt['base']['name']} (fingerprint {receipt['base']['fingerprint'][:12]}), but "
            f"{ours.name} has the fingerprint {ours.fingerprint[:12]}; give the base it was made from"
        )
    spec = read_spec(ours)
    problems, vouched = [], set()
    for change in receipt["changed"]:
        name = change["tensor"]
        if change["sha256_before"] is None and name not in ours.tensors and name in theirs.tensors:
            # a bias that the plan created goes again
            vouched.add(name)
            if _sha256(theirs, theirs.tensors[name]) != change["sha256_after"]:
                problems.append(f"{name} in {theirs.path} is not what the receipt says it was after the edit")
            continue
        places = [_place(checkpoint, spec, name) for checkpoint in (ours, theirs)]
        if not _alike(*places):
            problems.append(f"{name} is missing, or has another shape or dtype than in the base")
            continue
        vouched.add(name)
        for checkpoint, place, when in zip((ours, theirs), places, ("before", "after"), strict=True):
            if place is not None and _sha256(checkpoint, place) != change[f"sha256_{when}"]:
                problems.append(f"{name} in {checkpoint.path} is not what the receipt says it was {when} the edit")
    if any(name not in ours.tensors for name in different):
        problems += _shared_shards(ours, theirs)
    for name in different:
        problems += [
            f"{part} differs from the base, and the receipt does not name it"
            for part in _different_parts(ours, theirs, spec, name)
            if part not in vouched
        ]
    if problems:
        raise PlanError(
            f"{folder} is not its base with the receipt's changes:\n{listing(problems)}\n"
            "--unproven -o DIR restores whatever differs all the same."
        )


def _shared_shards(ours: Checkpoint, theirs: Checkpoint) -> list[str]:
    """What is wrong where new tensors should lie in shards of their own, and all others in the base's shards."""
    pairs = {
        (info.shard, ours.tensors[name].shard if name in ours.tensors else None)
        for name, info in theirs.tensors.items()
    }
    kept = [pair for pair in pairs if pair[1] is not None]
    alike = len({a for a, _ in pairs}) == len(pairs) and len({b for _, b in kept}) == len(kept)
    return [] if alike else ["its tensors are not divided among shards as the base's, with the new ones apart"]


def _place(checkpoint: Checkpoint, spec: ModelSpec, name: str) -> TensorInfo | None:
    """Where a tensor lies, or the part of one that a plan calls ``name[3]``."""
    part = None if name in checkpoint.tensors else split_part_name(name)
    whole = checkpoint.tensors.get(part[0] if part else name)
    if part is None or whole is None:
        return whole
    count, which = _parts(spec, whole.name), part[1]
    return whole.part(which, count) if count and which < count and whole.shape[0] % count == 0 else None


def _parts(spec: ModelSpec, name: str) -> int | None:
    # the scales of a fused tensor in fp8 fall into as many
    return fused_parts(spec).get(name.removesuffix(SUFFIX))


def _different_parts(ours: Checkpoint, theirs: Checkpoint, spec: ModelSpec, name: str) -> list[str]:
    """The parts in which a tensor of several matrices differs.

    The tensor itself, if it is one matrix or cannot be compared.
    """
    a, b, count = ours.tensors.get(name), theirs.tensors.get(name), _parts(spec, name)
    if a is None or b is None or count is None or not _alike(a, b):
        return [name]
    parts = [(a.part(i, count), b.part(i, count)) for i in range(count)]
    return [x.name for x, y in parts if not equal(ours, theirs, x, y)]


def _sha256(checkpoint: Checkpoint, info: TensorInfo) -> str:
    digest = hashlib.sha256()
    for _, block in checkpoint.blocks(
        TensorInfo(info.name, "U8", (info.nbytes,), info.shard, info.offset, info.nbytes)
    ):
        digest.update(block.numpy().data)
    return digest.hexdigest()


def _write(
    ours: Checkpoint, theirs: Checkpoint, restored: set[str], created: set[str], folder: Path, progress: Progress
) -> None:
    """The edited checkpoint's shards, with the base's bytes for ``restored``.

    Shards of ``created`` tensors alone are left out. Where there are some, the others have the names of the base's shards.
    """
    sizes = {shard: (theirs.path / shard).stat().st_size for shard in theirs.shards}
    names = {info.shard: ours.tensors[name].shard for name, info in theirs.tensors.items() if name not in created}
    with progress("restore", total=sum(sizes.values())) as advance:
        for shard, size in sizes.items():
            if created and shard not in names:
                advance(size)
                continue
            target = folder / (names[shard] if created else shard)
            with open(target, "xb") as file:
                file.truncate(size)
            here = sorted((i for i in theirs.tensors.values() if i.shard == shard), key=lambda info: info.offset)
            end = 0
            for info in [info for info in here if info.name in restored]:
                _copy(theirs.path / shard, end, target, end, info.offset - end)
                source = ours.tensors[info.name]
                _copy(ours.path / source.shard, source.offset, target, info.offset, info.nbytes)
                end = info.offset + info.nbytes
            _copy(theirs.path / shard, end, target, end, size - end)
            advance(size)


def _copy(source: Path, start: int, target: Path, at: int, count: int) -> None:
    for done in range(0, count, COPY_BYTES):
        copy_range(source, start + done, target, at + done, min(COPY_BYTES, count - done))
