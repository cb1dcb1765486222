r"""Which experts carry a behaviour: how differently the classes route, and how sure that is.

One *example* is one draw, because the tokens of a text are not independent. With p_e the share of an example's tokens that
choose expert e:

- ``difference``: mean of p_e over positive examples minus that over negative ones (functional Token Resonance Imaging, Mixture
  of Tunable Experts, arXiv 2502.11096);
- ``mass``: the same of the routing weight in place of a count;
- ``risk``: the difference of the pooled rates, tokens chosen over tokens seen (SteerMoE, arXiv 2509.09660);
- ``z``: ``difference`` over its standard error (Welch); ``q`` is its false-discovery rate over all experts (Benjamini and
  Hochberg);
- ``alignment``: cos(v, E[w_e E_e(x)]), of the expert's share of its layer's output with the layer's steering vector.

``stability`` is the share of bootstrap resamples in which the expert stays among the strongest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from steer2edit.architecture import ModelSpec
from steer2edit.bootstrap import LEAST_DRAWS
from steer2edit.capture.evidence import too_few
from steer2edit.capture.populations import Scope, routing_key
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import Checkpoint
from steer2edit.checkpoint.fp8 import read_values
from steer2edit.data.answers import LABELS, Label
from steer2edit.errors import DataError, PlanError
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent

Criterion = Literal["difference", "mass", "risk", "z", "alignment"]
CRITERIA: tuple[Criterion, ...] = ("difference", "mass", "risk", "z", "alignment")
Side = Literal["negative", "positive"]


@dataclass(frozen=True)
class ExpertTable:
    """Scores of every expert; all tensors are ``[mixture layers, experts]``, float64, in the order of ``layers``.

    ``positive`` and ``negative`` are the classes' selection rates; ``low`` and ``high`` bound the difference (bootstrap, 95 %).
    ``alignment`` is None where the weights were not read. ``resampled`` [resamples, layers, experts] is what the criterion of
    ``by`` is under resampled examples. ``scope`` says over which tokens.
    """

    layers: tuple[int, ...]
    scope: Scope
    by: Criterion
    positive: torch.Tensor
    negative: torch.Tensor
    difference: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    mass: torch.Tensor
    risk: torch.Tensor
    z: torch.Tensor
    q: torch.Tensor
    alignment: torch.Tensor | None
    resampled: torch.Tensor

    @property
    def score(self) -> torch.Tensor:
        """The scores of the criterion: positive where an expert belongs to the positive class."""
        found: torch.Tensor | None = getattr(self, self.by)
        assert found is not None
        return found


@dataclass(frozen=True)
class Ranked:
    """One expert of a ranking, with its numbers."""

    layer: int
    expert: int
    score: float
    positive: float
    negative: float
    difference: float
    low: float
    high: float
    z: float
    q: float
    alignment: float | None
    stability: float


def expert_table(
    statistics: Statistics,
    *,
    scope: Scope = "response",
    by: Criterion = "difference",
    control: Statistics | None = None,
    alignment: torch.Tensor | None = None,
) -> ExpertTable:
    """Score every expert from one capture, less the scores of a ``control`` on the same topics where there is one.

    ``alignment`` is what :func:`alignments` found, needed for that criterion. Raises PlanError where the statistics hold no
    routing, and DataError where the scope cannot tell the classes apart.
    """
    layers = routed_layers(statistics)
    if by == "alignment" and alignment is None:
        raise PlanError("alignment reads the experts' matrices: name the model")
    if control is not None and routed_layers(control) != layers:
        raise PlanError("the control's statistics are of another model")
    selected = {label: _rows(statistics, layers, "selected", scope, label) for label in LABELS}
    if scope == "prompt" and torch.equal(selected["positive"][0], selected["negative"][0]):
        raise DataError(
            "both classes have the same prompts, so the routing of prompts is the same too; use --scope response, or data "
            'whose rows have a "label"'
        )
    difference, error = _difference(statistics, layers, scope)
    draws = _resampled(statistics, layers, "selected", scope)
    mass, mass_draws = _contrast(statistics, layers, "mass", scope), _resampled(statistics, layers, "mass", scope)
    risk = _risk(statistics, layers, scope)
    if control is not None:
        other, other_error = _difference(control, layers, scope)
        difference, error = difference - other, (error.square() + other_error.square()).sqrt()
        draws = draws - _resampled(control, layers, "selected", scope)
        mass = mass - _contrast(control, layers, "mass", scope)
        mass_draws = mass_draws - _resampled(control, layers, "mass", scope)
        risk = risk - _risk(control, layers, scope)
    prompts = statistics.distinct_prompts
    few = prompts is not None and prompts < LEAST_DRAWS
    if few:
        notice(f"{too_few(prompts or 0)}: no expert counts as stable, and every q is 1")
    known = (error > 0) & (not few)
    z = torch.where(known, difference / error.clamp(min=1e-300), 0.0)
    resampled = {"mass": mass_draws, "z": torch.where(known, draws / error.clamp(min=1e-300), 0.0)}.get(by, draws)
    if few:
        resampled = torch.zeros_like(resampled)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return ExpertTable(
        layers=layers,
        scope=scope,
        by=by,
        positive=selected["positive"][0],
        negative=selected["negative"][0],
        difference=difference,
        low=low,
        high=high,
        mass=mass,
        risk=risk,
        z=z,
        q=false_discovery(z),
        alignment=alignment,
        resampled=resampled,
    )


def routed_layers(statistics: Statistics) -> tuple[int, ...]:
    """The layers whose routing the statistics hold. Raises PlanError where there are none."""
    start = routing_key("selected", "response", 0).removesuffix("0")
    found = sorted({int(key.removeprefix(start)) for key, _, _ in statistics.moments if key.startswith(start)})
    if not found:
        raise PlanError(
            "the statistics hold no routing of experts: the model is not a mixture, or they are of an older version"
        )
    return tuple(found)


def ranking(table: ExpertTable, top: int, side: Side = "negative", per_layer: bool = False) -> list[Ranked]:
    """The ``top`` experts most typical of one class, of the whole model or of each layer, the strongest first."""
    sign = 1.0 if side == "positive" else -1.0
    stability = _stability(table, top, sign, per_layer)
    chosen = _strongest(sign * table.score, top, per_layer).nonzero().tolist()
    ranked = [
        Ranked(
            layer=table.layers[row],
            expert=expert,
            score=float(table.score[row, expert]),
            positive=float(table.positive[row, expert]),
            negative=float(table.negative[row, expert]),
            difference=float(table.difference[row, expert]),
            low=float(table.low[row, expert]),
            high=float(table.high[row, expert]),
            z=float(table.z[row, expert]),
            q=float(table.q[row, expert]),
            alignment=None if table.alignment is None else float(table.alignment[row, expert]),
            stability=float(stability[row, expert]),
        )
        for row, expert in chosen
    ]
    return sorted(ranked, key=lambda one: -sign * one.score)


def weakest_for_pruning(
    table: ExpertTable, per_layer: int, side: Side = "negative", groups: int = 1
) -> list[tuple[int, int]]:
    """The experts most typical of one class, equally many in every layer and group.

    They are pairs of layer and expert.

    Raises PlanError where ``per_layer`` cannot be divided among the groups.
    """
    if per_layer % groups:
        raise PlanError(
            f"{per_layer} experts a layer cannot be taken evenly from {groups} groups; give a multiple of {groups}"
        )
    sign = 1.0 if side == "positive" else -1.0
    layers, experts = table.score.shape
    by_group = (sign * table.score).view(layers, groups, experts // groups)
    chosen = by_group.topk(per_layer // groups, dim=-1).indices
    offsets = torch.arange(groups)[None, :, None] * (experts // groups)
    numbers = (chosen + offsets).flatten(1).tolist()
    return [(layer, expert) for layer, row in zip(table.layers, numbers, strict=True) for expert in sorted(row)]


def false_discovery(z: torch.Tensor) -> torch.Tensor:
    """Benjamini and Hochberg's q of each two-sided z, in the shape of z.

    q is the least rate of false discoveries at which the z counts.
    """
    p = torch.erfc(z.abs() / math.sqrt(2)).flatten()
    order = p.argsort()
    ranks = torch.arange(1, len(p) + 1, dtype=p.dtype)
    scaled = (p[order] * len(p) / ranks).flip(0).cummin(0).values.flip(0).clamp(max=1.0)
    q = torch.empty_like(p)
    q[order] = scaled
    return q.view(z.shape)


def _strongest(scores: torch.Tensor, top: int, per_layer: bool) -> torch.Tensor:
    """Which ``[…, layers, experts]`` are among the ``top`` of their model or layer; only experts on the right side of zero."""
    flat = scores if per_layer else scores.flatten(-2)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept.scatter_(-1, flat.topk(min(top, flat.shape[-1]), dim=-1).indices, True)
    return kept.view(scores.shape) & (scores > 0)


def _stability(table: ExpertTable, top: int, sign: float, per_layer: bool) -> torch.Tensor:
    return _strongest(sign * table.resampled, top, per_layer).double().mean(dim=0)


def _rows(
    statistics: Statistics, layers: Sequence[int], what: str, scope: Scope, label: Label
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and mean square over examples, each [layers, experts]."""
    found = [statistics.moments[routing_key(what, scope, layer), "output", label] for layer in layers]
    return torch.stack([one.mean for one in found]), torch.stack([one.m2 for one in found])


