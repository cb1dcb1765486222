"""Settling a plan's strength, at a given value or at the largest within a KL budget, and its cost there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from steer2edit.architecture import MatrixRole
from steer2edit.errors import PlanError, Steer2EditError
from steer2edit.plan import EditPlan
from steer2edit.plan.edit_plan import check_strength
from steer2edit.plan.measured import ClassStrength, TextKind
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel
from steer2edit.strength.kl import NeutralText, Windows
from steer2edit.strength.meet import Apply, at, meet
from steer2edit.strength.neutral_texts import NeutralTexts

Scaled = Callable[[EditPlan, float], EditPlan]
KL_BUDGETS: Mapping[TextKind, float] = {"chat": 0.05, "answers": 0.05, "prose": 0.025}
"""The budget where none is asked for, by the kind of text that it is on, in nats per token."""


@dataclass(frozen=True)
class Settled:
    """A plan at its strength, and its cost on each text, window by window.

    An evaluation need not measure that again.
    """

    plan: EditPlan
    costs: Mapping[NeutralText, Windows]


def check_not_empty(plan: EditPlan) -> None:
    """Raise Steer2EditError where a plan edits nothing, with what its own method offers against that."""
    if plan.edits or plan.structure:
        return
    offers = [
        "give more examples",
        *(["edit components of unstable sign too (--all-components)"] if "stable" in plan.method else []),
        *(["lower rho, or raise --top-heads and --top-neurons"] if "top_heads" in plan.method else []),
    ]
    under = ", or every score is under its threshold" if "top_heads" in plan.method else ""
    raise Steer2EditError(
        f"the plan edits nothing: no score's sign is stable over resamples of the data{under}; {'; or '.join(offers)}"
    )


def settle_strength(
    loaded: LoadedModel,
    plan: EditPlan,
    *,
    strength: float | None = None,
    kl_budget: float | None = None,
    class_budgets: Mapping[MatrixRole, float] | None = None,
    neutral: NeutralTexts,
    scaled: Scaled = EditPlan.scaled,
) -> EditPlan:
    """The plan of :func:`settle`, which raises what that raises."""
    budgets: dict[str, Any] = {"kl_budget": kl_budget, "class_budgets": class_budgets}
    return settle(loaded, plan, strength=strength, neutral=neutral, scaled=scaled, **budgets).plan


def settle(
    loaded: LoadedModel,
    plan: EditPlan,
    *,
    strength: float | None = None,
    kl_budget: float | None = None,
    class_budgets: Mapping[MatrixRole, float] | None = None,
    neutral: NeutralTexts,
    scaled: Scaled = EditPlan.scaled,
) -> Settled:
    """The plan at ``strength``, or at the largest one within ``kl_budget``, with what was measured written into it.

    The budget is on the first text, and the cost on the other one is measured once, at the strength that is settled.
    ``class_budgets`` give attention and MLPs each a KL of their own, measured with the other class switched off; a budget
    of 0 leaves a class out. ``kl_budget`` then bounds them together, where it is given. ``scaled`` gives the plan at a strength
    where that is not so many times its edits (``methods.scaling``). Raises PlanError where the plan edits a class that has no
    budget.
    """
    if strength is not None:
        check_strength(strength, "--strength")
    check_not_empty(plan)
    classes: dict[str, ClassStrength] = {}
    text = neutral.budget
    linear = scaled is EditPlan.scaled
    if class_budgets is not None and not linear:
        raise PlanError(
            f"the strength of the method {plan.method.get('name')} is not a factor of its edits, so that attention and MLPs "
            "have none of their own: give --kl-budget"
        )
    if class_budgets is not None:
        plan, classes = _settle_classes(loaded, plan, class_budgets, neutral)
    elif kl_budget is None and strength is None:
        kl_budget = KL_BUDGETS[text.kind]
    apply = applying(loaded, plan, scaled)
    if strength is not None or kl_budget is None:
        kl_budget = None
        settled = at(apply, text, 1.0 if strength is None else strength)
    else:
        settled = meet(apply, text, kl_budget)
    every = {one: settled if one is text else at(apply, one, settled.strength) for one in neutral}
    measured = replace(
        plan.measured,
        strength=settled.strength,
        kl_budget=kl_budget,
        budget_text=text.kind,
        classes=classes,
        costs={one.kind: found.divergence for one, found in every.items()},
        steps=settled.steps,
    )
    costs = {one: found.windows for one, found in every.items() if found.windows is not None}
    return Settled(replace(scaled(plan, settled.strength), measured=measured), costs)


def applying(loaded: LoadedModel, plan: EditPlan, scaled: Scaled) -> Apply:
    """The model under the plan at a strength, as a function of the strength."""
    if scaled is EditPlan.scaled:
        return partial(edited, loaded, plan)
    return lambda strength: edited(loaded, scaled(plan, strength))


def _settle_classes(
    loaded: LoadedModel, plan: EditPlan, budgets: Mapping[MatrixRole, float], neutral: NeutralTexts
) -> tuple[EditPlan, dict[str, ClassStrength]]:
    roles = {name: site.role.kind for name, site in loaded.spec.owners.items()}
    classes: dict[str, ClassStrength] = {}
    strengths: dict[MatrixRole, float] = {}
    for role in sorted({roles[edit.tensor] for edit in plan.edits if edit.tensor in roles}):
        name = "attn" if role is MatrixRole.ATTN_OUT else "mlp"
        if role not in budgets:
            raise PlanError(f"the plan edits {name} writers too: give --kl-budget-{name} (0 leaves them out)")
        strengths[role] = 0.0
        if budgets[role] > 0:
            part = replace(plan, edits=tuple(edit for edit in plan.edits if roles.get(edit.tensor) is role))
            settled = meet(partial(edited, loaded, part), neutral.budget, budgets[role])
            strengths[role] = settled.strength
            classes[name] = ClassStrength(settled.strength, budgets[role], settled.divergence.kl)
    tensors = {tensor: strengths.get(role, 1.0) for tensor, role in roles.items()}
    keys = {site.key: strengths.get(site.role.kind, 1.0) for site in loaded.spec.sites}
    return plan.reweighted(tensors, keys), classes
