r"""Constants: activation addition in the weights, the steering vector as a writer's bias.

A hook adds v to the residual stream at every token. The bias of the writer before that place adds the same:

    y = W x + b  →  y = W x + (b + v / m)

where m is what the model multiplies the writer's output by. The result is exact, in a model that no engine has to know. Where
the checkpoint has no such bias, a setting of config.json may create it (``architecture.carriers``); where none does, there is
the best stand-in of rank 1, and its error is known before anything is written:

    v aᵀ,   a = S⁻¹μ / (μᵀS⁻¹μ),   S = E[x xᵀ],  μ = E[x]:   E‖v aᵀx − v‖² / E‖v aᵀx‖² = 1 − κ,   κ = μᵀS⁻¹μ.

A hook that keeps the stream's length, ``‖h‖ (h + v) / ‖h + v‖``, is another operator, with one exception: after the last block
only the final norm reads the stream, and no norm sees a length. There both give the same logits.

The mean of a is one on all texts alike: contrast data, prose and chat count the same. S is known within a head; between heads
it is taken for the means' alone, so the error is an estimate. Strength 1 adds v, the difference of the classes' means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from steer2edit.errors import PlanError, listing
from steer2edit.methods._shared import LAYERS
from steer2edit.options import AnyLayer, option
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from steer2edit.architecture import ModelSpec, Site
    from steer2edit.capture.populations import Other, Source
    from steer2edit.capture.statistics import Statistics
    from steer2edit.plan import Edit, EditPlan
    from steer2edit.scoring.scores import Scoring


@dataclass(frozen=True)
class Options:
    """Where the vector is added.

    At one ``layer`` or at all of ``layers``; after the block, in its middle, or at every writer.
    """

    layer: int | None = option(
        None,
        "Add the vector to the residual stream of this layer alone.",
        shown_default="the middle layer, or those of imported vectors",
        search=AnyLayer(),
    )
    layers: tuple[int, int] | None = option(None, LAYERS)
    place: Literal["after-block", "after-attention", "writers"] = option(
        "after-block",
        "Place of the vector: the stream after the block, the stream between attention and MLP, or each writer's output.",
    )
    sites: Literal["attn", "mlp", "both"] = option("both", "The matrices that carry the vector.")
    norm_preserving: bool = option(
        False, "Keep the stream's length, as some hooks do: exact at the last layer, refused at others.", rare=True
    )
    stand_in: bool = option(
        False, "In place of a bias take the best edit of rank 1 in attention, for types or engines without the bias."
    )


def plan(scoring: Scoring, options: Options = Options(), progress: Progress = silent) -> EditPlan:
    """A bias for each place, or its stand-in. Raises PlanError, with the reasons, where a place can have none."""
    from steer2edit.architecture.constants import carrier
    from steer2edit.plan import Base, EditPlan

    layers = _layers(scoring, options)
    if options.norm_preserving:
        _check_norm_preserving(scoring.spec, options, layers)
    wanted = [pair for layer in layers for pair in _wanted(scoring, options, layer)]
    wanted = [(site, v) for site, v in wanted if bool(v.any())]
    if not wanted:
        raise PlanError(f"the vector is zero in {_named(layers)}: there is no constant to add")
    errors: dict[str, float] = {}
    edits: list[Edit] = []
    if not options.stand_in and (without := [site for site, _ in wanted if carrier(site) is None]):
        raise PlanError(_refused(scoring, options, without))
    with progress("plan", total=len(wanted)) as advance:
        for site, v in wanted:
            if options.stand_in:
                edit, errors[site.key] = _stand_in(scoring, site, v)
                edits.append(edit)
            else:
                edits.append(_constant(scoring, site, v))
            advance(1)
    method = {
        "name": "constant",
        **asdict(options),
        "layers": [layers[0], layers[-1]],
        **({"stand_ins": errors} if errors else {}),
    }
    return EditPlan(Base.of(scoring.checkpoint), tuple(edits), method=method)


def widest(spec: ModelSpec, options: Options) -> Sequence[Edit]:
    """A bias of zeros at every writer that can have one in the layers of ``options``, or attention's stand-ins."""
    import torch

    from steer2edit.architecture.constants import carrier
    from steer2edit.methods._biases import bias_edit
    from steer2edit.plan import LowRank

    layers = options.layers if options.layer is None else (options.layer, options.layer)
    first, last = spec.layer_range(layers)
    zero = torch.zeros(1, 1)  # one number for all matrices
    edits: list[Edit] = []
    for site in (one for one in spec.sites if first <= one.layer <= last):
        if options.stand_in and site.heads is not None:
            edits.append(LowRank(site.matrix, zero.expand(site.out_features, 1), zero.expand(1, site.in_features)))
        elif not options.stand_in and carrier(site) is not None:
            edits.append(bias_edit(site, torch.zeros(site.out_features)))
    return edits


