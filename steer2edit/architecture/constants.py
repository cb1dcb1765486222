"""Which bias carries a constant of the residual stream, and why a writer has none."""

from __future__ import annotations

from steer2edit.architecture.carriers import CARRIERS, PARALLEL
from steer2edit.architecture.sites import MatrixRole, ModelSpec, Site

_PLAIN = (MatrixRole.ATTN_OUT, MatrixRole.MIXER_OUT, MatrixRole.MLP_OUT)


def carrier(site: Site) -> str | None:
    """The bias of a writer that is a constant in the stream.

    It is the checkpoint's own, or one to create; None where there is none.
    """
    if site.norm is not None or site.role not in _PLAIN or site.part is not None:
        return None
    return site.bias_vector or site.new_bias


def ends_block(spec: ModelSpec, site: Site) -> bool:
    """Whether a writer's output joins the stream where the block ends: the last writer's, or all writers' at once."""
    last = next(one for one in reversed(spec.sites) if one.layer == site.layer)
    return site.key == last.key or (spec.model_type in PARALLEL and site.role in _PLAIN)


def why_none(spec: ModelSpec, site: Site) -> str:
    """Why no bias of a writer is a constant in the stream."""
    if site.norm is not None:
        return "a norm stands between it and the stream, and gives each token another vector"
    if site.role is MatrixRole.EXPERT_OUT:
        return "an expert's output reaches only the tokens that are routed to it"
    if site.role is MatrixRole.SHARED_EXPERT_OUT:
        return "a shared expert's output may be weighted by the token"
    return why_no_bias(spec, site)


def why_no_bias(spec: ModelSpec, site: Site) -> str:
    """Why a writer that has no bias gets none."""
    if site.norm is not None:
        return "it has no bias, and none is created in front of a norm"
    if site.role in (MatrixRole.EXPERT_OUT, MatrixRole.SHARED_EXPERT_OUT):
        return "it has no bias, and none is created for an expert"
    known = ", or config.json has it already" if spec.model_type in CARRIERS else ""
    return f"it has no bias, and no setting of a {spec.model_type} model gives it one{known}"
