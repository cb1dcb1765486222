"""The search for the largest strength within a KL budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from steer2edit.errors import Steer2EditError
from steer2edit.plan import Divergence
from steer2edit.plan.measured import LARGEST_STRENGTH
from steer2edit.strength.kl import Windows

USUAL_PASSES = 5
"""How many measurements a search seldom exceeds when it begins at :func:`quadratic_start`."""


@dataclass(frozen=True)
class Strength:
    """The strength found, what it measured, and the search's ``(strength, kl)`` steps in order.

    ``windows`` is the same measurement window by window, where it was of a text.
    """

    strength: float
    divergence: Divergence
    steps: tuple[tuple[float, float], ...]
    windows: Windows | None = None


def find_strength(
    measure: Callable[[float], Divergence],
    budget: float,
    *,
    start: float = 1.0,
    tolerance: float = 0.05,
    max_steps: int = 12,
) -> Strength:
    """The largest strength whose measured KL stays within ``budget``, to ``tolerance`` of the budget.

    KL grows about as the square of the strength, so each guess follows the power law through the last measurement
    and falls back to bisection inside the bracket; :func:`quadratic_start` gives a good ``start``.
    Raises Steer2EditError where no strength meets the budget, and where even ``LARGEST_STRENGTH`` does not reach it.
    """
    _check_budget(budget)
    low: tuple[float, Divergence] | None = None
    high: tuple[float, float] | None = None
    steps: list[tuple[float, float]] = []
    strength = start
    for _ in range(max_steps):
        strength = min(strength, LARGEST_STRENGTH)
        divergence = measure(strength)
        steps.append((strength, divergence.kl))
        if not math.isfinite(divergence.kl) and strength < 1e-6:
            break
        if divergence.kl <= budget:
            low = (strength, divergence)
            if divergence.kl >= (1 - tolerance) * budget:
                break
            if strength == LARGEST_STRENGTH:
                raise Steer2EditError(
                    f"the edit hardly changes the model: at a strength of {strength:g} its KL is {divergence.kl:.2g}, and the "
                    f"budget is {budget:g}; are its vectors as small as rounding, or the responses of both classes the same?"
                )
        else:
            high = (strength, divergence.kl)
        strength = _next(low, high, budget)
    if low is None:
        raise Steer2EditError(
            f"no strength met the KL budget of {budget}: {steps[-1][0]:.3g} still gave {steps[-1][1]:.3g}; "
            "is the neutral text or the data damaged?"
        )
    return Strength(low[0], low[1], tuple(steps))


def quadratic_start(glance: Callable[[float], Divergence], budget: float, *, probe: float = 0.1) -> float:
    """The strength that meets ``budget`` if the logits moved in proportion to it: ``γ = sqrt(2ε / E Var_p(J v))``.

    ``E Var_p(J v)`` is measured by a finite difference, ``2 quadratic(h) / h²`` at a small strength h; ``probe`` is the first
    one tried, and it is moved until the logits differ by more than rounding and less than would bend the curve. The KL there
    then corrects it once.
    """
    _check_budget(budget)
    for _ in range(8):
        quadratic = glance(probe).quadratic
        if quadratic is not None and math.isfinite(quadratic) and quadratic > 0:
            guess = probe * math.sqrt(budget / quadratic)
            if 1e-4 <= quadratic <= max(budget, 1e-2):
                # in a narrow dtype most of a small difference is rounding: at the guess itself it is not
                there = glance(guess).kl
                return guess * min(max(math.sqrt(budget / there), 0.1), 10.0) if there > 0 else guess
            probe = min(max(0.5 * guess, probe / 30), probe * 30)
        else:
            probe = probe / 16 if quadratic else probe * 16
    return probe


def _check_budget(budget: float) -> None:
    if not budget > 0:
        raise Steer2EditError(f"the KL budget is {budget}, expected a positive number of nats per token")


def _next(low: tuple[float, Divergence] | None, high: tuple[float, float] | None, budget: float) -> float:
    # aimed a little under the budget, so that a good guess ends the search
    goal = 0.975 * budget
    points = ([(low[0], low[1].kl)] if low else []) + ([high] if high else [])
    if len(points) == 2:
        (a, ka), (b, kb) = points
        power = math.log(max(kb, 1e-30) / max(ka, 1e-30)) / math.log(b / a)
        guess = a * (goal / max(ka, 1e-30)) ** (1 / max(power, 0.25))
        inside = a + 0.05 * (b - a), b - 0.05 * (b - a)
        return guess if inside[0] <= guess <= inside[1] else math.sqrt(a * b)
    at, kl = points[0]
    if not math.isfinite(kl):
        return at / 16
    return at * min(max(math.sqrt(goal / max(kl, 1e-12)), 1 / 64), 64.0)
