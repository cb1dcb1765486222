"""How much of a planned update the stored dtype kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer2edit.plan.operations import Bias, Edit, LowRank


@dataclass(frozen=True)
class Rounding:
    """How much of a tensor's planned update its stored dtype kept.

    ``along_v`` is the part kept along the planned update itself (for a rank-1 edit: of its push along v_hat), ``cosine`` is
    that between stored and planned update, ``relative`` the norm of their difference over the planned norm.
    """

    tensor: str
    along_v: float
    cosine: float
    relative: float


class RoundingMeter:
    """Sums over blocks: planned·stored, planned², stored²."""

    def __init__(self, tensor: str) -> None:
        self.tensor, self.cross, self.planned, self.stored = tensor, 0.0, 0.0, 0.0

    def add(self, edit: Edit, out_in: bool, first: int, old: torch.Tensor, new: torch.Tensor) -> None:
        """Take in a block of rows from ``first`` on, before and after."""
        # what is added is compared by itself, so that a small edit of a large matrix is not lost in the sum
        before = torch.zeros(old.shape) if isinstance(edit, (LowRank, Bias)) else old.float()
        planned = before.clone()
        edit.apply(planned, first, out_in)
        planned -= before
        stored = new.float() - old.float()
        self.cross += float((planned * stored).sum(dtype=torch.float64))
        self.planned += float(planned.square().sum(dtype=torch.float64))
        self.stored += float(stored.square().sum(dtype=torch.float64))

    def result(self) -> Rounding:
        """What the blocks so far come to."""
        scale = max(self.planned, 1e-300)
        error = max(self.planned - 2 * self.cross + self.stored, 0.0)
        cosine = self.cross / max((self.planned * self.stored) ** 0.5, 1e-300)
        return Rounding(self.tensor, self.cross / scale, cosine, (error / scale) ** 0.5)
