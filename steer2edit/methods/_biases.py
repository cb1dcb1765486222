"""A constant in a writer's bias: the checkpoint's own, or one that a setting of config.json creates."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from steer2edit.architecture import ModelSpec, Site
    from steer2edit.plan import Bias


def bias_edit(site: Site, delta: torch.Tensor) -> Bias:
    """``delta`` [out] added to a writer's bias, which is created where there is none yet."""
    from steer2edit.plan import Bias, NewBias

    if site.bias_vector is not None:
        return Bias(site.bias_vector, delta)
    assert site.new_bias is not None, site.key
    return NewBias(site.new_bias, delta)


def no_bias(spec: ModelSpec, site: Site) -> str:
    """Why a writer has no bias, and can get none; "" where it has or can."""
    from steer2edit.architecture.constants import why_no_bias

    if site.bias_vector is not None or site.new_bias is not None:
        return ""
    return f"{site.key}: {why_no_bias(spec, site)}"
