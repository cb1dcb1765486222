"""Settling a plan's strength: at a given value, or at the largest within a KL budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from steer2edit.architecture import MatrixRole
from steer2edit.data import contrast
from steer2edit.errors import PlanError, Steer2EditError
from steer2edit.plan import EditPlan
from steer2edit.plan.edit_plan import check_strength
from steer2edit.plan.measured import ClassStrength
from steer2edit.progress import Progress, silent
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel
from steer2edit.strength.kl import MAX_TOKENS, WINDOW, NeutralText
from steer2edit.strength.meet import at, meet

KL_BUDGET = 0.05
LEAST_WINDOWS = 4
"""Windows of neutral text below which a KL's interval, which is over windows, says nothing."""


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
    if strength is not None:
        check_strength(strength, "--strength")
    if not plan.edits and not plan.structure:
        raise Steer2EditError(
            "the plan edits nothing: every score is under its threshold, or no score's sign is stable; lower rho, raise "
            "--top-heads/--top-neurons, give more examples, or --all-components"
        )
    classes: dict[str, ClassStrength] = {}
    if class_budgets is not None:
        plan, classes = _settle_classes(loaded, plan, class_budgets, neutral)
    elif kl_budget is None and strength is None:
        kl_budget = KL_BUDGET
    apply = partial(edited, loaded, plan)
    if strength is not None or kl_budget is None:
        kl_budget = None
        settled = at(apply, neutral, 1.0 if strength is None else strength)
    else:
        settled = meet(apply, neutral, kl_budget)
    measured = replace(
        plan.measured,
        strength=settled.strength,
        kl_budget=kl_budget,
        classes=classes,
        divergence=settled.divergence,
        steps=settled.steps,
    )
    return replace(plan.scaled(settled.strength), measured=measured)


def _settle_classes(
    loaded: LoadedModel, plan: EditPlan, budgets: Mapping[MatrixRole, float], neutral: NeutralText
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
            settled = meet(partial(edited, loaded, part), neutral, budgets[role])
            strengths[role] = settled.strength
            classes[name] = ClassStrength(settled.strength, budgets[role], settled.divergence.kl)
    tensors = {tensor: strengths.get(role, 1.0) for tensor, role in roles.items()}
    keys = {site.key: strengths.get(site.role.kind, 1.0) for site in loaded.spec.sites}
    return plan.reweighted(tensors, keys), classes


def neutral_text(
    loaded: LoadedModel,
    text: str | Sequence[str] | None = None,
    progress: Progress = silent,
    *,
    limit: int | None = None,
) -> NeutralText:
    """The text on which the KL is measured; the packaged one if there is none.

    ``limit`` bounds it to that many windows of ``WINDOW`` tokens, but to no fewer than ``LEAST_WINDOWS``.
    """
    tokens = MAX_TOKENS if limit is None else min(MAX_TOKENS, WINDOW * max(limit, LEAST_WINDOWS))
    texts = contrast.neutral_text() if text is None else text
    return NeutralText(loaded, texts, max_tokens=tokens, progress=progress)
