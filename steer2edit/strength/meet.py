"""Apply an edit at a strength and measure its KL on neutral text; or find the strength that meets a KL budget.

All that changes a model by a number comes here: a plan, one part of it, a baseline, activation steering.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from steer2edit.plan import Divergence
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.line_search import Strength, find_strength, quadratic_start

Apply = Callable[[float], AbstractContextManager[Any]]
"""Within ``apply(strength)`` the model of the neutral text is edited at that strength."""


def at(apply: Apply, text: NeutralText, strength: float = 1.0) -> Strength:
    """The divergence at one strength: one pass over the neutral text."""
    return Strength(strength, _measure(apply, text, strength), ())


def meet(apply: Apply, text: NeutralText, budget: float) -> Strength:
    """The largest strength whose KL is within ``budget``, in nats per token; see :func:`find_strength`.

    Raises Steer2EditError where no strength meets the budget.
    """
    return find_strength(lambda strength: _measure(apply, text, strength), budget, start=estimate(apply, text, budget))


def estimate(apply: Apply, text: NeutralText, budget: float) -> float:
    """The strength that meets ``budget`` by the closed form, from a few passes over some 500 tokens of the text."""
    return quadratic_start(lambda strength: _measure(apply, text, strength, glance=True), budget)


def _measure(apply: Apply, text: NeutralText, strength: float, glance: bool = False) -> Divergence:
    with apply(strength):
        return text.measure(glance=glance)
