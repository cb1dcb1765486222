"""Vectors that are added under a condition: no weight does that, and the nearest edit has a known error."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from operator_rows.row import ADAPTERS, Hook, Row
from operator_rows.subject import Subject
from steer2edit.capture.background import background_examples
from steer2edit.capture.gate import Gate, fit_gate, gate_plan
from steer2edit.plan import EditPlan


def _gate(subject: Subject) -> tuple[Gate, torch.Tensor]:
    """The behaviour as its own condition, read after the first block; and the vector that the second one adds."""
    statistics = subject.statistics
    direction = statistics.difference("residual.0")
    means = [statistics.mean("residual.0", "output", label) for label in ("positive", "negative")]
    cosines = [float(torch.cosine_similarity(mean, direction, dim=0)) for mean in means]
    return Gate(direction.float(), 0, sum(cosines) / 2), statistics.difference("residual.1")


def _planned(subject: Subject) -> EditPlan:
    gate, v = _gate(subject)
    loaded, site = subject.loaded, subject.spec.site("attn_out.1")
    texts = [*subject.behavior.encode(loaded.tokenizer, loaded.context), *background_examples(loaded)]
    fit = fit_gate(loaded, texts, site, gate)
    return gate_plan(subject.checkpoint, subject.spec, site, v, gate, fit, condition="rows", name="rows")


def _hooks(subject: Subject) -> Mapping[str, Hook]:
    gate, v = _gate(subject)
    held: dict[str, torch.Tensor] = {}

    def condition(_x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        held["gate"] = gate.of(h)
        return h

    writer = subject.spec.site("attn_out.1").module
    return {f"{subject.spec.block_modules}0": condition, writer: lambda _x, y: y + held["gate"][..., None] * v}


ROWS = (
    Row(
        "CAST (2409.05907)",
        "y + 1[cos(h, c) > θ] v",
        "gate MODEL --condition DIRECTION --condition-layer 0 --layer 1",
        "a hook reads the condition after a block, and a later one adds v where it holds",
        _hooks,
        exactness="approximate, with its error on held-out texts: the nearest edit of rank 1",
        carried=dict.fromkeys((*ADAPTERS, "gguf-vector"), 0.9),
        families=("llama",),
        plan=_planned,
    ),
)