def _layers(scoring: Scoring, options: Options) -> Sequence[int]:
    """The layers where vectors are added. Raises PlanError for options that contradict each other."""
    spec, layer = scoring.spec, options.layer
    if layer is not None and options.layers not in (None, (layer, layer)):
        raise PlanError("--layer and --layers exclude each other; give one")
    if options.place != "writers" and options.sites != "both":
        raise PlanError(
            f"--sites chooses among writers, and --place is {options.place}; leave it out, or --place writers"
        )
    if layer is not None:
        if not 0 <= layer < spec.layers:
            raise PlanError(f"--layer {layer} is not in this model, which has the layers 0-{spec.layers - 1}")
        return [layer]
    if options.layers is None and options.place != "writers" and "vectors" not in scoring.statistics.source:
        return [spec.layers // 2]
    first, last = spec.layer_range(options.layers)
    return range(first, last + 1)


def _check_norm_preserving(spec: ModelSpec, options: Options, layers: Sequence[int]) -> None:
    """Raise PlanError unless the vector is added where only the final norm reads the stream."""
    from steer2edit.architecture.find_family import family_of

    last = spec.layers - 1
    if list(layers) != [last] or options.place != "after-block":
        raise PlanError(
            f"--norm-preserving is asked for at {_named(layers)}, {options.place}: a factor of the stream's length there depends "
            "on the token, and later blocks add to what it has scaled, so no weight gives it. Only after the last block, where "
            f"the final norm alone reads the stream, is it the plain addition: --layer {last} --place after-block"
        )
    if family_of(spec.model_type) is None:
        raise PlanError(
            f"the type {spec.model_type} is not described, so it is not known that a norm follows its last block; "
            "--norm-preserving needs that"
        )


def _wanted(scoring: Scoring, options: Options, layer: int) -> list[tuple[Site, torch.Tensor]]:
    """The writers of a layer that are to add a vector.

    Each with what the stream is to get, float32 ``[hidden]``.
    """
    from steer2edit.architecture import MatrixRole
    from steer2edit.architecture.constants import carrier, ends_block
    from steer2edit.architecture.stream import factor

    spec, statistics = scoring.spec, scoring.statistics
    here = [site for site in spec.sites if site.layer == layer]
    attention = [site for site in here if site.role.kind is MatrixRole.ATTN_OUT]
    if options.place == "writers":
        kinds = {"attn": {MatrixRole.ATTN_OUT}, "mlp": {MatrixRole.MLP_OUT}}.get(options.sites, set(MatrixRole))
        chosen = [site for site in here if site.role.kind in kinds]
        # what a writer puts out, times what it is multiplied by, is what the stream gets
        return [
            (site, statistics.difference(site.vector_key).float() * factor(scoring.checkpoint, site)) for site in chosen
        ]
    if options.place == "after-block" and not options.stand_in:
        possible = [site for site in here if ends_block(spec, site)]
    else:
        possible = attention
    if not possible:
        raise PlanError(f"layer {layer} has no attention, and nothing in its place: choose another layer")
    site = next((site for site in reversed(possible) if options.stand_in or carrier(site)), possible[-1])
    return [(site, statistics.difference(f"residual.{layer}").float())]


def _constant(scoring: Scoring, site: Site, v: torch.Tensor) -> Edit:
    from steer2edit.architecture.stream import factor
    from steer2edit.methods._biases import bias_edit

    return bias_edit(site, v / factor(scoring.checkpoint, site))


def _stand_in(scoring: Scoring, site: Site, v: torch.Tensor) -> tuple[Edit, float]:
    """The best edit of rank 1 for a constant, and its relative squared error. Raises PlanError where that is not known."""
    from steer2edit.architecture.stream import factor
    from steer2edit.plan import LowRank

    found = _functional(scoring.statistics, site)
    if found is None:
        raise PlanError(f"{site.key} has no stand-in: {_unknown(site)}")
    a, error = found
    B = v / factor(scoring.checkpoint, site)
    return LowRank(site.matrix, B[:, None].clone(), a[None, :].clone()), error


def _functional(statistics: Statistics, site: Site) -> tuple[torch.Tensor, float] | None:
    """``a`` [in], float32, with a mean of one, and 1 − κ.

    None where the moments of the site's input are not known.
    """
    import torch

    from steer2edit.methods._solver import Energy

    if site.heads is None or site.norm is not None:
        return None
    others: tuple[Other, ...] = ("background", "chat")
    sources: list[Source] = ["contrast"] if _contrast(statistics) else []
    sources += [one for one in others if statistics.examples[one]]
    means = torch.stack(
        [
            *([statistics.x_bar(site.key)] if sources[:1] == ["contrast"] else []),
            *(statistics.mean(site.key, "input", one) for one in others if one in sources),
        ],
        dim=1,
    ).double()
    share = 1 / len(sources)
    moments = {one: statistics.block_moments(site.key, one).double() for one in sources}
    by_head = means.T.reshape(len(sources), site.heads, -1)
    within = {one: moments[one] - by_head[i, :, :, None] * by_head[i, :, None, :] for i, one in enumerate(sources)}
    spread = Energy.of(within, dict.fromkeys(sources, share))
    # S is the spread within heads, plus what the texts' means add: the inverse by Woodbury's identity
    U = means * share**0.5
    Y = spread.inverse(torch.cat((U, means.mean(dim=1)[:, None]), dim=1))
    Z, y, mu = Y[:, :-1], Y[:, -1], means.mean(dim=1)
    solved = y - Z @ torch.linalg.solve(torch.eye(len(sources), dtype=torch.float64) + U.T @ Z, Z.T @ mu)
    kappa = float(mu @ solved)
    return (solved / kappa).float(), 1 - kappa


def _contrast(statistics: Statistics) -> bool:
    return bool(statistics.examples["positive"] and statistics.examples["negative"])


def _refused(scoring: Scoring, options: Options, sites: Sequence[Site]) -> str:
    """Why places carry no constant, and what comes nearest."""
    from steer2edit.architecture.constants import why_none

    spec = scoring.spec
    reasons = [f"{site.key}: {why_none(spec, site)}" for site in sites]
    lines = [f"no bias carries the constant in {scoring.checkpoint.name}:\n{listing(reasons)}"]
    exact = [text for text in _exact_elsewhere(spec, options, [site.layer for site in sites]) if text]
    lines += exact
    if options.place == "writers":
        standing = [site for site in sites if site.heads is not None]
    else:
        standing = [site for site in spec.sites if site.layer in {s.layer for s in sites} and site.heads is not None]
    known = {site.key: found[1] for site in standing if (found := _functional(scoring.statistics, site)) is not None}
    if known and (options.place != "writers" or len(known) == len(sites)):
        told = ", ".join(f"{key} {error:.2g}" for key, error in list(known.items())[:4])
        lines.append(
            f"--stand-in takes the best edit of rank 1 instead, in attention; its relative squared error (estimated): {told}"
        )
    elif not exact:
        lines.append("The method steering compiles the vector into low-rank edits, which any type carries.")
    return "\n".join(lines)


def _exact_elsewhere(spec: ModelSpec, options: Options, layers: Sequence[int]) -> list[str]:
    """The places at which the same layers carry a constant exactly, as lines of an error."""
    from steer2edit.architecture import MatrixRole
    from steer2edit.architecture.constants import carrier

    attention = {s.layer for s in spec.sites if s.role.kind is MatrixRole.ATTN_OUT and carrier(s)}
    if not set(layers) <= attention:
        return []
    if options.place == "after-block":
        return ["--place after-attention adds it exactly, half a block earlier: the layer's MLP reads it too."]
    return ["--place writers --sites attn adds attention's vectors exactly."] if options.place == "writers" else []


def _unknown(site: Site) -> str:
    if site.norm is not None:
        return "a norm stands behind it, so what a fixed edit adds depends on the token"
    return "the second moments between its neurons are not captured, so its error is not known; attention's are (--sites attn)"


def _named(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
