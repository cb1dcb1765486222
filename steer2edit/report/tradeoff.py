"""The figure of the trade-off: the attribute of each candidate against its cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from steer2edit.bootstrap import Estimate
from steer2edit.evaluation.evaluate import Evaluation, Row
from steer2edit.evaluation.metrics import Metric
from steer2edit.plan.measured import is_kl
from steer2edit.report.drawing import BLUE, GREY, INK, ORANGE, WIDTH, Drawing, canvas, one_line

# label, colour, marker, size; control edits are grey
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

_Point = tuple[Row, str, Estimate, Estimate]


def tradeoff(
    evaluation: Evaluation | None, trials: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Drawing | None:
    """The attribute against the utility: every candidate with its intervals, and a study's trials as dots.

    None where the attribute or the utility was not measured.
    """
    axes = objectives(evaluation, settings)
    dots = [] if axes is None else _dots(trials, settings, axes)
    if axes is None or (evaluation is None and not dots):
        return None
    x, y = axes
    points = [] if evaluation is None else _points(evaluation, x, y)
    with canvas(WIDTH, 4.1) as figure:
        axis = figure.subplots()
        if dots:
            axis.plot(
                *zip(*dots, strict=True), ".", color=GREY, markersize=3, label="trials (selection split)", zorder=1
            )
        _draw_points(axis, points)
        searched = {} if evaluation is not None else _searched(trials, settings, axes)
        for mark, at in searched.items():
            label, colour, marker, size = _MARKS[mark]
            line, face = ("-", "none") if mark == "front" else ("", colour)
            drawn = {"color": colour, "markersize": size, "markerfacecolor": face, "linewidth": 1, "zorder": 3}
            axis.plot(*zip(*at, strict=True), marker + line, label=label, **drawn)
        every = [*dots, *((px.value, py.value) for _, _, px, py in points), *searched.get("base", ())]
        _scale_x(axis, [value for value, _ in every], x)
        axis.set(xlabel=_axis_label(x), ylabel=_axis_label(y))
        marks = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        order = [*dict.fromkeys(mark[0] for mark in _MARKS.values()), *marks]
        labels = [name for name in dict.fromkeys(order) if name in marks]
        figure.legend(
            [marks[name] for name in labels],
            labels,
            loc="outside lower center",
            ncols=2,
            handletextpad=0.4,
            columnspacing=1.2,
        )
    return Drawing(
        "tradeoff",
        f"Scatter of {y.name} against {x.name}. "
        + "; ".join(f"{row.name}: {x.name} {px}, {y.name} {py}" for row, _, px, py in points[:8]),
        _caption(x, y, len(dots), evaluation is not None),
        figure,
    )


def _caption(x: Metric, y: Metric, trials: int, measured: bool) -> str:
    what = f"{y.name} ({y.goal} is better) against its {x.name} ({x.goal} is better)"
    if not measured:
        return f"Each of the study's {trials} complete trials: its {what}, all on the selection split."
    dots = f"; small dots are the study's {trials} complete trials, on the selection split." if trials else "."
    return f"Each candidate's {what}, with 95 % intervals{dots}"


def objectives(evaluation: Evaluation | None, settings: Mapping[str, Any]) -> tuple[Metric, Metric] | None:
    """(utility, attribute): those of the study where they were measured, else the first of each role."""
    attribute, utility = (settings.get(role) or {} for role in ("attribute", "utility"))
    if evaluation is None:
        if not (attribute.get("name") and utility.get("name")):
            return None
        return (
            Metric(utility["name"], "utility", utility.get("goal", "more")),
            Metric(attribute["name"], "attribute", attribute.get("goal", "more")),
        )
    x = _measured(evaluation, "utility", utility.get("name"))
    y = _measured(evaluation, "attribute", attribute.get("name"))
    return None if x is None or y is None else (x, y)


def chosen_row(evaluation: Evaluation | None) -> Row | None:
    """The edit that a report is about: the knee, else the first edit."""
    rows = () if evaluation is None else evaluation.rows
    return next((row for kind in ("knee", "edit") for row in rows if row.kind == kind), None)


def _measured(evaluation: Evaluation, role: str, name: str | None) -> Metric | None:
    """The role's metric called ``name``, else its first."""
    there = [metric for metric in evaluation.metrics if metric.role == role]
    return next((metric for metric in there if metric.name == name), there[0] if there else None)


def _points(evaluation: Evaluation, x: Metric, y: Metric) -> list[_Point]:
    """Each row with its mark and both estimates; the base and the chosen edit come first.

    Rows that are not finite are left out.
    """
    chosen = chosen_row(evaluation)
    points = []
    for row in evaluation.rows:
        if x.name in row.samples and y.name in row.samples:
            px, py = evaluation.estimate(row, x.name), evaluation.estimate(row, y.name)
            if all(map(math.isfinite, (px.value, px.low, px.high, py.value, py.low, py.high))):
                points.append((row, "chosen" if row is chosen else row.kind, px, py))
    order = list(_MARKS)
    return sorted(points, key=lambda point: order.index(point[1]) if point[1] in order else len(order))


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
            label=one_line(label),
            zorder=4 if mark in ("base", "chosen") else 3,
        )
        if mark == "steering" and row.strength in named:
            at = (px.value, py.value)
            axis.annotate(f"×{row.strength:.3g}", at, (5, 4), textcoords="offset points", fontsize=8)
    if strengths:
        # strength 0 is the base
        curve = sorted(
            (r.strength or 0.0, px.value, py.value) for r, mark, px, py in points if mark in ("base", "steering")
        )
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


def _searched(
    trials: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], axes: tuple[Metric, Metric]
) -> dict[str, list[tuple[float, float]]]:
    """The points of a search by mark: its front, the chosen trial, and the base where it was measured."""
    base = settings.get("base") or {}
    points = {
        "front": sorted(_dots([trial for trial in trials if trial.get("front")], settings, axes)),
        "chosen": _dots([trial for trial in trials if trial.get("knee")], settings, axes),
        "base": [(float(base[axes[0].name]), float(base[axes[1].name]))] if all(a.name in base for a in axes) else [],
    }
    return {mark: at for mark, at in points.items() if at}


def _scale_x(axis: Any, values: Sequence[float], x: Metric) -> None:
    """A symmetric logarithm where divergences span more than 30 times: the base's is 0."""
    # the base's may also be rounding, of either sign
    noise = 1e-4 * max(values, default=0.0)
    positive = sorted(value for value in values if value > noise)
    if not is_kl(x.name) or min(values, default=0.0) < -noise or not positive or positive[-1] <= 30 * positive[0]:
        return
    first = math.floor(math.log10(positive[0]))
    last = math.ceil(math.log10(positive[-1]))
    axis.set_xscale("symlog", linthresh=10.0**first, linscale=0.4)
    ticks = [0.0, *(10.0**power for power in range(first, last + 1))]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(-0.4 * 10.0**first, positive[-1] * 2)


def _axis_label(metric: Metric) -> str:
    return one_line(metric.name + (f" ({metric.unit})" if metric.unit else "") + f", {metric.goal} is better")
