"""Figures of plans and evaluations: drawn once, then a PNG file, or an SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import torch

from steer2edit.errors import Steer2EditError
from steer2edit.plan import EditPlan, Scores

if TYPE_CHECKING:
    from steer2edit.estimates import Estimate
    from steer2edit.evaluate import Evaluation, Row
    from steer2edit.metrics import Metric

WIDTH = 4.6
"""Inches: at 390 px across, text of 9 points is still read."""
INK = "#010203"
"""Stands for the page's own text colour: black in a file, ``currentColor`` in a page."""
BLUE, ORANGE, GREY = "#2f7fd6", "#d2691e", "#808080"
"""Of data; each is at least 3 : 1 on white and on #111."""

HEADS, NEURONS = "attn_out", "mlp_out"
_KINDS = {HEADS: "head", NEURONS: "neuron"}
_TOP = 6  # neurons named in each layer
_ROWS = 40  # layers that the neurons' panel has room for
_STYLE = {
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "steer2edit",
    "svg.image_inline": True,
}
# label, colour, marker, size; what an edit is held against is grey
_MARKS = {
    "base": ("base", INK, "o", 6.0),
    "chosen": ("chosen edit", BLUE, "*", 13.0),
    "knee": ("edit", BLUE, "D", 5.0),
    "edit": ("edit", BLUE, "D", 5.0),
    "front": ("front", BLUE, "D", 5.0),
    "steering": ("activation steering", ORANGE, ".", 7.0),
    "random": ("random direction", GREY, "o", 4.5),
    "shuffled": ("shuffled labels", GREY, "P", 5.5),
    "flipped": ("sign flipped", GREY, "v", 5.0),
    "whole": ("whole matrices", GREY, "s", 4.5),
    "ablation": ("ablation", GREY, "^", 5.0),
}


@dataclass(frozen=True)
class Drawing:
    """A figure with its name (for files and ids), what it shows in words, and a caption."""

    name: str
    alt: str
    caption: str
    figure: Any

    def png(self) -> bytes:
        """On white, at 200 dots an inch."""
        return _saved(self.figure, "png", dpi=200, facecolor="white")

    def svg(self) -> str:
        """An ``<svg>`` for the body of a page: scales with its box, takes the page's font and text colour, and every id in it
        begins with ``name``.
        """
        # of the salted figure alone: no date, no metadata
        root = ElementTree.fromstring(_saved(self.figure, "svg", metadata={"Date": None}))
        return _inline(root, self.name, _label(self.alt, 1000))


def heatmap(plan: EditPlan, path: Path) -> None:
    """Draw a plan's heads and neurons into a PNG, SVG or PDF.

    Raises Steer2EditError without matplotlib, for a plan without component scores, and where ``path`` cannot be written.
    """
    parts = [(role, draw) for role, draw in ((HEADS, _draw_heads), (NEURONS, _draw_neurons)) if _tables(plan, role)]
    if not parts:
        raise Steer2EditError(f"this plan ({plan.method.get('name')}) has no component scores to draw")
    height = max(_height(plan, role) for role, _ in parts) + 0.3
    with _drawing(WIDTH * len(parts), height) as figure:
        for sub, (_, draw) in zip(figure.subfigures(1, len(parts), squeeze=False)[0], parts, strict=True):
            draw(sub, plan)
        figure.suptitle(
            _label(f"{plan.data.get('name', 'edits')} in {plan.base.name} ({plan.method.get('name')})", 80), fontsize=10
        )
    suffix = path.suffix.removeprefix(".").lower() or "png"
    try:
        written = _saved(figure, suffix, dpi=150, facecolor="white")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(written)
    except (OSError, ValueError) as error:
        raise Steer2EditError(f"cannot write {path}: {error}") from None


def heads(plan: EditPlan) -> Drawing | None:
    """lambda, |g| and g's sign over layers × heads; None where no head was scored."""
    tables = _tables(plan, HEADS)
    if not tables:
        return None
    with _drawing(WIDTH, _height(plan, HEADS)) as figure:
        _draw_heads(figure, plan)
    count = max(len(table.g) for table in tables.values())
    return Drawing(
        "heads",
        f"Heat-maps of lambda, |g| and the sign of g over {len(tables)} layers and {count} heads. {_strongest(plan, HEADS)}",
        "Attention heads, each in its own place. λ is the signed size of a head's edit, g its score; "
        "in the right panel heads whose sign of g is in doubt are pale.",
        figure,
    )


