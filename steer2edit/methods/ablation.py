r"""Directional ablation: every writer loses its output along one direction.

    W' = W - alpha r_hat r_hatᵀ W,   b' = b - alpha r_hat (r_hat · b)

``r_hat`` is the difference of the classes' mean residual streams after one block, the same for all writers; with
alpha = 1 no writer can write along it any more. Where a norm stands between a writer and the stream, the stream gets
``gain * y / rms(y)``; what must vanish is ``r_hat · (gain * y)``, so the projected direction is ``u_hat ∝ gain * r_hat``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from steer2edit.errors import PlanError
from steer2edit.methods._shared import LAYERS
from steer2edit.options import AnyLayer, option
from steer2edit.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from steer2edit.architecture import Site
    from steer2edit.checkpoint import Checkpoint
    from steer2edit.plan import Edit, EditPlan
    from steer2edit.scoring.scores import Scoring


@dataclass(frozen=True)
class Options:
    """How much is removed, and where; with ``direction_layer`` None the direction is taken after the middle block."""

    alpha: float = option(1.0, "Part of the direction that is removed; 1 is all of it.")
    direction_layer: int | None = option(
        None, "Take the direction after this layer's block.", shown_default="the middle layer", search=AnyLayer()
    )
    layers: tuple[int, int] | None = option(None, LAYERS)
    embedding: bool = option(False, "Edit the token embedding too, in models that do not tie it.")


def plan(scoring: Scoring, options: Options = Options(), progress: Progress = silent) -> EditPlan:
    """One rank-1 edit for each writer, and one for each bias. Raises PlanError for layers that are not there."""
    from steer2edit.plan import Base, Bias, EditPlan, LowRank
    from steer2edit.scoring.scores import analyse

    checkpoint, spec, statistics = scoring.checkpoint, scoring.spec, scoring.statistics
    layer = spec.layers // 2 if options.direction_layer is None else options.direction_layer
    if not 0 <= layer < spec.layers:
        raise PlanError(f"--direction-layer {layer} is not in this model, which has the layers 0-{spec.layers - 1}")
    if options.embedding and spec.tied_embeddings:
        raise PlanError(
            f"{checkpoint.name} ties its embedding to its unembedding: ablating {spec.embedding.tensor} would change both; "
            "leave --embedding out"
        )
    r = statistics.difference(f"residual.{layer}").float()
    if not bool(r.any()):
        raise PlanError(
            f"both classes have the same mean residual stream after layer {layer}: there is no direction to ablate"
        )
    first, last = spec.layer_range(options.layers)
    sites = [site for site in spec.sites if first <= site.layer <= last]
    sites += [spec.embedding] if options.embedding else []
    edits: list[Edit] = []
    with progress("plan", total=len(sites)) as advance:
        for site in sites:
            u_hat = _through_norm(checkpoint, site, r)
            found = analyse(checkpoint, site, u_hat[None])
            edits.append(LowRank(site.matrix, -options.alpha * u_hat[:, None], found.projection))
            if site.bias_vector is not None:
                along = float(checkpoint.read(site.locate(checkpoint, site.bias_vector)).float() @ u_hat)
                edits.append(Bias(site.bias_vector, -options.alpha * along * u_hat))
            advance(1)
    base = Base.of(checkpoint)
    method = {"name": "ablation", **asdict(options), "direction_layer": layer, "layers": [first, last]}
    return EditPlan(base, tuple(edits), method=method)


def _through_norm(checkpoint: Checkpoint, site: Site, r: torch.Tensor) -> torch.Tensor:
    import torch

    from steer2edit.architecture.stream import gain

    return torch.nn.functional.normalize(gain(checkpoint, site) * r, dim=0)
