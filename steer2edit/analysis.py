"""One streaming read of a matrix that yields all that methods ask of it.

Methods need a matrix only through its products with two vectors and its columns' norms; each is a sum over row
blocks, so no matrix is ever held whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer2edit.architecture import Site
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import CheckpointError

# small enough that a block's float32 copy stays in the processor's cache
_BLOCK_BYTES = 1 << 20
_TINY = 1e-12


@dataclass(frozen=True)
class Analysis:
    """What a direction and a typical input meet in one matrix ``W`` [out, in]; all float32.

    ``projection`` [in] is ``Wᵀ v_hat``. ``column_norms`` [in] are the norms of W's columns. ``head_outputs`` [heads] are
    ``‖W_j x_bar_j‖``, None for an MLP or where no typical input was given.
    """

    projection: torch.Tensor
    column_norms: torch.Tensor
    head_outputs: torch.Tensor | None


def analyse(checkpoint: Checkpoint, site: Site, v_hat: torch.Tensor, x_bar: torch.Tensor | None = None) -> Analysis:
    """Read ``site``'s matrix once. ``v_hat`` is [out], ``x_bar`` [in]. Raises CheckpointError for NaN or infinity."""
    v = v_hat.to(torch.float32)
    projection = torch.zeros(site.in_features)
    squares = torch.zeros(site.in_features)
    # W_j x_bar_j for all heads at once: [out, heads] = W @ spread, with x_bar_j in column j
    spread = outputs = None
    if site.heads is not None and x_bar is not None:
        spread = torch.block_diag(*x_bar.to(torch.float32).view(site.heads, -1, 1))  # type: ignore[no-untyped-call]
        outputs = torch.zeros(site.out_features, site.heads)
    for first, block in checkpoint.blocks(site.tensor, _BLOCK_BYTES):
        part = block.to(torch.float32)
        rows = slice(first, first + part.shape[0])
        if site.orientation == "out_in":
            projection += v[rows] @ part
            squares += torch.linalg.vector_norm(part, dim=0).square_()
            if outputs is not None and spread is not None:
                outputs[rows] = part @ spread
        else:
            projection[rows] = part @ v
            squares[rows] = torch.linalg.vector_norm(part, dim=1).square_()
            if outputs is not None and spread is not None:
                outputs += part.T @ spread[rows]
    if not bool(squares.isfinite().all()):
        raise CheckpointError(f"{site.tensor} holds NaN or infinity; the checkpoint is damaged")
    norms = torch.linalg.vector_norm(outputs, dim=0) if outputs is not None else None
    return Analysis(projection, squares.sqrt_(), norms)


def component_scores(found: Analysis, site: Site, x_bar: torch.Tensor) -> torch.Tensor:
    """Steer2Edit's cosine scores, [components].

    Head j: ``g_j = cos(v_hat, W_j x_bar_j)``, where v_hat · W_j x_bar_j is block j of ``Wᵀ v_hat`` times x_bar_j. Neuron i:
    ``g_i = sign(x_bar_i) cos(v_hat, w_i)``.
    """
    if site.heads is None:
        scores: torch.Tensor = x_bar.sign() * found.projection / found.column_norms.clamp(min=_TINY)
        return scores
    assert found.head_outputs is not None
    along = (found.projection * x_bar).view(site.heads, -1).sum(dim=1)
    return torch.div(along, found.head_outputs.clamp(min=_TINY))


def scored_projection(found: Analysis, site: Site) -> torch.Tensor:
    """``w_i · v_hat`` for each neuron, ``‖W_jᵀ v_hat‖`` for each head; [components]."""
    if site.heads is None:
        return found.projection.clone()
    return found.projection.view(site.heads, -1).norm(dim=1)
