"""Plans as text: what is edited, how strongly, what it costs, and the strongest components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from steer2edit.architecture.components import component_name
from steer2edit.errors import count_of
from steer2edit.formatting import divergence, number
from steer2edit.plan import Edit, EditPlan, LowRank, Measured, Scale
from steer2edit.plan.measured import KL_NAMES, TEXT_NAMES
from steer2edit.plan.operations import addition_of, scales_of
from steer2edit.report.data import origin_line
from steer2edit.report.method_text import expert_lines, held_out_line, method_line, training_line

_KINDS = {
    "attn_out": "head",
    "mixer_out": "mixer channel",
    "mlp_out": "neuron",
    "shared_expert_out": "shared expert's neuron",
    "expert_out": "expert's neuron",
    "per_layer_out": "per-layer input's neuron",
}
_HEADS = {"g": "score", "lam": "edit"}
_LEGEND = (
    "score: cosine, from -1 to 1, of the steering vector with what the component writes on the contrast data.\n"
    "edit: Frobenius norm of the component's edit; it is negative where the edit works against the component."
)
_MOST_TENSORS = 60


def describe_plan(plan: EditPlan, top: int = 10) -> dict[str, Any]:
    """A plan in plain values: totals, layers, every edited tensor, and the ``top`` components of each kind by |lam|."""
    return {
        "base": vars(plan.base),
        "method": dict(plan.method),
        "data": {key: value for key, value in plan.data.items() if key != "prompts"},
        "measured": plan.measured.to_json(),
        "sha256": plan.hash,
        "edits": len(plan.edits),
        "norm": plan.norm,
        "stable": _stable(plan),
        "layers": _layers(plan),
        "scaled": _scaled(plan),
        "tensors": _tensors(plan),
        "components": {kind: _top(plan, role, top) for role, kind in _KINDS.items()},
    }


def render_plan(plan: EditPlan, top: int = 10) -> str:
    """The summary, then the layers and the ``top`` components of each kind as tables."""
    parts = [render_summary(plan)]
    layers = [
        {key.replace("‖λ‖", "edit").replace("|g|", "|score|"): value for key, value in row.items()}
        for row in _layers(plan)
    ]
    if layers:
        parts += ["", "Edited components by layer", tabulate(layers, headers="keys", floatfmt=".3g")]
    for role, kind in _KINDS.items():
        if rows := _top(plan, role, top):
            named = [{_HEADS.get(key, key): value for key, value in row.items()} for row in rows]
            parts += ["", f"Strongest {kind}s", tabulate(named, headers="keys", floatfmt="+.3f")]
    if rows := _scaled(plan):
        parts += ["", "Scaled tensors", tabulate(rows, headers="keys", floatfmt=".3g")]
    # edits of no single component, such as constants, rotations and imported adapters
    single = any(bool(table.lam.any()) for table in plan.scores.values())
    if rest := [] if single else [row for row in _tensors(plan) if "×" not in row["edit"]]:
        parts += ["", "Edited tensors", tabulate(rest[:_MOST_TENSORS], headers="keys", floatfmt=".3g")]
        parts += [f"… and {len(rest) - _MOST_TENSORS} more (--json lists all)"] if len(rest) > _MOST_TENSORS else []
    return "\n".join([*parts, *(["", _LEGEND] if plan.scores else [])])


def render_summary(plan: EditPlan) -> str:
    """What a plan is, in a few lines: base, data, method, edits, strength, cost."""
    rows = {
        "Base": f"{plan.base.name}{f', revision {plan.base.revision}' if plan.base.revision else ''} "
        f"(fingerprint {plan.base.fingerprint[:12]})",
        "Format": quantised_line(plan),
        "Data": data_line(plan),
        "From": origin_line(plan),
        "Method": method_line(plan.method),
        "Training": training_line(plan.method),
        "Held out": held_out_line(plan.method),
        "Edits": f"{count_of(len(plan.edits), 'tensor')}{_layer_range(plan)}{_norm(plan)}",
        "Strength": strength_line(plan.measured),
        "Cost": cost_line(plan.measured),
        "Silenced": _names_line(plan.method.get("silenced", ())),
        "Removed": ", ".join(f"layer {layer}" for layer in plan.structure.layers),
        "Stability": _stability_line(plan),
    }
    lines = [f"{label:<9}  {text}" for label, text in rows.items() if text]
    return "\n".join([*lines, *(f"Expert     {line}" for line in expert_lines(plan.method))])


def plan_line(plan: EditPlan) -> str:
    """One sentence: which behaviour, in which model, by which method, in how many tensors, and what is removed."""
    name = plan.data.get("name")
    method = plan.method.get("name", "unknown")
    how = "" if method == "merge" else f" by the method {method}"
    changes = [f"{count_of(len(plan.edits), 'tensor')} edited{_layer_range(plan)}", *removal_lines(plan)]
    return f"{name or 'edits'} into {plan.base.name}{how}: {', '.join(changes)}"


def removal_lines(plan: EditPlan) -> list[str]:
    """What a plan removes from the architecture, as "2 layers removed" and "3 experts removed"; nothing for most plans."""
    counts = {"layer": len(plan.structure.layers), "expert": sum(map(len, plan.structure.remove.values()))}
    return [f"{count_of(count, thing)} removed" for thing, count in counts.items() if count]


def edit_line(edit: Edit) -> str:
    """What one edit is: its rank, or what it scales."""
    parts = [_scale_line(one) for one in scales_of(edit)]
    if (addition := addition_of(edit)) is not None:
        parts += [f"rank {addition.A.shape[0]}" if isinstance(addition, LowRank) else addition.op]
    return " + ".join(parts) or edit.op


def _scale_line(scale: Scale) -> str:
    if scale.axis == "whole":
        return f"× {float(scale.factors):g}"
    changed = scale.factors[scale.changed]
    if not len(changed):
        return f"no {scale.axis} scaled"
    low, high = float(changed.min()), float(changed.max())
    factors = f"{low:g}" if low == high else f"{low:.3g} to {high:.3g}"
    return f"{len(changed)} of {len(scale.factors)} {scale.axis} × {factors}"


def quantised_line(plan: EditPlan) -> str:
    """The format of a quantised base, and what the plan was computed from; empty for other bases."""
    told = plan.data.get("quantised")
    if not told:
        return ""
    weights = told.get("weights")
    if "captured_on" in told:
        return f"captured on {told['captured_on']['name']} ({told['format']}), and moved to its unquantised form"
    source = f"the unquantised {weights['name']}" if weights else "its matrices, dequantised"
    return f"{told['format']}; computed from {source}"


def data_line(plan: EditPlan) -> str:
    """The behaviour's name and how many examples it has."""
    examples = plan.data.get("examples")
    examples = examples if isinstance(examples, Mapping) else {}
    counts = [f"{examples[kind]} {kind}" for kind in ("positive", "negative") if examples.get(kind)]
    told = f"{' and '.join(counts)} examples" if counts else ""
    return ": ".join(str(one) for one in (plan.data.get("name"), told) if one)


