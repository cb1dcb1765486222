"""Zero and mean ablation of components, as in circuit analysis: hooks set what a head or neuron writes to zero, or its mean."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from operator_rows.row import ADAPTERS, EXACT, Hook, Row
from operator_rows.subject import Subject


def _without(subject: Subject, chosen: Mapping[str, list[int]], mean: bool = False) -> Mapping[str, Hook]:
    hooks = {}
    for key, numbers in chosen.items():
        site = subject.spec.site(key)
        width = site.in_features // site.components
        columns = torch.tensor([number * width + i for number in numbers for i in range(width)])
        W = subject.matrix(site)[:, columns]
        kept = subject.statistics.x_bar(key)[columns] if mean else torch.zeros(len(columns), dtype=torch.float64)
        hooks[site.module] = lambda x, y, W=W, columns=columns, kept=kept: y + (kept - x[..., columns]) @ W.T
    return hooks


ROWS = (
    Row(
        "Zero ablation (recall and reasoning circuits)",
        "y − W_c x_c for chosen heads and neurons",
        "--method silence --components attn.1.h2,mlp.0.n5-7",
        "a hook sets the inputs of the chosen components to zero",
        lambda subject: _without(subject, {"attn_out.1": [2], "mlp_out.0": [5, 6, 7]}),
        carried=ADAPTERS,
    ),
    Row(
        "Mean ablation (recall and reasoning circuits)",
        "y − W_c (x_c − x̄_c) for chosen heads",
        "--method silence --components attn.1.h2 --leave mean",
        "a hook sets the inputs of the chosen components to their means",
        lambda subject: _without(subject, {"attn_out.1": [2]}, mean=True),
        exactness="exact where the writer has a bias or can get one, refused elsewhere",
        carried={"checkpoint": EXACT, "lora": EXACT},
    ),
)
