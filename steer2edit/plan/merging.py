"""Several plans as one: their updates add up."""

from __future__ import annotations

import math
from collections.abc import Iterable

from steer2edit.errors import PlanError, listing
from steer2edit.plan.edit_plan import EditPlan
from steer2edit.plan.operations import Edit
from steer2edit.plan.sums import added


def merge(plans: Iterable[EditPlan], weights: Iterable[float] | None = None) -> EditPlan:
    """Several plans for one base as one: ranks add, so the update is exactly the weighted sum of theirs.

    Scores are not kept: they belong to one behaviour. Raises PlanError where the bases differ.
    """
    merged = list(plans)
    factors = [1.0] * len(merged) if weights is None else list(weights)
    if not merged or len(factors) != len(merged):
        raise PlanError(
            f"{len(merged)} plans and {len(factors)} weights; expected at least one plan and a weight for each"
        )
    if not all(math.isfinite(factor) for factor in factors):
        raise PlanError(f"the weights are {factors}, expected finite numbers")
    if len({plan.base.fingerprint for plan in merged}) > 1:
        raise PlanError(f"the plans were made for different models: {', '.join(sorted({p.base.name for p in merged}))}")
    if any(plan.structure for plan in merged):
        raise PlanError("a plan that removes experts or layers cannot be merged: it changes what the others count")
    content = _merged_content(merged)
    edits: dict[str, Edit] = {}
    for plan, factor in zip(merged, factors, strict=True):
        for edit in plan.scaled(factor).edits:
            edits[edit.tensor] = added(edits[edit.tensor], edit) if edit.tensor in edits else edit
    called = [str(plan.data.get("name") or "unnamed") for plan in merged]
    parts = [
        {"name": name, "method": dict(plan.method), "weight": factor, "plan": plan.hash}
        for name, plan, factor in zip(called, merged, factors, strict=True)
    ]
    # nothing may be reported on what any of the parts has seen
    seen = sorted({digest for plan in merged for digest in plan.seen})
    data = {"name": " + ".join(called), "prompts": seen}
    return EditPlan(
        merged[0].base, tuple(edits.values()), method={"name": "merge", "plans": parts}, data=data, content=content
    )


def _merged_content(plans: Iterable[EditPlan]) -> dict[str, str]:
    """The content of all plans' matrices. Raises PlanError where two plans were made from different values of one."""
    content: dict[str, str] = {}
    for plan in plans:
        if other := [name for name, digest in plan.content.items() if content.setdefault(name, digest) != digest]:
            raise PlanError(f"the plans were made for different weights of {plan.base.name}:\n{listing(other)}")
    return content
