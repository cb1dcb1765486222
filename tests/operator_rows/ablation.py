"""Directional ablation (arXiv 2406.11717): its hooks take a direction out of what every writer gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from operator_rows.row import ADAPTERS, EXACT, MEAN_EFFECT, Hook, Row, along
from operator_rows.subject import Subject


def _ablating(subject: Subject, layer: int, share: float = 1.0) -> Mapping[str, Hook]:
    part = along(subject.statistics.difference(f"residual.{layer}"))
    return {site.module: lambda _x, y: y - share * part(y) for site in subject.spec.sites}


def _whole(subject: Subject) -> Mapping[str, Hook]:
    embedding = subject.spec.embedding.module
    part = along(subject.statistics.difference("residual.1"))
    return {**_ablating(subject, 1), embedding: lambda _x, y: y - part(y)}


def _per_layer(subject: Subject) -> Mapping[str, Hook]:
    hooks = {}
    for site in subject.spec.sites:
        part = along(subject.statistics.difference(f"residual.{site.layer}"))
        hooks[site.module] = lambda _x, y, part=part: y - part(y)
    return hooks


def _projected(subject: Subject) -> Mapping[str, Hook]:
    r, mean = subject.statistics.difference("residual.1"), subject.statistics.mean("residual.1", "output", "background")
    part = along(r - along(mean)(r))
    return {site.module: lambda _x, y: y - part(y) for site in subject.spec.sites}


def _norm_preserving(subject: Subject) -> Mapping[str, Hook]:
    r = subject.statistics.difference("residual.1")
    r = r / r.norm()
    hooks = {}
    for site in subject.spec.sites:
        W = subject.matrix(site)
        cut = W - torch.outer(r, r @ W)
        kept = cut * (W.norm(dim=0) / cut.norm(dim=0))
        gone = torch.zeros(len(r), dtype=torch.float64)
        if site.bias is not None:
            gone = along(r)(subject.checkpoint.read(site.bias).double())
        hooks[site.module] = lambda x, y, change=kept - W, gone=gone: y + x @ change.T - gone
    return hooks


def _to_the_other_class(subject: Subject) -> Mapping[str, Hook]:
    part = along(subject.statistics.difference("residual.1"))
    hooks = {}
    for site in subject.spec.sites:
        mean = subject.statistics.mean(site.key, "output", "negative")
        hooks[site.module] = lambda _x, y, mean=mean: y - part(y - mean)
    return hooks


_SYSTEM = "Directional ablation (2406.11717)"
ROWS = (
    Row(
        _SYSTEM,
        "y − r̂ r̂ᵀ y at every writer",
        "--method ablation --direction-layer 1",
        "a forward hook on every writer takes r̂ out of its output",
        lambda subject: _ablating(subject, 1),
        carried={**ADAPTERS, **MEAN_EFFECT},
        families=("llama",),
    ),
    Row(
        _SYSTEM,
        "y − r̂ r̂ᵀ y at every writer, biases included",
        "--method ablation --direction-layer 1 --alpha 0.5",
        "a forward hook on every writer takes half of r̂ out of its output",
        lambda subject: _ablating(subject, 1, 0.5),
        carried={"checkpoint": EXACT, "lora": EXACT, **MEAN_EFFECT},
        families=("gpt2",),
    ),
    Row(
        _SYSTEM,
        "y − r̂ r̂ᵀ y at every writer and at the embedding",
        "--method ablation --direction-layer 1 --embedding",
        "the same, and a hook on the token embedding",
        _whole,
        carried={"checkpoint": EXACT},
        families=("llama",),
    ),
    Row(
        _SYSTEM,
        "y − r̂_l r̂_lᵀ y, a direction for each layer",
        "--method ablation --per-layer",
        "a forward hook on every writer takes its own layer's r̂ out of its output",
        _per_layer,
        carried={**ADAPTERS, **MEAN_EFFECT},
        families=("llama",),
    ),
    Row(
        "Projected ablation",
        "the same, with r ⟂ the background's mean",
        "--method ablation --direction-layer 1 --projected",
        "a forward hook on every writer takes the cleaned r̂ out of its output",
        _projected,
        carried={**ADAPTERS, **MEAN_EFFECT},
        families=("llama",),
    ),
    Row(
        "Norm-preserving ablation",
        "w' = ‖w‖ (w − r̂ r̂ᵀw)/‖w − r̂ r̂ᵀw‖ for each column w",
        "--method ablation --direction-layer 1 --norm-preserving",
        "the paper edits the weights; a hook adds (W' − W) x",
        _norm_preserving,
        carried={"checkpoint": EXACT},
    ),
    Row(
        "ACE (2411.09003)",
        "y − r̂ r̂ᵀ(y − μ₋) at every writer",
        "--method ablation --direction-layer 1 --restore negative",
        "a forward hook on every writer moves its output along r̂ to the other class's mean",
        _to_the_other_class,
        exactness="exact where every writer has a bias or can get one, refused elsewhere",
        carried={"checkpoint": EXACT, "lora": EXACT, **MEAN_EFFECT},
    ),
)
