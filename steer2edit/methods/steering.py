r"""Compiled steering: the weights add the steering vector themselves, and mostly where the behaviour is at stake.

Activation steering adds v to a site's output at every token. A rank-1 edit v aᵀ adds (a·x) v instead, so a is asked for a
push of one on the behaviour's own inputs, for none on average elsewhere, and for as little energy as it can have:

    minimise  Σ_j a_jᵀ S_j a_j   subject to   a · x_bar = 1,  a · μ_prose = 0,  a · μ_chat = 0

where j runs over the components (heads' blocks of columns; single neurons). S_j is the second moment of the component's input:
weighted, on the contrast data, on running prose and on the model's own answers, plus eps times its mean diagonal.
Moments between components are left out: a stays a sum of single components' work, and with blocks it fires less on text unlike
the contrast data. The pushes on means are shared: one component's may make up for another's. docs/notebook.md has the
measurements.

Each head's block and each neuron is a component as in Steer2Edit, with ΔW_j = v a_jᵀ; components that carry the push
reliably get most of it. Strength 1 is a mean push of v, as activation steering's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from steer2edit.errors import PlanError
from steer2edit.methods._shared import ALL_COMPONENTS, LAYERS
from steer2edit.methods._solver import Energy, SilentSpace, least_energy
from steer2edit.notices import notice
from steer2edit.options import option
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from steer2edit.capture.populations import Other, Source
    from steer2edit.capture.statistics import Statistics
    from steer2edit.plan import EditPlan
    from steer2edit.scoring.scores import Scoring, SiteScores

UNSAID: Mapping[str, Any] = {"chat": 0.0, "zero_push": "none"}
"""What the options were in plans that do not hold them."""


@dataclass(frozen=True)
class Options:
    """Which writers and components carry the vector, and where it is to be silent. ``sites`` is attention alone by default.

    ``stable`` leaves out components whose score's bootstrap interval holds zero; of the others ``carriers`` is the share that
    carries the vector at each site, the most reliable first. What is left of ``background`` and ``chat`` to 1 is the weight of
    the contrast data; for a model that wrote no answers both others are raised in proportion. Texts of ``--keep`` count with
    ``keep_weight`` beside them ("soft"), or the edit lies where their inputs have hardly any energy ("hard"). Experts that fewer
    than ``min_tokens`` tokens were routed to are left alone.
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
        0.4, "Weight of the background prose in the second moments, 0 to 1.", "--background-weight", rare=True
    )
    chat: float = option(
        0.4, "Weight of the model's own answers in the second moments, 0 to 1.", "--chat-weight", rare=True
    )
    zero_push: Literal["both", "prose", "chat", "none"] = option(
        "both", "Background on which the mean effect is held at zero.", rare=True
    )
    keep_as: Literal["soft", "hard"] = option(
        "soft", "Weigh the texts of --keep, or edit only where they have hardly any energy.", rare=True
    )
    keep_weight: float = option(1.0, "Weight of the texts of --keep in the second moments.", minimum=0, rare=True)
    stable: bool = option(True, ALL_COMPONENTS, "--all-components", value=False)
    layers: tuple[int, int] | None = option(None, LAYERS, shown_default="the deeper half of 12 or more")
    min_tokens: int = 32

    def check(self) -> None:
        """Raise PlanError for numbers out of their ranges."""
        if not 0 < self.carriers <= 1:
            raise PlanError(f"--carriers is {self.carriers}, expected a share above 0 and at most 1")
        for flag, weight in (("--background-weight", self.background), ("--chat-weight", self.chat)):
            if not 0 <= weight <= 1:
                raise PlanError(f"{flag} is {weight}, expected a number from 0 to 1")
        if self.background + self.chat > 1 + 1e-9:
            raise PlanError(
                f"--background-weight and --chat-weight are {self.background} and {self.chat}: together more than 1; "
                "the rest to 1 is the contrast data's"
            )
        if not 0 <= self.keep_weight < float("inf"):
            raise PlanError(f"--keep-weight is {self.keep_weight}, expected a number of at least 0")


