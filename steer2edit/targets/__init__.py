"""One file, one target: an EditPlan becomes files.

A target module has ``lower(plan, checkpoint, spec, folder, progress) -> Lowering``, found by its file's name. It answers
*exact* or *approximate* in the Lowering, or refuses by a TargetError that says why; it never skips an edit.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from steer2edit import __version__
from steer2edit.architecture import ModelSpec, Role, Site
from steer2edit.checkpoint import Checkpoint, TensorInfo, read_json
from steer2edit.errors import PlanError, TargetError, listing, shown
from steer2edit.files.atomic import RECEIPT, new_folder
from steer2edit.files.schema import MAYBE, TEXT, check
from steer2edit.plan import BASE, DATA, MEASURED, METHOD, Assign, Bias, Edit, EditPlan, LowRank
from steer2edit.progress import Progress, silent

CARD = "README.md"
PLAN = "steer2edit/plan.safetensors"
EVALUATION = "steer2edit/evaluation.json"
REPORT = "steer2edit/report.html"
FORMAT = "steer2edit.receipt.1"
_CARD: Any = dict.fromkeys(("license?", "license_name?", "license_link?", "pipeline_tag?"), TEXT)
_RECEIPT: Any = {
    "target": str,
    "exactness": str,
    "base": BASE,
    "plan": {"file": str, "sha256": str},
    "method": METHOD,
    "measured": MEASURED,
    "data": DATA,
    "changed": [{"tensor": str, "op": str, "norm": MAYBE, "sha256_before": TEXT, "sha256_after": TEXT}],
    "notes": [str],
    "details": {},
    "versions": {str: str},
    "files?": [str],
    "card?": {**_CARD, "language?": [str], str: ()},
    "card_sha256?": TEXT,
}


@dataclass(frozen=True)
class Change:
    """One changed tensor: what was done, its bytes before and after (SHA-256; None for an adapter), and ‖ΔW‖, where known."""

    tensor: str
    op: str
    norm: float | None
    sha256_before: str | None = None
    sha256_after: str | None = None


@dataclass(frozen=True)
class Lowering:
    """What a target did: how exact it is, each change, and remarks for whoever loads the artefact."""

    exactness: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Writing:
    """How files are written: ``jobs`` at a time (None: as many as there are processors, at most four), and whether shards
    that no edit touches become hard links to the base's.
    """

    jobs: int | None = None
    link: bool = False

    @property
    def workers(self) -> int:
        return min(4, os.cpu_count() or 1) if self.jobs is None else self.jobs


def names() -> list[str]:
    """The targets there are."""
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in found)


def load(name: str) -> ModuleType:
    """The target called ``name``. Raises TargetError naming the known ones."""
    if name not in names():
        raise TargetError(f"there is no target {name!r}; known: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def emit(
    plan: EditPlan,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    to: str,
    out: str | Path,
    *,
    force: bool = False,
    writing: Writing = Writing(),
    progress: Progress = silent,
) -> Lowering:
    """Lower ``plan`` into the new folder ``out``, with receipt, plan and model card.

    The folder appears only when it is complete and on the disk. Raises PlanError for a plan made for another model,
    TargetError where ``out`` exists, the disk is full, or the target cannot express the plan, and CheckpointError where the
    base was changed since it was opened.
    """
    from steer2edit.artefact.model_card import inherited, model_card
    from steer2edit.lowering.disk_use import check_room, forecast

    target = load(to)
    resolve(plan, checkpoint, spec)
    if plan.structure and to != "checkpoint":
        raise TargetError(
            f"{to} cannot remove experts, or change how many each token passes through; use --to checkpoint"
        )
    if Path(out).expanduser().resolve() == checkpoint.path.resolve():
        raise TargetError(f"{out} is the base itself, and no artefact may take its place; give another folder")
    checkpoint.check_unchanged()
    with new_folder(Path(out), force) as folder:
        # only now: what a killed run left there has been removed
        check_room(forecast(plan, checkpoint, spec, to, Path(out), writing, measure=False), Path(out))
        # only a target that copies shards has a use for it
        how = {"writing": writing} if "writing" in inspect.signature(target.lower).parameters else {}
        lowering: Lowering = target.lower(plan, checkpoint, spec, folder, progress, **how)
        if "grade" in plan.method:  # what a mask of experts equals
            lowering = replace(lowering, exactness=f"{plan.method['grade']}; the stored values {lowering.exactness}")
        plan.save(folder / PLAN)
        receipt = {
            "format": FORMAT,
            "target": to,
            "exactness": lowering.exactness,
            "base": asdict(plan.base),
            "plan": {"file": PLAN, "sha256": plan.hash},
            "method": dict(plan.method),
            "measured": dict(plan.measured),
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
    return lowering


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt of an artefact. Raises PlanError where there is none that this version reads."""
    if not (folder / RECEIPT).is_file():
        raise PlanError(f"{folder} holds no {RECEIPT}: it is no artefact of steer2edit")
    receipt = read_json(folder / RECEIPT)
    if receipt.get("format") != FORMAT:
        raise PlanError(f"{folder / RECEIPT} has the format {shown(receipt.get('format'))}, expected {FORMAT!r}")
    try:
        check(receipt, _RECEIPT, RECEIPT)
    except ValueError as error:
        raise PlanError(f"{folder}: {error}") from None
    load(receipt["target"])
    return receipt


def resolve(plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, tuple[Edit, Site]]:
    """Each edit with the site it belongs to, by tensor name.

    Raises PlanError, with all problems, where the plan was made for another model or does not fit this one.
    """
    plan.check_base(checkpoint)
    resolved, problems = {}, []
    for edit in plan.edits:
        site = spec.owners.get(edit.tensor)
        if site is None:
            problems.append(f"{edit.tensor} is no residual writer of {checkpoint.name}")
        elif isinstance(edit, Assign) != (site.role is Role.ROUTER):
            problems.append(f"{edit.tensor}: {edit.op} is no operation on a {site.role.value}")
        elif not edit.fits(shape := _shape(site, edit.tensor)):
            shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in edit.parts().items())
            problems.append(f"{edit.tensor} is {' x '.join(map(str, shape))}, its update has {shapes}")
        else:
            resolved[edit.tensor] = (edit, site)
    if problems:
        raise PlanError(f"the plan does not fit {checkpoint.name}:\n{listing(problems)}")
    if spec.tied_embeddings and spec.embedding.tensor in resolved:
        raise PlanError(
            f"{checkpoint.name} ties its embedding to its unembedding: editing {spec.embedding.tensor} would change both. "
            "Leave the embedding out."
        )
    return resolved


def _shape(site: Site, name: str) -> tuple[int, ...]:
    return (site.out_features, site.in_features) if name == site.matrix else (site.out_features,)


def located(checkpoint: Checkpoint, edit: Edit, site: Site) -> TensorInfo:
    """Where the matrix or vector lies that an edit of ``site`` names."""
    return site.locate(checkpoint, edit.tensor)


def adapter_refusal(edit: Edit, site: Site) -> str:
    """Why an adapter cannot carry an edit; "" where it can."""
    if site.role is Role.EMBED:
        return "the embedding"
    if site.role is Role.ROUTER:
        return "a router"
    if site.expert is not None:
        return "an expert among several"
    if isinstance(edit, LowRank):
        return ""
    return "a bias" if isinstance(edit, Bias) else "a gain"


def _versions() -> dict[str, str]:
    import torch

    return {"steer2edit": __version__, "torch": torch.__version__}