def _difference(statistics: Statistics, layers: Sequence[int], scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the selection rates, with its standard error."""
    means, variances = [], []
    for label in LABELS:
        mean, m2 = _rows(statistics, layers, "selected", scope, label)
        # repeated rows are not further draws
        count = min(statistics.examples[label], statistics.distinct.get(label, statistics.examples[label]))
        means.append(mean)
        # rounding alone is not a spread
        spread = (m2 - mean.square()).clamp(min=0)
        variances.append(torch.where(spread > 1e-12, spread, 0.0) / max(count - 1, 1))
    return means[0] - means[1], (variances[0] + variances[1]).sqrt()


def _contrast(statistics: Statistics, layers: Sequence[int], what: str, scope: Scope) -> torch.Tensor:
    return _rows(statistics, layers, what, scope, "positive")[0] - _rows(statistics, layers, what, scope, "negative")[0]


def _risk(statistics: Statistics, layers: Sequence[int], scope: Scope) -> torch.Tensor:
    rates = []
    for label in LABELS:
        counts = _rows(statistics, layers, "counts", scope, label)[0]
        rates.append(counts[:, :-1] / counts[:, -1:].clamp(min=1e-300))
    return rates[0] - rates[1]


def _resampled(statistics: Statistics, layers: Sequence[int], what: str, scope: Scope) -> torch.Tensor:
    """The classes' difference under resampled examples, [resamples, layers, experts]."""
    drawn = [
        statistics.resamples("bootstrap", routing_key(what, scope, layer), "output").difference().double()
        for layer in layers
    ]
    return torch.stack(drawn, dim=1)


def alignments(
    statistics: Statistics, spec: ModelSpec, checkpoint: Checkpoint, progress: Progress = silent
) -> torch.Tensor:
    """cos(v, E[w_e E_e(x)]) of each expert, [mixture layers, experts]; reads every expert's output matrix once."""
    rows = {layer: i for i, layer in enumerate(routed_layers(statistics))}
    found = torch.zeros(len(rows), max(router.experts for router in spec.routers), dtype=torch.float64)
    sites = [site for site in spec.sites if site.expert is not None]
    with progress("alignment", total=len(sites)) as advance:
        for site in sites:
            v = statistics.difference(site.vector_key)
            W = read_values(checkpoint, site.locate(checkpoint)).double()
            both = [statistics.experts[site.layer, label] for label in LABELS]
            share = (both[0].weighted[site.expert] + both[1].weighted[site.expert]) / 2
            written = W @ share if site.orientation == "out_in" else share @ W
            if site.bias_vector is not None:
                key = routing_key("mass", "response", site.layer)
                mass = sum(statistics.mean(key, "output", label)[site.expert] for label in LABELS) / 2
                written = written + checkpoint.read(site.locate(checkpoint, site.bias_vector)).double() * mass
            size = float(v.norm() * written.norm())
            assert site.expert is not None
            found[rows[site.layer], site.expert] = float(v @ written) / size if size > 0 else 0.0
            advance(1)
    return found
