"""From a plan to bytes: what every target shares."""

from steer2edit.lowering.compare import compare_with_lowered
from steer2edit.lowering.factors import expert_factors, low_rank_forms, rank_notes, writer_factors
from steer2edit.lowering.resolve import Change, Lowering, Resolved, Writing, adapter_refusal, located, resolve
from steer2edit.lowering.target import (
    AppliedPlan,
    Comparison,
    HubEntry,
    Loadable,
    PeftAdapter,
    Place,
    Snippet,
    StreamShift,
    Target,
    WholeModel,
)

__all__ = [
    "AppliedPlan", "Change", "Comparison", "HubEntry", "Loadable", "Lowering", "PeftAdapter", "Place", "Resolved", "Snippet",
    "StreamShift", "Target", "WholeModel", "Writing", "adapter_refusal", "compare_with_lowered", "expert_factors", "located",
    "low_rank_forms", "rank_notes", "resolve", "writer_factors",
]  # fmt: skip