def neurons(plan: EditPlan) -> Drawing | None:
    """Each layer's strongest neurons by name, with their lambda, |g| and sign; None where no neuron was scored."""
    if not _tables(plan, NEURONS):
        return None
    with _drawing(WIDTH, _height(plan, NEURONS)) as figure:
        _draw_neurons(figure, plan)
    shown, total = len(_named_neurons(plan)), len(_tables(plan, NEURONS))
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
    found = {role: tables for role in _KINDS if (tables := _tables(plan, role))}
    if not found:
        return None
    said = []
    with _drawing(WIDTH, 2.5) as figure:
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axis, (role, tables) in zip(panels, found.items(), strict=True):
            said.append(_draw_scores(axis, role, list(tables.values())))
        panels[0].set_ylabel("components")
        handles = {
            label: mark for axis in panels for mark, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    every = [table for tables in found.values() for table in tables.values()]
    caption = "How the components' scores |g| are distributed."
    if any(table.null is not None for table in every):
        caption = (
            "Scores |g| beside those under shuffled labels: what lies to the right of the grey, chance did not give."
        )
    if all(table.interval is not None for table in every):
        caption += " Stable: the 95 % interval of g over resampled examples leaves its sign in no doubt."
    return Drawing(
        "scores",
        f"Histograms of |g|, on a logarithmic scale. {'; '.join(said)}.",
        caption,
        figure,
    )


def tradeoff(
    evaluation: Evaluation | None, trials: Sequence[Mapping[str, Any]] = (), settings: Mapping[str, Any] | None = None
) -> Drawing | None:
    """The attribute against the utility: every candidate with its intervals, and a study's trials as dots.

    None where there is nothing of both kinds.
    """
    axes = objectives(evaluation, settings or {})
    dots = [] if axes is None else _dots(trials, settings or {}, axes)
    if axes is None or (evaluation is None and not dots):
        return None
    x, y = axes
    points = [] if evaluation is None else _points(evaluation, x, y)
    with _drawing(WIDTH, 4.1) as figure:
        axis = figure.subplots()
        if dots:
            axis.plot(
                *zip(*dots, strict=True), ".", color=GREY, markersize=3, label="trials (selection split)", zorder=1
            )
        _draw_points(axis, points)
        every = [*dots, *((px.value, py.value) for _, _, px, py in points)]
        _scale_x(axis, [value for value, _ in every], x)
        axis.set(xlabel=_axis_label(x), ylabel=_axis_label(y))
        marks = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        order = [*dict.fromkeys(mark[0] for mark in _MARKS.values()), *marks]
        kept = [name for name in dict.fromkeys(order) if name in marks]
        figure.legend(
            [marks[name] for name in kept],
            kept,
            loc="outside lower center",
            ncols=2,
            handletextpad=0.4,
            columnspacing=1.2,
        )
    return Drawing(
        "tradeoff",
        f"Scatter of {y.name} against {x.name}. "
        + "; ".join(f"{row.name}: {x.name} {px}, {y.name} {py}" for row, _, px, py in points[:8]),
        f"Each candidate's {y.name} ({y.goal} is better) against its {x.name} ({x.goal} is better), with 95 % intervals"
        + (f"; small dots are the study's {len(dots)} complete trials, on the selection split." if dots else "."),
        figure,
    )


def objectives(evaluation: Evaluation | None, settings: Mapping[str, Any]) -> tuple[Metric, Metric] | None:
    """(utility, attribute): a study's own if they were measured, else KL or the first utility, and the first attribute."""
    from steer2edit.metrics import Metric

    names = {role: (settings.get(role) or {}).get("name") for role in ("utility", "attribute")}
    if evaluation is None:
        if not all(names.values()):
            return None
        x, y = (Metric(names[role], role, settings[role].get("goal", "more")) for role in ("utility", "attribute"))  # type: ignore[arg-type]
        return x, y
    wanted = {"utility": "KL", **{role: name for role, name in names.items() if name}}
    found = []
    for role in ("utility", "attribute"):
        there = [metric for metric in evaluation.metrics if metric.role == role]
        found.append(next((metric for metric in there if metric.name == wanted.get(role)), there[0] if there else None))
    return (found[0], found[1]) if found[0] is not None and found[1] is not None else None


def chosen_row(evaluation: Evaluation | None) -> Row | None:
    """The edit that a report is about: the knee, else the first edit."""
    rows = () if evaluation is None else evaluation.rows
    return next((row for kind in ("knee", "edit") for row in rows if row.kind == kind), None)


# Heads, neurons and scores.


def _draw_heads(figure: Any, plan: EditPlan) -> None:
    tables = _tables(plan, HEADS)
    layers = max(tables) + 1
    width = max(len(table.g) for table in tables.values())
    grids = torch.full((3, layers, width), torch.nan)
    for layer, table in tables.items():
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
    tables = _tables(plan, NEURONS)
    axes = figure.subplots(1, 3, sharey=True, width_ratios=[width * 0.5, 1, 1])
    for row, (layer, indices) in enumerate(named.items()):
        grids[:, row, : len(indices)] = torch.stack(_panels(tables[layer]))[:, indices]
        for column, index in enumerate(indices):
            axes[0].text(column, row, str(index), ha="center", va="center", fontsize=7.5)
    _draw_panels(figure, axes, grids)
    for axis in axes:
        axis.set_xticks([])
    axes[0].set_yticks(range(len(named)), list(map(str, named)))
    axes[0].set_xlabel("neurons, the strongest first")
    axes[0].set_ylabel("layer")


def _draw_scores(axis: Any, role: str, tables: list[Scores]) -> str:
    """Draw one kind's histogram; what it shows in words."""
    g = torch.cat([table.g for table in tables]).abs()
    null = [table.null.abs() for table in tables if table.null is not None]
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
    resampled = all(table.interval is not None for table in tables)
    count = f"{sum(int(table.stable.sum()) for table in tables):,} of {len(g):,} stable" if resampled else f"{len(g):,}"
    axis.set_title(f"{_KINDS[role]}s\n{count}")
    return f"{_KINDS[role]}s: {count}, the largest |g| {float(g.max()):.2g}" + (
        f", under shuffled labels {float(torch.cat(null).max()):.2g}" if null else ""
    )


def _draw_panels(figure: Any, axes: Sequence[Any], grids: torch.Tensor) -> None:
    """lambda, |g| and sign as images; what is zero lets the page through, so that it fits a light page and a dark one."""
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


def _tables(plan: EditPlan, role: str) -> dict[int, Scores]:
    """A role's tables by layer, in order; those without components left out."""
    found = {
        int(key.rsplit(".", 1)[1]): table
        for key, table in plan.scores.items()
        if key.startswith(f"{role}.") and len(table.g)
    }
    return dict(sorted(found.items()))


def _edited(plan: EditPlan, role: str) -> bool:
    return any(bool(table.lam.any()) for table in _tables(plan, role).values())


def _named_neurons(plan: EditPlan) -> dict[int, list[int]]:
    """By layer the indices of the strongest neurons; of very deep models the layers with the strongest ones."""
    edited = _edited(plan, NEURONS)
    sizes = {layer: (t.lam if edited else t.g).abs() for layer, t in _tables(plan, NEURONS).items()}
    kept = sorted(sorted(sizes, key=lambda layer: -float(sizes[layer].max()))[:_ROWS])
    top = {layer: sizes[layer].topk(min(_TOP, len(sizes[layer]))).indices.tolist() for layer in kept}
    return {layer: [i for i in indices if not edited or sizes[layer][i]] for layer, indices in top.items()}


def _strongest(plan: EditPlan, role: str) -> str:
    lam = {layer: table.lam.abs() for layer, table in _tables(plan, role).items()}
    layer = max(lam, key=lambda layer: float(lam[layer].max()))
    index = int(lam[layer].argmax())
    kind = _KINDS[role]
    size = float(lam[layer][index])
    return (
        f"The strongest is {kind} {index} of layer {layer}, |lambda| {size:.3g}." if size else f"No {kind} is edited."
    )


def _height(plan: EditPlan, role: str) -> float:
    if role == NEURONS:
        return 1.3 + 0.15 * len(_named_neurons(plan))
    return 1.3 + min(max(0.1 * (max(_tables(plan, HEADS)) + 1), 1.0), 6.0)


def _ticks(count: int, most: int) -> list[int]:
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, count) if count <= step * most)
    return list(range(0, count, step))


