"""What happens to a write on its way into the residual stream: gains and factors."""

from __future__ import annotations

import torch

from steer2edit.architecture import MatrixRole, Site
from steer2edit.checkpoint import Checkpoint

# what these write reaches the stream at some tokens only, or weighted by a router
_CONDITIONAL = (MatrixRole.EMBED, MatrixRole.EXPERT_OUT, MatrixRole.SHARED_EXPERT_OUT)


def gain(checkpoint: Checkpoint, site: Site) -> torch.Tensor:
    """The gain of the norm between a site and the stream, float32 ``[out]``; ones where there is none."""
    if site.norm is None:
        return torch.ones(site.out_features)
    return checkpoint.read(site.norm.tensor).float() + site.norm.offset
