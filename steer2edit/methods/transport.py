r"""Affine transport of each coordinate of a writer's output.

It gets the mean and the spread that it has on the positive class.

    y' = omega * y + beta,   omega = sigma_pos / sigma_neg,   beta = mu_pos - omega * mu_neg

This is Linear-AcT (arXiv 2410.23054) in closed form, from the captured means and variances: the optimal transport between two
Gaussians, coordinate by coordinate. It is exact in the weights, ``W' = diag(omega) W`` and ``b' = omega * b + beta``, where the
writer has a bias or can get one. Strength s gives ``(1 - s) y + s y'``. All maps are estimated on the base at once, and not one
after another, so that together they move the model further than each alone.

``--fit lineas`` trains the maps together instead (LinEAS, arXiv 2503.10679; see ``capture/lineas.py``). That is a training of
two numbers for each row of each matrix, the one method here that is one. It runs the model on the contrast data.

Without a bias, ``--constant none`` takes the gain alone that comes nearest, ``omega + beta mu / E[y²]`` on the negative class,
or trains gains alone. The closed gain's relative squared error, ``E‖gain * y - y'‖² / E‖y' - y‖²``, stands in the plan. Where the
model runs, it is measured on pairs that had no part in the fit, and so is what all maps together leave of the classes' distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from steer2edit.errors import PlanError, listing
from steer2edit.methods._shared import LAYERS
from steer2edit.notices import notice
from steer2edit.options import option, options_of
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    from steer2edit.architecture import ModelSpec, Site
    from steer2edit.capture.affine_maps import AffineMap
    from steer2edit.capture.moments import Moments
    from steer2edit.plan import Edit, EditPlan
    from steer2edit.scoring.scores import Scoring

RUNS_THE_MODEL = True
"""The compiler hands over the loaded model and the contrast data."""
_TINY = 1e-12


@dataclass(frozen=True)
class Options:
    """Which outputs are transported, how far, with what constant, and how the maps are found."""

    sites: Literal["attn", "mlp", "both"] = option("both", "The matrices whose outputs are transported.")
    constant: Literal["bias", "none"] = option(
        "bias",
        "Where the map's constant goes: into the writer's bias, or nowhere, with the gain that then comes nearest.",
    )
    most_gain: float = option(3.0, "Largest gain of a coordinate; its inverse is the smallest.", minimum=1)
    fit: Literal["closed", "lineas"] = option(
        "closed",
        "How the maps are found: in closed form from both classes' moments, or by LinEAS, which trains all of them together on "
        "the contrast data.",
    )
    fit_steps: int = option(60, "Steps of LinEAS.", minimum=1)
    fit_seconds: float = option(900.0, "Begin no step of LinEAS after so many seconds.", minimum=1)
    fit_sparse: float = option(
        0.0, "Weight of LinEAS's sparse penalties, which leave coordinates and whole outputs as they are.", minimum=0
    )
    fit_seed: int = option(0, "Seed of the order in which LinEAS takes the examples.", minimum=0, rare=True)
    layers: tuple[int, int] | None = option(None, LAYERS)


def plan(scoring: Scoring, options: Options = Options(), progress: Progress = silent) -> EditPlan:
    """Factors for the rows of each writer, and its bias.

    Raises PlanError where a writer can have no bias, for statistics that are not those of two classes of text, and for a
    training without a model and its data.
    """
    from steer2edit.methods._biases import no_bias
    from steer2edit.plan import Base, EditPlan

    _check(scoring, options)
    spec = scoring.spec
    sites = _sites(spec, options)
    if any(site.expert is not None for site in spec.sites):
        notice("routed experts are left alone: the outputs of single experts are not captured")
    if options.constant == "bias" and (problems := [why for site in sites if (why := no_bias(spec, site))]):
        told = ", ".join(f"{site.key} {_closed(scoring, site, options, gain_only=True)[1]:.2g}" for site in sites[:4])
        raise PlanError(
            f"the map's constant is a bias:\n{listing(problems)}\n--constant none takes the nearest gain alone; its relative "
            f"squared error: {told}"
        )
    if options.fit == "lineas":
        maps, measured = _trained(scoring, sites, options, progress)
    else:
        maps, measured = _closed_maps(scoring, sites, options, progress)
    edits: list[Edit] = []
    with progress("plan", total=len(sites)) as advance:
        for site in sites:
            edits += _edits(site, maps[site.key], options)
            advance(1)
    if not edits:
        raise PlanError("LinEAS left every output as it was: lower --fit-sparse, or give more --fit-steps")
    method = {"name": "transport", **asdict(options), **measured}
    return EditPlan(Base.of(scoring.checkpoint), tuple(edits), method=method)


def widest(spec: ModelSpec, options: Options) -> Sequence[Edit]:
    """Factors of one for all rows of the writers of ``options``."""
    import torch

    from steer2edit.plan import Scale

    sites = _sites(spec, options)
    return [Scale(site.matrix, torch.ones(site.out_features, dtype=torch.float64), "rows") for site in sites]


def _check(scoring: Scoring, options: Options) -> None:
    source = scoring.statistics.source
    if "vectors" in source or not all(scoring.statistics.examples[label] for label in ("positive", "negative")):
        raise PlanError(
            "the method transport needs the moments of both classes: give contrast data, and no imported vectors"
        )
    if source.get("protect"):
        raise PlanError("--protect clears a direction, and the method transport maps coordinates: leave it out")
    if source.get("vector", "mean") != "mean":
        raise PlanError(f"the method transport takes the classes' means and spreads, not --vector {source['vector']}")
    if options.fit == "lineas":
        if scoring.runs is None:
            raise PlanError(
                "--fit lineas trains the maps by running the model on contrast data, and none was given. Give it to compile "
                "(--behavior NAME or --data FILE), which writes the plan into the artefact"
            )
        return
    default = Options()
    for one in options_of(Options):
        if one.name.startswith("fit_") and getattr(options, one.name) != getattr(default, one.name):
            raise PlanError(f"{one.flags[-1]} would change nothing: it goes with --fit lineas")


def _sites(spec: ModelSpec, options: Options) -> list[Site]:
    from steer2edit.architecture import MatrixRole

    first, last = spec.layer_range(options.layers)
    roles = {"attn": (MatrixRole.ATTN_OUT,), "mlp": (MatrixRole.MLP_OUT,)}.get(
        options.sites, (MatrixRole.ATTN_OUT, MatrixRole.MLP_OUT)
    )
    return [
        site for site in spec.sites if first <= site.layer <= last and site.role.kind in roles and site.expert is None
    ]


def _edits(site: Site, one: AffineMap, options: Options) -> list[Edit]:
    """The rows' factors and the bias of a map; nothing where it is the identity."""
    from steer2edit.methods._biases import bias_edit
    from steer2edit.plan import Scale, ScaleAdd
    from steer2edit.plan.operations import Bias

    if one.identity:
        return []
    scale = Scale(site.matrix, one.omega, "rows")
    if options.constant == "none":
        own = site.bias_vector
        return [scale] if own is None else [scale, Scale(own, one.omega.clone(), "rows")]
    if site.bias_vector is None:
        return [scale, bias_edit(site, one.beta.float())]
    added = Bias(site.bias_vector, one.beta.float())
    return [scale, ScaleAdd(site.bias_vector, (Scale(site.bias_vector, one.omega.clone(), "rows"),), added)]


