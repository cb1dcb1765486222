r"""Rotation: what the blocks read is turned in a plane, and the stream itself is not.

Selective Steering (arXiv 2601.19375) turns the output of norms. A norm gives ``x = g ⊙ n + b`` for the normalised stream n, and
with ``R`` in the place of n's turn each of its readers is given ``g ⊙ R n + b``. The same in the weights, exactly:

    W' = W diag(g) R diag(g)⁻¹,    b' = b_W + (W - W') b

``R`` turns by an angle in the plane of ``b1`` and ``b2`` and leaves all else: ``W' - W`` has rank 2. ``b1`` is the difference of
the classes' mean streams after the block whose difference agrees best with those of the others (Angular Steering, arXiv
2510.26243); ``b2`` is the first principal component of all blocks' differences, or the mean stream itself, without its part
along b1. Its sign is such that a positive angle turns the typical stream towards b1.

Discriminative layers are turned unless --layers says otherwise. A writer's output joins a stream that was not turned, so this is
not a turn of the stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

from steer2edit.errors import PlanError, listing
from steer2edit.methods._shared import LAYERS
from steer2edit.notices import notice
from steer2edit.options import DISCRIMINATIVE, AnyLayer, Between, option
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from steer2edit.architecture import ModelSpec, Site
    from steer2edit.capture.statistics import Statistics
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.plan import Edit, EditPlan
    from steer2edit.scoring.scores import Scoring

LARGEST_ANGLE = 180.0


@dataclass(frozen=True)
class Options:
    """By which angle, in which plane, and in which layers what is read is turned."""

    angle: float = option(
        30.0,
        "Angle in degrees, at strength 1, by which the reads are turned towards the direction; below 0 away from it.",
        search=Between(2.0, 90.0, log=True),
    )
    direction_layer: int | None = option(
        None, "Take the direction after this layer's block.", shown_default="that which agrees best", search=AnyLayer()
    )
    second_axis: Literal["pca", "mean"] = option(
        "pca", "The plane's other axis: the main component of all layers' directions, or the mean stream."
    )
    layers: tuple[int, int] | None = option(DISCRIMINATIVE, LAYERS, shown_default=DISCRIMINATIVE)

    @property
    def strength(self) -> float:
        """Without a budget the angle is the one that is given."""
        return 1.0


def plan(scoring: Scoring, options: Options = Options(), progress: Progress = silent) -> EditPlan:
    """A rank-2 edit for each reader of a norm in the chosen layers.

    Where the norm has a bias, the reader's bias is edited too. Raises PlanError for blocks whose readers do not all read a
    known norm.
    """
    from steer2edit.plan import Base, EditPlan

    checkpoint, spec, statistics = scoring.checkpoint, scoring.spec, scoring.statistics
    if not 0 < abs(options.angle) <= LARGEST_ANGLE:
        raise PlanError(f"--angle is {options.angle:g}, expected degrees from -180 to 180, and not 0")
    layer, plane = plane_of(statistics, spec, options)
    # make_plan has put the discriminative layers in their place
    first, last = spec.layer_range(options.layers if isinstance(options.layers, tuple) else None)
    sites = readers_of(spec, range(first, last + 1))
    edits: list[Edit] = []
    with progress("plan", total=len(sites)) as advance:
        for site in sites:
            edits += _turned(checkpoint, site, plane, options.angle)
            advance(1)
    described = {**asdict(options), "direction_layer": layer, "layers": [first, last]}
    return EditPlan(Base.of(checkpoint), tuple(edits), method={"name": "rotation", **described})


def widest(spec: ModelSpec, options: Options) -> Iterator[Edit]:
    """Edits of zeros on every matrix and bias that a plan with these options may edit."""
    import torch

    from steer2edit.plan import Bias, LowRank

    first, last = spec.layer_range(options.layers)
    zero = torch.zeros(1, 1)
    for site in readers_of(spec, range(first, last + 1)):
        yield LowRank(site.matrix, zero.expand(site.out_features, 2), zero.expand(2, site.in_features))
        if site.norm_before is not None and site.norm_before.bias is not None and site.bias_vector is not None:
            yield Bias(site.bias_vector, torch.zeros(site.out_features))


def scaled(plan: EditPlan, factor: float) -> EditPlan:
    """The plan at ``factor`` times its angle, which is not ``factor`` times its update; at most half a turn.

    An update is ``U M(θ) Vᵀ`` with the same U and V for every angle, so no weight is read. ``measured.strength`` times the
    option's angle is the present angle.
    """
    import torch

    from steer2edit.plan import Bias, LowRank

    now = float(plan.method["angle"]) * (1.0 if plan.measured.strength is None else plan.measured.strength)
    then = max(-LARGEST_ANGLE, min(now * factor, LARGEST_ANGLE))
    change = torch.linalg.solve(_turn(now), _turn(then), left=True) if now else torch.zeros(2, 2, dtype=torch.float64)
    edits: list[Edit] = []
    known = {edit.tensor: edit for edit in plan.edits if isinstance(edit, LowRank)}
    for edit in plan.edits:
        if isinstance(edit, LowRank):
            edits.append(replace(edit, B=(edit.B.double() @ change).float(), mean_effect=None))
            continue
        assert isinstance(edit, Bias)
        matrix = known[f"{edit.tensor.removesuffix('.bias')}.weight"]
        along = torch.linalg.lstsq(matrix.B.double(), edit.delta.double()[:, None]).solution
        edits.append(replace(edit, delta=(matrix.B.double() @ change @ along)[:, 0].float()))
    return replace(plan, edits=tuple(edits))


def readers_of(spec: ModelSpec, layers: Sequence[int]) -> list[Site]:
    """The readers of the norms of these layers. Raises PlanError for blocks in which something reads no known norm."""
    from steer2edit.architecture import MatrixRole

    apart = (MatrixRole.PER_LAYER_GATE, MatrixRole.ROUTER, MatrixRole.UNEMBED)
    sites = [site for site in spec.readers if site.layer in layers and site.role is not MatrixRole.UNEMBED]
    turned = [site for site in sites if site.norm_before is not None]
    wrong = [
        f"{site.tensor} reads the stream without a norm that is known"
        for site in sites
        if site.reads in ("stream", "unknown") and site.role not in apart
    ]
    wrong += [f"{site.tensor} is a LayerNorm's reader without a bias" for site in turned if _lacks_bias(site)]
    if spec.frozen:
        wrong.append(f"{spec.frozen[0]} is in a format that is not edited")
    if wrong or not turned:
        raise PlanError(
            f"what the blocks of this {spec.model_type} model read cannot be turned exactly:\n"
            f"{listing(wrong or ['no reader of a norm was found'])}\n"
            "Choose layers without these, or a method that edits writers."
        )
    left = [site.tensor for site in sites if site.norm_before is None and site.reads != "inside"]
    if left:
        notice(f"not turned, since they read no norm's output: {', '.join(left[:3])}{', …' if len(left) > 3 else ''}")
    return turned


def _lacks_bias(site: Site) -> bool:
    from steer2edit.architecture import MatrixRole

    assert site.norm_before is not None
    # a router's bias may take part in the selection alone
    return site.norm_before.bias is not None and (site.bias is None or site.role is MatrixRole.ROUTER)


def plane_of(statistics: Statistics, spec: ModelSpec, options: Options) -> tuple[int, torch.Tensor]:
    """The layer whose difference is the first axis, and the plane's axes [hidden, 2], float64, of length one."""
    import torch

    differences = torch.stack([statistics.difference(f"residual.{one}").double() for one in range(spec.layers)])
    sizes = differences.norm(dim=1)
    units = differences / sizes.clamp(min=1e-30)[:, None]
    if options.direction_layer is None:
        # the last block's stream is read by the unembedding alone
        likeness = (units @ units.T).mean(dim=1)
        layer = int(likeness[: max(spec.layers - 1, 1)].argmax())
    else:
        layer = options.direction_layer
        if not 0 <= layer < spec.layers:
            raise PlanError(f"--direction-layer {layer} is not in this model, which has the layers 0-{spec.layers - 1}")
    if not float(sizes[layer]):
        raise PlanError(f"both classes have the same mean residual stream after layer {layer}: there is no direction")
    mean = sum(_typical(statistics, one) / _typical(statistics, one).norm() for one in range(spec.layers))
    assert isinstance(mean, torch.Tensor)
    first = units[layer]
    if options.second_axis == "mean":
        other = mean
    else:
        centred = units - units.mean(dim=0)
        other = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    rest = other - (other @ first) * first
    if not float(rest.norm()) > 1e-6 * float(other.norm()):
        raise PlanError("the plane's two axes are one: the layers' directions do not differ; try --second-axis mean")
    second = rest / rest.norm()
    return layer, torch.stack([first, second if float(second @ mean) >= 0 else -second], dim=1)


