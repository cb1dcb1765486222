"""Settling a plan's strength: at a given value, or at the largest within a KL budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from steer2edit.architecture import MatrixRole
from steer2edit.data import contrast
from steer2edit.errors import PlanError, Steer2EditError
from steer2edit.plan import EditPlan
from steer2edit.progress import Progress, silent
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel
from steer2edit.strength.kl import Divergence, NeutralText
from steer2edit.strength.line_search import Strength, find_strength, quadratic_start

KL_BUDGET = 0.05


def settle_strength(
    loaded: LoadedModel,
    plan: EditPlan,
    *,
    strength: float | None = None,
    kl_budget: float | None = None,
    class_budgets: Mapping[MatrixRole, float] | None = None,
    neutral: NeutralText,
) -> EditPlan:
    """The plan at ``strength``, or at the largest one within ``kl_budget``, with what was measured written into it.

    ``class_budgets`` give attention and MLPs each a KL of their own, measured with the other class switched off; a budget
    of 0 leaves a class out. ``kl_budget`` then bounds them together, where it is given. Raises PlanError where the plan
    edits a class that has no budget.
    """
    if strength is not None and not math.isfinite(strength):
        raise PlanError(f"--strength is {strength}, expected a finite number")
    if not plan.edits and not plan.structure:
        raise Steer2EditError(
            "the plan edits nothing: every score is under its threshold, or no score's sign is stable; lower rho, raise "
            "--top-heads/--top-neurons, give more examples, or --all-components"
        )
    classes: dict[str, Any] = {}
    if class_budgets is not None:
        plan, classes = _settle_classes(loaded, plan, class_budgets, neutral)
    elif kl_budget is None and strength is None:
        kl_budget = KL_BUDGET

    def measure(factor: float) -> Divergence:
        with edited(loaded, plan, factor):
            return neutral.measure()

    if strength is not None or kl_budget is None:
        fixed = 1.0 if strength is None else strength
        found = Strength(fixed, measure(fixed), ())
        kl_budget = None
    else:
        found = find_strength(measure, kl_budget, start=_start(loaded, plan, neutral, kl_budget))
    measured = {
        "strength": found.strength,
        "kl_budget": kl_budget,
        **({"classes": classes} if classes else {}),
        **asdict(found.divergence),
        "steps": [list(step) for step in found.steps],
    }
    return replace(plan.scaled(found.strength), measured={**plan.measured, **measured})


def _settle_classes(
    loaded: LoadedModel, plan: EditPlan, budgets: Mapping[MatrixRole, float], neutral: NeutralText
) -> tuple[EditPlan, dict[str, Any]]:
    roles = {name: site.role.kind for name, site in loaded.spec.owners.items()}
    found: dict[str, Any] = {}
    factors: dict[MatrixRole, float] = {}
    for role in sorted({roles[edit.tensor] for edit in plan.edits if edit.tensor in roles}):
        name = "attn" if role is MatrixRole.ATTN_OUT else "mlp"
        if role not in budgets:
            raise PlanError(f"the plan edits {name} writers too: give --kl-budget-{name} (0 leaves them out)")
        factors[role] = 0.0
        if budgets[role] > 0:
            part = replace(plan, edits=tuple(edit for edit in plan.edits if roles.get(edit.tensor) is role))

            def measure(factor: float, part: EditPlan = part) -> Divergence:
                with edited(loaded, part, factor):
                    return neutral.measure()

            settled = find_strength(measure, budgets[role], start=_start(loaded, part, neutral, budgets[role]))
            factors[role] = settled.strength
            found[name] = {"strength": settled.strength, "kl_budget": budgets[role], "kl": settled.divergence.kl}
    tensors = {tensor: factors.get(role, 1.0) for tensor, role in roles.items()}
    keys = {site.key: factors.get(site.role.kind, 1.0) for site in loaded.spec.sites}
    return plan.reweighted(tensors, keys), found


def _start(loaded: LoadedModel, plan: EditPlan, neutral: NeutralText, budget: float) -> float:
    def glance(factor: float) -> Divergence:
        with edited(loaded, plan, factor):
            return neutral.measure(glance=True)

    return quadratic_start(glance, budget)


def neutral_text(
    loaded: LoadedModel, text: str | Sequence[str] | None = None, progress: Progress = silent
) -> NeutralText:
    """The text on which the KL is measured; the packaged one if there is none."""
    return NeutralText(loaded, contrast.neutral_text() if text is None else text, progress=progress)
