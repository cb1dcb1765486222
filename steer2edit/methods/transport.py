r"""Affine transport of each coordinate of a writer's output.

It gets the mean and the spread that it has on the positive class.

    y' = omega * y + beta,   omega = sigma_pos / sigma_neg,   beta = mu_pos - omega * mu_neg

This is Linear-AcT (arXiv 2410.23054) in closed form, from the captured means and variances: the optimal transport between two
Gaussians, coordinate by coordinate. It is exact in the weights, ``W' = diag(omega) W`` and ``b' = omega * b + beta``, where the
writer has a bias or can get one. Strength s gives ``(1 - s) y + s y'``. All maps are estimated on the base at once, and not one
after another, so that together they move the model further than each alone.

Without a bias, ``--constant none`` takes the gain alone that comes nearest, ``omega + beta mu / E[y²]`` on the negative class.
Its relative squared error, ``E‖gain * y - y'‖² / E‖y' - y‖²`` over the captured data, stands in the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from steer2edit.errors import PlanError, listing
from steer2edit.methods._shared import LAYERS
from steer2edit.notices import notice
from steer2edit.options import option
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from steer2edit.architecture import ModelSpec, Site
    from steer2edit.plan import Edit, EditPlan
    from steer2edit.scoring.scores import Scoring

_TINY = 1e-12


@dataclass(frozen=True)
class Options:
    """Which outputs are transported, how far a gain may go, and what becomes of the constant."""

    sites: Literal["attn", "mlp", "both"] = option("both", "The matrices whose outputs are transported.")
    constant: Literal["bias", "none"] = option(
        "bias",
        "Where the map's constant goes: into the writer's bias, or nowhere, with the gain that then comes nearest.",
    )
    most_gain: float = option(3.0, "Largest gain of a coordinate; its inverse is the smallest.", minimum=1)
    layers: tuple[int, int] | None = option(None, LAYERS)


@dataclass(frozen=True)
class _Map:
    """``omega`` and ``beta`` [out], float64, and the relative squared error of the gain where beta is left out."""

    omega: torch.Tensor
    beta: torch.Tensor
    error: float = 0.0


def plan(scoring: Scoring, options: Options = Options(), progress: Progress = silent) -> EditPlan:
    """Factors for the rows of each writer, and its bias.

    Raises PlanError where a writer can have no bias, and for statistics that are not those of two classes of text.
    """
    from steer2edit.methods._biases import bias_edit, no_bias
    from steer2edit.plan import Base, EditPlan, Scale, ScaleAdd
    from steer2edit.plan.operations import Bias

    _check(scoring)
    spec = scoring.spec
    sites = _sites(spec, options)
    if any(site.expert is not None for site in spec.sites):
        notice("routed experts are left alone: the outputs of single experts are not captured")
    if options.constant == "bias" and (problems := [why for site in sites if (why := no_bias(spec, site))]):
        told = ", ".join(f"{site.key} {_map(scoring, site, options, gain_only=True).error:.2g}" for site in sites[:4])
        raise PlanError(
            f"the map's constant is a bias:\n{listing(problems)}\n--constant none takes the nearest gain alone; its relative "
            f"squared error: {told}"
        )
    edits: list[Edit] = []
    errors = {}
    with progress("plan", total=len(sites)) as advance:
        for site in sites:
            found = _map(scoring, site, options, gain_only=options.constant == "none")
            edits.append(Scale(site.matrix, found.omega, "rows"))
            if options.constant == "none":
                errors[site.key] = found.error
                if site.bias_vector is not None:
                    edits.append(Scale(site.bias_vector, found.omega.clone(), "rows"))
            elif site.bias_vector is not None:
                added = Bias(site.bias_vector, found.beta.float())
                edits.append(ScaleAdd(site.bias_vector, (Scale(site.bias_vector, found.omega.clone(), "rows"),), added))
            else:
                edits.append(bias_edit(site, found.beta.float()))
            advance(1)
    method = {"name": "transport", **asdict(options), **({"errors": errors} if errors else {})}
    return EditPlan(Base.of(scoring.checkpoint), tuple(edits), method=method)


def widest(spec: ModelSpec, options: Options) -> Sequence[Edit]:
    """Factors of one for all rows of the writers of ``options``."""
    import torch

    from steer2edit.plan import Scale

    sites = _sites(spec, options)
    return [Scale(site.matrix, torch.ones(site.out_features, dtype=torch.float64), "rows") for site in sites]


def _check(scoring: Scoring) -> None:
    source = scoring.statistics.source
    if "vectors" in source or not all(scoring.statistics.examples[label] for label in ("positive", "negative")):
        raise PlanError(
            "the method transport needs the moments of both classes: give contrast data, and no imported vectors"
        )
    if source.get("protect"):
        raise PlanError("--protect clears a direction, and the method transport maps coordinates: leave it out")
    if source.get("vector", "mean") != "mean":
        raise PlanError(f"the method transport takes the classes' means and spreads, not --vector {source['vector']}")


def _sites(spec: ModelSpec, options: Options) -> list[Site]:
    from steer2edit.architecture import MatrixRole

    first, last = spec.layer_range(options.layers)
    roles = {"attn": (MatrixRole.ATTN_OUT,), "mlp": (MatrixRole.MLP_OUT,)}.get(
        options.sites, (MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT)
    )
    return [
        site for site in spec.sites if first <= site.layer <= last and site.role.kind in roles and site.expert is None
    ]


def _map(scoring: Scoring, site: Site, options: Options, *, gain_only: bool) -> _Map:
    import torch

    moments = scoring.statistics.moments
    target, source = (moments[site.key, "output", label] for label in ("positive", "negative"))
    spreads = [(one.m2 - one.mean.square()).clamp(min=0).sqrt() for one in (target, source)]
    # a coordinate that did not vary in either class is moved, not stretched
    known = (spreads[0] > _TINY) & (spreads[1] > _TINY)
    omega = torch.where(known, spreads[0] / spreads[1].clamp(min=_TINY), torch.ones_like(spreads[0]))
    omega = omega.clamp(1 / options.most_gain, options.most_gain)
    beta = target.mean - omega * source.mean
    if not gain_only:
        return _Map(omega, beta)
    energy = source.m2.clamp(min=_TINY)
    gain = (omega + beta * source.mean / energy).clamp(1 / options.most_gain, options.most_gain)
    # E(gain y - omega y - beta)², and E(y' - y)²
    rest = gain - omega
    missing = rest.square() * source.m2 - 2 * rest * beta * source.mean + beta.square()
    step = omega - 1
    moved = step.square() * source.m2 + 2 * step * beta * source.mean + beta.square()
    return _Map(gain, torch.zeros_like(beta), float(missing.sum() / moved.sum().clamp(min=_TINY)))
