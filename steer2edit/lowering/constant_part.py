"""The constant part of an edit: what it adds to the stream on the typical input of its own data."""

from __future__ import annotations

import torch

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.architecture.stream import _CONDITIONAL, factor, gain
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import TargetError, listing
from steer2edit.plan import Bias, Edit, EditPlan, LowRank


def constant_parts(plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec) -> dict[int, torch.Tensor]:
    """What each block's edits add to the stream on average, float32 ``[hidden]`` by layer, to first order in the edit.

    Raises TargetError for edits whose mean effect is not known.
    """
    unknown = []
    parts: dict[int, torch.Tensor] = {}
    for edit in plan.edits:
        site = spec.owners[edit.tensor]
        if isinstance(edit, LowRank) and edit.mean_effect is not None and site.role not in _CONDITIONAL:
            vector = edit.B.double() @ edit.mean_effect.double()
        elif isinstance(edit, Bias) and site.norm is None and site.role.writes and site.role not in _CONDITIONAL:
            vector = edit.delta.double()
        else:
            unknown.append(f"{edit.tensor}: {_reason(edit, site)}")
            continue
        vector = vector * gain(checkpoint, site).double() * factor(checkpoint, site)
        parts[site.layer] = parts.get(site.layer, 0) + vector
    if unknown:
        raise TargetError(f"what these edits add to the residual stream on average is not known:\n{listing(unknown)}")
    return {layer: vector.float() for layer, vector in sorted(parts.items())}


def _reason(edit: Edit, site: Site) -> str:
    if site.role is MatrixRole.EMBED:
        return "the embedding's edit adds another vector from token to token"
    if site.role in _CONDITIONAL:
        return "an expert's edit acts only on tokens that are routed to it"
    if not site.role.writes:
        return "it changes what a block reads, and adds no vector to the stream"
    if isinstance(edit, Bias):
        return "a bias before a norm"
    if not isinstance(edit, LowRank):
        return "routing, gains and scaled rows or columns add no vector"
    return "the plan was not made from statistics, so its typical input is not known"
