"""One streaming read of a matrix that yields all that methods ask of it.

Methods need a matrix only through its products with two vectors and its columns' norms; each is a sum over row
blocks, so no matrix is ever held whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from steer2edit.architecture import Site
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import CheckpointError

_TINY = 1e-12


@dataclass(frozen=True)
class Analysis:
    """What a direction and a typical input meet in one matrix ``W`` [out, in]; all float32.

    ``projection`` [in] is ``Wᵀ v_hat``. ``norms`` are those of the heads' outputs, ``‖W_j x_bar_j‖`` [heads], where the site
    has heads and a typical input was given; elsewhere those of W's columns, [in].
    """

    projection: torch.Tensor
    norms: torch.Tensor


def analyse(checkpoint: Checkpoint, site: Site, v_hat: torch.Tensor, x_bar: torch.Tensor | None = None) -> Analysis:
    """Read ``site``'s matrix once. ``v_hat`` is [out], ``x_bar`` [in]. Raises CheckpointError for NaN or infinity."""
    v = v_hat.to(torch.float32)
    x = x_bar.to(torch.float32) if x_bar is not None and site.heads is not None else None
    by_rows = _analyse_out_in if site.orientation == "out_in" else _analyse_in_out
    projection, squares = by_rows(checkpoint, site, v, x)
    # whatever v_hat is: 0 · inf and 0 · NaN are NaN
    if not bool(projection.isfinite().all()):
        raise CheckpointError(f"{site.tensor} holds NaN or infinity; the checkpoint is damaged")
    return Analysis(projection, squares.sqrt_())


# Both give Wᵀ v, and the squares of Analysis.norms. A block's float32 copy is overwritten on the way: one that stays in
# the processor's cache costs less than any new memory.


def _analyse_out_in(
    checkpoint: Checkpoint, site: Site, v: torch.Tensor, x: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    projection = torch.zeros(site.in_features)
    squares = torch.zeros(site.in_features if x is None else site.components)
    ones = torch.ones(site.out_features)
    for first, wide in _wide_blocks(checkpoint, site):
        rows = slice(first, first + wide.shape[0])
        projection += v[rows] @ wide
        if x is not None:  # [rows, heads]
            wide = wide.mul_(x).view(wide.shape[0], site.components, -1).sum(dim=2)
        squares += ones[rows] @ wide.square_()
    return projection, squares


def _analyse_in_out(
    checkpoint: Checkpoint, site: Site, v: torch.Tensor, x: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    projection, squares = torch.zeros(site.in_features), torch.zeros(site.in_features)
    head = torch.arange(site.in_features) // (site.in_features // site.components)
    outputs = torch.zeros(site.components if x is not None else 0, site.out_features)
    for first, wide in _wide_blocks(checkpoint, site):
        rows = slice(first, first + wide.shape[0])
        projection[rows] = wide @ v
        if x is None:
            squares[rows] = wide.square_().sum(dim=1)
        else:
            outputs.index_add_(0, head[rows], wide.mul_(x[rows, None]))
    return projection, squares if x is None else outputs.square_().sum(dim=1)


def _wide_blocks(checkpoint: Checkpoint, site: Site) -> Iterator[tuple[int, torch.Tensor]]:
    """``(first row, block)`` in float32; a block's memory is used again for the next."""
    wide = torch.empty(0)
    for first, block in checkpoint.blocks(site.tensor):
        if wide.shape[0] < block.shape[0]:
            wide = torch.empty(block.shape)
        yield first, wide[: block.shape[0]].copy_(block)


def component_scores(found: Analysis, site: Site, x_bar: torch.Tensor) -> torch.Tensor:
    """Steer2Edit's cosine scores, [components].

    Head j: ``g_j = cos(v_hat, W_j x_bar_j)``, where v_hat · W_j x_bar_j is block j of ``Wᵀ v_hat`` times x_bar_j. Neuron i:
    ``g_i = sign(x_bar_i) cos(v_hat, w_i)``.
    """
    if site.heads is None:
        return x_bar.sign() * found.projection / found.norms.clamp(min=_TINY)
    along = (found.projection * x_bar).view(site.heads, -1).sum(dim=1)
    return along / found.norms.clamp(min=_TINY)


def scored_projection(found: Analysis, site: Site) -> torch.Tensor:
    """``w_i · v_hat`` for each neuron, ``‖W_jᵀ v_hat‖`` for each head; [components]."""
    if site.heads is None:
        return found.projection.clone()
    norms: torch.Tensor = torch.linalg.vector_norm(found.projection.view(site.heads, -1), dim=1)
    return norms
