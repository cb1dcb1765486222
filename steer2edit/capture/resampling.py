"""How often each row of the data counts in each resample. A row's number alone decides that."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from steer2edit.capture.populations import RESAMPLES


@lru_cache(maxsize=4096)
def draws(row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often a row counts in each bootstrap resample, float32, and whether each permutation swaps its labels."""
    generator = torch.Generator().manual_seed(row)
    times = torch.poisson(torch.ones(RESAMPLES["bootstrap"]), generator=generator)
    return times, torch.randint(2, (RESAMPLES["shuffled"],), generator=generator)


def drawn_rows(rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and signs of several rows: the data itself, the bootstrap resamples, the permutations; each [1 + 32 + 8, rows].

    A resample that drew none of the rows has all of them once. Both are float64.
    """
    both = [draws(row) for row in rows]
    times = torch.stack([one for one, _ in both], dim=1).double()
    times[times.sum(dim=1) == 0] = 1
    swaps = torch.stack([one for _, one in both], dim=1).double()
    ones = torch.ones(1, len(rows), dtype=torch.float64)
    weights = torch.cat((ones, times, ones.expand(len(swaps), -1)))
    signs = torch.cat((ones.expand(1 + len(times), -1), 1 - 2 * swaps))
    return weights, signs
