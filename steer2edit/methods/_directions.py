"""Directions of the residual stream that a method takes out: after which block, cleaned of what, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steer2edit.errors import DataError, PlanError

if TYPE_CHECKING:
    import torch

    from steer2edit.capture.statistics import Statistics
    from steer2edit.scoring.scores import Scoring

_REST = 1e-3
"""Of a direction's length, what must be left beside the background's mean, or beside other directions."""
RIDGE = 1e-3
"""Of the covariance's mean diagonal, what is added to it before it is inverted."""


@dataclass(frozen=True)
class Directions:
    """Directions at each layer, from the behaviour's statistics and from ``others``."""

    statistics: Statistics
    others: Sequence[Statistics]
    projected: bool = False

    @classmethod
    def of(cls, scoring: Scoring, files: Sequence[str], projected: bool) -> Directions:
        """The behaviour's directions with those of more statistics or vectors ``files``. Raises PlanError for other files."""
        return cls(scoring.statistics, [_read(scoring, name) for name in files], projected)

    def at(self, layer: int) -> torch.Tensor:
        """The directions after a block, float32 [hidden, n]. Raises PlanError where one is zero, or no more than the rest."""
        import torch

        key = f"residual.{layer}"
        found = [one.difference(key).float() for one in (self.statistics, *self.others)]
        if not all(bool(r.any()) for r in found):
            raise PlanError(
                f"both classes have the same mean residual stream after layer {layer}: there is no direction to ablate"
            )
        if self.projected:
            mean = torch.nn.functional.normalize(self.statistics.mean(key, "output", "background").float(), dim=0)
            cleaned = [r - (r @ mean) * mean for r in found]
            if any(float(after.norm()) < _REST * float(r.norm()) for r, after in zip(found, cleaned, strict=True)):
                raise PlanError(f"after layer {layer} nothing of a direction is left beside the background's mean")
            found = cleaned
        R: torch.Tensor = torch.stack(found, dim=1)
        sizes = torch.linalg.svdvals(R / R.norm(dim=0))
        if float(sizes[-1]) < _REST:
            raise PlanError(f"after layer {layer} one of the {len(found)} directions is a mixture of the others")
        return R

    def duals(self, layer: int, R: torch.Tensor) -> torch.Tensor:
        """``Σ⁻¹ R`` [hidden, n] with the contrast data's covariance of the stream. Raises PlanError where it was not captured."""
        import torch

        key = f"residual.{layer}"
        if (key, "contrast") not in self.statistics.blocks:
            raise PlanError(
                f"--eraser leace needs the covariance of the residual stream after layer {layer}. compile captures it where it "
                f"is given data (--behavior or --data); statistics hold it after steer2edit capture … --stream-moments {layer}"
            )
        mean = (self.statistics.mean(key, "output", "positive") + self.statistics.mean(key, "output", "negative")) / 2
        sigma = self.statistics.blocks[key, "contrast"][0].double() - torch.outer(mean, mean)
        sigma += RIDGE * sigma.diagonal().mean() * torch.eye(len(sigma), dtype=torch.float64)
        found: torch.Tensor = torch.linalg.solve(sigma, R.double())
        return found.float()


def orthonormal(R: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis [out, n] of the columns of ``R``; of one column, that column at length one."""
    import torch

    if R.shape[1] == 1:
        return torch.nn.functional.normalize(R, dim=0)
    U: torch.Tensor = torch.linalg.svd(R / R.norm(dim=0), full_matrices=False).U
    return U


def _read(scoring: Scoring, name: str) -> Statistics:
    from steer2edit.capture.statistics import Statistics
    from steer2edit.capture.vectors import Vectors, substituted

    try:
        found = Statistics.load(name)
    except PlanError:
        try:
            vectors = Vectors.load(name)
        except DataError:
            raise PlanError(
                f"--also {name}: this is neither a statistics file (steer2edit capture) nor one of vectors (steer2edit import)"
            ) from None
        return substituted(vectors, scoring.statistics, scoring.checkpoint, scoring.spec)
    found.check_model(scoring.checkpoint)
    return found
