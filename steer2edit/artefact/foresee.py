"""Refusals of targets that are known before there is a plan: from what a method may edit at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from steer2edit.architecture import ModelSpec
from steer2edit.architecture.stream import CONDITIONAL
from steer2edit.artefact.emit import check_carried
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import TargetError
from steer2edit.plan import Edit, EditPlan, LowRank, Scale


def foreseen_refusals(
    widest: EditPlan, checkpoint: Checkpoint, spec: ModelSpec, chosen: Sequence[str]
) -> tuple[str, ...]:
    """What the chosen targets refuse of a plan that edits all that its method may edit.

    ``widest`` has an edit of zeros on each matrix (``dry_run.widest_plan``). Raises TargetError where a target refuses the least
    edit of every kind: then it refuses whatever the plan turns out to be. Reads no matrix.
    """
    most = replace(widest, edits=tuple(_most(edit, spec) for edit in widest.edits))
    doubts = []
    for target in dict.fromkeys(chosen):
        try:
            check_carried(most, checkpoint, spec, [target])
        except TargetError as refusal:
            if not any(_is_carried(one, widest, checkpoint, spec, target) for one in _kinds(most, spec)):
                raise
            doubts.append(f"{target}, by what the plan edits: {refusal}")
    return tuple(doubts)


def _kinds(plan: EditPlan, spec: ModelSpec) -> list[Edit]:
    """One small edit of each operation on each kind of matrix."""
    found: dict[tuple[object, ...], Edit] = {}
    for edit in plan.edits:
        site = spec.owners[edit.tensor]
        found.setdefault((type(edit), site.role, site.expert is None, edit.tensor == site.matrix), _least(edit))
    return list(found.values())


def _is_carried(edit: Edit, widest: EditPlan, checkpoint: Checkpoint, spec: ModelSpec, target: str) -> bool:
    try:
        check_carried(replace(widest, edits=(edit,)), checkpoint, spec, [target])
    except TargetError:
        return False
    return True


def _most(edit: Edit, spec: ModelSpec) -> Edit:
    """An edit as a plan has it. Low-rank ones of writers know their mean effect, and factors of 1 stand for others."""
    site = spec.owners[edit.tensor]
    if isinstance(edit, LowRank) and site.role.writes and site.role not in CONDITIONAL:
        return replace(edit, mean_effect=torch.zeros(edit.A.shape[0]))
    if isinstance(edit, Scale) and not len(edit.changed):
        return replace(edit, factors=torch.full_like(edit.factors, 2))
    return edit


def _least(edit: Edit) -> Edit:
    """The same edit at the lowest rank, which none is refused for."""
    if isinstance(edit, LowRank):
        effect = None if edit.mean_effect is None else edit.mean_effect[:1]
        return replace(edit, B=edit.B[:, :1], A=edit.A[:1], mean_effect=effect)
    if isinstance(edit, Scale) and edit.axis != "whole":
        factors = torch.ones_like(edit.factors)
        factors[:1] = 2
        return replace(edit, factors=factors)
    return edit
