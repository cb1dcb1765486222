"""Figures of a plan: its heads and its neurons layer by layer, and how their scores are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steer2edit.errors import Steer2EditError
from steer2edit.files.atomic import write_bytes
from steer2edit.plan import EditPlan, Scores
from steer2edit.report.drawing import BLUE, GREY, ORANGE, WIDTH, Drawing, canvas, one_line, saved

HEADS, NEURONS = "attn_out", "mlp_out"
KINDS = {HEADS: "head", NEURONS: "neuron"}
_TOP = 6  # neurons named in each layer
_ROWS = 40  # layers that the neurons' panel has room for


def heatmap(plan: EditPlan, path: Path) -> None:
    """Draw a plan's heads and neurons into a PNG, SVG or PDF.

    Raises Steer2EditError without matplotlib, for a plan without component scores, and where ``path`` cannot be written.
    """
    parts = [(role, draw) for role, draw in ((HEADS, _draw_heads), (NEURONS, _draw_neurons)) if tables(plan, role)]
    if not parts:
        raise Steer2EditError(f"this plan ({plan.method.get('name')}) has no component scores to draw")
    height = max(_height(plan, role) for role, _ in parts) + 0.3
    with canvas(WIDTH * len(parts), height) as figure:
        for sub, (_, draw) in zip(figure.subfigures(1, len(parts), squeeze=False)[0], parts, strict=True):
            draw(sub, plan)
        figure.suptitle(
            one_line(f"{plan.data.get('name', 'edits')} in {plan.base.name} ({plan.method.get('name')})", 80),
            fontsize=10,
        )
    suffix = path.suffix.removeprefix(".").lower() or "png"
    try:
        written = saved(figure, suffix, dpi=150, facecolor="white")
        write_bytes(path, written, "picture")
    except (OSError, ValueError) as error:
        raise Steer2EditError(f"cannot write {path}: {error}") from None


def heads(plan: EditPlan) -> Drawing | None:
    """lambda, |g| and g's sign over layers × heads; None where no head was scored."""
    sites = tables(plan, HEADS)
    if not sites:
        return None
    with canvas(WIDTH, _height(plan, HEADS)) as figure:
        _draw_heads(figure, plan)
    count = max(len(table.g) for table in sites.values())
    caption = (
        "Attention heads by layer. λ is the signed size of a head's edit. g is its score: the cosine of its output with the "
        "steering vector"
    )
    if any(table.interval is not None for table in sites.values()):
        caption += ". In the right panel, heads whose sign of g is not certain are pale"
    return Drawing(
        "heads",
        f"Heat-maps of lambda, |g| and the sign of g over {len(sites)} layers and {count} heads. {_strongest(plan, HEADS)}",
        f"{caption}.",
        figure,
    )


def neurons(plan: EditPlan) -> Drawing | None:
    """Each layer's strongest neurons by name, with their lambda, |g| and sign; None where no neuron was scored."""
    if not tables(plan, NEURONS):
        return None
    with canvas(WIDTH, _height(plan, NEURONS)) as figure:
        _draw_neurons(figure, plan)
    shown, total = len(_named_neurons(plan)), len(tables(plan, NEURONS))
    which = f"the {shown} of {total} layers with the strongest neurons" if shown < total else f"{total} layers"
    by = "|λ|" if _edited(plan, NEURONS) else "|g| (none is edited)"
    return Drawing(
        "neurons",
        f"The strongest neurons of {which}, named, with lambda, |g| and the sign of g. {_strongest(plan, NEURONS)}",
        f"The strongest MLP neurons by {by} in {which}: each cell names its neuron, and the two panels on the right have the "
        "same neurons in the same places.",
        figure,
    )