def plan(scoring: Scoring, options: Options = Options(), progress: Progress = silent) -> EditPlan:
    """One rank-1 edit for each writer chosen. Raises PlanError for options out of their range, and where no writer can push."""
    from steer2edit.architecture import MatrixRole
    from steer2edit.plan import Base, EditPlan, LowRank

    options.check()
    spec = scoring.spec
    roles = {"attn": {MatrixRole.ATTN_OUT}, "mlp": {MatrixRole.MLP_OUT}}.get(
        options.sites, {MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT}
    )
    first, last = spec.layer_range(options.layers or _deeper_half(scoring))
    sites = [site for site in spec.sites if site.role.kind in roles and first <= site.layer <= last]
    sites, too_few = scoring.routed_enough(sites, options.min_tokens)
    terms = _Terms.of(scoring.statistics, options)
    edits, tables, unable = [], {}, []
    for one in scoring.score(sites, progress):
        a = terms.functional(scoring.statistics, one, options)
        if a is None:
            unable.append(one.site.key)
            a = one.x_bar.new_zeros(one.x_bar.shape)
        a = one.size * a
        # |lam| is the size of the component's edit; its sign says whether it works with or against the component
        lam = one.table.g.sign() * a.view(one.site.components, -1).norm(dim=1)
        tables[one.site.key] = replace(one.table, lam=lam)
        if bool(a.any()):
            edits.append(LowRank(one.site.matrix, one.v_hat[:, None].clone(), a[None, :].clone()))
    if unable:
        _say_unable(unable, len(sites), bool(edits))
    base = Base.of(scoring.checkpoint)
    method = {
        "name": "steering",
        **asdict(options),
        "layers": [first, last],
        "experts_left_alone": too_few,
        "weights": dict(terms.weights),
        "no_push_on": list(terms.silent),
        **({"matrices_left_alone": len(unable)} if unable else {}),
    }
    return EditPlan(base, tuple(edits), tables, method)


def _deeper_half(scoring: Scoring) -> tuple[int, int] | None:
    """The layers that carry the vector by default: all of a shallow model's.

    Vectors from elsewhere have their own places, and stay there.
    """
    return None if "vectors" in scoring.statistics.source else scoring.spec.deeper_half


class _Terms:
    """The sum that is minimised: ``weights`` of the sources' moments, and the sources that get no mean push."""

    def __init__(self, weights: Mapping[Source, float], silent: tuple[Other, ...], hard: bool) -> None:
        self.weights, self.silent, self.hard = weights, silent, hard

    @classmethod
    def of(cls, statistics: Statistics, options: Options) -> _Terms:
        weights: dict[Source, float] = {"background": options.background, "chat": options.chat}
        weights = {"contrast": max(1 - sum(weights.values()), 0.0), **weights}
        if not statistics.examples["chat"]:
            if options.chat and "chat" not in statistics.source:
                notice(
                    "the statistics hold no chats, which older versions did not capture: the moments are of contrast data and "
                    "prose alone; capture them again to weigh chats too"
                )
            left = 1 - weights.pop("chat")
            weights = {name: weight / left for name, weight in weights.items()} if left else {"contrast": 1.0}
        # without contrast data the typical input is the background's own
        known = bool(statistics.examples["positive"] and statistics.examples["negative"])
        wanted: dict[Other, bool] = {
            "background": options.zero_push in ("prose", "both"),
            "chat": options.zero_push in ("chat", "both"),
            "keep": True,
        }
        silent = tuple(
            name for name, there in wanted.items() if there and statistics.examples[name] and (known or name == "keep")
        )
        kept = bool(statistics.examples["keep"])
        if kept and options.keep_as == "soft":
            weights["keep"] = options.keep_weight
        return cls(weights, silent, kept and options.keep_as == "hard")

    def functional(self, statistics: Statistics, one: SiteScores, options: Options) -> torch.Tensor | None:
        """``a`` [in], with a · x_bar = 1 over the components that carry, zero elsewhere; None where no such functional is."""
        import torch

        site, x = one.site, one.x_bar.double()

        def moments(source: Source) -> torch.Tensor:
            if site.heads is not None and options.moments == "heads":
                return statistics.block_moments(site.key, source)
            return statistics.energy(site.key, source)

        parts = {source: moments(source) for source, weight in self.weights.items() if weight}
        S = Energy.of(parts, self.weights)
        space = SilentSpace.of(moments("keep")) if self.hard else None
        inverse = S.inverse if space is None else space.inverse(S)
        reliability = (inverse(x[:, None])[:, 0] * x).view(site.components, -1).sum(dim=1)
        if options.stable:
            reliability = reliability * one.table.stable
        carrying = torch.zeros_like(reliability)
        carrying[reliability.topk(max(1, round(options.carriers * site.components))).indices] = 1
        carrying = carrying * (reliability > 0)
        carries = carrying.repeat_interleave(site.in_features // site.components)
        if not bool((x * carries).any()):
            return torch.zeros_like(one.x_bar)
        silent = [statistics.mean(site.key, "input", source) for source in self.silent]
        a = least_energy(inverse, [mean * carries for mean in (x, *silent)], [1.0] + [0.0] * len(silent))
        return None if a is None else a.float()


def _say_unable(unable: list[str], sites: int, others: bool) -> None:
    reason = "their typical input is a mixture of those that are to get no push"
    if not others:
        raise PlanError(
            f"no matrix can push on the contrast data alone ({reason}); --zero-push none, or --keep-as soft, asks for less"
        )
    shown = ", ".join(unable[:5]) + (", …" if len(unable) > 5 else "")
    notice(f"{len(unable)} of {sites} matrices are left alone: {reason} ({shown})")