def strength_line(measured: Measured) -> str:
    """The strength and how it was found."""
    if measured.classes:
        names = {"attn": "attention", "mlp": "MLPs"}
        told = [
            f"{names.get(name, name)} {number(one.strength)} (KL budget {number(one.kl_budget)})"
            for name, one in measured.classes.items()
        ]
        return f"{', '.join(told)}; all together × {number(measured.strength or 1.0)}"
    if measured.strength is None:
        return "" if measured.costs else "1, the method's own; no KL was measured"
    if measured.aim is not None:
        aim = measured.aim
        penalty = aim.get("repetition_penalty")
        decoded = "" if penalty is None else f" (with a repetition penalty of {number(penalty)})"
        return (
            f"{number(measured.strength)} times the method's edit, the weakest that reaches {aim['metric']}={number(aim['aim'])} "
            f"on the questions for selection: {number(aim['value'])} there, the base {number(aim['base'])}{decoded}"
        )
    if measured.kl_budget is None:
        return f"{number(measured.strength)} times the method's edit"
    return (
        f"{number(measured.strength)} times the method's edit, the largest whose {KL_NAMES[measured.budget_text]} is within the "
        f"budget of {number(measured.kl_budget)} nats per token"
    )


def cost_line(measured: Measured) -> str:
    """The KL from the base on each text, with its tokens, and the perplexities of prose."""
    told = [
        f"{KL_NAMES[kind]} {divergence(cost.estimate)}, over {cost.tokens:,} tokens of {TEXT_NAMES[kind]}"
        for kind, cost in measured.costs.items()
    ]
    if prose := measured.costs.get("prose"):
        told.append(f"perplexity of prose {number(prose.base_perplexity)} before, {number(prose.perplexity)} after")
    return "; ".join(told)


