"""What methods ask of the weights: each matrix's products with the steering vector, in one streaming read, scored.

Methods need a matrix only through its products with a few vectors and its columns' norms; each is a sum over row
blocks, so no matrix is ever held whole. :class:`Scoring` keeps what was read, so that many plans cost one read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from steer2edit.architecture import ModelSpec, Site
from steer2edit.bootstrap import LEAST_DRAWS
from steer2edit.capture.affine_maps import ContrastRuns
from steer2edit.capture.evidence import too_few
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import Checkpoint
from steer2edit.checkpoint.fp8 import values
from steer2edit.errors import CheckpointError, PlanError
from steer2edit.plan import Scores
from steer2edit.progress import Progress, silent

TINY = 1e-12
_Z = 1.96  # of a 95 % normal interval


@dataclass(frozen=True)
class Analysis:
    """What directions and typical inputs meet in one matrix ``W`` [out, in]; all float32.

    ``projection`` [n, in] is ``V W``, a row for each direction. ``norms`` are those of the heads' outputs, ``‖W_j x_bar_j‖``
    [n, heads], where the site has heads and typical inputs were given; elsewhere those of W's columns, [1, in].
    """

    projection: torch.Tensor
    norms: torch.Tensor


@dataclass(frozen=True)
class SiteScores:
    """One site's steering vector, typical input and component scores; float32.

    ``v_hat`` [out] has length one, ``size`` is ‖v‖; ``projection`` [in] is ``Wᵀ v_hat``; ``table`` holds the components'
    scores, with no strength yet.
    """

    site: Site
    v_hat: torch.Tensor
    size: float
    x_bar: torch.Tensor
    projection: torch.Tensor
    table: Scores


@dataclass(frozen=True)
class Scoring:
    """A model, what was captured of it, and each site's scores once they are asked for.

    ``runs`` are the loaded model and its contrast data, where there are some: for the few options of methods that run the model.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    statistics: Statistics
    runs: ContrastRuns | None = field(default=None, repr=False)
    _known: dict[str, SiteScores] = field(default_factory=dict, repr=False)

    @property
    def untested(self) -> str | None:
        """Why no score's sign can be tested, or None: the data has too few distinct prompts."""
        prompts = self.statistics.distinct_prompts
        resampled = any(kind == "bootstrap" for kind, _, _ in self.statistics.resampled)
        return too_few(prompts) if resampled and prompts is not None and prompts < LEAST_DRAWS else None

    def routed_enough(self, sites: Sequence[Site], min_tokens: int) -> tuple[list[Site], int]:
        """``sites`` without the experts that had fewer than ``min_tokens`` tokens of contrast data, and how many those are."""
        tokens = [(site, self.statistics.routed_tokens(site.key)) for site in sites]
        kept = [site for site, count in tokens if count is None or count >= min_tokens]
        return kept, len(sites) - len(kept)

    def score(self, sites: Sequence[Site], progress: Progress = silent) -> list[SiteScores]:
        """Scores of ``sites`` in their order; each matrix is read once in this object's life.

        Raises PlanError where statistics and matrix do not fit, CheckpointError for weights that are not finite.
        """
        with progress("score", total=len(sites)) as advance:
            for site in sites:
                if site.key not in self._known:
                    self._known[site.key] = _score(self.checkpoint, site, self.statistics, self.untested is None)
                advance(1)
        return [self._known[site.key] for site in sites]


def _score(checkpoint: Checkpoint, site: Site, statistics: Statistics, tested: bool) -> SiteScores:
    directions, inputs = (
        [statistics.difference(site.vector_key).float()[None]],
        [statistics.x_bar(site.key).float()[None]],
    )
    resampled = ("bootstrap", site.vector_key, "output") in statistics.resampled
    if resampled:
        for kind, count in (("bootstrap", None), ("shuffled", 1)):
            drawn = statistics.resamples(kind, site.vector_key, "output").difference()[:count]  # type: ignore[arg-type]
            directions.append(drawn)
            # an expert's inputs are not resampled: their signs are taken as they are
            inputs.append(
                inputs[0].expand(len(drawn), -1)
                if site.expert is not None
                else statistics.resamples(kind, site.key, "input").x_bar()[:count]  # type: ignore[arg-type]
            )
    v, x = torch.cat(directions), torch.cat(inputs)
    if v.shape[1] != site.out_features or x.shape[1] != site.in_features:
        raise PlanError(
            f"the statistics of {site.key} are {x.shape[1]} -> {v.shape[1]}, the matrix {site.in_features} -> {site.out_features}"
        )
    sizes = v.norm(dim=1)
    v_hat = v / sizes.clamp(min=TINY)[:, None]
    found = analyse(checkpoint, site, v_hat, x)
    g = component_scores(found, site, x)
    interval = null = None
    if resampled:
        width = _Z * g[1:-1].std(dim=0)
        interval, null = torch.stack((g[0] - width, g[0] + width)), g[-1].clone()
        if not tested or not bool(v[0].any()):
            # nothing is known of a cosine but that it is one
            interval = torch.stack((-torch.ones_like(g[0]), torch.ones_like(g[0])))
    # copies: views would keep the resamples' memory
    g0, projection = g[0].clone(), found.projection[0].clone()
    along = projection if site.heads is None else torch.linalg.vector_norm(projection.view(site.heads, -1), dim=1)
    table = Scores(g0, torch.zeros_like(g0), along, interval, null)
    return SiteScores(site, v_hat[0].clone(), float(sizes[0]), x[0].clone(), projection, table)


