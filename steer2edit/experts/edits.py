"""From "these experts off, those on" to operations on weights, each as exact as the family allows, and named so.

| lowering | what is written | what it equals |
|---|---|---|
| ``bias`` | -1e4 into the router's selection bias | exact: *unselected*; with a bias on logits, *absent* |
| ``constant`` | a router row that gives every token a logit of -1e4 (phimoe's LayerNorm has a bias) | exact: *absent* |
| ``prune`` | the expert, its router row and its bias entry are cut | exact: *absent* |
| ``row`` | a router row that held-out tokens hardly ever choose | approximate, with the measured share; see ``router_rows.py`` |
| ``zero`` | the expert's output matrix times 0 | another function: the slot and its weight are still spent |

*Absent*: the expert's logit is -inf before scores are made. *Unselected*: its score stays, and the selection passes it over. They
differ where a softmax over all experts is not normalised again over the selected ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from steer2edit.architecture import ModelSpec, Site
from steer2edit.architecture.routers import Router
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import PlanError, count_of, listing
from steer2edit.lowering.pruning import check_structure
from steer2edit.plan import Assign, Base, Edit, EditPlan, Scale, Structure

How = Literal["auto", "bias", "constant", "prune", "row", "zero"]
HOWS: tuple[How, ...] = ("auto", "bias", "constant", "prune", "row", "zero")
Reference = Literal["absent", "unselected"]
# finite in every dtype of the format, and far beyond any score
OFF, ON = -1e4, 1e4


@dataclass(frozen=True)
class Request:
    """What to do with a model's experts, by layer: switch off, force on, or scale.

    Also how many experts each token passes through from now on.
    """

    off: Mapping[int, tuple[int, ...]]
    on: Mapping[int, tuple[int, ...]]
    gains: Mapping[tuple[int, int], float]
    top_k: int | None = None

    @classmethod
    def of(
        cls,
        off: Sequence[tuple[int, int]] = (),
        on: Sequence[tuple[int, int]] = (),
        gains: Mapping[tuple[int, int], float] | None = None,
        top_k: int | None = None,
    ) -> Request:
        """From pairs of layer and expert."""
        return cls(_by_layer(off), _by_layer(on), dict(gains or {}), top_k)


@dataclass(frozen=True)
class Graded:
    """How one expert's wish was lowered: ``grade`` says how exact that is, ``reference`` what it equals."""

    layer: int
    expert: int
    wish: Literal["off", "on", "gain"]
    how: str
    grade: str
    reference: Reference | None = None
    selected: float | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class RowFit:
    """A router row fitted for one expert: ``row`` [hidden], and the share of ``tokens`` held-out tokens that still choose it."""

    row: torch.Tensor
    selected: float
    tokens: int


def strongest(router: Router) -> How:
    """The strongest lowering for switching single experts of a layer off, without cutting any."""
    if router.bias is not None:
        return "bias"
    return "constant" if router.input_norm is not None else "row"


def lower_experts(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    request: Request,
    *,
    how: How = "auto",
    rows: Mapping[tuple[int, int], RowFit] | None = None,
    bound: float = 1e-3,
    data: Mapping[str, Any] | None = None,
) -> EditPlan:
    """The plan for a request. ``rows`` are fitted router rows, needed where ``strongest`` says ``row``; ``data`` says of what
    behaviour the experts are.

    Raises PlanError, with every problem, for experts that are not there, routing that would be left without enough of
    them, rows that more than ``bound`` of the held-out tokens still choose, and what the family cannot do exactly.
    """
    problems = check_request(spec, request)
    if problems:
        raise PlanError(f"this cannot be done with {checkpoint.name}:\n{listing(problems)}")
    edits: dict[str, Edit] = {}
    graded: list[Graded] = []
    structure = Structure(top_k=request.top_k)
    if how == "prune":
        structure = Structure(dict(request.off), request.top_k)
        graded += [
            Graded(layer, e, "off", "prune", "exact", "absent") for layer, gone in request.off.items() for e in gone
        ]
    else:
        for layer, experts in request.off.items():
            made, marks, wrong = _switched_off(checkpoint, spec, layer, experts, how, rows or {}, bound)
            edits |= made
            graded += marks
            problems += wrong
    for layer, experts in request.on.items():
        made, marks, wrong = _forced_on(spec, layer, experts, edits)
        edits |= made
        graded += marks
        problems += wrong
    for (layer, expert), gain in request.gains.items():
        edits |= {edit.tensor: edit for edit in _scaled(spec, layer, expert, gain)}
        graded.append(Graded(layer, expert, "gain", f"output × {gain:g}", "exact"))
    if problems:
        raise PlanError(f"this cannot be done with {checkpoint.name}:\n{listing(problems)}")
    if structure:
        check_structure(structure, checkpoint, spec)
    base = Base.of(checkpoint)
    method: dict[str, Any] = {"name": "experts", "grade": summary(graded, request.top_k)}
    method["experts"] = [{k: v for k, v in asdict(one).items() if v is not None} for one in graded]
    said = {"name": "masked experts", **(data or {})}
    plan = EditPlan(base, tuple(edits.values()), method=method, data=said, structure=structure)
    return plan.computed_from(checkpoint, spec)


