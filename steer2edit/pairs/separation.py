"""Whether pairs point one way in the model: agreement of their differences, and separability along their vector.

The vector is the mean difference of the pairs, and each pair is tried on a vector that it has no part in (cross-validation).
The same is done with randomly swapped labels, which is what pairs look like that say nothing. Layers are those that a compile
edits by default; each number is the median over them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Word = Literal["steerable", "weak", "not", "not measured"]
FOLDS = 5
DRAWS = 40
"""Swappings of labels that the numbers are compared with."""
LEAST_PROMPTS = 10
"""From fewer prompts nothing is said."""


@dataclass(frozen=True)
class Separation:
    """How far two sides lie apart in the model.

    ``agreement`` is the mean cosine of two pairs' differences, ``d_prime`` how many standard deviations the sides lie apart along
    the vector, ``chance`` the 95 % quantile of that with swapped labels.
    """

    agreement: float
    d_prime: float
    chance: float
    pairs: int
    prompts: int

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "agreement": self.agreement,
            "d_prime": self.d_prime,
            "d_prime_by_chance": self.chance,
            "pairs": self.pairs,
            "prompts": self.prompts,
        }


def agreement(differences: torch.Tensor) -> torch.Tensor:
    """The mean cosine of two different rows of ``[pairs, …, features]``, for each place between. Zero rows count as 0.

    It is 1 where all rows point one way, about 0 where they have nothing in common.
    """
    count = len(differences)
    unit = torch.nn.functional.normalize(differences.double(), dim=-1)
    squares = unit.square().sum(-1).sum(0)
    return (unit.sum(0).square().sum(-1) - squares) / max(count * (count - 1), 1)


def d_prime(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """``(mean p - mean n) / sqrt((var p + var n) / 2)`` of projections ``[answers, …]``, for each place.

    It is 0 where nothing differs.
    """
    spread = ((positive.var(0) + negative.var(0)) / 2).sqrt()
    apart = positive.mean(0) - negative.mean(0)
    return torch.where(apart == 0, torch.zeros_like(apart), apart / spread)


def projections(pairs: torch.Tensor, folds: torch.Tensor) -> torch.Tensor:
    """Of each answer its projection on the vector of the pairs of the other folds, ``[pairs, 2, …]``.

    ``pairs`` are activations ``[pairs, 2, …, features]``, positive first; ``folds`` number the pairs' folds.
    """
    pairs = pairs.double()
    found = torch.zeros(pairs.shape[:-1], dtype=torch.float64)
    for fold in sorted(set(folds.tolist())):
        own = folds == fold
        vector = (pairs[~own, 0] - pairs[~own, 1]).mean(0)
        found[own] = (pairs[own] * torch.nn.functional.normalize(vector, dim=-1)).sum(-1)
    return found


def separation(pairs: torch.Tensor, prompts: Sequence[Hashable], seed: int = 0) -> Separation | None:
    """Both numbers of pairs, and what they are by chance; None for pairs of fewer than :data:`LEAST_PROMPTS` prompts.

    ``pairs`` are activations ``[pairs, 2, layers, features]``, positive first. Pairs of one prompt stay in one fold, and their
    labels are swapped together.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    if len(numbers) < LEAST_PROMPTS:
        return None
    owners = torch.tensor([numbers[prompt] for prompt in prompts])
    folds = owners % FOLDS
    draws = torch.Generator().manual_seed(seed)
    by_chance = []
    for _ in range(DRAWS):
        swap = (torch.rand(len(numbers), generator=draws) < 0.5)[owners]
        by_chance.append(_d_prime(torch.where(swap[:, None, None, None], pairs.flip(1), pairs), folds))
    return Separation(
        float(agreement(pairs[:, 0] - pairs[:, 1]).median()),
        _d_prime(pairs, folds),
        float(torch.tensor(by_chance, dtype=torch.float64).quantile(0.95)),
        len(pairs),
        len(numbers),
    )


def _d_prime(pairs: torch.Tensor, folds: torch.Tensor) -> float:
    on_vector = projections(pairs, folds)
    number = float(d_prime(on_vector[:, 0], on_vector[:, 1]).median())
    return number if math.isfinite(number) else 0.0
