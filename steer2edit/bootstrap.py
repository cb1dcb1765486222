"""Means over prompts, with how far a sample of them can be trusted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from steer2edit.errors import DataError

DRAWS = 2000
LEAST_DRAWS = 6
"""Fewer draws cannot leave a sign beyond doubt: were all of them of one sign, chance does that at ``2 · 2⁻⁵`` > 5 %."""


@dataclass(frozen=True)
class Estimate:
    """A mean ``value`` over ``count`` prompts (or windows), and its bootstrap 95 % interval.

    ``count`` is the number of units that were resampled: questions of one prompt are one unit.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def estimate(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    groups: Sequence[Hashable] | None = None,
    exponential: bool = False,
    seed: int = 0,
) -> Estimate:
    """The mean of ``values``, or with ``weights`` the ratio ``Σ values / Σ weights``, and the percentile bootstrap over items.

    Items of the same ``groups`` entry are drawn together, because they are not independent (the cluster bootstrap).
    ``exponential`` gives exp of it all: a perplexity from losses. The draws depend on ``seed`` and the number of units
    alone, so estimates of the same prompts are paired. Raises DataError for no values.
    """
    if not values:
        raise DataError("there is nothing to take a mean of")
    top = torch.tensor(values, dtype=torch.float64)
    bottom = torch.ones_like(top) if weights is None else torch.tensor(weights, dtype=torch.float64)
    if groups is not None and len(places := {group: at for at, group in enumerate(dict.fromkeys(groups))}) < len(top):
        owners = torch.tensor([places[group] for group in groups])
        top, bottom = (torch.zeros(len(places), dtype=torch.float64).index_add(0, owners, x) for x in (top, bottom))
    drawn = torch.randint(len(top), (DRAWS, len(top)), generator=torch.Generator().manual_seed(seed))
    means = torch.cat(((top.sum() / bottom.sum())[None], top[drawn].sum(dim=1) / bottom[drawn].sum(dim=1)))
    if exponential:
        means = means.clamp(max=700).exp()
    low, high = torch.quantile(means[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(means[0]), low, high, len(top))
