"""Component tables: the scores of one site's heads or neurons, and reading them from a plan's file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from steer2edit.errors import PlanError, shown

TABLE = ("g", "lam", "projection", "interval", "null")
"""The names of the tables in a file, which are those of the fields."""
_LARGEST = 1e18  # a larger value is not a score, and overflows where it is squared


@dataclass(frozen=True)
class Scores:
    """Component tables of one site, float32 ``[components]``, in the order of its input columns.

    ``g`` is the cosine score; ``lam`` the signed strength, ``|lam| = ‖ΔW_j‖``; ``projection`` is ``w_i·v_hat`` for a
    neuron (its sign is the paper's k_i) and ``‖W_jᵀ v_hat‖`` for a head. ``interval`` ``[2, components]`` is g's bootstrap
    95 % interval over examples, ``null`` what g is under shuffled labels; None where nothing was resampled.
    """

    g: torch.Tensor
    lam: torch.Tensor
    projection: torch.Tensor
    interval: torch.Tensor | None = None
    null: torch.Tensor | None = None

    @property
    def stable(self) -> torch.Tensor:
        """Components whose interval leaves the sign of g in no doubt, ``[components]`` bool."""
        if self.interval is None:
            return torch.ones_like(self.g, dtype=torch.bool)
        return self.interval[0].sign() * self.interval[1].sign() > 0


def read_scores(key: str, tensors: Mapping[str, torch.Tensor]) -> Scores:
    """The tables of the site ``key`` among a plan file's tensors. Raises PlanError for values that cannot be scores."""
    tables = {name: tensors.get(f"{key}.{name}") for name in TABLE}
    g = tables["g"]
    if not re.fullmatch(r"[a-z_]{1,40}(\.\d{1,5}){1,2}", key) or g is None or g.ndim != 1 or not len(g):
        raise PlanError(f"the plan's scores {shown(key)} are not those of a site")
    shapes = {"interval": (2, len(g))}
    for name, values in tables.items():
        if values is None and name in ("interval", "null"):
            continue
        expected = shapes.get(name, (len(g),))
        if (
            values is None
            or values.shape != expected
            or values.dtype != torch.float32
            or not bool((values.abs() < _LARGEST).all())
        ):
            raise PlanError(f"the plan's {key}.{name} is not {list(expected)} float32 values of a plausible size")
    return Scores(**tables)  # type: ignore[arg-type]