def summary(graded: Sequence[Graded], top_k: int | None = None) -> str:
    """The grades in one line: ``10 experts off by bias (exact, unselected)``."""
    counted: dict[str, int] = {}
    for one in graded:
        reference = "" if one.reference is None else f", {one.reference}"
        label = f"{one.wish} by {one.how} ({one.grade}{reference})"
        counted[label] = counted.get(label, 0) + 1
    parts = [f"{count_of(count, 'expert')} {label}" for label, count in counted.items()]
    return "; ".join([*parts, *([f"{count_of(top_k, 'expert')} per token (exact)"] if top_k is not None else [])])


def check_request(spec: ModelSpec, request: Request) -> list[str]:
    """What is wrong with a request whatever its lowering."""
    problems = []
    wishes = [(layer, e) for part in (request.off, request.on) for layer, experts in part.items() for e in experts]
    wishes += list(request.gains)
    if not wishes and request.top_k is None:
        problems.append("nothing is asked for: name experts, or --top")
    routers = {router.layer: router for router in spec.routers}
    if not routers:
        return [f"{spec.model_type} is not a mixture of experts"]
    for layer, expert in dict.fromkeys(wishes):
        if layer not in routers:
            problems.append(f"layer {layer} has no experts; those that have: {', '.join(map(str, routers))}")
        elif not 0 <= expert < routers[layer].experts:
            problems.append(f"layer {layer} has the experts 0-{routers[layer].experts - 1}; there is no {expert}")
    both = [(layer, e) for layer, on in request.on.items() for e in on if e in request.off.get(layer, ())]
    problems += [f"expert {layer}:{expert} is to be off and on" for layer, expert in both]
    return list(dict.fromkeys(problems))


def _switched_off(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    layer: int,
    experts: Sequence[int],
    how: How,
    rows: Mapping[tuple[int, int], RowFit],
    bound: float,
) -> tuple[dict[str, Edit], list[Graded], list[str]]:
    router = spec.router(layer)
    chosen = strongest(router) if how == "auto" else how
    problems = _left_over(router, experts) if chosen != "zero" else []
    if chosen == "bias":
        if router.bias is None:
            return {}, [], [f"layer {layer}: its router has no bias; use --how row, --how zero or --prune"]
        reference: Reference = "absent" if router.bias_of == "logits" else "unselected"
        made: Edit = Assign(router.bias, tuple(experts), torch.full((len(experts),), OFF))
        return {made.tensor: made}, [Graded(layer, e, "off", "bias", "exact", reference) for e in experts], problems
    if chosen == "constant":
        if router.input_norm is None:
            return {}, [], [f"layer {layer}: no LayerNorm with a bias stands before its router"]
        row = _constant_row(checkpoint, router)
        made = Assign(router.tensor, tuple(experts), row.expand(len(experts), -1).clone())
        return {made.tensor: made}, [Graded(layer, e, "off", "constant", "exact", "absent") for e in experts], problems
    silent = {edit.tensor: edit for e in experts for edit in _scaled(spec, layer, e, 0.0)}
    if chosen == "zero":
        return silent, [Graded(layer, e, "off", "zero", "another function") for e in experts], problems
    fits = [rows.get((layer, e)) for e in experts]
    if any(fit is None for fit in fits):
        return {}, [], [f"layer {layer}: no router row was fitted; give text, or use --how zero or --prune"]
    found = [fit for fit in fits if fit is not None]
    problems += [
        f"layer {layer}, expert {e}: {fit.selected:.2%} of {fit.tokens} held-out tokens still choose it, more than "
        f"{bound:.2%}; use --prune, --how zero, or more --calibration text"
        for e, fit in zip(experts, found, strict=True)
        if fit.selected > bound
    ]
    made = Assign(router.tensor, tuple(experts), torch.stack([fit.row for fit in found]))
    marks = [
        Graded(layer, e, "off", "row", "approximate", "absent", fit.selected, fit.tokens)
        for e, fit in zip(experts, found, strict=True)
    ]
    # the few tokens that still come give nothing
    return {**silent, made.tensor: made}, marks, problems


