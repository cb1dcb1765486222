"""Whether pairs point one way in the model: agreement, consistency and separability along their vector.

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
DRAWS = 399
"""Swappings of labels that the numbers are compared with."""
LEAST_PROMPTS = 10
"""From fewer prompts nothing is said."""


@dataclass(frozen=True)
class Separation:
    """How far two sides lie apart in the model.

    ``agreement`` is the mean cosine of two pairs' differences, ``d_prime`` how many standard deviations of single answers the
    sides lie apart along the vector, ``chance`` the 95 % quantile of that with swapped labels. ``consistency`` is the mean
    difference of a pair along the vector over its standard deviation, and ``p`` the share of swappings in which it is as large.
    ``paired`` says that both answers of a pair are to one prompt.
    """

    agreement: float
    d_prime: float
    chance: float
    consistency: float
    p: float
    pairs: int
    prompts: int
    paired: bool = True

    def reliability(self, pairs: int) -> float:
        """Expected cosine of the vector of ``pairs`` such pairs with that of endlessly many (Spearman-Brown)."""
        known = max(self.agreement, 0.0) * pairs
        return math.sqrt(known / (1 - max(self.agreement, 0.0) + known)) if known else 0.0

    def pairs_for(self, reliability: float) -> int | None:
        """How many such pairs make a vector of this reliability; None where the pairs do not agree at all."""
        if self.agreement <= 0:
            return None
        square = reliability**2
        return math.ceil(square * (1 - self.agreement) / (self.agreement * (1 - square)))

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "agreement": self.agreement,
            "d_prime": self.d_prime,
            "d_prime_by_chance": self.chance,
            "consistency": self.consistency,
            "p": self.p,
            "pairs": self.pairs,
            "prompts": self.prompts,
            "paired": self.paired,
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


def consistency(differences: torch.Tensor) -> torch.Tensor:
    """``mean / standard deviation`` of ``[pairs, …]``, for each place; 0 where nothing differs."""
    mean = differences.mean(0)
    return torch.where(mean == 0, torch.zeros_like(mean), mean / differences.std(0))


def projections(pairs: torch.Tensor, folds: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Of each answer its projection on the vector of the pairs of the other folds, ``[pairs, 2, draws, layers]``.

    ``pairs`` are activations ``[pairs, 2, layers, features]``, positive first; ``folds`` number the pairs' folds. ``signs`` are
    ``[draws, pairs]``: -1 swaps a pair's labels.
    """
    pairs, signs = pairs.double().transpose(0, 2), signs.double()  # [layers, 2, pairs, features]
    # everything is a sum of products of answers with differences, whatever the labels
    products = pairs @ (pairs[:, :1] - pairs[:, 1:]).transpose(-1, -2)
    found = torch.zeros(pairs.shape[2], 2, len(signs), len(pairs), dtype=torch.float64)
    for fold in sorted(set(folds.tolist())):
        own = folds == fold
        others = signs * ~own
        on_sum = torch.einsum("lsij,dj->isdl", products, others)
        square = torch.einsum("idl,di->dl", on_sum[:, 0] - on_sum[:, 1], others)
        found[own] = on_sum[own] / square.clamp(min=1e-300).sqrt()
    return torch.where((signs.T < 0)[:, None, :, None], found.flip(1), found)


def separation(
    pairs: torch.Tensor, prompts: Sequence[Hashable], seed: int = 0, paired: bool = True
) -> Separation | None:
    """The numbers of pairs, and what they are by chance; None for pairs of fewer than :data:`LEAST_PROMPTS` prompts.

    ``pairs`` are activations ``[pairs, 2, layers, features]``, positive first. Pairs of one prompt stay in one fold, and their
    labels are swapped together.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    if len(numbers) < LEAST_PROMPTS:
        return None
    owners = torch.tensor([numbers[prompt] for prompt in prompts])
    draws = torch.Generator().manual_seed(seed)
    swaps = torch.rand(DRAWS, len(numbers), generator=draws) < 0.5
    # the first draw is the labels as they are
    signs = torch.cat([torch.ones(1, len(owners)), torch.where(swaps, -1.0, 1.0)[:, owners]])
    on_vector = projections(pairs, owners % FOLDS, signs)
    apart = _median(d_prime(on_vector[:, 0], on_vector[:, 1]))
    consistent = _median(consistency(on_vector[:, 0] - on_vector[:, 1]))
    return Separation(
        float(agreement(pairs[:, 0] - pairs[:, 1]).median()),
        float(apart[0]),
        float(apart[1:].quantile(0.95)),
        float(consistent[0]),
        float((consistent >= consistent[0]).double().mean()),
        len(pairs),
        len(numbers),
        paired,
    )


def _median(numbers: torch.Tensor) -> torch.Tensor:
    """The median over layers of ``[draws, layers]``; 0 where it is not finite, as of answers without any spread."""
    found = numbers.median(-1).values
    return torch.where(found.isfinite(), found, torch.zeros_like(found))
