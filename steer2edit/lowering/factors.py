"""The factors of a plan's edits as an adapter holds them. Those of a layer's experts are stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from steer2edit.architecture import Site
from steer2edit.plan import LowRank


def writer_factors(edit: LowRank | None, site: Site, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``B`` [out, rank] and ``A`` [rank, in] of one writer, zero where nothing is edited."""
    if edit is not None:
        return edit.factors(rank)
    return torch.zeros(site.out_features, rank), torch.zeros(rank, site.in_features)


def expert_factors(edits: Mapping[str, LowRank], sites: Sequence[Site], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``B`` [experts, out, rank] and ``A`` [experts, rank, in] of a layer's experts, in the order of ``sites``.

    ``edits`` are by site key. The factors of an expert that is not edited are zero.
    """
    pairs = [writer_factors(edits.get(site.key), site, rank) for site in sites]
    return torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])
