"""Emit a plan: lower it into a new folder, with receipt, plan and model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from steer2edit import __version__, targets
from steer2edit.architecture import ModelSpec
from steer2edit.artefact.receipt import FORMAT
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import TargetError
from steer2edit.files.atomic import new_folder
from steer2edit.files.known_bases import remember
from steer2edit.files.layout import CARD, PLAN, RECEIPT
from steer2edit.files.outputs import check_apart, check_new
from steer2edit.lowering import Lowering, Resolved, Writing, resolve
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent


def emit(
    plan: EditPlan,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    to: str,
    out: str | Path,
    *,
    force: bool = False,
    writing: Writing = Writing(),  # noqa: B008
    progress: Progress = silent,
) -> Lowering:
    """Lower ``plan`` into the new folder ``out``, with receipt, plan and model card.

    The folder appears only when it is complete and on the disk. Raises PlanError for a plan made for another model,
    TargetError where ``out`` exists, the disk is full, or the target cannot express the plan, and CheckpointError where the
    base was changed since it was opened. Where a base that is a folder lies is noted on this computer, for ``verify``.
    """
    from steer2edit.artefact.model_card import inherited, model_card
    from steer2edit.lowering.disk_use import check_room, disk_use

    target = targets.load(to)
    resolved = check_emit(plan, checkpoint, spec, to, out)
    plan.check_content(checkpoint, spec)
    checkpoint.check_unchanged()
    with new_folder(Path(out), force) as folder:
        # only now: what a killed run left there has been removed
        use = disk_use(resolved, to, Path(out), writing, whole_model=target.WHOLE_MODEL, measure=False)
        check_room(use, Path(out))
        lowering = target.lower(resolved, folder, writing, progress)
        notes = (*lowering.notes, *base_notes(checkpoint, lowering))
        lowering = replace(lowering, exactness=exactness_of(plan, lowering), notes=notes)
        plan.save(folder / PLAN)
        receipt = {
            "format": FORMAT,
            "target": to,
            "exactness": lowering.exactness,
            "base": asdict(plan.base),
            "plan": {"file": PLAN, "sha256": plan.hash},
            "method": dict(plan.method),
            "measured": plan.measured.to_json(),
            "data": dict(plan.data),
            "changed": [asdict(change) for change in lowering.changes],
            "notes": list(lowering.notes),
            "details": dict(lowering.details),
            "files": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
            "card": inherited(checkpoint),
            "versions": _versions(),
        }
        card = model_card(receipt)
        # a card that somebody wrote on since is known by its hash, and not written anew when it is pushed
        receipt["card_sha256"] = hashlib.sha256(card.encode()).hexdigest()
        (folder / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
    if checkpoint.revision is None:
        remember(checkpoint.fingerprint, checkpoint.path)
    return lowering


def check_emit(plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec, to: str, out: str | Path) -> Resolved:
    """Raise what :func:`emit` raises before it reads a matrix, except for a folder that is there; the resolved plan."""
    resolved = resolve(plan, checkpoint, spec)
    _check_target(to, resolved)
    check_apart(out, inputs_of(checkpoint))
    _check_names(checkpoint)
    return resolved


def check_carried(plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec, chosen: Sequence[str]) -> None:
    """Raise what :func:`emit` would raise where a target cannot carry a plan, before the plan's strength and effect are measured.

    No matrix is read, and nothing is written.
    """
    resolved = resolve(plan, checkpoint, spec)
    for name in chosen:
        _check_target(name, resolved)


def _check_target(name: str, resolved: Resolved) -> None:
    """Ask a target for its refusals.

    Its advice to write a checkpoint does not hold for a quantised base, and is followed by advice that does.
    """
    checkpoint = resolved.checkpoint
    targets.check_structure(name, resolved.plan)
    targets.check_quantised(name, checkpoint)
    try:
        targets.load(name).check(resolved)
    except TargetError as error:
        if checkpoint.quantisation is None:
            raise
        raise TargetError(
            f"{error}\n{checkpoint.name} is quantised, and no checkpoint of it is written: compile its unquantised model to a "
            "checkpoint, and quantise that; or take a method whose edits an adapter carries"
        ) from None


def base_notes(checkpoint: Checkpoint, lowering: Lowering) -> tuple[str, ...]:
    """A remark on an artefact beside a quantised base."""
    if checkpoint.quantisation is None:
        return ()
    exact = " The update is exact beside it: y = Q(W) x + B A x." if lowering.exactness.startswith("exact") else ""
    return (
        f"The base is quantised ({checkpoint.quantisation.text}).{exact} Another quantisation of the same model, such as a "
        "GGUF or MLX copy, is another base, whose behaviour and KL under this artefact were not measured.",
    )


def exactness_of(plan: EditPlan, lowering: Lowering) -> str:
    """The exactness of an artefact in words; of a mask of experts first what the mask equals."""
    grade = plan.method.get("grade")
    return f"{grade}; the stored values {lowering.exactness}" if grade is not None else lowering.exactness


def _versions() -> dict[str, str]:
    import torch

    return {"steer2edit": __version__, "torch": torch.__version__}


def _check_names(checkpoint: Checkpoint) -> None:
    """Raise TargetError where a shard has the name of a file that every artefact gets."""
    ours = {RECEIPT.casefold(), CARD.casefold(), PLAN.split("/")[0]}
    if taken := [shard for shard in checkpoint.shards if shard.casefold() in ours]:
        raise TargetError(
            f"{checkpoint.path} has shards with the names of files that steer2edit writes itself: {', '.join(taken)}; "
            "rename them, in the index too"
        )


def inputs_of(checkpoint: Checkpoint) -> list[Path]:
    """What a checkpoint is read from: its folder, and its shards, which may be links to files elsewhere."""
    return [checkpoint.path, *(checkpoint.path / shard for shard in checkpoint.shards)]


def artefact_folders(
    out: str | Path, to: Sequence[str], force: bool, inputs: Sequence[str | Path] = ()
) -> dict[str, Path]:
    """Where each target goes. Raises TargetError, before any work is done, where that is taken, or contains an input."""
    chosen = list(dict.fromkeys(to))
    for target in chosen:
        targets.load(target)
    out = Path(out).expanduser()
    folders = {target: out if len(chosen) == 1 else out / target for target in chosen}
    for folder in folders.values():
        check_apart(folder, inputs)
        check_new(folder, force)
    return folders