# The trade-off.

_Point = tuple["Row", str, "Estimate", "Estimate"]


def _points(evaluation: Evaluation, x: Metric, y: Metric) -> list[_Point]:
    """Each row with its mark and both estimates; the base and the chosen edit first. What is not finite has no place."""
    chosen = chosen_row(evaluation)
    found = []
    for row in evaluation.rows:
        if x.name in row.samples and y.name in row.samples:
            px, py = evaluation.estimate(row, x.name), evaluation.estimate(row, y.name)
            if all(map(math.isfinite, (px.value, px.low, px.high, py.value, py.low, py.high))):
                found.append((row, "chosen" if row is chosen else row.kind, px, py))
    order = list(_MARKS)
    return sorted(found, key=lambda point: order.index(point[1]) if point[1] in order else len(order))


def _draw_points(axis: Any, points: Sequence[_Point]) -> None:
    strengths = [row.strength for row, mark, _, _ in points if mark == "steering" and row.strength is not None]
    named = {1.0, min(strengths, default=1.0), max(strengths, default=1.0)}
    for row, mark, px, py in reversed(points):
        label, colour, marker, size = _MARKS.get(mark, (mark, GREY, "d", 5.0))
        axis.errorbar(
            [px.value],
            [py.value],
            xerr=[[max(px.value - px.low, 0)], [max(px.high - px.value, 0)]],
            yerr=[[max(py.value - py.low, 0)], [max(py.high - py.value, 0)]],
            fmt="none",
            ecolor=colour,
            elinewidth=0.9,
            alpha=0.8,
            zorder=2,
        )
        axis.plot(
            [px.value],
            [py.value],
            marker,
            color=colour,
            markersize=size,
            markerfacecolor="none" if mark == "front" else colour,
            label=_label(label),
            zorder=4 if mark in ("base", "chosen") else 3,
        )
        if mark == "steering" and row.strength in named:
            at = (px.value, py.value)
            axis.annotate(f"×{row.strength:.3g}", at, (5, 4), textcoords="offset points", fontsize=8)
    steering = [(row.strength, px.value, py.value) for row, mark, px, py in points if mark == "steering"]
    start = [(0.0, px.value, py.value) for _, mark, px, py in points if mark == "base"]
    if steering:
        # strength 0 is the base
        curve = sorted((strength or 0.0, a, b) for strength, a, b in (*start, *steering))
        axis.plot([a for _, a, _ in curve], [b for _, _, b in curve], "-", color=ORANGE, linewidth=1, zorder=1)