def _left_over(router: Router, experts: Sequence[int]) -> list[str]:
    """Whether the selection still finds enough experts when these are passed over."""
    left = router.experts - len(experts)
    if left < router.top_k:
        return [f"layer {router.layer}: {count_of(left, 'expert')} would be left, and each token takes {router.top_k}"]
    if router.groups <= 1:
        return []
    size = router.experts // router.groups
    enabled = [size - sum(e // size == group for e in experts) for group in range(router.groups)]
    problems = [
        f"layer {router.layer}: group {group} would be left with one expert, and a group is ranked by its best two, so that "
        "it would never be chosen either; switch that off too, or --prune as many in every group"
        for group, count in enumerate(enabled)
        if count == 1
    ]
    least = sum(sorted(count for count in enabled if count)[: router.top_groups])
    if least < router.top_k:
        problems.append(
            f"layer {router.layer}: its {router.top_groups} chosen groups may hold {count_of(least, 'expert')}, and each token "
            f"takes {router.top_k}: one that is switched off would come back"
        )
    return problems


def _forced_on(
    spec: ModelSpec, layer: int, experts: Sequence[int], edits: Mapping[str, Edit]
) -> tuple[dict[str, Edit], list[Graded], list[str]]:
    router = spec.router(layer)
    if router.bias is None:
        return {}, [], [f"layer {layer}: an expert is forced on through a selection bias, which its router has not"]
    if router.bias_of == "logits":
        return (
            {},
            [],
            [f"layer {layer}: its bias is part of the weights too, so a forced expert would take all of them"],
        )
    if len(experts) > router.top_k:
        return (
            {},
            [],
            [f"layer {layer}: {len(experts)} experts are to be forced on, and each token takes {router.top_k}"],
        )
    if router.groups > 1 and len({e // (router.experts // router.groups) for e in experts}) > router.top_groups:
        return {}, [], [f"layer {layer}: experts of more groups are to be forced on than a token may choose"]
    before = edits.get(router.bias)
    rows, values = tuple(experts), torch.full((len(experts),), ON)
    if isinstance(before, Assign):
        rows, values = (*before.rows, *rows), torch.cat((before.values, values))
    made = Assign(router.bias, rows, values)
    return {made.tensor: made}, [Graded(layer, e, "on", "bias", "exact") for e in experts], []


def _scaled(spec: ModelSpec, layer: int, expert: int, gain: float) -> list[Edit]:
    site: Site = spec.site(f"expert_out.{layer}.{expert}")
    return [Scale.whole(name, gain) for name in (site.matrix, site.bias_vector) if name]


def _constant_row(checkpoint: Checkpoint, router: Router) -> torch.Tensor:
    """The router row ``c / g``, which gives every token the same logit.

    A LayerNorm gives ``g n + b``, and the n of each token add up to 0, so the logit is ``c Σ b/g``.
    """
    assert router.input_norm is not None
    gain = checkpoint.read(f"{router.input_norm}.weight").double()
    bias = checkpoint.read(f"{router.input_norm}.bias").double()
    if not bool((gain.abs() > 1e-6).all()) or abs(float((bias / gain).sum())) < 1e-6:
        raise PlanError(f"layer {router.layer}: no row of its router gives every token the same logit; use --how row")
    return (OFF / (bias / gain).sum() / gain).float()


def _by_layer(pairs: Sequence[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    found: dict[int, list[int]] = {}
    for layer, expert in dict.fromkeys(pairs):
        found.setdefault(layer, []).append(expert)
    return {layer: tuple(sorted(experts)) for layer, experts in sorted(found.items())}
