"""Directions to protect: the behaviour's vector is cleared of them at every writer.

The edit then does not write along them. With the protected directions as A's columns, each of length one,
r' = r − A (AᵀA + λI)⁻¹ Aᵀ r (arXiv 2601.08489).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from steer2edit.capture.moments import Resampled
from steer2edit.capture.statistics import Statistics
from steer2edit.data.answers import LABELS
from steer2edit.errors import PlanError

LAMBDA = 1e-6
"""What keeps two directions that are nearly the same from cancelling; a share of it of the vector stays."""
_REST = 1e-3
"""Of the vector's length, what must be left somewhere for an edit to be of the behaviour."""


def protected(statistics: Statistics, others: Sequence[Statistics]) -> Statistics:
    """The statistics with every class difference cleared of the ``others``' differences at the same place.

    Differences of resampled rows are cleared of them too; class means stay symmetric about their middle. Raises PlanError where
    the others are of another model, and where they leave hardly anything of the behaviour at any place.
    """
    if not others:
        return statistics
    for other in others:
        if other.source.get("fingerprint") != statistics.source.get("fingerprint"):
            raise PlanError(
                f"the directions to protect are of {other.source.get('model')}, and the statistics of "
                f"{statistics.source.get('model')}: capture both from one model"
            )
    moments, resampled = dict(statistics.moments), dict(statistics.resampled)
    rests = []
    for key in statistics.directions:
        columns = [other.difference(key) for other in others if key in other.directions]
        columns = [column / column.norm() for column in columns if bool(column.any())]
        if not columns:
            continue
        A = torch.stack(columns, dim=1)
        both = [moments[key, "output", label] for label in LABELS]
        before = both[0].mean - both[1].mean
        after = cleared(before[None], A)[0]
        if bool(before.any()):
            rests.append(float(after.norm() / before.norm()))
        middle = (both[0].mean + both[1].mean) / 2
        for label, one, sign in zip(LABELS, both, (0.5, -0.5), strict=True):
            moments[key, "output", label] = replace(one, mean=middle + sign * after)
        for kind in ("bootstrap", "shuffled"):
            drawn = resampled.get((kind, key, "output"))
            if drawn is not None:
                half = cleared(drawn.difference().double(), A).float() / 2
                resampled[kind, key, "output"] = Resampled(torch.stack((drawn.x_bar() + half, drawn.x_bar() - half), 1))
    names = [str(other.source.get("name")) for other in others]
    if rests and max(rests) < _REST:
        raise PlanError(
            f"nothing of the behaviour is left beside {', '.join(names)}: at most {max(rests):.2g} of its vector's length; "
            "protect something else"
        )
    source = {**statistics.source, "protect": [*statistics.source.get("protect", []), *names]}
    return replace(statistics, moments=moments, resampled=resampled, source=source)


def cleared(vectors: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """``vectors`` [n, features] without what lies along the columns of ``directions`` [features, m]; float64."""
    gram = directions.T @ directions + LAMBDA * torch.eye(directions.shape[1], dtype=directions.dtype)
    found: torch.Tensor = vectors - (vectors @ directions) @ torch.linalg.solve(gram, directions.T)
    return found
