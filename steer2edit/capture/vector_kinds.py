r"""What one vector is made of all pairs: their mean, their principal direction, or their median.

With ``d_i`` the difference of pair i at one place:

- *pca*: the first principal direction u of the differences, not centred (RepE, arXiv 2310.01405 and 2504.19483), which is the
  axis on which pairs differ most. The labels decide its sign and its length: ``v = u (u · mean d)``.
- *median*: the geometric median, ``argmin_v Σ_i ‖d_i − v‖`` (Weiszfeld). A few odd pairs hardly move it, and it does not hang
  on the basis of the stream, as a median of each coordinate would.

Both are mixtures ``Σ_i c_i d_i``, so only the products of the differences with each other are needed. Resamples of the rows are
taken through the same formula, so that the tests of components' signs are of this vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch

from steer2edit.capture.moments import Resampled
from steer2edit.capture.populations import RESAMPLES, Kind
from steer2edit.capture.resampling import drawn_rows
from steer2edit.capture.statistics import Statistics
from steer2edit.data.answers import LABELS
from steer2edit.errors import PlanError, shown

VectorKind = Literal["mean", "pca", "median", "gradient"]
_ROWS: Mapping[Kind, slice] = {
    "bootstrap": slice(1, 1 + RESAMPLES["bootstrap"]),
    "shuffled": slice(1 + RESAMPLES["bootstrap"], None),
}
"""Where the resamples are among ``drawn_rows``."""
_STEPS = 200
_SETTLED = 1e-10
_NEAR = 1e-9


def with_vector(statistics: Statistics, kind: VectorKind) -> Statistics:
    """The statistics with every class difference made of the pairs in another way; "mean" changes nothing.

    Raises PlanError where the statistics hold no pairs, or a vector from elsewhere.
    """
    if kind not in get_args(VectorKind):
        raise PlanError(f"there is no vector {shown(kind)}; there are {', '.join(get_args(VectorKind))}")
    if kind == "mean":
        return statistics
    if kind == "gradient":
        raise PlanError(
            "--vector gradient runs the model on contrast data, and statistics hold none: make the vectors with "
            "steer2edit vectors MODEL --kind gradient, and give their file as --vectors"
        )
    if "vectors" in statistics.source:
        raise PlanError(
            f"--vector {kind} is made of contrast data, and the vector comes from elsewhere; give one of the two"
        )
    if len(statistics.pair_rows) < 2:
        raise PlanError(
            f"--vector {kind} is made of pairs, and these statistics hold {len(statistics.pair_rows)}: capture data in which a "
            "prompt has a positive and a negative response (statistics of older versions hold none)"
        )
    weights, signs = drawn_rows(statistics.pair_rows)
    mix = _MIXTURES[kind]
    moments, resampled = dict(statistics.moments), dict(statistics.resampled)
    for key in statistics.directions & statistics.pairs.keys():
        D = statistics.pairs[key].double()
        vectors = mix(D @ D.T, weights, signs) @ D
        both = [moments[key, "output", label] for label in LABELS]
        middle = (both[0].mean + both[1].mean) / 2
        for label, one, sign in zip(LABELS, both, (0.5, -0.5), strict=True):
            moments[key, "output", label] = replace(one, mean=middle + sign * vectors[0])
        for resample, rows in _ROWS.items():
            drawn = resampled.get((resample, key, "output"))
            if drawn is not None:
                half = vectors[rows].float() / 2
                means = torch.stack((drawn.x_bar() + half, drawn.x_bar() - half), dim=1)
                resampled[resample, key, "output"] = Resampled(means)
    return replace(statistics, moments=moments, resampled=resampled, source={**statistics.source, "vector": kind})


def principal(products: torch.Tensor, weights: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The principal direction's mixtures, [resamples, pairs]; ``products`` [pairs, pairs] are those of the differences.

    Row r weighs the pairs with ``weights`` [resamples, pairs] and swaps the labels where ``signs`` are -1.
    """
    roots = weights.sqrt()
    energies, axes = torch.linalg.eigh(roots[:, :, None] * products * roots[:, None, :])
    energy, axis = energies[:, -1].clamp(min=0), axes[:, :, -1]
    # u = Σ_i along_i d_i, of length one
    along = torch.where(energy[:, None] > 0, roots * axis / energy.clamp(min=1e-300).sqrt()[:, None], 0.0)
    shares = signs * weights / weights.sum(dim=1, keepdim=True)
    length = ((along @ products) * shares).sum(dim=1)
    return along * length[:, None]


def median(products: torch.Tensor, weights: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The geometric median's mixtures; the arguments are those of :func:`principal`."""
    squares = products.diagonal()
    nearest = _NEAR * float(squares.max().clamp(min=1e-300).sqrt())
    shares = weights / weights.sum(dim=1, keepdim=True)
    for _ in range(_STEPS):
        # distances of s_i d_i from Σ_j shares_j s_j d_j
        across = signs * ((signs * shares) @ products)
        inside = (shares * across).sum(dim=1, keepdim=True)
        distances = (squares - 2 * across + inside).clamp(min=0).sqrt().clamp(min=nearest)
        nearer = weights / distances
        nearer = nearer / nearer.sum(dim=1, keepdim=True)
        moved = float((nearer - shares).abs().max())
        shares = nearer
        if moved < _SETTLED:
            break
    return shares * signs


_MIXTURES: Mapping[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "pca": principal,
    "median": median,
}
