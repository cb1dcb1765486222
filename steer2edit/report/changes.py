"""The sections of the page on the plan: what it changes, how to load it, how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from steer2edit import __version__, targets
from steer2edit.artefact.model_card import snippet_of
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.formatting import divergence, number, pairs, plain_value
from steer2edit.lowering import Snippet
from steer2edit.plan import EditPlan, Measured, Scores
from steer2edit.plan.measured import KL_NAMES, TEXT_NAMES
from steer2edit.report.drawing import Drawing
from steer2edit.report.figures import KINDS, tables
from steer2edit.report.markup import Html, code, fact_list, figures, folded, table, tag
from steer2edit.report.plan_text import describe_plan, edit_line

_PLAN = "PLAN"


def changed(plan: EditPlan, drawings: Sequence[Drawing]) -> list[Html]:
    """What the plan does to the weights: totals, figures, the strongest components, layers, tensors."""
    described = describe_plan(plan)
    totals: list[tuple[str, object]] = [
        ("Tensors changed", len(plan.edits)),
        ("Size, ‖ΔW‖ in all", number(plan.norm)),
        ("Method", _method(plan.method)),
        *_measured(plan.measured),
    ]
    parts: list[Html] = []
    rows: list[list[object]]
    for role, kind in KINDS.items():
        sites = tables(plan, role)
        if sites:
            totals.append((f"Edited {kind}s", _edited(list(sites.values()))))
        if strongest := described["components"][kind]:
            rows = [[row["layer"], row[kind], *_scored(sites[row["layer"]], row[kind])] for row in strongest]
            heads = ["layer", kind, "λ", "g", "sign of g", "g, shuffled labels"]
            parts.append(table(f"Strongest {kind}s by |λ|", heads, rows))
    if merged := _merged(plan.method):
        parts.append(table("Merged plans", ["plan", "method", "weight", "options", "SHA-256"], merged))
    if layers := described["layers"]:
        names = list(dict.fromkeys(name for row in layers for name in row))
        rows = [[plain_value(row.get(name, "–")) for name in names] for row in layers]
        parts.append(folded("Layer by layer", table("What was edited in each layer", names, rows)))
    if plan.edits:
        rows = [[edit.tensor, edit_line(edit), "" if edit.norm is None else number(edit.norm)] for edit in plan.edits]
        parts.append(folded("Edited tensors", table("Every tensor changed", ["tensor", "edit", "‖ΔW‖"], rows)))
    return [fact_list(totals), figures(drawings), *parts]


def loading(plan: EditPlan, receipt: Mapping[str, Any] | None) -> list[Html]:
    """How to load the artefact, or how to make it where there is none."""
    if receipt is None:
        line = "There is no artefact yet. The plan makes one without running the model:"
        return [tag("p", line), code(_emit(plan, "checkpoint"), _emit(plan, "lora"))]
    target = str(receipt.get("target"))
    if target in targets.names():
        snippet = snippet_of({**receipt, "base": vars(plan.base)})
    else:  # a target of another version, or of somebody else's
        snippet = Snippet("console", (_emit(plan, target),))
    facts = [
        ("Target", target),
        ("Exactness", receipt.get("exactness")),
        ("Remarks", "; ".join(receipt.get("notes") or ())),
    ]
    remark = [tag("p", snippet.remark)] if snippet.remark else []
    return [code(*snippet.lines), *remark, fact_list([(key, value) for key, value in facts if value])]


def reproduction(
    plan: EditPlan,
    evaluation: Evaluation | None,
    receipt: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    command: str,
) -> list[Html]:
    """The commands, and every input of the result."""
    receipt = receipt or {}
    context = {} if evaluation is None else evaluation.context
    seeds = {"search": settings.get("seed"), "split": context.get("split_seed", settings.get("split_seed"))}
    facts = [
        ("Base", plan.base.name),
        ("Revision", plan.base.revision),
        ("Base fingerprint", plan.base.fingerprint),
        ("Plan, SHA-256", plan.hash),
        ("Method", _method(plan.method)),
        ("Options", _options(plan.method)),
        ("Data", plan.data.get("name")),
        ("Data, SHA-256", plan.data.get("data")),
        ("Examples", plain_value(plan.data.get("examples"))),
        ("System message, digest", plan.data.get("system")),
        ("Strength", plain_value(plan.measured.strength)),
        ("Seeds", pairs(seeds)),
        ("Versions", pairs(receipt.get("versions") or {"steer2edit": __version__})),
    ]
    lines = [
        *([command] if command else []),
        f"steer2edit show {_PLAN}",
        _emit(plan, str(receipt.get("target") or "checkpoint")),
        f"steer2edit verify FOLDER --base {shlex.quote(plan.base.name)}",
    ]
    line = f"{_PLAN} is the plan, FOLDER where the artefact goes."
    known = [(key, value) for key, value in facts if value not in (None, "", "–")]
    return [code(*lines), tag("p", line), fact_list(known)]


def _method(method: Mapping[str, Any]) -> str:
    if plans := method.get("plans"):
        return f"{method.get('name')} of {len(plans)} {'plan' if len(plans) == 1 else 'plans'}"
    return str(method.get("name", "–"))


def _options(method: Mapping[str, Any]) -> str:
    return pairs({key: value for key, value in method.items() if key not in ("name", "plans", "experts")})


def _merged(method: Mapping[str, Any], prefix: str = "") -> list[list[object]]:
    """A row for each plan that ``plan.merge`` added up.

    Where a part was merged itself, its own parts follow it, as 2.1, 2.2.
    """
    rows: list[list[object]] = []
    for place, part in enumerate(method.get("plans", ()), 1):
        name, inner = f"{prefix}{place}", part["method"]
        rows.append([name, _method(inner), number(part["weight"]), _options(inner) or "–", part["plan"]])
        rows += _merged(inner, f"{name}.")
    return rows


def _measured(measured: Measured) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = []
    if measured.strength is not None:
        facts.append(("Strength", number(measured.strength)))
    for kind, cost in measured.costs.items():
        told = f"{divergence(cost.estimate)} from the base, over {cost.tokens:,} tokens of {TEXT_NAMES[kind]}"
        facts.append((KL_NAMES[kind], told))
    if measured.kl_budget is not None:
        facts.append(("KL budget", f"{number(measured.kl_budget)} nats/token of {KL_NAMES[measured.budget_text]}"))
    if prose := measured.costs.get("prose"):
        facts.append(("Perplexity of prose", f"{number(prose.base_perplexity)} → {number(prose.perplexity)}"))
    return facts


def _edited(sites: Sequence[Scores]) -> str:
    edited, total = sum(int((site.lam != 0).sum()) for site in sites), sum(len(site.lam) for site in sites)
    if any(site.interval is None for site in sites):
        return f"{edited:,} of {total:,}"
    stable = sum(int(site.stable.sum()) for site in sites)
    return f"{edited:,} of {total:,}; the sign of g is stable in {stable:,}"


def _scored(site: Scores, index: int) -> list[str]:
    g = number(float(site.g[index]), signed=True)
    sign, null = "–", "–"
    if site.interval is not None:
        low, high = (number(float(end)) for end in site.interval[:, index])
        g, sign = f"{g} [{low}, {high}]", "stable" if bool(site.stable[index]) else "not certain"
    if site.null is not None:
        null = number(float(site.null[index]), signed=True)
    return [number(float(site.lam[index]), signed=True), g, sign, null]


def _emit(plan: EditPlan, target: str) -> str:
    revision = f" --revision {shlex.quote(plan.base.revision)}" if plan.base.revision else ""
    return f"steer2edit emit {_PLAN} {shlex.quote(plan.base.name)}{revision} --to {shlex.quote(target)} -o FOLDER"
