"""Prove that an artefact is what its plan says: folder, receipt, and logits.

The folder is compared by bytes, and the receipt is computed again.

Bytes: everything is recomputed from base and plan, and every file of the folder is compared. Numbers: logits of the base with
the plan applied by hooks are compared with those of the artefact, loaded as its users load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steer2edit import targets
from steer2edit.architecture import read_spec
from steer2edit.artefact.claims import check_claims
from steer2edit.artefact.find_base import open_base
from steer2edit.artefact.folder import check_folder
from steer2edit.artefact.numbers import compare_numbers, in_words
from steer2edit.artefact.receipt import read_receipt
from steer2edit.files.layout import PLAN
from steer2edit.lowering import resolve
from steer2edit.lowering.rounding import Rounding
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import Runtime


@dataclass(frozen=True)
class Verification:
    """The result. ``ok`` is whether every check passed; ``problems`` name each that did not, ``notes`` are remarks.

    ``base`` is where the base was found.
    """

    target: str
    tensors: int
    problems: tuple[str, ...]
    rounding: tuple[Rounding, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    base: str = ""

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        """What the logits say, in one sentence; empty where none were computed."""
        return in_words(self.numbers) if self.numbers else ""


def verify(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    numbers: bool = True,
    runtime: Runtime = Runtime(dtype="float32"),  # noqa: B008
    progress: Progress = silent,
) -> Verification:
    """Check the artefact in ``folder`` against its base, which :func:`open_base` finds where ``base`` is None.

    Raises PlanError or CheckpointError where there is nothing to compare: no receipt, a damaged plan, another base.
    """
    folder = Path(folder)
    receipt = read_receipt(folder)
    plan = EditPlan.load(folder / PLAN)
    checkpoint = open_base(plan.base, base)
    resolved = resolve(plan, checkpoint, read_spec(checkpoint))
    plan.check_content(checkpoint, resolved.spec)
    name = str(receipt["target"])
    targets.check_structure(name, plan)
    target = targets.load(name)
    compared = target.verify(resolved, folder, progress)
    strangers, remarks = check_folder(folder, compared.files)
    false_claims, unproven = check_claims(receipt, resolved, compared, folder)
    problems = (*compared.problems, *strangers, *false_claims)
    notes = (*compared.notes, *remarks, *unproven)
    if numbers and problems:
        notes += ("the logits were not compared, because the files are wrong already",)
    result = Verification(name, compared.tensors, problems, compared.rounding, notes=notes, base=str(checkpoint.path))
    if numbers and result.ok:
        measured, wrong = compare_numbers(resolved, target.loadable(resolved, folder), runtime, progress)
        result = replace(result, numbers=measured, problems=wrong)
    return result