def _norm(plan: EditPlan) -> str:
    """The size of all updates; that of a scale is not known from the plan alone."""
    known = [edit for edit in plan.edits if edit.norm is not None]
    if not known:
        return ""
    which = "all updates" if len(known) == len(plan.edits) else f"the {len(known)} updates of known size"
    return f"; Frobenius norm of {which} {plan.norm:.4g}"


def _names_line(names: Sequence[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _layer_range(plan: EditPlan) -> str:
    if chosen := plan.method.get("discriminative_layers"):
        return f" in {len(chosen)} discriminative layers ({_names_line([str(layer) for layer in chosen])})"
    found = plan.method.get("layers")
    if not isinstance(found, (list, tuple)) or len(found) != 2:
        return ""
    return f" in layer {found[0]}" if found[0] == found[1] else f" in layers {found[0]} to {found[1]}"


def _stability_line(plan: EditPlan) -> str:
    told = []
    for kind, counts in _stable(plan).items():
        line = f"{counts['stable']} of {counts['scored']} {kind}s have a score whose sign is certain"
        told.append(
            line + (f", {counts['unstable_edited']} others are edited too" if counts["unstable_edited"] else "")
        )
    return "; ".join(told)


def _stable(plan: EditPlan) -> dict[str, dict[str, int]]:
    """Counts for each kind of component: scored, with a stable sign, and others that are edited."""
    found: dict[str, dict[str, int]] = {}
    for role, kind in _KINDS.items():
        tables = [t for key, t in plan.scores.items() if key.startswith(f"{role}.") and t.interval is not None]
        if tables:
            found[kind] = {
                "scored": sum(len(table.g) for table in tables),
                "stable": sum(int(table.stable.sum()) for table in tables),
                "unstable_edited": sum(int(((table.lam != 0) & ~table.stable).sum()) for table in tables),
            }
    return found


def _layers(plan: EditPlan) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for key, table in plan.scores.items():
        role, layer, _ = _place(key)
        kind = _KINDS[role]
        row = rows.setdefault(layer, {"layer": layer})
        count, size, largest = f"{kind}s", f"{kind}s ‖λ‖", f"largest |g| of {kind}s"
        row[count] = row.get(count, 0) + int((table.lam != 0).sum())
        row[size] = (row.get(size, 0.0) ** 2 + float(table.lam.norm()) ** 2) ** 0.5
        row[largest] = max(row.get(largest, 0.0), float(table.g.abs().max()))
    return [rows[layer] for layer in sorted(rows)]


def _scaled(plan: EditPlan) -> list[dict[str, Any]]:
    """The edits that scale rows or columns."""
    scaled = (edit for edit in plan.edits if any(one.axis != "whole" for one in scales_of(edit)))
    return [{"tensor": edit.tensor, "edit": edit_line(edit)} for edit in scaled]


def _tensors(plan: EditPlan) -> list[dict[str, Any]]:
    """Every edit, with its Frobenius norm where the plan alone knows it."""
    return [{"tensor": edit.tensor, "edit": edit_line(edit), "norm": edit.norm} for edit in plan.edits]


def _place(key: str) -> tuple[str, int, int | None]:
    """MatrixRole, layer and expert of a site's key."""
    role, layer, *expert = key.split(".")
    return role, int(layer), int(expert[0]) if expert else None


def _top(plan: EditPlan, role: str, top: int) -> list[dict[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for key, table in plan.scores.items():
        if key.startswith(f"{role}."):
            _, layer, expert = _place(key)
            where = {"layer": layer} if expert is None else {"layer": layer, "expert": expert}
            for index in table.lam.abs().topk(min(top, len(table.lam))).indices.tolist():
                values = {"g": float(table.g[index]), "lam": float(table.lam[index])}
                found.append({**where, _KINDS[role]: index, "name": component_name(key, index), **values})
    chosen = sorted((row for row in found if row["lam"]), key=lambda row: -abs(row["lam"]))
    return [dict(row) for row in chosen[:top]]
