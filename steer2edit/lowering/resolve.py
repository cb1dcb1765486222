"""A plan's edits with the sites that they belong to, and what a lowering answers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.checkpoint import Checkpoint, TensorInfo
from steer2edit.errors import PlanError, listing
from steer2edit.plan import Assign, Bias, Edit, EditPlan, LowRank, NewBias
from steer2edit.plan.operations import addition_of, scales_of

LARGEST_RANK = 512
"""The highest rank that an adapter is written with; the largest max_lora_rank of vLLM."""


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
    """How files are written: ``jobs`` at a time, and whether unedited shards become links.

    ``jobs`` None means as many as there are processors, at most four. The links are hard links to the base's shards.
    """

    jobs: int | None = None
    link: bool = False

    @property
    def workers(self) -> int:
        return min(4, os.cpu_count() or 1) if self.jobs is None else self.jobs


@dataclass(frozen=True)
class Resolved:
    """A plan with the base that it fits. ``edits`` are the plan's, each with its site, by tensor name.

    ``rewritten`` are those of tensors that the base holds; the others create biases (``lowering.new_biases``).
    """

    plan: EditPlan
    checkpoint: Checkpoint
    spec: ModelSpec
    edits: Mapping[str, tuple[Edit, Site]]

    @property
    def rewritten(self) -> dict[str, tuple[Edit, Site]]:
        return {name: one for name, one in self.edits.items() if not isinstance(one[0], NewBias)}


def resolve(plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec) -> Resolved:
    """Find the site of each edit.

    Raises PlanError, with all problems, where the plan was made for another model or does not fit this one.
    """
    plan.check_base(checkpoint)
    edits: dict[str, tuple[Edit, Site]] = {}
    problems = []
    for edit in plan.edits:
        site = spec.owners.get(edit.tensor)
        if site is None:
            problems.append(spec.why_unknown(edit.tensor))
        elif isinstance(edit, NewBias) != (edit.tensor == site.new_bias):
            problems.append(_no_such_bias(edit, checkpoint))
        elif not _allowed(edit, site):
            problems.append(f"{edit.tensor}: {edit.op} is not an operation on a {site.role.value}")
        elif not edit.fits(shape := _shape(site, edit.tensor)):
            shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in edit.parts().items())
            problems.append(f"{edit.tensor} is {' x '.join(map(str, shape))}, its update has {shapes}")
        else:
            edits[edit.tensor] = (edit, site)
    if problems:
        raise PlanError(f"the plan does not fit {checkpoint.name}:\n{listing(problems)}")
    if spec.tied_embeddings and spec.embedding.tensor in edits:
        raise PlanError(
            f"{checkpoint.name} ties its embedding to its unembedding: editing {spec.embedding.tensor} would change both. "
            "Leave the embedding out."
        )
    if plan.structure and any(isinstance(edit, NewBias) for edit in plan.edits):
        raise PlanError(
            "a plan that changes experts or layers creates no biases too: do the first, and plan on the result"
        )
    return Resolved(plan, checkpoint, spec, edits)


def _no_such_bias(edit: Edit, checkpoint: Checkpoint) -> str:
    if isinstance(edit, NewBias):
        return f"{edit.tensor} cannot be created: {checkpoint.name} has it, or its class gives it none"
    return f"{edit.tensor} is not in {checkpoint.name}: {edit.op} is not an operation on a bias to create"


def _allowed(edit: Edit, site: Site) -> bool:
    """Whether an operation is one on this kind of matrix.

    Rows are set in routers alone, and of them the matrix may also take an update.
    """
    if site.role is not MatrixRole.ROUTER:
        return not isinstance(edit, Assign)
    return isinstance(edit, Assign) or (isinstance(edit, LowRank) and edit.tensor == site.matrix)


def _shape(site: Site, name: str) -> tuple[int, ...]:
    return (site.out_features, site.in_features) if name == site.matrix else (site.out_features,)


def located(checkpoint: Checkpoint, edit: Edit, site: Site) -> TensorInfo:
    """Where the matrix or vector lies that an edit of ``site`` names."""
    return site.locate(checkpoint, edit.tensor)


def adapter_refusal(edit: Edit, site: Site, *, experts: bool = False, biases: bool = False) -> str:
    """Why an adapter cannot carry an edit; "" where it can.

    ``experts`` and ``biases``: whether it can carry those of this model's experts, and of its writers' biases.
    """
    if site.role is MatrixRole.EMBED:
        return "the embedding"
    if site.role is MatrixRole.ROUTER:
        return "a router"
    if site.role is MatrixRole.UNEMBED:
        return "the unembedding, which not every engine's adapters reach"
    if site.expert is not None and site.role is not MatrixRole.EXPERT_OUT:
        return "an input matrix of an expert among several, which no engine was seen to apply"
    if site.expert is not None and not experts:
        return "an expert among several"
    if site.modules or site.output_part is not None:
        return "a matrix that transformers divides, or holds together with another one"
    if isinstance(edit, Bias) or edit.tensor != site.matrix:
        return "" if biases and isinstance(edit, Bias) and site.expert is None else "a bias"
    scales = scales_of(edit)
    if isinstance(edit, Assign) or any(one.axis == "whole" for one in scales):
        return "a gain"
    rank = update_rank(edit)
    if scales and rank >= min(site.in_features, site.out_features):
        return f"{_counted(edit)}, which is an update of full rank"
    if rank > LARGEST_RANK:
        return f"{_counted(edit)}, an update of rank {rank}; an adapter has at most rank {LARGEST_RANK}"
    return ""


def update_rank(edit: Edit) -> int:
    """The rank that a matrix's update has in an adapter, at least 1: each scaled row or column adds one."""
    addition = addition_of(edit)
    rank = addition.B.shape[1] if isinstance(addition, LowRank) else 0
    return max(rank + sum(len(one.changed) for one in scales_of(edit)), 1)


def _counted(edit: Edit) -> str:
    counts = [f"{len(one.changed)} scaled {one.axis}" for one in scales_of(edit)]
    return " and ".join(counts) or "factors of many columns"
