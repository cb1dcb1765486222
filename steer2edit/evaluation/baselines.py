"""The baselines: activation steering, an instruction, and control edits of the same size (random direction, …).

Each baseline is a candidate like any other. Edits are made as large as the plan (``match="norm"``: each tensor's ‖ΔW‖ is the
plan's) or brought to the KL that the plan reaches (``match="kl"``), so that what a random direction gives as well is seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from steer2edit.capture.populations import RESAMPLES
from steer2edit.errors import PlanError, Steer2EditError
from steer2edit.evaluation.candidates import Candidate, plan_candidate
from steer2edit.evaluation.comparison import ADAPTER, BOTH, EQUAL_COST, INSTRUCTED
from steer2edit.evaluation.steerability import LEAST_DIRECTIONS
from steer2edit.methods import load, make_plan
from steer2edit.notices import notice
from steer2edit.plan import Bias, Edit, EditPlan, LowRank, Scale, ScaleAdd
from steer2edit.plan.measured import KL_NAMES
from steer2edit.progress import Progress, silent
from steer2edit.runtime.adapters import adapted
from steer2edit.runtime.hooks import edited, steered
from steer2edit.runtime.model import LoadedModel
from steer2edit.scoring.discriminative import within
from steer2edit.scoring.scores import TINY, Scoring, analyse
from steer2edit.strength.kl import NeutralText, Windows
from steer2edit.strength.line_search import Strength
from steer2edit.strength.meet import Apply, at, meet
from steer2edit.strength.neutral_texts import NeutralTexts

Match = Literal["norm", "kl"]
KINDS = ("random", "shuffled", "flipped", "whole", "ablation")
STRENGTHS = (0.25, 0.5, 1.0, 2.0)


def baselines(
    loaded: LoadedModel,
    scoring: Scoring,
    plan: EditPlan,
    neutral: NeutralTexts,
    *,
    match: Match = "kl",
    draws: int = 3,
    only: Sequence[str] = KINDS,
    kl: float | None = None,
    progress: Progress = silent,
) -> list[Candidate]:
    """The control edits of ``plan``, or those of the kinds ``only``.

    They are ``draws`` random directions and as many shuffled labels, the flipped sign, whole matrices and directional
    ablation.

    The flipped plan keeps its ‖ΔW‖ whatever ``match`` is. ``kl`` is the plan's, where that is known already. Raises PlanError
    where a baseline cannot be brought to the KL.
    """
    edits: list[tuple[str, str, EditPlan]] = []
    for kind in only:
        if kind == "random":
            edits += [(f"random direction {i + 1}", kind, random_direction(plan, seed=i)) for i in range(draws)]
        elif kind == "shuffled":
            shuffles = range(min(draws, RESAMPLES["shuffled"]))
            edits += [(f"shuffled labels {i + 1}", kind, shuffled_labels(scoring, plan, i)) for i in shuffles]
        elif kind == "flipped":
            edits.append(("sign flipped", kind, plan.scaled(-1)))
        elif kind == "whole":
            edits.append(("whole matrices", kind, whole_matrices(scoring, plan)))
        else:
            ablated = make_plan(scoring, method="ablation")
            edits.append(("ablation", kind, of_norm(ablated, plan.norm)))
    if match == "kl" and kl is None:
        kl = neutral_kl(loaded, plan, neutral)
    candidates = []
    with progress("baselines", total=len(edits)) as advance:
        for name, kind, other in edits:
            if match == "kl" and kl is not None and kind != "flipped":
                found = _met(loaded, other, neutral, kl, name)
                candidates.append(_scaled(loaded, name, other, kind, neutral, found))
            else:
                candidates.append(plan_candidate(loaded, name, other, kind, "at equal ‖ΔW‖"))
            advance(1)
    return candidates


def steering(
    loaded: LoadedModel, scoring: Scoring, strengths: Sequence[float] = STRENGTHS, only: Sequence[str] | None = None
) -> list[Candidate]:
    """Activation steering: every writer's own vector added at every token, at each strength; ``only`` names the sites."""
    keys = [site.key for site in scoring.spec.sites] if only is None else list(only)
    vectors = {key: scoring.statistics.difference(key).float() for key in keys}
    return [_steering(loaded, vectors, strength) for strength in strengths]


def steering_at(loaded: LoadedModel, scoring: Scoring, neutral: NeutralTexts, kl: float) -> Candidate:
    """Activation steering at the strength that meets a KL."""
    vectors = {site.key: scoring.statistics.difference(site.vector_key).float() for site in scoring.spec.sites}
    found = meet(partial(steered, loaded, vectors), neutral.budget, kl, "steering")
    return replace(_steering(loaded, vectors, found.strength), note=_equal(neutral), costs=_costs(neutral, found))


