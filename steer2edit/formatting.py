"""Numbers, intervals, ratios and settings as text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from steer2edit.bootstrap import Estimate


def number(value: float, signed: bool = False) -> str:
    """A number with three digits and a minus sign (−); with ``signed`` also a plus sign."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif 0 < abs(value) < 1e-4:
        text = f"{value:.1e}"
    else:
        text = f"{value:.3g}"
    return ("+" if signed and value > 0 else "") + text.replace("-", "−")


def interval(estimate: Estimate, signed: bool = False) -> str:
    """A value with its interval. An interval that is not finite is left out."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return number(estimate.value, signed)
    return f"{number(estimate.value, signed)} [{number(estimate.low)}, {number(estimate.high)}]"


def ratio(estimate: Estimate) -> str:
    """A factor with its interval."""
    # a perplexity's ratio is near 1: the decimals carry the difference
    value, low, high = (
        f"{x:.3f}" if abs(x) < 100 else number(x) for x in (estimate.value, estimate.low, estimate.high)
    )
    return f"× {value} [{low}, {high}]"


def plain_interval(stored: Mapping[str, Any] | None) -> str:
    """An estimate from JSON: ``value``, and ``low`` and ``high`` where they are known."""
    if not stored:
        return "–"
    return interval(Estimate(stored["value"], stored.get("low", math.nan), stored.get("high", math.nan), 0))


def divergence(kl: Estimate) -> str:
    """A plan's KL from the base, with its interval."""
    return f"{interval(kl)} nats/token"


def plain_value(value: object) -> str:
    """A value from JSON: numbers are rounded, lists and mappings are written in full."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return pairs(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(plain_value, value))}]"
    return str(value)


def pairs(values: Mapping[str, Any]) -> str:
    """Keys with their values. Empty values are left out."""
    return ", ".join(
        f"{str(key).replace('_', ' ')} {plain_value(value)}"
        for key, value in values.items()
        if value not in (None, {}, [])
    )


def cut(text: str, longest: int) -> str:
    """The beginning of a text, with … where more follows."""
    return text if len(text) <= longest else f"{text[:longest].rstrip()} …"
