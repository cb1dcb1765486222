"""Compiled steering: the hooks solve for each writer's functional anew, from the captured moments."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from operator_rows.row import ADAPTERS, MEAN_EFFECT, Hook, Row, pushing
from operator_rows.subject import Subject
from steer2edit.architecture import MatrixRole, Site


def _least_energy(subject: Subject) -> Mapping[str, Hook]:
    """``(a · x) v`` at attention's writers; a solves the Lagrange conditions of the least energy on contrast data and prose."""
    statistics = subject.statistics
    hooks = {}
    for site in subject.spec.sites:
        if _carries(subject, site):
            # without chats the prose has the weight of both backgrounds, 0.4 of the remaining 0.6
            parts = [statistics.block_moments(site.key, source) for source in ("contrast", "background")]
            S = _whole(parts[0].double() / 3 + parts[1].double() * 2 / 3)
            silent = statistics.mean(site.key, "input", "background")
            a = _lagrange(S, [statistics.x_bar(site.key), silent], [1.0, 0.0])
            hooks[site.module] = pushing(a, statistics.difference(site.key))
    return hooks


def _whole(blocks: torch.Tensor) -> torch.Tensor:
    floor = 0.01 * blocks.diagonal(dim1=1, dim2=2).mean()
    return torch.block_diag(*blocks) + floor * torch.eye(blocks.shape[0] * blocks.shape[1])  # type: ignore[no-untyped-call]


def _lagrange(S: torch.Tensor, columns: list[torch.Tensor], wanted: list[float]) -> torch.Tensor:
    M = torch.stack(columns, dim=1).double()
    n, m = M.shape
    conditions = torch.zeros(n + m, n + m, dtype=torch.float64)
    conditions[:n, :n], conditions[:n, n:], conditions[n:, :n] = S, M, M.T
    right = torch.cat((torch.zeros(n, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)))
    return torch.linalg.solve(conditions, right)[:n]


def _constant(subject: Subject) -> Mapping[str, Hook]:
    """Activation steering at the same writers: every writer's own vector, at every token."""
    statistics = subject.statistics

    def adding(site: Site) -> Hook:
        v = statistics.difference(site.key)
        return lambda _x, y: y + v

    return {site.module: adding(site) for site in subject.spec.sites if _carries(subject, site)}


def _carries(subject: Subject, site: Site) -> bool:
    """Attention's writers; of 12 layers or more, those of the deeper half."""
    layers = subject.spec.layers
    return site.role.kind is MatrixRole.ATTN_OUT and site.layer >= (layers // 2 if layers >= 12 else 0)


ROWS = (
    Row(
        "steer2edit",
        "y + (a·x) v, a of least energy",
        "--method steering --all-components",
        "a forward hook on each attention's writer adds (a·x) v",
        _least_energy,
        carried={**ADAPTERS, **MEAN_EFFECT},
    ),
    Row(
        "CAA, activation addition (2312.06681)",
        "y + v",
        "--method steering --zero-push none --background-weight 0 --chat-weight 0 --all-components",
        "a forward hook on each attention's writer adds v at every token",
        _constant,
        carried={**dict.fromkeys(ADAPTERS, 0.7), **MEAN_EFFECT},
        exactness="approximate: the best functional of the input in place of a constant",
    ),
)