def _dots(
    trials: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], axes: tuple[Metric, Metric]
) -> list[tuple[float, float]]:
    """(utility, attribute) of every complete trial, where the study's objectives are those drawn."""
    if [(settings.get(role) or {}).get("name") for role in ("utility", "attribute")] != [axis.name for axis in axes]:
        return []
    complete = [t for t in trials if t.get("state") == "complete" and t.get("utility") and t.get("attribute")]
    pairs = [(float(trial["utility"]["value"]), float(trial["attribute"]["value"])) for trial in complete]
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def _scale_x(axis: Any, values: Sequence[float], x: Metric) -> None:
    """A symmetric logarithm where divergences span more than 30 times: the base's is 0."""
    # the base's may also be rounding, of either sign
    noise = 1e-4 * max(values, default=0.0)
    positive = sorted(value for value in values if value > noise)
    if x.name != "KL" or min(values, default=0.0) < -noise or not positive or positive[-1] <= 30 * positive[0]:
        return
    first = math.floor(math.log10(positive[0]))
    last = math.ceil(math.log10(positive[-1]))
    axis.set_xscale("symlog", linthresh=10.0**first, linscale=0.4)
    ticks = [0.0, *(10.0**power for power in range(first, last + 1))]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(-0.4 * 10.0**first, positive[-1] * 2)


def _axis_label(metric: Metric) -> str:
    return _label(metric.name + (f" ({metric.unit})" if metric.unit else "") + f", {metric.goal} is better")


# Matplotlib.


@contextmanager
def _drawing(width: float, height: float) -> Iterator[Any]:
    """A new figure, and within the block its style. Raises Steer2EditError without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise Steer2EditError("plots need matplotlib: pip install 'steer2edit[plots]'") from None
    with rc_context(_STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any, kind: str, **given: Any) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        # names may be in scripts that its font has no glyphs for
        warnings.filterwarnings("ignore", message=r"Glyph \d+", category=UserWarning)
        figure.savefig(buffer, format=kind, **given)
    return buffer.getvalue()


def _label(text: str, longest: int = 60) -> str:
    """A name from data as one line that a figure can hold."""
    plain = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    plain = " ".join(plain.split()).lstrip("_")
    return plain if len(plain) <= longest else f"{plain[: longest - 1]}…"


def _inline(root: ElementTree.Element, name: str, alt: str) -> str:
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in list(root.iter()):
        tag = element.tag.rpartition("}")[2]
        if tag in ("metadata", "style"):
            parents[element].remove(element)
        element.tag = tag
        element.attrib = {key.rpartition("}")[2]: _attribute(key, value, name) for key, value in element.attrib.items()}
    used = "".join(value for element in root.iter() for value in element.attrib.values() if "#" in value)
    for element in root.iter():
        if element.attrib.get("id", "") not in used:
            del element.attrib["id"]
    box = root.attrib["viewBox"]
    root.attrib = {
        "viewBox": box,
        "role": "img",
        "aria-label": alt,
        "style": "stroke-linejoin:round;stroke-linecap:butt",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    """One attribute as it stands in a page."""
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r"font-family: [^;]*", "font-family: inherit", value).replace(INK, "currentColor")
    return value


_DRAW: Mapping[str, Callable[[EditPlan], Drawing | None]] = {"heads": heads, "neurons": neurons, "scores": scores}


def of_plan(plan: EditPlan) -> dict[str, Drawing]:
    """Every figure of a plan that there is something for, by name."""
    return {name: drawing for name, draw in _DRAW.items() if (drawing := draw(plan)) is not None}
