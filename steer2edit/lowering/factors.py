"""The factors of a plan's edits as an adapter holds them. Those of a layer's experts are stacked.

A scale of k columns is exactly an update of rank k: ``W[:, c] (f - 1)`` times the columns' one-hot rows. One of k rows is so too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from steer2edit.architecture import Site
from steer2edit.checkpoint.fp8 import values
from steer2edit.lowering.resolve import Resolved
from steer2edit.plan import Edit, LowRank, Scale
from steer2edit.plan.operations import addition_of, scales_of

HIGH_RANK = 16
"""What engines take without being told: vLLM's own max_lora_rank."""


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


def low_rank_forms(resolved: Resolved) -> dict[str, LowRank]:
    """Every edit of a matrix as the low-rank update that it is, by site key. None scales a whole one; biases are left out."""
    return {
        site.key: _low_rank_form(resolved, edit, site)
        for edit, site in resolved.edits.values()
        if edit.tensor == site.matrix
    }


def rank_notes(rank: int) -> tuple[str, ...]:
    """A remark on a high rank."""
    return (f"Its rank is {rank}: vLLM needs --max-lora-rank of at least that.",) if rank > HIGH_RANK else ()


def _low_rank_form(resolved: Resolved, edit: Edit, site: Site) -> LowRank:
    """An edit as one low-rank update. ``R W C + B A`` has the parts ``W (C - 1)``, ``(R - 1) W C`` and ``B A``."""
    scales = {one.axis: one for one in scales_of(edit)}
    if not scales:
        assert isinstance(edit, LowRank), edit
        return edit
    rows, columns = scales.get("rows"), scales.get("columns")
    by_rows, by_columns = _read(resolved, site, rows, columns)
    left, right = [], []
    if columns is not None:
        left.append(by_columns * (columns.factors[columns.changed] - 1).float())
        right.append(_one_hot(columns.changed, site.in_features))
        by_rows = by_rows * columns.factors.float()
    if rows is not None:
        left.append(_one_hot(rows.changed, site.out_features).T)
        right.append(by_rows * (rows.factors[rows.changed] - 1).float()[:, None])
    addition = addition_of(edit)
    if isinstance(addition, LowRank):
        left.append(addition.B)
        right.append(addition.A)
    if not sum(len(one) for one in right):
        # factors of 1, as at strength 0: no engine loads a rank of 0
        return LowRank(edit.tensor, torch.zeros(site.out_features, 1), torch.zeros(1, site.in_features))
    return LowRank(edit.tensor, torch.cat(left, dim=1), torch.cat(right))


def _read(
    resolved: Resolved, site: Site, rows: Scale | None, columns: Scale | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows [k, in] and the columns [out, k] of W whose factor is not 1, float32, in one reading."""
    none = torch.zeros(0, dtype=torch.int64)
    wanted_rows, wanted_columns = (none if one is None else one.changed for one in (rows, columns))
    by_rows = torch.zeros(len(wanted_rows), site.in_features)
    by_columns = torch.zeros(site.out_features, len(wanted_columns))
    stored = (by_rows, by_columns.T, wanted_rows, wanted_columns)
    if site.orientation != "out_in":
        stored = (by_columns.T, by_rows, wanted_columns, wanted_rows)
    along, across, mine, theirs = stored  # of the file's first axis, and of its second
    for first, block in values(resolved.checkpoint, site.locate(resolved.checkpoint)):
        here = ((mine >= first) & (mine < first + len(block))).nonzero()[:, 0]
        along[here] = block[mine[here] - first].float()
        across[:, first : first + len(block)] = block[:, theirs].float().T
    return by_rows, by_columns


def _one_hot(numbers: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(numbers, size).float()
