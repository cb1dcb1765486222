"""The constant part of a plan: what its edits push, on average, into the residual stream.

An edit ``B A`` adds ``B (A x)``. On the typical input x_bar of the data that the plan was made from, that is the vector
``B (A x_bar)``; run-time steering, which adds one vector at every token, can carry that much of an edit and no more.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from steer2edit.architecture import ModelSpec, Role, Site
from steer2edit.capture.statistics import LABELS, Statistics
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import TargetError, listing
from steer2edit.plan import Bias, Edit, EditPlan, LowRank

# what these write reaches the stream at some tokens only, or weighted by a router
_CONDITIONAL = (Role.EMBED, Role.EXPERT_OUT, Role.SHARED_EXPERT_OUT)


def record_push(plan: EditPlan, spec: ModelSpec, statistics: Statistics) -> EditPlan:
    """The plan with every low-rank edit's ``push`` filled in where its typical input was captured.

    Behind a norm the push is what reaches its gain: ``A x_bar`` over the root mean square of the site's output.
    """

    def pushing(edit: Edit) -> Edit:
        site = spec.owners.get(edit.tensor)
        if site is None or site.role in _CONDITIONAL or not isinstance(edit, LowRank):
            return edit
        if (site.key, "input", "positive") not in statistics.moments:
            return edit
        push = edit.A.double() @ statistics.x_bar(site.key).double()
        if site.norm is not None:
            push = push / output_size(statistics, site)
        return replace(edit, push=push.float())

    return replace(plan, edits=tuple(pushing(edit) for edit in plan.edits))


def output_size(statistics: Statistics, site: Site) -> float:
    """The root mean square over features of what a site writes, before its norm."""
    squares = [float(statistics.moments[site.key, "output", label].m2.mean()) for label in LABELS]
    return math.sqrt(max(sum(squares) / len(squares), 1e-24))


def residual_push(plan: EditPlan, checkpoint: Checkpoint, spec: ModelSpec) -> dict[int, torch.Tensor]:
    """What each block's edits push into the stream, float32 ``[hidden]`` by layer, to first order in the edit.

    Raises TargetError for edits whose push is not known.
    """
    unknown = []
    found: dict[int, torch.Tensor] = {}
    for edit in plan.edits:
        site = spec.owners[edit.tensor]
        if isinstance(edit, LowRank) and edit.push is not None and site.role not in _CONDITIONAL:
            vector = edit.B.double() @ edit.push.double()
        elif isinstance(edit, Bias) and site.norm is None and site.role not in _CONDITIONAL:
            vector = edit.delta.double()
        else:
            unknown.append(f"{edit.tensor}: {_reason(edit, site)}")
            continue
        vector = vector * gain(checkpoint, site).double() * stream_factor(checkpoint)
        found[site.layer] = found.get(site.layer, 0) + vector
    if unknown:
        raise TargetError(f"what these edits push into the residual stream is not known:\n{listing(unknown)}")
    return {layer: vector.float() for layer, vector in sorted(found.items())}


def gain(checkpoint: Checkpoint, site: Site) -> torch.Tensor:
    """The gain of the norm between a site and the stream, float32 ``[out]``; ones where there is none."""
    if site.norm is None:
        return torch.ones(site.out_features)
    return checkpoint.read(site.norm.tensor).float() + site.norm.offset


def stream_factor(checkpoint: Checkpoint) -> float:
    """What the family multiplies every writer's output by before it joins the stream."""
    config = checkpoint.config
    if "residual_multiplier" in config:  # Granite
        return float(config["residual_multiplier"])
    if config.get("model_type") == "minicpm3" and "scale_depth" in config:
        return float(config["scale_depth"]) / math.sqrt(float(config["num_hidden_layers"]))
    return 1.0


def _reason(edit: Edit, site: Site) -> str:
    if site.role is Role.EMBED:
        return "the embedding's push differs from token to token"
    if site.role in _CONDITIONAL:
        return "an expert pushes only where it is routed to"
    if isinstance(edit, Bias):
        return "a bias before a norm"
    if not isinstance(edit, LowRank):
        return "routing and gains push no vector"
    return "the plan was not made from statistics, so its typical input is not known"
