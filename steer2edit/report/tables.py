"""Plans and verifications as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from steer2edit.plan import EditPlan

if TYPE_CHECKING:
    from steer2edit.artefact.verify import Verification
    from steer2edit.evaluation.evaluate import Evaluation
    from steer2edit.search.study import Study

_KINDS = {
    "attn_out": "head",
    "mixer_out": "mixer channel",
    "mlp_out": "neuron",
    "shared_expert_out": "shared expert's neuron",
    "expert_out": "expert's neuron",
}


def describe_plan(plan: EditPlan, top: int = 10) -> dict[str, Any]:
    """A plan in plain values: totals, layers, and the ``top`` components of each kind by |lam|."""
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
        "components": {kind: _top(plan, role, top) for role, kind in _KINDS.items()},
    }


def render_plan(plan: EditPlan, top: int = 10) -> str:
    """The same as text."""
    described = describe_plan(plan, top)
    told = {key: value for key, value in described["method"].items() if value is not None and key != "experts"}
    merged = told.pop("plans", [])
    method = ", ".join(f"{key} {_short(value)}" for key, value in told.items())
    if merged:
        method += ": " + ", ".join(f"{part.get('name', part['plan'][:12])} × {part['weight']:g}" for part in merged)
    parts = [
        f"base     {plan.base.name} ({plan.base.fingerprint[:12]})",
        f"method   {method}",
        f"edits    {described['edits']} tensors, ‖ΔW‖ {described['norm']:.4g}",
    ]
    if plan.data:
        told_of = (plan.data.get("name"), plan.data.get("examples"))
        parts.insert(1, f"data     {', '.join(str(one) for one in told_of if one is not None)}")
    if (cost := plan.measured.divergence) is not None:
        parts.append(
            f"measured strength {plan.measured.strength:.4g}, KL {cost.kl:.4g} [{cost.low:.2g}, {cost.high:.2g}] nats/token "
            f"over {cost.tokens} tokens, perplexity {cost.base_perplexity:.4g} → {cost.perplexity:.4g}"
        )
    parts += [f"experts  {line}" for line in expert_lines(plan.method)]
    if stable := described["stable"]:
        said = (
            f"{s['stable']} of {s['scored']} {kind}s, {s['unstable_edited']} others edited"
            for kind, s in stable.items()
        )
        parts.append(f"stable   sign of the score beyond doubt in {'; '.join(said)}")
    if described["layers"]:
        parts += ["", tabulate(described["layers"], headers="keys", floatfmt=".3g")]
    for kind, rows in described["components"].items():
        if rows:
            parts += ["", f"strongest {kind}s", tabulate(rows, headers="keys", floatfmt="+.3f")]
    return "\n".join(parts)


def expert_lines(method: Mapping[str, Any], limit: int = 20) -> list[str]:
    """What a plan does with single experts, one line each; nothing for plans that mask none."""
    marks = method.get("experts", ())
    lines = []
    for one in marks[:limit]:
        told = f"{one['layer']}:{one['expert']} {one['wish']} by {one['how']}, {one['grade']}"
        if "selected" in one:
            told += f": {one['selected']:.3%} of {one['tokens']} held-out tokens still choose it"
        lines.append(told)
    return [*lines, *([f"… and {len(marks) - limit} more"] if len(marks) > limit else [])]


def render_evaluation(found: Evaluation) -> str:
    """A table of every candidate: each metric with its interval, and the counts below."""
    table = [
        [row.name, row.note, *(str(found.estimate(row, metric.name)) for metric in found.metrics)] for row in found.rows
    ]
    headers = ["", "", *(f"{m.name}{f' ({m.unit})' if m.unit else ''}" for m in found.metrics)]
    counts = {metric.name: found.estimate(found.rows[0], metric.name).count for metric in found.metrics}
    context = found.context
    lines = [tabulate(table, headers=headers, disable_numparse=True), ""]
    lines.append(
        f"split {context.get('split')}: {', '.join(f'{name} over {count}' for name, count in counts.items())}; "
        "bootstrap 95 % intervals over questions (KL and perplexity: over windows of neutral text)"
    )
    for name, results in (context.get("lm_eval") or {}).items():
        lines += ["", f"lm-eval, {name}", tabulate(results, headers="keys", floatfmt=".4g")]
    return "\n".join(lines)


def render_study(done: Study) -> str:
    """The front on the selection split, what the knee is, and the report's table."""
    settings, result = done.result.settings, done.result
    attribute, utility = settings["attribute"]["name"], settings["utility"]["name"]
    rows = []
    for trial in sorted(result.trials, key=lambda trial: trial.kl):
        if trial.number in result.front and trial.attribute is not None and trial.utility is not None:
            a, u = (f"{v['value']:.3g} [{v['low']:.3g}, {v['high']:.3g}]" for v in (trial.attribute, trial.utility))
            params = ", ".join(f"{key} {_short(value)}" for key, value in trial.params.items())
            rows.append([trial.number, a, u, params, "knee" if trial.number == result.knee else ""])
    states = [trial.state for trial in result.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    base = settings["base"]
    parts = [
        f"{len(states)} trials ({counts}); base: {attribute} {base[attribute]:.3g}",
        "",
        "the front, on the selection split",
        tabulate(rows, headers=["trial", attribute, utility, "", ""], disable_numparse=True),
    ]
    if done.evaluation is not None:
        parts += ["", "on the reporting split", render_evaluation(done.evaluation)]
    kept = [
        "study.json",
        *(["knee.plan.safetensors", "front/"] if rows else []),
        *(["evaluation.json"] if done.evaluation else []),
    ]
    parts += [
        "",
        f"{done.folder}: {', '.join(kept)}",
    ]
    return "\n".join(parts)


def render_verification(result: Verification) -> str:
    """What was checked and what it gave, one line each; then rounding, where something was rounded."""
    lines = [f"bytes    {result.tensors} tensors compared"]
    if result.numbers:
        lines.append(f"numbers  {result.verdict}")
        if experts := result.numbers.get("experts"):
            lines.append(f"experts  {_expert_check(experts)}")
    if result.rounding:
        kept = [r.along_v for r in result.rounding]
        worst = max(result.rounding, key=lambda r: r.relative)
        lines.append(
            f"rounding {sum(kept) / len(kept):.2%} of the edit kept along v_hat (least {min(kept):.2%}); "
            f"largest relative error {worst.relative:.2%}, cosine {worst.cosine:.5f}, at {worst.tensor}"
        )
    lines += [f"note     {note}" for note in result.notes[:20]]
    lines += [f"problem  {problem}" for problem in result.problems[:50]]
    lines.append("ok" if result.ok else f"FAILED: {len(result.problems)} problems")
    return "\n".join(lines)


def _expert_check(found: Mapping[str, Any]) -> str:
    told = [f"over {found['probe_tokens']} tokens"]
    if "selected" in found:
        told.append(f"{found['selected']:.2%} choose a masked one")
    if "forced" in found:
        told.append(f"at least {found['forced']:.2%} choose each forced one")
    if "reference_difference" in found:
        told.append(f"logits within {found['reference_difference']:.2g} of the base that cannot see the masked ones")
    return "; ".join(told)


def _stable(plan: EditPlan) -> dict[str, dict[str, int]]:
    """Of each kind of component: how many were scored, how many scores have a stable sign, how many others are edited."""
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
                found.append({**where, _KINDS[role]: index, **values})
    chosen = sorted((row for row in found if row["lam"]), key=lambda row: -abs(row["lam"]))
    return [dict(row) for row in chosen[:top]]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
