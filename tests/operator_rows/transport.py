"""Linear-AcT (arXiv 2410.23054): hooks map each coordinate of a writer's output to the other class's mean and spread."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from operator_rows.row import EXACT, Hook, Row
from operator_rows.subject import Subject


def _maps(subject: Subject) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each writer's module: omega, beta, and mean and second moment of the negative class."""
    maps = {}
    for site in subject.spec.sites:
        target, source = (subject.statistics.moments[site.key, "output", label] for label in ("positive", "negative"))
        spreads = [(one.m2 - one.mean**2).sqrt() for one in (target, source)]
        omega = (spreads[0] / spreads[1]).clamp(1 / 3, 3)
        maps[site.module] = (omega, target.mean - omega * source.mean, source.mean, source.m2)
    return maps


def _transported(subject: Subject) -> Mapping[str, Hook]:
    return {
        module: lambda _x, y, omega=omega, beta=beta: omega * y + beta
        for module, (omega, beta, _, _) in _maps(subject).items()
    }


def _by_gain(subject: Subject) -> Mapping[str, Hook]:
    hooks = {}
    for module, (omega, beta, mean, m2) in _maps(subject).items():
        gain = (omega + beta * mean / m2).clamp(1 / 3, 3)
        hooks[module] = lambda _x, y, gain=gain: gain * y
    return hooks


ROWS = (
    Row(
        "Linear-AcT (2410.23054)",
        "ω ⊙ y + β, ω = σ₊/σ₋, β = μ₊ − ω μ₋",
        "--method transport",
        "a forward hook on every writer maps its output, coordinate by coordinate",
        _transported,
        exactness="exact where the writer has a bias or can get one, refused elsewhere",
        carried={"checkpoint": EXACT},
    ),
    Row(
        "Linear-AcT (2410.23054)",
        "the nearest gain, ω + β μ₋/E[y²]",
        "--method transport --constant none",
        "a forward hook on every writer multiplies its output, coordinate by coordinate",
        _by_gain,
        exactness="exact as a gain; its error as a transport stands in the plan",
        carried={"checkpoint": EXACT},
        families=("llama",),
    ),
)