def scores(plan: EditPlan) -> Drawing | None:
    """How |g| is distributed, beside what it is under shuffled labels; None for a plan without scores."""
    by_role = {role: list(sites.values()) for role in KINDS if (sites := tables(plan, role))}
    if not by_role:
        return None
    descriptions = []
    with canvas(WIDTH, 2.5) as figure:
        panels = figure.subplots(1, len(by_role), squeeze=False)[0]
        for axis, (role, scored) in zip(panels, by_role.items(), strict=True):
            descriptions.append(_draw_scores(axis, role, scored))
        panels[0].set_ylabel("components")
        handles = {
            label: mark for axis in panels for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    every = [table for scored in by_role.values() for table in scored]
    caption = "How the components' scores |g| are distributed."
    if any(table.null is not None for table in every):
        caption = (
            "Scores |g| beside the scores under shuffled labels. Chance gives no score to the right of the grey ones."
        )
    if all(table.interval is not None for table in every):
        caption += " Stable means: the whole 95 % interval of g over resampled examples has one sign."
    return Drawing(
        "scores",
        f"Histograms of |g|, on a logarithmic scale. {'; '.join(descriptions)}.",
        caption,
        figure,
    )


def of_plan(plan: EditPlan) -> list[Drawing]:
    """The figures of a plan. A figure without contents is left out."""
    return [drawing for drawing in (heads(plan), neurons(plan), scores(plan)) if drawing is not None]


def tables(plan: EditPlan, role: str) -> dict[int, Scores]:
    """A role's tables by layer, in order. Tables without components are left out."""
    by_layer = {
        int(key.rsplit(".", 1)[1]): table
        for key, table in plan.scores.items()
        if key.startswith(f"{role}.") and len(table.g)
    }
    return dict(sorted(by_layer.items()))


def _draw_heads(figure: Any, plan: EditPlan) -> None:
    sites = tables(plan, HEADS)
    layers = max(sites) + 1
    width = max(len(table.g) for table in sites.values())
    grids = torch.full((3, layers, width), torch.nan)
    for layer, table in sites.items():
        grids[:, layer, : len(table.g)] = torch.stack(_panels(table))
    axes = figure.subplots(1, 3, sharey=True)
    _draw_panels(figure, axes, grids)
    for axis in axes:
        axis.set_xticks(_ticks(width, 4))
        axis.set_xlabel("head")
    axes[0].set_yticks(_ticks(layers, 10))
    axes[0].set_ylabel("layer")


def _draw_neurons(figure: Any, plan: EditPlan) -> None:
    named = _named_neurons(plan)
    width = max(1, *(len(indices) for indices in named.values()))
    grids = torch.full((3, len(named), width), torch.nan)
    sites = tables(plan, NEURONS)
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[width * 0.5, 1, 1])
    for row, (layer, indices) in enumerate(named.items()):
        grids[:, row, : len(indices)] = torch.stack(_panels(sites[layer]))[:, indices]
        for column, index in enumerate(indices):
            axes[0].text(column, row, str(index), ha="center", va="center", fontsize=7.5)
    _draw_panels(figure, axes, grids)
    for axis in axes:
        axis.set_xticks([])
    axes[0].set_yticks(range(len(named)), list(map(str, named)))
    axes[0].set_xlabel("neurons, the strongest first")
    axes[0].set_ylabel("layer")


def _draw_scores(axis: Any, role: str, sites: Sequence[Scores]) -> str:
    """Draw one kind's histogram. Gives its description in words."""
    g = torch.cat([table.g for table in sites]).abs()
    null = [table.null.abs() for table in sites if table.null is not None]
    top = max(float(values.max()) for values in (g, *null)) or 1.0
    bins = torch.linspace(0, top, 31).tolist()
    if null:
        axis.hist(torch.cat(null).tolist(), bins, color=GREY, alpha=0.55, label="|g| under shuffled labels")
    axis.hist(g.tolist(), bins, histtype="step", color=BLUE, linewidth=1.4, label="|g|")
    axis.set_yscale("log")
    # Matplotlib's own labels are mathematics, which names from data must not be
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.locator_params(axis="x", nbins=4)
    axis.set(xlabel="|g|", xlim=(0, top))
    resampled = all(table.interval is not None for table in sites)
    count = f"{sum(int(table.stable.sum()) for table in sites):,} of {len(g):,} stable" if resampled else f"{len(g):,}"
    axis.set_title(f"{KINDS[role]}s\n{count}")
    return f"{KINDS[role]}s: {count}, the largest |g| {float(g.max()):.2g}" + (
        f", under shuffled labels {float(torch.cat(null).max()):.2g}" if null else ""
    )