_CLASSES: tuple[Literal["positive", "negative"], ...] = ("positive", "negative")


def _typical(statistics: Statistics, layer: int) -> torch.Tensor:
    positive, negative = (statistics.mean(f"residual.{layer}", "output", label).double() for label in _CLASSES)
    return (positive + negative) / 2


def _turn(angle: float) -> torch.Tensor:
    """``R - 1`` in the plane's own axes, float64 [2, 2]: a positive angle turns the second axis towards the first."""
    import torch

    radians = math.radians(angle)
    c, s = math.cos(radians), math.sin(radians)
    return torch.tensor([[c - 1, s], [-s, c - 1]], dtype=torch.float64)


def _turned(checkpoint: Checkpoint, site: Site, plane: torch.Tensor, angle: float) -> list[Edit]:
    from steer2edit.architecture.stream import input_bias, input_gain
    from steer2edit.plan import Bias, LowRank
    from steer2edit.scoring.scores import applied

    assert site.norm_before is not None
    gain = input_gain(checkpoint, site).double()
    if float(gain.abs().min()) < 1e-6 * float(gain.abs().max()):
        raise PlanError(
            f"{site.norm_before.tensor} has gains of almost 0: what it took away cannot be turned; leave layer {site.layer} out"
        )
    B = applied(checkpoint, site, gain[:, None] * plane).double() @ _turn(angle)
    A = (plane / gain[:, None]).T
    edits: list[Edit] = [LowRank(site.matrix, B.float().contiguous(), A.float().contiguous())]
    bias = input_bias(checkpoint, site)
    if bias is not None:
        assert site.bias_vector is not None
        edits.append(Bias(site.bias_vector, (-B @ (A @ bias.double())).float()))
    return edits