def adapter_at(loaded: LoadedModel, folder: Path, neutral: NeutralTexts, kl: float) -> Candidate:
    """Another LoRA adapter of the model, such as a trained one, scaled until it meets a KL.

    Raises PlanError where PEFT cannot scale it, and CheckpointError for what is not an adapter.
    """
    from peft.helpers import rescale_adapter_scale

    with adapted(loaded.model, folder) as adapter:
        try:
            strength = meet(partial(rescale_adapter_scale, adapter), neutral.budget, kl, folder.name).strength
        except ValueError as error:
            raise PlanError(f"{folder} cannot be brought to the edit's KL: {error}") from None

    @contextmanager
    def enter() -> Iterator[LoadedModel]:
        with adapted(loaded.model, folder) as adapter, rescale_adapter_scale(adapter, strength):
            yield loaded

    return Candidate(f"{folder.name} × {strength:.3g}", enter, ADAPTER, _equal(neutral), strength)


def random_directions(
    loaded: LoadedModel, plan: EditPlan, neutral: NeutralTexts, kl: float, draws: int = LEAST_DIRECTIONS
) -> list[Candidate]:
    """Random directions at a KL; those after the first are measured in brief.

    Directions of one size cost nearly the same: each begins at the first one's strength, and takes few passes.
    """
    candidates: list[Candidate] = []
    strength = None
    for i in range(draws):
        name, drawn = f"random direction {i + 1}", random_direction(plan, seed=i)
        if strength is None:
            found = _met(loaded, drawn, neutral, kl, name)
            strength = found.strength
        else:
            found = near(partial(edited, loaded, drawn), neutral.budget, kl, strength, name)
        candidates.append(replace(_scaled(loaded, name, drawn, "random", neutral, found), brief=i > 0))
    return candidates


def instructed(edit: Candidate, loaded: LoadedModel, instruction: str) -> list[Candidate]:
    """The base told how to behave, and the edit told so too. Their cost is not measured: a prompt leaves the model as it is."""

    @contextmanager
    def enter() -> Iterator[LoadedModel]:
        yield loaded

    note = f"told: {instruction}"
    alone = Candidate("instruction", enter, INSTRUCTED, note, told=instruction)
    both = replace(edit, name=f"{edit.name} and instruction", kind=BOTH, note=note, told=instruction)
    return [alone, both]


def random_direction(plan: EditPlan, seed: int) -> EditPlan:
    """The plan with every output direction drawn at random; every ‖ΔW‖ stays. Factors of rows or columns change their places.

    So where a plan silences heads, as many others are silenced. What is alike in length is moved alike.
    """
    generator = torch.Generator().manual_seed(seed)

    def added(edit: LowRank | Bias) -> LowRank | Bias:
        if isinstance(edit, Bias):
            direction = torch.randn(edit.delta.shape, generator=generator)
            return replace(edit, delta=direction * (edit.delta.norm() / direction.norm()))
        direction = torch.randn(edit.B.shape, generator=generator)
        return _of_norm(replace(edit, B=direction), edit.norm)

    def drawn(edit: Edit) -> Edit:
        if isinstance(edit, Scale):
            return _elsewhere(edit, seed)
        if isinstance(edit, ScaleAdd):
            scales = tuple(_elsewhere(one, seed) for one in edit.scales)
            return replace(edit, scales=scales, added=None if edit.added is None else added(edit.added))
        return added(edit) if isinstance(edit, (LowRank, Bias)) else edit  # routing has no direction

    return _with(plan, [drawn(edit) for edit in plan.edits])


def _elsewhere(scale: Scale, seed: int) -> Scale:
    """The factors with their blocks in a random order.

    A block is as wide as all runs of equal factors allow.
    """
    factors = scale.factors
    edges = (factors[1:] != factors[:-1]).nonzero()[:, 0] + 1
    width = math.gcd(len(factors), *edges.tolist())
    blocks = factors.view(-1, width)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return replace(scale, factors=blocks[order].flatten())


def shuffled_labels(scoring: Scoring, plan: EditPlan, index: int) -> EditPlan:
    """What the plan's method makes of the same data with randomly swapped labels, at the plan's ‖ΔW‖ in all.

    Raises PlanError where the method that made the plan is not known.
    """
    module = load(str(plan.method.get("name")))
    # plans of older versions do not hold all options
    method = {**getattr(module, "UNSAID", {}), **plan.method}
    known = module.Options.__dataclass_fields__
    options = {key: value for key, value in method.items() if key in known}
    if isinstance(options.get("layers"), list):
        options["layers"] = tuple(options["layers"])
    if options.get("fit") == "lineas":
        notice("the control with shuffled labels is that of the closed form: a control is not trained")
        options = {key: value for key, value in options.items() if not key.startswith("fit")}
    # nothing is stable under shuffled labels, and that is not the question here
    if "stable" in options:
        options["stable"] = False
    spec = scoring.spec
    if "discriminative_layers" in method:
        spec = within(spec, method["discriminative_layers"])
    shuffled = Scoring(scoring.checkpoint, spec, scoring.statistics.shuffled(index))
    return of_norm(
        make_plan(shuffled, method=module.__name__.rsplit(".", 1)[-1], options=module.Options(**options)), plan.norm
    )


