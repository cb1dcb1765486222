r"""Directional ablation: every writer loses its output along one direction, or along several.

    W' = W - alpha U Uᵀ W,   b' = b - alpha U Uᵀ b

``U`` spans the differences of the classes' mean residual streams after one block, the same for all writers, or after each
writer's own block. With alpha = 1 no writer can write along them any more. Where a norm stands between a writer and the stream,
the stream gets ``gain * y / rms(y)``; what must vanish is ``r · (gain * y)``, so U spans the ``gain * r``.

- *projected*: r is cleared of the background's mean first.
- *norm-preserving*: each column of W' gets the length that it had. The update has full rank, and no adapter carries it.
- *leace* (arXiv 2306.03819): ``W' = W - alpha δ (δᵀΣ⁻¹δ)⁻¹ δᵀΣ⁻¹ W``, the projection that changes the stream least, in the mean
  square, of all that make the classes' means equal. Σ is the stream's covariance on the contrast data.
- *restore* (ACE, arXiv 2411.09003): the bias puts back the mean that a population of texts has along the directions, writer by
  writer: ``y' = y - U Uᵀ (y - μ)``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from steer2edit.errors import PlanError, listing
from steer2edit.methods._shared import LAYERS
from steer2edit.options import AnyLayer, option
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from steer2edit.architecture import ModelSpec, Site
    from steer2edit.plan import Edit, EditPlan
    from steer2edit.scoring.scores import Analysis, Scoring


@dataclass(frozen=True)
class Options:
    """How much is removed, and where; with ``direction_layer`` None the direction is taken after the middle block."""

    alpha: float = option(1.0, "Part of the direction that is removed; 1 is all of it.")
    direction_layer: int | None = option(
        None, "Take the direction after this layer's block.", shown_default="the middle layer", search=AnyLayer()
    )
    per_layer: bool = option(False, "Take each writer's direction after its own layer's block.")
    projected: bool = option(False, "Clear the direction of the background's mean first.")
    also: tuple[str, ...] = option(
        (), "Ablate the direction of these statistics or vectors too. Repeatable.", metavar="FILE"
    )
    norm_preserving: bool = option(
        False, "Give each column of a matrix its length back; for whole checkpoints only, as the update has full rank."
    )
    eraser: Literal["orthogonal", "leace"] = option(
        "orthogonal", "Projection that removes the direction: orthogonal, or the one that changes the stream least."
    )
    restore: Literal["nothing", "positive", "negative", "background"] = option(
        "nothing", "Texts whose mean along the direction the writers' biases put back."
    )
    layers: tuple[int, int] | None = option(None, LAYERS)
    embedding: bool = option(False, "Edit the token embedding too, in models that do not tie it.")

    @property
    def strength(self) -> float | None:
        """Columns have their length at strength 1 alone: there alpha says how much is removed."""
        return 1.0 if self.norm_preserving else None


@dataclass(frozen=True)
class _Eraser:
    """``W - alpha B Aᵀ W``: ``left`` [out, n] is B, ``right`` [out, n] is A."""

    left: torch.Tensor
    right: torch.Tensor

    def removed(self, y: torch.Tensor) -> torch.Tensor:
        """What it takes out of a vector [out]."""
        return self.left @ (self.right.T @ y)


def plan(scoring: Scoring, options: Options = Options(), progress: Progress = silent) -> EditPlan:
    """An edit for each writer, and one for each bias.

    Raises PlanError for layers that are not there, options that exclude each other, and means that no bias can hold.
    """
    from steer2edit.methods._directions import Directions
    from steer2edit.plan import Base, EditPlan
    from steer2edit.scoring.scores import analyse

    checkpoint, spec = scoring.checkpoint, scoring.spec
    layer = spec.layers // 2 if options.direction_layer is None else options.direction_layer
    first, last = spec.layer_range(options.layers)
    sites = [site for site in spec.sites if first <= site.layer <= last]
    _check(scoring, options, layer, sites)
    sites += [spec.embedding] if options.embedding else []
    directions = Directions.of(scoring, options.also, options.projected)
    found = {} if options.per_layer else {layer: directions.at(layer)}
    edits: list[Edit] = []
    with progress("plan", total=len(sites)) as advance:
        for site in sites:
            at = max(site.layer, 0) if options.per_layer else layer
            R = found[at] if at in found else found.setdefault(at, directions.at(at))
            eraser = _eraser(scoring, site, R, directions.duals(at, R) if options.eraser == "leace" else None)
            edits.append(_edit(site, eraser, analyse(checkpoint, site, eraser.right.T), options))
            edits += _bias_edits(scoring, site, eraser, options)
            advance(1)
    method = {"name": "ablation", **asdict(options), "layers": [first, last]}
    # as a file gives it back
    method |= {"direction_layer": None if options.per_layer else layer, "also": list(options.also)}
    return EditPlan(Base.of(checkpoint), tuple(edits), method=method)


def covariance_layers(spec: ModelSpec, options: Options) -> list[int]:
    """The layers after which LEACE needs the covariance of the stream; none for the orthogonal projection."""
    if options.eraser != "leace":
        return []
    if not options.per_layer:
        layer = spec.layers // 2 if options.direction_layer is None else options.direction_layer
        return [layer] if 0 <= layer < spec.layers else []
    # discriminative layers are known after the capture
    first, last = spec.layer_range(options.layers) if isinstance(options.layers, tuple) else (0, spec.layers - 1)
    return list(range(first, last + 1))


def _check(scoring: Scoring, options: Options, layer: int, sites: list[Site]) -> None:
    spec, name = scoring.spec, scoring.checkpoint.name
    if not 0 <= layer < spec.layers:
        raise PlanError(f"--direction-layer {layer} is not in this model, which has the layers 0-{spec.layers - 1}")
    if options.per_layer and options.direction_layer is not None:
        raise PlanError("--per-layer and --direction-layer exclude each other; give one")
    if options.norm_preserving and options.eraser == "leace":
        raise PlanError("--norm-preserving belongs to the orthogonal projection; leave --eraser leace out")
    if options.embedding and spec.tied_embeddings:
        raise PlanError(
            f"{name} ties its embedding to its unembedding: ablating {spec.embedding.tensor} would change both; "
            "leave --embedding out"
        )
    if options.eraser == "leace" and (behind := [site.key for site in sites if site.norm is not None]):
        raise PlanError(
            f"--eraser leace needs writers that add to the stream directly; a norm stands behind {behind[0]}"
        )
    if options.restore != "nothing":
        problems = [why for site in sites if (why := _no_mean(spec, site))]
        if problems:
            raise PlanError(f"--restore {options.restore} is a constant in each writer's bias:\n{listing(problems)}")


def _no_mean(spec: ModelSpec, site: Site) -> str:
    from steer2edit.methods._biases import no_bias

    if site.expert is not None:
        return f"{site.key}: the mean of a single expert's output was not captured"
    return no_bias(spec, site)


def _eraser(scoring: Scoring, site: Site, R: torch.Tensor, duals: torch.Tensor | None) -> _Eraser:
    """The projection on what is removed, for one writer. ``duals`` are ``Σ⁻¹ R``, for LEACE."""
    import torch

    from steer2edit.architecture.stream import gain
    from steer2edit.methods._directions import orthonormal

    if duals is None:
        U = orthonormal(gain(scoring.checkpoint, site)[:, None] * R)
        return _Eraser(U, U)
    return _Eraser(R @ torch.linalg.inv(R.T.double() @ duals.double()).float(), duals)


def _edit(site: Site, eraser: _Eraser, found: Analysis, options: Options) -> Edit:
    from steer2edit.plan import LowRank, Scale, ScaleAdd

    low_rank = LowRank(site.matrix, -options.alpha * eraser.left, found.projection)
    if not options.norm_preserving:
        return low_rank
    # (W + B A) C = W C + B (A C), where C gives the columns their lengths back
    squares = found.norms[0].double().square()
    part = found.projection.double().square().sum(dim=0)
    left = squares - (2 * options.alpha - options.alpha**2) * part
    # a column that lies along the directions has no direction left to be long in
    factors = (squares / left.clamp(min=1e-300)).sqrt().where(left > 1e-6 * squares, squares.new_ones(()))
    added = LowRank(site.matrix, low_rank.B, low_rank.A * factors.float())
    return ScaleAdd(site.matrix, (Scale(site.matrix, factors, "columns"),), added)


def _bias_edits(scoring: Scoring, site: Site, eraser: _Eraser, options: Options) -> list[Edit]:
    """The bias without its part along the directions, and with the mean that is put back."""
    import torch

    from steer2edit.methods._biases import bias_edit

    restored = options.restore != "nothing" and site is not scoring.spec.embedding
    gone = torch.zeros(site.out_features)
    if site.bias_vector is not None:
        gone = scoring.checkpoint.read(site.locate(scoring.checkpoint, site.bias_vector)).float()
    elif not restored:
        return []
    if options.restore != "nothing" and restored:
        mean: torch.Tensor = scoring.statistics.mean(site.key, "output", options.restore).float()
        gone = gone - mean
    return [bias_edit(site, -options.alpha * eraser.removed(gone))]
