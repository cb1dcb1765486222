"""Measure the KL of an edit at a strength, or find the strength for a budget.

All that changes a model by a number comes here: a plan, one part of it, a baseline, activation steering.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from steer2edit.plan import Divergence
from steer2edit.strength.kl import NeutralText, Windows
from steer2edit.strength.line_search import USUAL_PASSES, Strength, find_strength, quadratic_start

Apply = Callable[[float], AbstractContextManager[Any]]
"""Within ``apply(strength)`` the model of the neutral text is edited at that strength."""


def at(apply: Apply, text: NeutralText, strength: float = 1.0, name: str = "") -> Strength:
    """The divergence at one strength: one pass over the neutral text. ``name`` is the candidate's, for the progress."""
    windows = _measure(apply, text, strength, _stage(text, name))
    return Strength(strength, windows.divergence(), (), windows)


def meet(apply: Apply, text: NeutralText, budget: float, name: str = "") -> Strength:
    """The largest strength whose KL is within ``budget``, in nats per token; see :func:`find_strength`.

    ``name`` is the candidate's, for the progress. Raises Steer2EditError where no strength meets the budget.
    """
    passes: dict[float, Windows] = {}

    def measure(strength: float) -> Divergence:
        number = len(passes) + 1
        about = f" of about {USUAL_PASSES}" if number <= USUAL_PASSES else ""
        passes[strength] = _measure(apply, text, strength, f"{_stage(text, name)}, pass {number}{about}")
        return passes[strength].divergence()

    settled = find_strength(measure, budget, start=estimate(apply, text, budget))
    return replace(settled, windows=passes[settled.strength])


def estimate(apply: Apply, text: NeutralText, budget: float) -> float:
    """The strength that meets ``budget`` by the closed form, from a few passes over some 500 tokens of the text."""
    return quadratic_start(lambda strength: _measure(apply, text, strength, glance=True).divergence(), budget)


def _measure(apply: Apply, text: NeutralText, strength: float, stage: str = "", glance: bool = False) -> Windows:
    with apply(strength):
        return text.windows(glance=glance, stage=stage)


def _stage(text: NeutralText, name: str) -> str:
    return f"{name}: {text.stage}" if name else text.stage
