"""Means of one activation: over all examples, and under resampled rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moments:
    """First and elementwise second moment of one activation, each ``[features]``, float64."""

    mean: torch.Tensor
    m2: torch.Tensor


@dataclass(frozen=True)
class Resampled:
    """Class means under resampled rows: ``means`` ``[resamples, 2 labels, features]``, float32."""

    means: torch.Tensor

    def difference(self) -> torch.Tensor:
        """Positive minus negative, ``[resamples, features]``."""
        return self.means[:, 0] - self.means[:, 1]

    def x_bar(self) -> torch.Tensor:
        """Half the sum of both classes, ``[resamples, features]``."""
        return self.means.mean(dim=1)