def component_scores(found: Analysis, site: Site, x_bar: torch.Tensor) -> torch.Tensor:
    """Steer2Edit's cosine scores for each direction and its typical input ``x_bar`` [n, in]; [n, components].

    Head j: ``g_j = cos(v_hat, W_j x_bar_j)``, where v_hat · W_j x_bar_j is block j of ``Wᵀ v_hat`` times x_bar_j. Neuron i:
    ``g_i = sign(x_bar_i) cos(v_hat, w_i)``.
    """
    if site.heads is None:
        return x_bar.sign() * found.projection / found.norms.clamp(min=TINY)
    along = (found.projection * x_bar).view(len(x_bar), site.heads, -1).sum(dim=2)
    return along / found.norms.clamp(min=TINY)


def analyse(checkpoint: Checkpoint, site: Site, v_hat: torch.Tensor, x_bar: torch.Tensor | None = None) -> Analysis:
    """Read ``site``'s matrix once. ``v_hat`` is [n, out], ``x_bar`` [n, in]. Raises CheckpointError for NaN or infinity."""
    v = v_hat.to(torch.float32)
    x = x_bar.to(torch.float32) if x_bar is not None and site.heads is not None else None
    by_rows = _analyse_out_in if site.orientation == "out_in" else _analyse_in_out
    projection, squares = by_rows(checkpoint, site, v, x)
    # whatever v_hat is: 0 · inf and 0 · NaN are NaN
    if not bool(projection.isfinite().all()):
        raise CheckpointError(f"{site.matrix} holds NaN or infinity; the checkpoint is damaged")
    return Analysis(projection, squares.sqrt_())


def applied(checkpoint: Checkpoint, site: Site, x: torch.Tensor) -> torch.Tensor:
    """``W x`` [out, n], float32, of inputs ``x`` [in, n]; W is read once. Raises CheckpointError for NaN or infinity."""
    columns = x.to(torch.float32)
    blocks = _wide_blocks(checkpoint, site)
    if site.orientation == "out_in":
        product = torch.cat([wide @ columns for _, wide in blocks])
    else:
        product = torch.zeros(site.out_features, columns.shape[1])
        for first, wide in blocks:
            product += wide.T @ columns[first : first + len(wide)]
    if not bool(product.isfinite().all()):
        raise CheckpointError(f"{site.matrix} holds NaN or infinity; the checkpoint is damaged")
    return product


def written(checkpoint: Checkpoint, site: Site, x: torch.Tensor) -> torch.Tensor:
    """What a site's matrix gives for one input ``x`` [in], without its bias: ``W x``, float32 [out]. Reads the matrix once."""
    return applied(checkpoint, site, x[:, None])[:, 0]


# Both give V W, and the squares of Analysis.norms.


def _analyse_out_in(
    checkpoint: Checkpoint, site: Site, v: torch.Tensor, x: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    projection = torch.zeros(len(v), site.in_features)
    squares = torch.zeros(len(v), site.components) if x is not None else torch.zeros(1, site.in_features)
    inputs = x.view(len(x), site.components, -1).permute(1, 2, 0) if x is not None else None  # [heads, d, n]
    for first, wide in _wide_blocks(checkpoint, site):
        projection += v[:, first : first + wide.shape[0]] @ wide
        if inputs is None:
            # in place: a block that stays in the processor's cache costs less than any new memory
            squares += wide.square_().sum(dim=0)
        else:
            outputs = wide.view(wide.shape[0], site.components, -1).transpose(0, 1) @ inputs  # [heads, rows, n]
            squares += outputs.square_().sum(dim=1).T
    return projection, squares


def _analyse_in_out(
    checkpoint: Checkpoint, site: Site, v: torch.Tensor, x: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    projection = torch.zeros(len(v), site.in_features)
    squares = torch.zeros(1, site.in_features)
    width = site.in_features // site.components
    outputs = torch.zeros(site.components if x is not None else 0, len(v), site.out_features)
    for first, wide in _wide_blocks(checkpoint, site):
        rows = slice(first, first + wide.shape[0])
        projection[:, rows] = v @ wide.T
        if x is None:
            squares[0, rows] = wide.square_().sum(dim=1)
        else:
            for head in range(first // width, (rows.stop - 1) // width + 1):
                inside = slice(max(rows.start, head * width), min(rows.stop, (head + 1) * width))
                outputs[head] += x[:, inside] @ wide[inside.start - first : inside.stop - first]
    return projection, squares if x is None else outputs.square_().sum(dim=2).T


def _wide_blocks(checkpoint: Checkpoint, site: Site) -> Iterator[tuple[int, torch.Tensor]]:
    """``(first row, block)`` in float32; a block's memory is used again for the next."""
    wide = torch.empty(0)
    for first, block in values(checkpoint, site.locate(checkpoint)):
        if wide.shape[0] < block.shape[0]:
            wide = torch.empty(block.shape)
        yield first, wide[: block.shape[0]].copy_(block)
