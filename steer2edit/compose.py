"""Several behaviours in one plan, another strength of one, and how far behaviours get in each other's way.

Ranks add: the update of the composition is exactly the weighted sum of its parts' (``plan.merge``). What the parts do is
not a sum, since a model is not linear; how much they share says where to look, held-out questions say what became of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import MatrixRole, ModelSpec, Site, read_spec
from steer2edit.artefact.emit import artefact_folders, check_carried, emit
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.behavior_file import builtin_questions
from steer2edit.data.metric_choice import read_metric
from steer2edit.data.neutral import OwnNeutral
from steer2edit.data.questions import Question, knowledge_questions
from steer2edit.errors import PlanError
from steer2edit.evaluation.assess import PROOF, assess
from steer2edit.evaluation.candidates import plan_candidate
from steer2edit.evaluation.evaluate import Evaluation
from steer2edit.evaluation.suite import Suite
from steer2edit.evaluation.summary import summary
from steer2edit.files.atomic import write_text
from steer2edit.files.layout import INTERFERENCE
from steer2edit.lowering import Lowering, Writing
from steer2edit.methods import scaling
from steer2edit.notices import notice
from steer2edit.plan import Bias, Edit, EditPlan, LowRank, Measured, merge
from steer2edit.progress import Progress, silent
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.strength.neutral_texts import NeutralTexts, neutral_texts
from steer2edit.strength.settle import settle_strength

FORMAT = "steer2edit.interference.1"


@dataclass(frozen=True)
class Overlap:
    """What two plans share at one site, or, with ``site`` None, in all. A bias is called by its tensor's name.

    ``update`` is the cosine of both updates, ``<ΔW, ΔW'> / (‖ΔW‖ ‖ΔW'‖)``: 0 where they cannot meet. ``direction`` is that of
    what they push on their own data where both know it, else the largest between their column spaces, unsigned. ``components`` is
    the part of both updates' energy that lies on the same heads or neurons, 0 to 1; a bias has none. All three are None where
    one of both scales or sets what is there, since the plan alone does not know that update.
    """

    first: int
    second: int
    site: str | None
    update: float | None
    direction: float | None
    components: float | None


@dataclass(frozen=True)
class Composed:
    """What a composition gave. ``evaluations`` are by behaviour: base, each part alone, all together."""

    plan: EditPlan
    artefacts: dict[str, Path]
    lowerings: dict[str, Lowering]
    overlaps: tuple[Overlap, ...]
    evaluations: Mapping[str, Evaluation]

    def described(self) -> dict[str, Any]:
        """Overlaps and changes in plain values."""
        return {
            "format": FORMAT,
            "plans": told_apart([str(part["name"] or "unnamed") for part in self.plan.method["plans"]]),
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
            "evaluations": {name: summary(found) for name, found in self.evaluations.items()},
        }


def compose(
    model: str | Path,
    plans: Sequence[EditPlan],
    weights: Sequence[float],
    out: str | Path,
    *,
    to: Sequence[str] = ("checkpoint",),
    revision: str | None = None,
    strength: float | None = None,
    kl_budget: float | None = None,
    neutral: OwnNeutral | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008
    questions: Sequence[Sequence[Question] | None] | None = None,
    measure: bool = True,
    repetition_penalty: float | None = None,
    force: bool = False,
    writing: Writing = Writing(),  # noqa: B008
    progress: Progress = silent,
) -> Composed:
    """Compile several plans for one base into one artefact, each at its own strength times its weight.

    Without a budget every strength stays. ``questions`` are those of each plan's behaviour, by default what comes with the
    package under the behaviour's name. Without ``measure``, a budget and a strength, no model is run. Raises a
    Steer2EditError for whatever is wrong with the input.
    """
    folders = artefact_folders(out, to, force, [model])
    checkpoint = open_checkpoint(model, revision)
    spec = read_spec(checkpoint)
    plan = merge(plans, weights)
    check_carried(plan, checkpoint, spec, to)
    parts = [one.scaled(weight) for one, weight in zip(plans, weights, strict=True)]
    overlaps = overlap(parts, spec)
    settled = strength is not None or kl_budget is not None
    evaluations: dict[str, Evaluation] = {}
    if measure or settled:
        loaded = load_model(checkpoint, spec, runtime)
        texts = neutral_texts(loaded, neutral, progress)
        plan = settle_strength(loaded, plan, strength=strength if settled else 1.0, kl_budget=kl_budget, neutral=texts)
        if measure:
            evaluations = _measure(
                loaded, parts, plan, questions_of(plans, questions), texts, repetition_penalty, progress
            )
    lowerings = {
        target: emit(plan, checkpoint, spec, target, folder, force=force, writing=writing, progress=progress)
        for target, folder in folders.items()
    }
    composed = Composed(plan, folders, lowerings, overlaps, evaluations)
    for folder in folders.values():
        write_text(folder / INTERFERENCE, _json(composed.described()), "interference")
    return composed


def rescale(
    plan: EditPlan,
    *,
    factor: float | None = None,
    kl_budget: float | None = None,
    class_budgets: Mapping[MatrixRole, float] | None = None,
    loaded: LoadedModel | None = None,
    neutral: NeutralTexts | None = None,
) -> EditPlan:
    """The plan at ``factor`` times its present strength, or at the largest strength within a KL budget, measured on ``loaded``.

    What was measured of the old strength is dropped; which prompts chose it is not. Raises PlanError unless exactly one of
    both is given, and for factors that are not finite.
    """
    if (factor is None) == (kl_budget is None and class_budgets is None):
        raise PlanError("give either --by, or a KL budget")
    if plan.structure and not plan.edits:
        raise PlanError("the plan edits no weights and has no strength: what it removes is removed at any")
    before = 1.0 if plan.measured.strength is None else plan.measured.strength
    bare = replace(plan, measured=Measured(strength=before, selected_on=plan.measured.selected_on))
    if factor is not None:
        if not math.isfinite(factor):
            raise PlanError(f"--by is {factor}, expected a finite number")
        return bare.at_strength(factor, scaling(plan))
    if loaded is None or neutral is None:
        raise PlanError("a KL budget is measured: it needs the model")
    settled = settle_strength(
        loaded, bare, kl_budget=kl_budget, class_budgets=class_budgets, neutral=neutral, scaled=scaling(plan)
    )
    return replace(settled, measured=replace(settled.measured, strength=before * _strength(settled)))


def overlap(plans: Sequence[EditPlan], spec: ModelSpec) -> tuple[Overlap, ...]:
    """What each pair of plans shares: in all, and at each matrix and bias that both edit.

    Matrices come in the model's order, biases behind them. What is shared in all is of the updates that the plans know.
    """
    found: list[Overlap] = []
    sites = {site.matrix: site for site in (*spec.sites, *spec.readers)}
    for (i, first), (j, second) in combinations(enumerate(plans), 2):
        mine, theirs = _by_tensor(first), _by_tensor(second)
        order = [
            name for name in (*sites, *(name for name in mine if name not in sites)) if name in mine and name in theirs
        ]
        shared, inners, weights = [], [], []
        for name in order:
            a, b = _known(mine[name]), _known(theirs[name])
            key = sites[name].key if name in sites else name
            if a is None or b is None:
                shared.append(Overlap(i, j, key, None, None, None))
                continue
            inner, weight = _inner(a, b), a.norm * b.norm
            cosine = inner / max(weight, 1e-30)
            if isinstance(a, LowRank) and isinstance(b, LowRank):
                energy = _shared_energy(a, b, sites[name]) if name in sites else None
                shared.append(Overlap(i, j, key, cosine, _direction(a, b), energy))
            else:
                shared.append(Overlap(i, j, key, cosine, cosine, None))
            inners.append(inner)
            weights.append(weight)
        size = math.prod(math.sqrt(sum(e.norm**2 for e in map(_known, part.values()) if e)) for part in (mine, theirs))
        known = [one for one in shared if one.update is not None]
        means = [_mean([getattr(one, key) for one in known], weights) for key in _MEANS]
        found += [Overlap(i, j, None, sum(inners) / max(size, 1e-30), *means), *shared]
    return tuple(found)


def names(plans: Sequence[EditPlan]) -> list[str]:
    """What each plan's behaviour is called; plans of one name are told apart by a number."""
    return told_apart([str(plan.data.get("name") or "unnamed") for plan in plans])


