r"""Compiled steering: the weights add the steering vector themselves, and mostly where the behaviour is at stake.

Activation steering adds v to a site's output at every token. A rank-1 edit v aᵀ adds (a·x) v instead, so a is asked for a
push of one on the behaviour's own inputs with as little energy as it can have:

    minimise  Σ_i a_i² E[x_i²]   subject to   a · x_bar = 1      ⇒      a_i = (x_bar_i / s_i) / Σ_k x_bar_k² / s_k

with s_i = E[x_i²] + eps · mean(E[x²]). Cross moments are left out: a stays a sum of single components' work, needs only
streamed statistics, and fires less on text unlike the contrast data, which the full solution (a·x ≈ 1 on every token) does
not. docs/strength.md has the measurements.

Each head's block and each neuron is a component as in Steer2Edit, with ΔW_j = v a_jᵀ; components that carry the push
reliably (large x_bar² against E[x²]) get most of it. Strength 1 is a mean push of v, as activation steering's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch

from steer2edit.analysis import analyse, component_scores, scored_projection
from steer2edit.architecture import ModelSpec, Role, Site
from steer2edit.checkpoint import Checkpoint
from steer2edit.errors import PlanError
from steer2edit.plan import Base, EditPlan, LowRank, Scores
from steer2edit.progress import Progress, silent
from steer2edit.statistics import Statistics

# keeps a component that was nearly silent in the contrast data from carrying much
_EPS = 0.1
_TINY = 1e-12


@dataclass(frozen=True)
class Options:
    """``sites`` are the writers that carry the vector (by default attention alone, which did best at equal KL); ``carriers``
    is the share of each site's input columns that do, the most reliable first; ``layers`` are the first and last layer edited.
    """

    sites: Literal["attn", "mlp", "both"] = "attn"
    carriers: float = 1.0
    layers: tuple[int, int] | None = None


def plan(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    statistics: Statistics,
    options: Options = Options(),
    progress: Progress = silent,
) -> EditPlan:
    """One rank-1 edit for each writer chosen. Raises PlanError for a share of carriers outside (0, 1]."""
    if not 0 < options.carriers <= 1:
        raise PlanError(f"--carriers is {options.carriers}, expected a share above 0 and at most 1")
    roles = {"attn": {Role.ATTN_OUT}, "mlp": {Role.MLP_OUT}}.get(options.sites, {Role.ATTN_OUT, Role.MLP_OUT})
    first, last = spec.layer_range(options.layers)
    sites = [site for site in spec.sites if site.role in roles and first <= site.layer <= last]
    edits, tables = [], {}
    with progress("plan", total=len(sites)) as advance:
        for site in sites:
            v = statistics.difference(site.key).float()
            v_hat = v / v.norm().clamp(min=_TINY)
            x_bar = statistics.x_bar(site.key).float()
            a = v.norm() * _functional(statistics, site, x_bar, options.carriers)
            found = analyse(checkpoint, site, v_hat, x_bar)
            g = component_scores(found, site, x_bar)
            # |lam| is the size of the component's edit; its sign says whether it works with or against the component
            lam = g.sign() * a.view(site.components, -1).norm(dim=1)
            tables[site.key] = Scores(g, lam, scored_projection(found, site))
            if bool(a.any()):
                edits.append(LowRank(site.tensor, v_hat[:, None].clone(), a[None, :].clone()))
            advance(1)
    base = Base(checkpoint.name, checkpoint.revision, checkpoint.fingerprint)
    method = {"name": "steering", **asdict(options), "layers": [first, last]}
    return EditPlan(base, tuple(edits), tables, method)


def _functional(statistics: Statistics, site: Site, x_bar: torch.Tensor, carriers: float) -> torch.Tensor:
    """``a`` [in], with a · x_bar = 1."""
    energy = statistics.energy(site.key).float()
    energy = energy + _EPS * energy.mean() + _TINY
    weights = x_bar / energy
    reliability = weights * x_bar
    kept = max(1, round(carriers * len(x_bar)))
    if kept < len(x_bar):
        chosen = torch.zeros_like(weights)
        index = reliability.topk(kept).indices
        chosen[index] = weights[index]
        weights = chosen
    return weights / (weights @ x_bar).clamp(min=_TINY)
