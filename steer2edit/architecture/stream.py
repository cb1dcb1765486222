"""What happens to a write on its way into the residual stream, and to a read out of it."""

from __future__ import annotations

import torch

from steer2edit.architecture import MatrixRole, ModelSpec, Site
from steer2edit.checkpoint import Checkpoint

# what these write reaches the stream at some tokens only, or weighted by a router
CONDITIONAL = (MatrixRole.EMBED, MatrixRole.EXPERT_OUT, MatrixRole.SHARED_EXPERT_OUT)


def gain(checkpoint: Checkpoint, site: Site) -> torch.Tensor:
    """The gain of the norm between a site and the stream, float32 ``[out]``; ones where there is none."""
    if site.norm is None:
        return torch.ones(site.out_features)
    gains = [checkpoint.read(name).float() + site.norm.offset for name in (site.norm.first, site.norm.tensor) if name]
    return torch.stack(gains).prod(dim=0)


def input_gain(checkpoint: Checkpoint, site: Site) -> torch.Tensor:
    """The gain of the norm before a reader, float32 ``[in]``; ones where there is none."""
    norm = site.norm_before
    if norm is None or norm.tensor is None:
        return torch.ones(site.in_features)
    return checkpoint.read(norm.tensor).float() + norm.offset


def input_bias(checkpoint: Checkpoint, site: Site) -> torch.Tensor | None:
    """What the norm before a reader adds, float32 ``[in]``; None where it adds nothing."""
    norm = site.norm_before
    return None if norm is None or norm.bias is None else checkpoint.read(norm.bias).float()


def factor(checkpoint: Checkpoint, site: Site) -> float:
    """What a site's output is multiplied by, after its norm, until it leaves its block.

    It is the family's multiplier, and in Gemma 4 and Beam the block's own factor on its whole stream. A later block multiplies
    it by that block's factor, like all of the stream.
    """
    return site.multiplier * _number(checkpoint, site.block_scale)


def block_scale(checkpoint: Checkpoint, spec: ModelSpec, layer: int) -> float:
    """The number by which a block multiplies its whole stream at its end; 1 in most families."""
    return _number(checkpoint, next(site.block_scale for site in spec.sites if site.layer == layer))


def _number(checkpoint: Checkpoint, scale: str | float | None) -> float:
    if isinstance(scale, str):
        return float(checkpoint.read(scale).float().reshape(-1)[0])
    return 1.0 if scale is None else scale
