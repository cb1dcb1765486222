r"""Compiled steering: the weights add the steering vector themselves, and mostly where the behaviour is at stake.

Activation steering adds v to a site's output at every token. A rank-1 edit v aᵀ adds (a·x) v instead, so a is asked for a
push of one on the behaviour's own inputs with as little energy as it can have:

    minimise  Σ_j a_jᵀ S_j a_j   subject to   a · x_bar = 1      ⇒      a_j ∝ S_j⁻¹ x_bar_j

where j runs over the components (heads' blocks of columns; single neurons) and S_j is the second moment of the component's
input, half of it on the contrast data and half on background text, plus eps times its mean diagonal. Moments between
components are left out: a stays a sum of single components' work. The full solution would fire on every token alike
(a·x ≈ 1), which is activation steering; with blocks it fires less on text unlike the contrast data. docs/notebook.md has
the measurements.

Each head's block and each neuron is a component as in Steer2Edit, with ΔW_j = v a_jᵀ; components that carry the push
reliably get most of it. Strength 1 is a mean push of v, as activation steering's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from steer2edit.errors import PlanError
from steer2edit.methods._shared import ALL_COMPONENTS, LAYERS
from steer2edit.options import option
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from steer2edit.capture.statistics import Statistics
    from steer2edit.plan import EditPlan
    from steer2edit.scoring.scores import Scoring, SiteScores

# of the moments' mean diagonal: keeps a direction that was nearly silent in the data from carrying much
_EPS = 0.01


@dataclass(frozen=True)
class Options:
    """Which writers and components carry the vector. ``sites`` is attention alone by default, which did best at equal KL.

    ``stable`` leaves out components whose score's bootstrap interval holds zero; of the others ``carriers`` is the share that
    carries the vector at each site, the most reliable first. Experts that fewer than ``min_tokens`` tokens were routed to are
    left alone.
    """

    search_mlp_share: ClassVar[bool] = True

    sites: Literal["attn", "mlp", "both"] = option("attn", "The matrices that carry the vector.")
    carriers: float = option(
        1.0, "Share of each matrix's heads or neurons that carry the vector, above 0 and at most 1."
    )
    moments: Literal["heads", "diagonal"] = option(
        "heads", "Weigh a head's input columns together, or each column by itself.", rare=True
    )
    background: float = option(
        0.5, "Weight of the background text in the second moments, 0 to 1.", "--background-weight", rare=True
    )
    stable: bool = option(True, ALL_COMPONENTS, "--all-components", value=False)
    layers: tuple[int, int] | None = option(None, LAYERS)
    min_tokens: int = 32


def plan(scoring: Scoring, options: Options = Options(), progress: Progress = silent) -> EditPlan:
    """One rank-1 edit for each writer chosen. Raises PlanError for a share of carriers outside (0, 1]."""
    from steer2edit.architecture import MatrixRole
    from steer2edit.plan import Base, EditPlan, LowRank

    if not 0 < options.carriers <= 1:
        raise PlanError(f"--carriers is {options.carriers}, expected a share above 0 and at most 1")
    if not 0 <= options.background <= 1:
        raise PlanError(f"--background-weight is {options.background}, expected a number from 0 to 1")
    spec = scoring.spec
    roles = {"attn": {MatrixRole.ATTN_OUT}, "mlp": {MatrixRole.MLP_OUT}}.get(
        options.sites, {MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT}
    )
    first, last = spec.layer_range(options.layers)
    sites = [site for site in spec.sites if site.role.kind in roles and first <= site.layer <= last]
    sites, too_few = scoring.routed_enough(sites, options.min_tokens)
    edits, tables = [], {}
    for one in scoring.score(sites, progress):
        a = one.size * _functional(scoring.statistics, one, options)
        # |lam| is the size of the component's edit; its sign says whether it works with or against the component
        lam = one.table.g.sign() * a.view(one.site.components, -1).norm(dim=1)
        tables[one.site.key] = replace(one.table, lam=lam)
        if bool(a.any()):
            edits.append(LowRank(one.site.matrix, one.v_hat[:, None].clone(), a[None, :].clone()))
    base = Base.of(scoring.checkpoint)
    method = {"name": "steering", **asdict(options), "layers": [first, last], "experts_left_alone": too_few}
    return EditPlan(base, tuple(edits), tables, method)


def _functional(statistics: Statistics, one: SiteScores, options: Options) -> torch.Tensor:
    """``a`` [in], with a · x_bar = 1 over the components that carry; zero elsewhere, and everywhere if none does."""
    import torch

    from steer2edit.capture.populations import SOURCES
    from steer2edit.scoring.scores import TINY

    site, x = one.site, one.x_bar.double()
    by_component = x.view(site.components, -1)
    if site.heads is not None and options.moments == "heads":
        contrast, background = (statistics.block_moments(site.key, name).double() for name in SOURCES)
        S = (1 - options.background) * contrast + options.background * background
        floor = _EPS * float(S.diagonal(dim1=1, dim2=2).mean()) + TINY
        weights = torch.linalg.solve(S + floor * torch.eye(S.shape[1], dtype=S.dtype), by_component)
    else:
        contrast, background = (statistics.energy(site.key, name) for name in SOURCES)
        energy = (1 - options.background) * contrast + options.background * background
        weights = by_component / (energy + _EPS * energy.mean() + TINY).view(site.components, -1)
    reliability = (weights * by_component).sum(dim=1)
    if options.stable:
        reliability = reliability * one.table.stable
    kept = torch.zeros_like(reliability)
    kept[reliability.topk(max(1, round(options.carriers * site.components))).indices] = 1
    weights = weights * (kept * (reliability > 0))[:, None]
    push = float((weights * by_component).sum())
    return (weights.flatten() / push).float() if push > TINY else torch.zeros_like(one.x_bar)
