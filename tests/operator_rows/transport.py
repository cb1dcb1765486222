"""Linear-AcT (arXiv 2410.23054) and LinEAS (2503.10679): hooks map each coordinate of a writer's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from operator_rows.row import EXACT, Hook, Row
from operator_rows.subject import Subject
from steer2edit.capture.affine_maps import contrast_runs, read_classes
from steer2edit.capture.lineas import FitSettings, fit_lineas

STEPS = 3
"""Steps of a training: the row is about what becomes of the maps, not about how good they are."""


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


def _trained(*, constant: bool) -> Callable[[Subject], Mapping[str, Hook]]:
    def hooks(subject: Subject) -> Mapping[str, Hook]:
        runs = contrast_runs(subject.loaded, subject.behavior)
        assert runs is not None
        classes = read_classes(runs, subject.spec.sites)
        maps = fit_lineas(runs, classes, FitSettings(STEPS, constant=constant)).maps
        return {
            subject.spec.site(key).module: lambda _x, y, one=one: one.omega * y + one.beta for key, one in maps.items()
        }

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
    Row(
        "LinEAS (2503.10679)",
        "ω ⊙ y + b, ω and b trained together",
        f"--method transport --fit lineas --fit-steps {STEPS}",
        "a forward hook on every writer maps its output, coordinate by coordinate; the paper's hooks are on norms",
        _trained(constant=True),
        exactness="exact where the writer has a bias or can get one, refused elsewhere",
        carried={"checkpoint": EXACT},
    ),
    Row(
        "LinEAS (2503.10679)",
        "ω ⊙ y, ω trained alone",
        f"--method transport --constant none --fit lineas --fit-steps {STEPS}",
        "a forward hook on every writer multiplies its output, coordinate by coordinate",
        _trained(constant=False),
        exactness="exact",
        carried={"checkpoint": EXACT},
        families=("llama",),
    ),
)
