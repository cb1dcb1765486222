"""Rankings and masks of experts as text, and the map of a model's experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steer2edit.errors import Steer2EditError
from steer2edit.experts.ranking import ExpertTable, Ranked
from steer2edit.files.atomic import write_bytes
from steer2edit.plan import Measured
from steer2edit.report.method_text import expert_lines
from steer2edit.report.plan_text import cost_line

_HEADERS = {
    "layer": "layer",
    "expert": "expert",
    "positive": "chosen, positive",
    "negative": "chosen, negative",
    "difference": "difference",
    "interval": "95 %",
    "z": "z",
    "q": "q",
    "alignment": "alignment",
    "stability": "stability",
}


_MEANINGS = {
    "difference": "selection rate",
    "mass": "routing weight",
    "risk": "pooled selection rate",
    "z": "z of selection",
}


def describe_ranking(table: ExpertTable, ranked: Sequence[Ranked]) -> dict[str, Any]:
    """A ranking as JSON."""
    return {
        "scope": table.scope,
        "by": table.by,
        "layers": list(table.layers),
        "experts": table.score.shape[1],
        "discoveries": int((table.q <= 0.05).sum()),
        "ranking": [asdict(one) for one in ranked],
    }


def render_ranking(table: ExpertTable, ranked: Sequence[Ranked]) -> str:
    """A ranking as a table, with the number of experts that differ."""
    from tabulate import tabulate

    layers, experts = table.score.shape
    lines = [
        f"{layers} layers of {experts} experts; ranked by {table.by} over {table.scope} tokens; "
        f"{int((table.q <= 0.05).sum())} of {layers * experts} differ at a false-discovery rate of 5 %"
    ]
    if not ranked:
        return "\n".join([*lines, "no expert is chosen more often on this side"])
    rows = []
    for one in ranked:
        row = {
            "layer": one.layer,
            "expert": one.expert,
            "positive": f"{one.positive:.1%}",
            "negative": f"{one.negative:.1%}",
            "difference": f"{one.difference:+.3f}",
            "interval": f"[{one.low:+.3f}, {one.high:+.3f}]",
            "z": f"{one.z:+.1f}",
            "q": f"{one.q:.2g}",
            "alignment": "" if one.alignment is None else f"{one.alignment:+.2f}",
            "stability": f"{one.stability:.0%}",
        }
        rows.append([row[name] for name in _HEADERS])
    return "\n".join([*lines, "", tabulate(rows, headers=list(_HEADERS.values()), disable_numparse=True)])


def render_masks(method: Mapping[str, Any], measured: Measured) -> str:
    """What a plan does with experts: the grades, each expert, and the measured cost."""
    lines = [str(method["grade"]), *(f"  {line}" for line in expert_lines(method))]
    if measured.costs:
        lines.append(cost_line(measured))
    return "\n".join(lines)


def expert_map(table: ExpertTable, path: Path, marked: Sequence[tuple[int, int]] = ()) -> None:
    """Draw the criterion over layers × experts, with a frame around the ``marked`` pairs of layer and expert.

    Raises Steer2EditError without matplotlib, and where ``path`` cannot be written.
    """
    from steer2edit.report.drawing import canvas, saved

    layers, experts = table.score.shape
    size = float(table.score.abs().max()) or 1.0
    width, height = min(max(4.5, 0.13 * experts + 1.8), 16.0), min(max(1.9, 0.24 * layers + 1.2), 14.0)
    with canvas(width, height) as figure:
        axis = figure.subplots()
        image = axis.imshow(
            table.score.numpy(), cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto", interpolation="nearest"
        )
        axis.set_xlabel("expert")
        axis.set_ylabel("layer")
        shown = range(0, layers, max(1, layers // 16))
        axis.set_yticks(list(shown), [str(table.layers[i]) for i in shown])
        figure.colorbar(image, ax=axis)
        for layer, expert in marked:
            if layer in table.layers:
                x, y = expert - 0.5, table.layers.index(layer) - 0.5
                axis.add_patch(_frame(x, y))
        title = f"{_MEANINGS[table.by]}, positive − negative" if table.by in _MEANINGS else "alignment with the vector"
        axis.set_title(f"{title}, {table.scope} tokens", fontsize=9)
    try:
        written = saved(figure, path.suffix.removeprefix(".").lower() or "png", dpi=150, facecolor="white")
        write_bytes(path, written, "picture")
    except (OSError, ValueError) as error:
        raise Steer2EditError(f"cannot write {path}: {error}") from None


def _frame(x: float, y: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, fill=False, edgecolor="black", linewidth=1.2)