def whole_matrices(scoring: Scoring, plan: EditPlan) -> EditPlan:
    """For every edited matrix ``v_hat (Wᵀ v_hat)ᵀ``, the rank-1 edit that knows no components, at the edit's ‖ΔW‖."""
    sites = {name: site for name, site in scoring.spec.owners.items() if site in scoring.spec.sites}
    edited = {edit.tensor for edit in plan.edits}
    edits = []
    for edit in plan.edits:
        site = sites.get(edit.tensor)
        # a constant is compared with its writer's matrix
        alone = isinstance(edit, Bias) and site is not None and site.matrix not in edited
        if site is not None and (isinstance(edit, LowRank) or alone):
            v = scoring.statistics.difference(site.vector_key).float()
            v_hat = v / v.norm().clamp(min=TINY)
            A = analyse(scoring.checkpoint, site, v_hat[None]).projection
            edits.append(_of_norm(LowRank(site.matrix, v_hat[:, None], A), edit.norm or 0.0))
    return _with(plan, edits)


def of_norm(plan: EditPlan, norm: float) -> EditPlan:
    """The plan scaled so that ‖ΔW‖ is ``norm`` in all."""
    return plan.scaled(norm / plan.norm) if plan.norm else plan


def neutral_kl(loaded: LoadedModel, plan: EditPlan, neutral: NeutralTexts) -> float:
    """The KL that a plan reaches on the text that budgets are on."""
    return at(partial(edited, loaded, plan), neutral.budget).divergence.kl


def to_kl(loaded: LoadedModel, plan: EditPlan, neutral: NeutralTexts, kl: float, name: str = "") -> EditPlan:
    """The plan at the strength that meets a KL. Raises PlanError where none does; ``name`` is for the progress."""
    return plan.scaled(_met(loaded, plan, neutral, kl, name).strength)


def _met(loaded: LoadedModel, plan: EditPlan, neutral: NeutralTexts, kl: float, name: str) -> Strength:
    try:
        return meet(partial(edited, loaded, plan), neutral.budget, kl, name)
    except Steer2EditError as error:
        raise PlanError(f"a baseline could not be brought to a KL of {kl:.3g}: {error}") from None


def near(apply: Apply, text: NeutralText, kl: float, start: float | None = None, name: str = "") -> Strength:
    """A strength whose KL is within half of ``EQUAL_COST`` of ``kl``, by the square law from ``start`` in few passes.

    Where that fails, or without a ``start``, it is searched for (``strength.meet``). Raises Steer2EditError where none is found.
    """
    strength = 0.0 if start is None else start
    for _ in range(3 if strength > 0 else 0):
        found = at(apply, text, strength, name)
        reached = found.divergence.kl
        if not (math.isfinite(reached) and reached > 0):
            break
        if abs(reached - kl) <= EQUAL_COST / 2 * kl:
            return found
        strength *= math.sqrt(kl / reached)
    return meet(apply, text, kl, name)


def _scaled(
    loaded: LoadedModel, name: str, plan: EditPlan, kind: str, neutral: NeutralTexts, found: Strength
) -> Candidate:
    """The plan at a strength that was found for it, with the cost that was measured there."""
    candidate = plan_candidate(loaded, name, plan.scaled(found.strength), kind, _equal(neutral))
    return replace(candidate, costs=_costs(neutral, found))


def _costs(neutral: NeutralTexts, found: Strength) -> dict[NeutralText, Windows]:
    return {} if found.windows is None else {neutral.budget: found.windows}


def _equal(neutral: NeutralTexts) -> str:
    return f"at equal {KL_NAMES[neutral.budget.kind]}"


def _steering(loaded: LoadedModel, vectors: Mapping[str, torch.Tensor], strength: float) -> Candidate:
    @contextmanager
    def enter() -> Iterator[LoadedModel]:
        with steered(loaded, vectors, strength):
            yield loaded

    return Candidate(f"steering × {strength:.3g}", enter, "steering", "activation steering", strength)


def _of_norm(edit: LowRank, norm: float) -> LowRank:
    return edit.scaled(norm / edit.norm) if edit.norm else edit


def _with(plan: EditPlan, edits: Sequence[Edit]) -> EditPlan:
    return EditPlan(plan.base, tuple(edits), method=plan.method)
