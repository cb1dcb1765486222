"""Plans and verifications as tables, and the heat-map of edits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate

from steer2edit.errors import Steer2EditError
from steer2edit.plan import EditPlan

if TYPE_CHECKING:
    from steer2edit.verification import Verification

_KINDS = {"attn_out": "head", "mlp_out": "neuron"}


def describe_plan(plan: EditPlan, top: int = 10) -> dict[str, Any]:
    """A plan in plain values: totals, layers, and the ``top`` components of each kind by |lam|."""
    return {
        "base": vars(plan.base),
        "method": dict(plan.method),
        "data": dict(plan.data),
        "measured": dict(plan.measured),
        "sha256": plan.hash,
        "edits": len(plan.edits),
        "norm": sum(edit.norm**2 for edit in plan.edits) ** 0.5,
        "layers": _layers(plan),
        "components": {kind: _top(plan, role, top) for role, kind in _KINDS.items()},
    }


def render_plan(plan: EditPlan, top: int = 10) -> str:
    """The same as text."""
    described = describe_plan(plan, top)
    method = ", ".join(f"{key} {_short(value)}" for key, value in described["method"].items() if value is not None)
    parts = [
        f"base     {plan.base.name} ({plan.base.fingerprint[:12]})",
        f"method   {method}",
        f"edits    {described['edits']} tensors, ‖ΔW‖ {described['norm']:.4g}",
    ]
    if plan.data:
        parts.insert(1, f"data     {plan.data.get('name')}, {plan.data.get('examples')}")
    if measured := described["measured"]:
        parts.append(
            f"measured strength {measured['strength']:.4g}, KL {measured['kl']:.4g} ± {measured['stderr']:.2g} nats/token over "
            f"{measured['tokens']} tokens, perplexity {measured['base_perplexity']:.4g} → {measured['perplexity']:.4g}"
        )
    if described["layers"]:
        parts += ["", tabulate(described["layers"], headers="keys", floatfmt=".3g")]
    for kind, rows in described["components"].items():
        if rows:
            parts += ["", f"strongest {kind}s", tabulate(rows, headers="keys", floatfmt="+.3f")]
    return "\n".join(parts)


def render_verification(result: Verification) -> str:
    """What was checked and what it gave, one line each; then rounding, where something was rounded."""
    lines = [f"bytes    {result.tensors} tensors compared"]
    if result.numbers:
        n = result.numbers
        bound = (
            f"at most {n['tolerance']:g} allowed"
            if n["tolerance"]
            else f"stored in {', '.join(n['stored'])}: rounding, see below"
        )
        lines.append(
            f"numbers  logits differ from base + plan by {n['difference']:.3g} ({bound}); "
            f"the edit moves them by {n['effect']:.3g}"
        )
    if result.rounding:
        kept = [r.along_v for r in result.rounding]
        worst = max(result.rounding, key=lambda r: r.relative)
        lines.append(
            f"rounding {sum(kept) / len(kept):.2%} of the edit kept along v_hat (least {min(kept):.2%}); "
            f"largest relative error {worst.relative:.2%}, cosine {worst.cosine:.5f}, at {worst.tensor}"
        )
    lines += [f"problem  {problem}" for problem in result.problems[:50]]
    lines.append("ok" if result.ok else f"FAILED: {len(result.problems)} problems")
    return "\n".join(lines)


def heatmap(plan: EditPlan, path: Path) -> None:
    """Draw lam over layers × heads (each head in its own place) and each layer's MLP total, as PNG, SVG or PDF.

    Raises Steer2EditError without matplotlib, or for a plan without component scores.
    """
    if not plan.scores:
        raise Steer2EditError(f"this plan ({plan.method.get('name')}) has no component scores to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise Steer2EditError("plots need matplotlib: pip install 'steer2edit[plots]'") from None
    heads, neurons = _grid(plan, "attn_out"), _grid(plan, "mlp_out")
    layers = max(len(heads), len(neurons))
    drawn = [
        draw for grid, draw in ((heads, _draw_heads), (neurons, _draw_neurons)) if any(bool(row.any()) for row in grid)
    ]
    figure = Figure(figsize=(1.5 + 3.6 * max(len(drawn), 1), max(2.6, 0.24 * layers + 1.5)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(len(drawn), 1), squeeze=False)[0]
    for axis, draw in zip(axes, drawn, strict=False):
        draw(axis, heads if draw is _draw_heads else neurons)
        axis.set_yticks(range(0, layers, 1 if layers <= 16 else 4))
    figure.suptitle(f"{plan.data.get('name', 'edits')} in {plan.base.name} ({plan.method.get('name')})", fontsize=11)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise Steer2EditError(f"cannot write {path}: {error}") from None


def _draw_heads(axis: Any, rows: list[torch.Tensor]) -> None:
    grid = torch.stack(rows)
    limit = float(grid.abs().max())
    image = axis.imshow(grid.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axis.figure.colorbar(image, ax=axis, label="λ (+ up, − down)")
    axis.set_xticks(range(0, grid.shape[1], 1 if grid.shape[1] <= 16 else 4))
    axis.set(title="attention heads", xlabel="head", ylabel="layer")


def _draw_neurons(axis: Any, rows: list[torch.Tensor]) -> None:
    totals = [float(row.norm()) for row in rows]
    axis.barh(range(len(rows)), totals, color="#555")
    for layer, row in enumerate(rows):
        count = int((row != 0).sum())
        axis.text(totals[layer], layer, f" {count}" if count else "", va="center", fontsize=7)
    axis.set(title="MLP neurons edited", xlabel="‖λ‖", ylabel="layer", ylim=(len(rows) - 0.5, -0.5))
    axis.set_xmargin(0.2)


def _grid(plan: EditPlan, role: str) -> list[torch.Tensor]:
    """A row of lam for each layer up to the last scored one; zeros where a layer was not scored."""
    rows = {int(key.rsplit(".", 1)[1]): table.lam for key, table in plan.scores.items() if key.startswith(f"{role}.")}
    if not rows:
        return []
    empty = torch.zeros_like(next(iter(rows.values())))
    return [rows.get(layer, empty) for layer in range(max(rows) + 1)]


def _layers(plan: EditPlan) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for key, table in plan.scores.items():
        role, _, layer = key.rpartition(".")
        kind = _KINDS[role]
        row = rows.setdefault(int(layer), {"layer": int(layer)})
        row[f"{kind}s"] = int((table.lam != 0).sum())
        row[f"{kind}s ‖λ‖"] = float(table.lam.norm())
        row[f"largest |g| of {kind}s"] = float(table.g.abs().max())
    return [rows[layer] for layer in sorted(rows)]


def _top(plan: EditPlan, role: str, top: int) -> list[dict[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for key, table in plan.scores.items():
        if key.startswith(f"{role}."):
            layer = int(key.rsplit(".", 1)[1])
            for index in table.lam.abs().topk(min(top, len(table.lam))).indices.tolist():
                values = {"g": float(table.g[index]), "lam": float(table.lam[index])}
                found.append({"layer": layer, _KINDS[role]: index, **values})
    chosen = sorted((row for row in found if row["lam"]), key=lambda row: -abs(row["lam"]))
    return [dict(row) for row in chosen[:top]]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