def _trained(
    scoring: Scoring, sites: Sequence[Site], options: Options, progress: Progress
) -> tuple[Mapping[str, AffineMap], dict[str, Any]]:
    """The maps of LinEAS, and what a plan says of the training."""
    from steer2edit.capture.affine_maps import read_classes
    from steer2edit.capture.lineas import FitSettings, fit_lineas

    assert scoring.runs is not None  # _check
    classes = read_classes(scoring.runs, sites, progress)
    settings = FitSettings(
        options.fit_steps,
        options.fit_seconds,
        options.fit_sparse,
        options.fit_seed,
        options.most_gain,
        options.constant == "bias",
    )
    fit = fit_lineas(scoring.runs, classes, settings, progress)
    training = {"steps": fit.steps, "parameters": fit.parameters, "prompts": fit.prompts[0], "loss": list(fit.fit)}
    told = {"training": training, **held_out_error(fit.prompts[1], fit.held_out)}
    return fit.maps, {**told, "left_as_it_was": fit.untouched} if fit.untouched else told


def _closed_maps(
    scoring: Scoring, sites: Sequence[Site], options: Options, progress: Progress
) -> tuple[Mapping[str, AffineMap], dict[str, Any]]:
    """The closed form's maps, and what a plan says of their error.

    The maps are those of all pairs. Their error is that of the same formula on a part of the pairs, measured on the rest.
    """
    from steer2edit.capture.affine_maps import losses_under, read_classes

    gain_only = options.constant == "none"
    maps, errors = {}, {}
    for site in sites:
        maps[site.key], errors[site.key] = _closed(scoring, site, options, gain_only=gain_only)
    told: dict[str, Any] = {"errors": errors} if gain_only else {}
    if scoring.runs is None or not scoring.runs.enough:
        why = "no model was run" if scoring.runs is None else "the data has too few prompts"
        return maps, {**told, "held_out": None, "why_no_held_out": why}
    classes = read_classes(scoring.runs, sites, progress)
    fitted, held_out_errors = {}, {}
    for site in sites:
        target, source = (classes.moments[site.key, label, "fit"] for label in ("positive", "negative"))
        fresh = classes.moments[site.key, "negative", "held_out"]
        fitted[site.key], held_out_errors[site.key] = _map(target, source, options, fresh, gain_only=gain_only)
    losses = losses_under(scoring.runs, classes, fitted, progress)
    if gain_only:
        told["held_out_errors"] = held_out_errors
    return maps, {
        **told,
        **held_out_error(classes.prompts["held_out"], (classes.losses["held_out"], losses["held_out"])),
    }


