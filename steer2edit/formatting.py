"""Values as text: numbers, intervals, ratios, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from steer2edit.bootstrap import Estimate


def number(value: float, signed: bool = False) -> str:
    """Three digits and a true minus; with ``signed`` a plus too."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif 0 < abs(value) < 1e-4:
        text = f"{value:.1e}"
    else:
        text = f"{value:.3g}"
    return ("+" if signed and value > 0 else "") + text.replace("-", "−")


def interval(found: Estimate, signed: bool = False) -> str:
    """A value and its interval, where that is finite."""
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return number(found.value, signed)
    return f"{number(found.value, signed)} [{number(found.low)}, {number(found.high)}]"


def ratio(found: Estimate) -> str:
    """A factor and its interval."""
    # a perplexity's ratio is near 1: what differs is behind the point
    value, low, high = (f"{x:.3f}" if abs(x) < 100 else number(x) for x in (found.value, found.low, found.high))
    return f"× {value} [{low}, {high}]"


def plain_interval(found: Mapping[str, Any] | None) -> str:
    """An estimate as JSON holds it: ``value``, and ``low`` and ``high`` where they are known."""
    if not found:
        return "–"
    return interval(Estimate(found["value"], found.get("low", math.nan), found.get("high", math.nan), 0))


def divergence(kl: Estimate) -> str:
    """A plan's KL from the base, with its interval."""
    return f"{interval(kl)} nats/token"


def plain_value(given: object) -> str:
    """A value of JSON: numbers rounded, lists and mappings in full."""
    if given is None:
        return "–"
    if isinstance(given, float):
        return number(given)
    if isinstance(given, Mapping):
        return pairs(given)
    if isinstance(given, (list, tuple)):
        return f"[{', '.join(map(plain_value, given))}]"
    return str(given)


def pairs(values: Mapping[str, Any]) -> str:
    """Keys with their values; those that hold nothing are left out."""
    return ", ".join(
        f"{str(key).replace('_', ' ')} {plain_value(given)}"
        for key, given in values.items()
        if given not in (None, {}, [])
    )


def cut(text: str, longest: int) -> str:
    """The beginning of a text, with a mark where it goes on."""
    return text if len(text) <= longest else f"{text[:longest].rstrip()} …"
