"""Component edits: Steer2Edit (arXiv 2602.09870), written out component by component."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from operator_rows.row import ADAPTERS, MEAN_EFFECT, Hook, Row
from operator_rows.subject import Subject

_RHO, _ALPHA = 0.3, 0.2


def _by_components(subject: Subject) -> Mapping[str, Hook]:
    hooks = {}
    for site in subject.spec.sites:
        W, x_bar = subject.matrix(site), subject.statistics.x_bar(site.key)
        v = subject.statistics.difference(site.key)
        v_hat, size = v / v.norm(), site.in_features // site.components
        update = torch.zeros_like(W)
        for block in (slice(i, i + size) for i in range(0, site.in_features, size)):
            g = float(torch.cosine_similarity(v_hat, W[:, block] @ x_bar[block], dim=0))
            lam = (1 if g > 0 else -1) * max(abs(g) - _RHO * _ALPHA, 0) / (_RHO * (1 - _ALPHA))
            k = W[:, block].T @ v_hat
            update[:, block] = lam * torch.outer(v_hat, k / k.norm())
        hooks[site.module] = _adding_product(update)
    return hooks


def _adding_product(update: torch.Tensor) -> Hook:
    return lambda x, y: y + x @ update.T


ROWS = (
    Row(
        "Steer2Edit (2602.09870)",
        "W + Σ_j λ_j v̂ k̂_jᵀ on heads and neurons",
        f"--method component --rho-attn {_RHO} --rho-mlp {_RHO} --alpha {_ALPHA} --scale absolute --all-components",
        "the paper edits the weights; a hook adds λ_j v̂ k̂_jᵀ x_j for each head and neuron",
        _by_components,
        carried={**ADAPTERS, **MEAN_EFFECT},
    ),
)
