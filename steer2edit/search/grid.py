"""Grids: values of a method's options, all combinations of which are tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steer2edit.errors import PlanError

PAPER_GRID: Mapping[str, tuple[float, ...]] = {
    "rho_attn": (0.1, 0.2, 0.3, 0.4, 0.5),
    "rho_mlp": (0.1, 0.2, 0.3, 0.4, 0.5),
    "alpha": (0.1, 0.3, 0.5, 0.7, 0.9),
}
"""5 × 5 × 5 of Steer2Edit's own parameters, over the thresholds rho·alpha that the paper's models needed."""


def read_grid(given: Sequence[str]) -> dict[str, list[Any]]:
    """A grid from ``paper``, or from texts such as ``rho_attn=0.1,0.2``. Raises PlanError for anything else."""
    grid: dict[str, list[Any]] = {}
    for text in given:
        name, _, values = text.partition("=")
        if text == "paper":
            grid |= {key: list(found) for key, found in PAPER_GRID.items()}
        elif not name or not values:
            raise PlanError(f"--grid {text!r} is neither 'paper' nor of the form option=value,value,…")
        else:
            grid[name.strip().replace("-", "_")] = [_value(value.strip()) for value in values.split(",")]
    return grid


def _value(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "." not in text else number