def held_out_error(prompts: int, losses: tuple[float, float]) -> dict[str, Any]:
    """What a plan says of pairs that had no part in a fit. Says so where the maps bring the classes no nearer there."""
    if not losses[1] < losses[0]:
        notice(
            f"the maps do not bring the classes nearer on {prompts} held-out prompts: their distance is {losses[0]:.3g} before "
            f"and {losses[1]:.3g} after. Give more data, fewer layers, or less strength"
        )
    return {"held_out": {"prompts": prompts, "loss": list(losses)}}


def _closed(scoring: Scoring, site: Site, options: Options, *, gain_only: bool) -> tuple[AffineMap, float]:
    """The closed form's map of all pairs, and the error of the gain alone on them."""
    moments = scoring.statistics.moments
    target, source = (moments[site.key, "output", label] for label in ("positive", "negative"))
    return _map(target, source, options, source, gain_only=gain_only)


def _map(
    target: Moments, source: Moments, options: Options, fresh: Moments, *, gain_only: bool
) -> tuple[AffineMap, float]:
    """The map between two classes' moments, and its error on other moments of the negative class.

    The error is that of a gain without a constant; it is 0 with one.
    """
    import torch

    from steer2edit.capture.affine_maps import AffineMap

    spreads = [(one.m2 - one.mean.square()).clamp(min=0).sqrt() for one in (target, source)]
    # a coordinate that did not vary in either class is moved, not stretched
    known = (spreads[0] > _TINY) & (spreads[1] > _TINY)
    omega = torch.where(known, spreads[0] / spreads[1].clamp(min=_TINY), torch.ones_like(spreads[0]))
    omega = omega.clamp(1 / options.most_gain, options.most_gain)
    beta = target.mean - omega * source.mean
    if not gain_only:
        return AffineMap(omega, beta), 0.0
    energy = source.m2.clamp(min=_TINY)
    gain = (omega + beta * source.mean / energy).clamp(1 / options.most_gain, options.most_gain)
    # E(gain y - omega y - beta)², and E(y' - y)²
    rest, step = gain - omega, omega - 1
    missing = rest.square() * fresh.m2 - 2 * rest * beta * fresh.mean + beta.square()
    moved = step.square() * fresh.m2 + 2 * step * beta * fresh.mean + beta.square()
    return AffineMap(gain, torch.zeros_like(beta)), float(missing.sum() / moved.sum().clamp(min=_TINY))
