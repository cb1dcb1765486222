"""The constant part of an edit: what it adds to the stream on the typical input of its own data."""

from __future__ import annotations

import torch

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.architecture.stream import CONDITIONAL, factor, gain
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import TargetError, listing
from steer2edit.plan import Bias, Edit, EditPlan, LowRank


def constant_parts(plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec) -> dict[int, torch.Tensor]:
    """What each block's edits add to the stream on average, float32 ``[hidden]`` by layer, to first order in the edit.

    Raises TargetError for edits whose mean effect is not known.
    """
    check_constant_parts(plan, spec)
    parts: dict[int, torch.Tensor] = {}
    for edit in plan.edits:
        site = spec.owners[edit.tensor]
        vector = _vector(edit)
        assert vector is not None
        vector = vector * gain(checkpoint, site).double() * factor(checkpoint, site)
        parts[site.layer] = parts.get(site.layer, 0) + vector
    return {layer: vector.float() for layer, vector in sorted(parts.items())}


def check_constant_parts(plan: EditPlan, spec: ModelSpec) -> None:
    """Raise TargetError for edits whose mean effect is not known. Computes none."""
    sites = [(edit, spec.owners[edit.tensor]) for edit in plan.edits]
    if unknown := [f"{edit.tensor}: {_reason(edit, site)}" for edit, site in sites if not _is_known(edit, site)]:
        raise TargetError(f"what these edits add to the residual stream on average is not known:\n{listing(unknown)}")


def _is_known(edit: Edit, site: Site) -> bool:
    if site.role in CONDITIONAL:
        return False
    if isinstance(edit, LowRank):
        return edit.mean_effect is not None
    return isinstance(edit, Bias) and site.norm is None and site.role.writes


def _vector(edit: Edit) -> torch.Tensor | None:
    """What the edit adds on average before the site's gain, float64 ``[out]``."""
    if isinstance(edit, LowRank) and edit.mean_effect is not None:
        return edit.B.double() @ edit.mean_effect.double()
    return edit.delta.double() if isinstance(edit, Bias) else None


def _reason(edit: Edit, site: Site) -> str:
    if site.role is MatrixRole.EMBED:
        return "the embedding's edit adds another vector from token to token"
    if site.role in CONDITIONAL:
        return "an expert's edit acts only on tokens that are routed to it"
    if not site.role.writes:
        return "it changes what a block reads, and adds no vector to the stream"
    if isinstance(edit, Bias):
        return "a bias before a norm"
    if not isinstance(edit, LowRank):
        return "routing, gains and scaled rows or columns add no vector"
    return "the plan was not made from statistics, so its typical input is not known"
