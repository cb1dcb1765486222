"""Directional ablation (arXiv 2406.11717): its hooks take a direction out of what every writer gives."""

from __future__ import annotations

from collections.abc import Mapping

from operator_rows.row import ADAPTERS, EXACT, MEAN_EFFECT, Hook, Row, along
from operator_rows.subject import Subject


def _ablating(subject: Subject, layer: int, share: float = 1.0) -> Mapping[str, Hook]:
    part = along(subject.statistics.difference(f"residual.{layer}"))
    return {site.module: lambda _x, y: y - share * part(y) for site in subject.spec.sites}


def _whole(subject: Subject) -> Mapping[str, Hook]:
    embedding = subject.spec.embedding.module
    part = along(subject.statistics.difference("residual.1"))
    return {**_ablating(subject, 1), embedding: lambda _x, y: y - part(y)}


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
        carried={"checkpoint": EXACT, **MEAN_EFFECT},
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
)