def told_apart(called: Sequence[str]) -> list[str]:
    """The names, with a number where one occurs more than once."""
    return [
        name if called.count(name) == 1 else f"{name} {called[: i + 1].count(name)}" for i, name in enumerate(called)
    ]


def _mean(values: Sequence[float | None], weights: Sequence[float]) -> float:
    """The weighted mean of the values that are known; 0 where none is."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(value * weight for value, weight in known) / max(sum(weight for _, weight in known), 1e-30)


_MEANS = ("direction", "components")


def _measure(
    loaded: LoadedModel,
    parts: Sequence[EditPlan],
    plan: EditPlan,
    questions: Mapping[str, tuple[EditPlan, Sequence[Question]]],
    neutral: NeutralTexts,
    penalty: float | None,
    progress: Progress,
) -> dict[str, Evaluation]:
    """On each behaviour's questions: the base, each part alone at the strength it has in the composition, all together."""
    strength = _strength(plan)
    called = names(parts)
    candidates = [
        plan_candidate(loaded, name, part.scaled(strength), note="alone")
        for name, part in zip(called, parts, strict=True)
    ]
    candidates.append(plan_candidate(loaded, "together", plan, note=" + ".join(called)))
    found = {}
    for name, (part, asked) in questions.items():
        own, _ = read_metric(part.data.get("metric"))
        suite = Suite(asked, knowledge_questions(), neutral, limit=PROOF, metric=own, repetition_penalty=penalty)
        found[name] = assess(loaded, suite, candidates, context={"behavior": name}, progress=progress)
    return found