def _draw_panels(figure: Any, axes: Sequence[Any], grids: torch.Tensor) -> None:
    """lambda, |g| and sign as images. Zero is transparent, so that the image fits light and dark pages."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    down, up = to_rgb(BLUE), to_rgb(ORANGE)
    signed = LinearSegmentedColormap.from_list(
        "signed", [(0, (*down, 0.85)), (0.5, (*down, 0)), (0.5, (*up, 0)), (1, (*up, 0.85))]
    )
    sizes = LinearSegmentedColormap.from_list("sizes", [(0, (*to_rgb(GREY), 0)), (1, (*to_rgb(GREY), 0.95))])
    for axis, values, title, colours in zip(
        axes, grids, ("λ", "|g|", "sign of g"), (signed, sizes, signed), strict=True
    ):
        limit = float(values.nan_to_num().abs().max()) or 1.0
        low = -limit if colours is signed else 0.0
        image = axis.imshow(
            values.numpy(), cmap=colours, vmin=low, vmax=limit, aspect="auto", interpolation="none", zorder=0
        )
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(True)
        axis.tick_params(length=2)
        bar = figure.colorbar(image, ax=axis, location="bottom", aspect=12, pad=0.02)
        # 256 seamed rectangles would show through
        bar.solids.set_rasterized(True)
        bar.outline.set_linewidth(0.6)
        if title == "sign of g":
            bar.set_ticks([-1, 1], labels=["−", "+"])
        else:
            bar.set_ticks([low, limit], labels=[f"{value:.2g}".replace("-", "−") for value in (low, limit)])


def _panels(table: Scores) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sign = table.g.sign() * torch.where(table.stable, 1.0, 0.3)
    return table.lam.float(), table.g.abs().float(), sign.float()


def _edited(plan: EditPlan, role: str) -> bool:
    return any(bool(table.lam.any()) for table in tables(plan, role).values())


def _named_neurons(plan: EditPlan) -> dict[int, list[int]]:
    """The indices of the strongest neurons by layer. Of very deep models, only the layers with the strongest ones."""
    edited = _edited(plan, NEURONS)
    sizes = {layer: (t.lam if edited else t.g).abs() for layer, t in tables(plan, NEURONS).items()}
    layers = sorted(sorted(sizes, key=lambda layer: -float(sizes[layer].max()))[:_ROWS])
    top = {layer: sizes[layer].topk(min(_TOP, len(sizes[layer]))).indices.tolist() for layer in layers}
    return {layer: [i for i in indices if not edited or sizes[layer][i]] for layer, indices in top.items()}


def _strongest(plan: EditPlan, role: str) -> str:
    lam = {layer: table.lam.abs() for layer, table in tables(plan, role).items()}
    layer = max(lam, key=lambda layer: float(lam[layer].max()))
    index = int(lam[layer].argmax())
    kind = KINDS[role]
    size = float(lam[layer][index])
    return (
        f"The strongest is {kind} {index} of layer {layer}, |lambda| {size:.3g}." if size else f"No {kind} is edited."
    )


def _height(plan: EditPlan, role: str) -> float:
    if role == NEURONS:
        return 1.3 + 0.15 * len(_named_neurons(plan))
    return 1.3 + min(max(0.1 * (max(tables(plan, HEADS)) + 1), 1.0), 6.0)


def _ticks(count: int, most: int) -> list[int]:
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, count) if count <= step * most)
    return list(range(0, count, step))
