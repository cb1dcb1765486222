"""Moments of what a layer's experts are given, over the tokens that are routed to them.

Sums are float64 and add up over disjoint examples, so they may be kept, reduced over processes and resumed by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

K = TypeVar("K")

_SUMS = ("mean", "m2", "weighted", "weight", "tokens")


@dataclass(frozen=True)
class ExpertMoments:
    """One layer's experts under one population; float64.

    ``mean`` and ``m2`` [experts, in] are moments of the input of the output matrix over the tokens routed to the expert, each
    example's tokens together counting once. ``weighted`` [experts, in] is the mean over *all* tokens of the routing weight
    times that input (zero where not routed): the expert's share of the layer's output is its matrix times this.
    ``weight`` [experts] is how many examples' worth of tokens were routed to it, ``tokens`` [experts] how many tokens.
    """

    mean: torch.Tensor
    m2: torch.Tensor
    weighted: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor

    def merged(self, other: ExpertMoments, mine: float, theirs: float) -> ExpertMoments:
        """The moments of both sets of examples, which are ``mine`` and ``theirs`` many."""
        total = (self.weight + other.weight).clamp(min=1e-300)[:, None]
        share = self.weight[:, None] / total
        return ExpertMoments(
            self.mean * share + other.mean * (1 - share),
            self.m2 * share + other.m2 * (1 - share),
            (self.weighted * mine + other.weighted * theirs) / max(mine + theirs, 1e-300),
            self.weight + other.weight,
            self.tokens + other.tokens,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, as statistics files hold them; the wide ones in float32."""
        return {f.name: _stored(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> ExpertMoments:
        """What :meth:`tensors` gave. Raises KeyError or ValueError for anything else."""
        values = {name: tensors[name].double() for name in _SUMS}
        wide, flat = values["mean"].shape, values["weight"].shape
        if len(wide) != 2 or any(values[name].shape != wide for name in _SUMS[:3]) or flat != wide[:1]:
            raise ValueError(f"moments of experts have shapes that do not fit: {list(wide)} and {list(flat)}")
        return cls(**values)


class ExpertSums:
    """Sums of one layer, [populations, experts, in] or [populations, experts]; :meth:`moments` freezes one population's."""

    def __init__(self, sums: Mapping[str, torch.Tensor] | None = None) -> None:
        self._sums = dict(sums or {})

    def add(self, expert: int, experts: int, values: torch.Tensor, shares: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the inputs ``values`` [n, in] of one of ``experts``; ``weights`` [n] are the routing's.

        ``shares`` [populations, n] is what part of its example each token is, in the example's population.
        """
        if not self._sums:
            wide, flat = (len(shares), experts, values.shape[1]), (len(shares), experts)
            where = home_of(values.device)
            self._sums = {name: torch.zeros(wide, dtype=torch.float64, device=where) for name in _SUMS[:3]}
            self._sums |= {name: torch.zeros(flat, dtype=torch.float64, device=where) for name in _SUMS[3:]}
        found = {
            "mean": shares @ values,
            "m2": shares @ values.square(),
            "weighted": (shares * weights) @ values,
            "weight": shares.sum(dim=1),
            "tokens": (shares > 0).sum(dim=1),
        }
        for name, value in found.items():
            sums = self._sums[name] = self._sums[name].to(home_of(value.device))
            sums[:, expert] += value.to(sums)

    def state(self) -> dict[str, torch.Tensor]:
        """The sums by name."""
        return dict(self._sums)

    def moments(self, population: int, examples: int) -> ExpertMoments:
        """The moments of a population of ``examples``."""
        sums = {name: values[population] for name, values in self._sums.items()}
        routed = sums["weight"].clamp(min=1e-300)[:, None]
        return ExpertMoments(
            sums["mean"] / routed,
            sums["m2"] / routed,
            sums["weighted"] / max(examples, 1),
            sums["weight"].clone(),
            sums["tokens"].clone(),
        )


def home_of(device: torch.device) -> torch.device:
    """Where float64 sums of a device's values lie: there, or on the CPU where the device knows no float64 (Apple's)."""
    return torch.device("cpu") if device.type == "mps" else device


def add_to(sums: dict[K, torch.Tensor], key: K, values: torch.Tensor) -> None:
    """Add ``values`` to the float64 sum called ``key``, on the values' device."""
    wide = values.to(home_of(values.device), torch.float64)
    # a sum that was read from a file is on the CPU
    sums[key] = wide if key not in sums else sums[key].to(wide.device).add_(wide)


def _stored(values: torch.Tensor) -> torch.Tensor:
    return values.float() if values.ndim == 2 else values