def questions_of(
    plans: Sequence[EditPlan], questions: Sequence[Sequence[Question] | None] | None
) -> dict[str, tuple[EditPlan, Sequence[Question]]]:
    """The questions of each behaviour, with a plan of it. Behaviours without questions are told in a notice.

    Those that come with the package are asked once, also where several plans are of one behaviour.
    """
    found: dict[str, tuple[EditPlan, Sequence[Question]]] = {}
    numbered = names(plans)
    for place, plan in enumerate(plans):
        name = str(plan.data.get("name") or "unnamed")
        asked = builtin_questions(name) if questions is None else questions[place]
        if asked:
            found[name if questions is None else numbered[place]] = (plan, asked)
        elif questions is None:
            notice(
                f"the effect on {name} is not measured: no questions of that name come with the package. Give --eval FILE for "
                "each plan"
            )
    return found


def _strength(settled: EditPlan) -> float:
    """The strength of a plan that was settled."""
    assert settled.measured.strength is not None
    return settled.measured.strength


def _by_tensor(plan: EditPlan) -> dict[str, Edit]:
    """The edits that change something, by tensor."""
    return {edit.tensor: edit for edit in plan.edits if edit.norm is None or edit.norm > 0}


def _known(edit: Edit) -> LowRank | Bias | None:
    """The update, where the plan alone knows all of it."""
    return edit if isinstance(edit, (LowRank, Bias)) else None


def _inner(a: LowRank | Bias, b: LowRank | Bias) -> float:
    """``<ΔW, ΔW'>`` without forming either."""
    if isinstance(a, Bias) or isinstance(b, Bias):
        assert isinstance(a, Bias) and isinstance(b, Bias)  # a tensor is a matrix or a bias
        return float(a.delta.double() @ b.delta.double())
    return float(((a.B.double().T @ b.B.double()) * (a.A.double() @ b.A.double().T)).sum())


def _direction(a: LowRank, b: LowRank) -> float:
    if a.mean_effect is not None and b.mean_effect is not None:
        one, two = a.B.double() @ a.mean_effect.double(), b.B.double() @ b.mean_effect.double()
        if bool(one.any() and two.any()):
            return float(torch.cosine_similarity(one, two, dim=0))
    bases = (torch.linalg.qr(edit.B.double()).Q for edit in (a, b))
    return float(torch.linalg.matrix_norm(next(bases).T @ next(bases), ord=2).clamp(max=1))


def _shared_energy(a: LowRank, b: LowRank, site: Site) -> float:
    """``Σ_j min(p_j, q_j)`` with p and q how ``‖ΔW_j‖²`` is spread over the components."""
    spreads = []
    for edit in (a, b):
        columns = ((edit.B.double().T @ edit.B.double()) @ edit.A.double() * edit.A.double()).sum(dim=0).clamp(min=0)
        energy = columns.view(site.components, -1).sum(dim=1)
        spreads.append(energy / energy.sum().clamp(min=1e-30))
    return float(torch.minimum(*spreads).sum())


def _json(value: Any) -> str:
    import json

    return json.dumps(value, indent=1) + "\n"
