r"""Component edits: Steer2Edit (arXiv 2602.09870), with a strength that carries over between models.

For a site with weight W (out × in), steering vector v and typical input x_bar:

- head j, columns W_j:   g_j = cos(v_hat, W_j x_bar_j),              k_hat_j = W_jᵀ v_hat / ‖W_jᵀ v_hat‖
- neuron i, column w_i:  g_i = sign(x_bar_i) cos(v_hat, w_i),        k_i = sign(w_iᵀ v_hat)
- lam_j = sign(g_j) max(|g_j| - tau, 0) slope · unit,                ΔW_j = lam_j v_hat k_hat_jᵀ

where tau = rho·alpha and slope = 1 / (rho (1 - alpha)) is the elastic net's closed form. All edits of a site share v_hat
and act on disjoint columns, so its whole edit is one outer product: B = v_hat, A = concat_j(lam_j k_hat_jᵀ).

``unit`` is 1 in the paper (scale "absolute"), so that ‖ΔW_j‖ = |lam_j| whatever the model. With scale "relative" it is one
factor for each site, such that the site's whole edit pushes by ‖v‖ along v_hat on the typical input: a strength of 1 is then
a mean push of v, as for activation steering, and the proportions within a site are the paper's. docs/notebook.md compares
this unit with others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from steer2edit.errors import PlanError
from steer2edit.methods._shared import ALL_COMPONENTS, LAYERS
from steer2edit.options import Between, option
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from steer2edit.architecture import MatrixRole
    from steer2edit.plan import EditPlan, LowRank
    from steer2edit.scoring.scores import Scoring, SiteScores

TOP_HEADS = 0.2
TOP_NEURONS = 0.02


@dataclass(frozen=True)
class Options:
    """Which components are edited, and how strongly.

    A class (heads, neurons) takes its threshold and slope from ``rho_*`` and ``alpha`` (the paper's), from ``tau_*`` and
    ``slope``, or from ``top_*``, a budget: this many components, or below 1 this share of them, by |g| over all layers; tau is
    then the first score left out. ``rho <= 0`` or ``top == 0`` leaves the class alone. With nothing given for either class
    the budgets ``TOP_HEADS`` and ``TOP_NEURONS`` apply. ``stable`` leaves out components whose score's bootstrap interval
    holds zero; where it is None, so does scale "relative", and "absolute" edits them as the paper does. Experts that fewer than
    ``min_tokens`` tokens were routed to are left alone.
    """

    search_mlp_share: ClassVar[bool] = True

    rho_attn: float | None = option(
        None, "The paper's rho for heads, with --alpha; 0 leaves attention alone.", rare=True
    )
    rho_mlp: float | None = option(
        None, "The paper's rho for neurons, with --alpha; 0 leaves the MLPs alone.", rare=True
    )
    alpha: float | None = option(None, "The paper's alpha, 0 to 1.", rare=True)
    tau_attn: float | None = option(None, "Threshold on a head's |score|, in place of rho and alpha.", rare=True)
    tau_mlp: float | None = option(None, "Threshold on a neuron's |score|, in place of rho and alpha.", rare=True)
    slope: float | None = option(
        None, "Growth of the edit with the score above the threshold, with --tau-….", rare=True
    )
    top_heads: float | None = option(
        None,
        "Edit this many heads; below 1, this share of them.",
        shown_default=f"{TOP_HEADS:g}",
        search=Between(0.02, 1.0, log=True),
    )
    top_neurons: float | None = option(
        None,
        "Edit this many neurons; below 1, this share of them.",
        shown_default=f"{TOP_NEURONS:g}",
        search=Between(0.001, 0.2, log=True),
    )
    scale: Literal["relative", "absolute"] = option(
        "relative",
        "Unit of the edit: relative to the steering vector, or the paper's own; absolute means strength 1 and --all-components.",
    )
    stable: bool | None = option(None, ALL_COMPONENTS, "--all-components", value=False)
    layers: tuple[int, int] | None = option(None, LAYERS)
    min_tokens: int = 32

    @property
    def strength(self) -> float | None:
        """The strength of these options where none is given: the paper's lambda is absolute, and is not rescaled."""
        return 1.0 if self.scale == "absolute" else None

    @property
    def only_stable(self) -> bool:
        """Whether components of unstable sign are left alone."""
        return self.scale == "relative" if self.stable is None else self.stable

    def rule(self, role: MatrixRole) -> Rule | None:
        """The rule for heads or neurons; None where they are left alone. Raises PlanError for contradictions."""
        attn = role.value == "attn_out"
        rho, tau, top = (
            (self.rho_attn, self.tau_attn, self.top_heads) if attn else (self.rho_mlp, self.tau_mlp, self.top_neurons)
        )
        name = "attn" if attn else "mlp"
        flags = {f"--rho-{name}": rho, f"--tau-{name}": tau, "--top-heads" if attn else "--top-neurons": top}
        given = [flag for flag, value in flags.items() if value is not None]
        if len(given) > 1:
            raise PlanError(f"{' and '.join(given)} exclude each other; give one")
        for flag, value in {**flags, "--slope": self.slope}.items():
            if value is not None and not 0 <= value < float("inf") and not (flag.startswith("--rho") and value < 0):
                raise PlanError(f"{flag} is {value}, expected a number of at least 0")
        if rho is not None:
            return None if rho <= 0 else Rule.from_elastic_net(rho, self._alpha())
        if tau is not None:
            return Rule(tau=tau, slope=1.0 if self.slope is None else self.slope)
        if top is None and self._nothing_given():
            top = TOP_HEADS if attn else TOP_NEURONS
        return Rule(top=top, slope=1.0 if self.slope is None else self.slope) if top else None

    def _alpha(self) -> float:
        if self.alpha is None or not 0 <= self.alpha < 1:
            raise PlanError(f"--alpha is {self.alpha}, expected 0 <= alpha < 1 beside --rho-attn or --rho-mlp")
        return self.alpha

    def _nothing_given(self) -> bool:
        names = ("rho_attn", "rho_mlp", "tau_attn", "tau_mlp", "top_heads", "top_neurons")
        return all(getattr(self, name) is None for name in names)


@dataclass(frozen=True)
class Rule:
    """``lam = sign(g) max(|g| - tau, 0) slope``; with ``top``, tau is the first score outside of the budget."""

    tau: float | None = None
    slope: float = 1.0
    top: float | None = None

    @classmethod
    def from_elastic_net(cls, rho: float, alpha: float) -> Rule:
        """tau = rho·alpha, slope = 1/(rho (1-alpha)); back: rho = tau + 1/slope, alpha = tau·slope/(1 + tau·slope)."""
        return cls(tau=rho * alpha, slope=1 / (rho * (1 - alpha)))

    def settle(self, scores: torch.Tensor) -> Rule:
        """The same rule with tau known, given all scores of the class."""
        if self.top is None:
            return self
        count = int(self.top) if self.top >= 1 else round(self.top * len(scores))
        ranked = scores.abs().sort(descending=True).values
        return Rule(float(ranked[count]) if count < len(ranked) else 0.0, self.slope)

    def lam(self, g: torch.Tensor) -> torch.Tensor:
        """Soft-thresholded scores, of g's shape. ``settle`` comes first."""
        assert self.tau is not None
        return g.sign() * (g.abs() - self.tau).clamp(min=0) * self.slope


def plan(scoring: Scoring, options: Options = Options(), progress: Progress = silent) -> EditPlan:
    """Make one rank-1 edit for each site that has a component over its threshold.

    Every head and neuron is scored.

    Raises PlanError for contradictory options, and CheckpointError for weights that are not finite.
    """
    import torch

    from steer2edit.architecture import MatrixRole
    from steer2edit.plan import Base, EditPlan

    spec = scoring.spec
    first, last = spec.layer_range(options.layers)
    rules = {role: options.rule(role) for role in (MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT)}
    sites = [site for site in spec.sites if first <= site.layer <= last and rules[site.role.kind] is not None]
    sites, too_few = scoring.routed_enough(sites, options.min_tokens)
    scored = scoring.score(sites, progress)
    settled = {}
    for role, rule in rules.items():
        scores = [_eligible(one, options) for one in scored if one.site.role.kind is role]
        if rule is not None and scores:
            settled[role] = rule.settle(torch.cat(scores))
    edits, tables = [], {}
    for one in scored:
        lam, edit = _edit(one, settled[one.site.role.kind], options)
        tables[one.site.key] = replace(one.table, lam=lam)
        if bool(lam.any()):
            edits.append(edit)
    method = {
        "name": "component",
        **{
            key: value
            for key, value in asdict(replace(options, stable=options.only_stable)).items()
            if value is not None
        },
        "layers": [first, last],
        "experts_left_alone": too_few,
        **{f"threshold_{role.value}": rule.tau for role, rule in settled.items()},
    }
    checkpoint = scoring.checkpoint
    return EditPlan(Base.of(checkpoint), tuple(edits), tables, method)


def _eligible(one: SiteScores, options: Options) -> torch.Tensor:
    """The scores g, with zero for components whose sign hangs on the sample, unless these may be edited too."""
    return one.table.g * one.table.stable if options.only_stable else one.table.g


def _edit(one: SiteScores, rule: Rule, options: Options) -> tuple[torch.Tensor, LowRank]:
    """The components' lam, and the site's outer product."""
    import torch

    from steer2edit.plan import LowRank
    from steer2edit.scoring.scores import TINY

    site, projection = one.site, one.projection
    size = one.table.projection.abs()
    # where a component cannot write along v_hat at all, k_hat is undefined and nothing is edited
    lam = torch.where(size > TINY, rule.lam(_eligible(one, options)), 0.0)
    k_hat = projection.view(site.components, -1) / size.clamp(min=TINY)[:, None]
    if options.scale == "relative":
        # what the whole edit pushes along v_hat on the typical input; every component's share is positive
        push = float(lam @ (k_hat * one.x_bar.view(site.components, -1)).sum(dim=1))
        lam = lam * (one.size / push) if push > TINY * one.size else torch.zeros_like(lam)
    A = (lam[:, None] * k_hat).reshape(1, -1)
    return lam, LowRank(site.matrix, one.v_hat[:, None].clone(), A)
