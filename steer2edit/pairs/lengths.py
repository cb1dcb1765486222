"""How long both sides are, and whether length alone tells them apart."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SEPARATES = 0.9
"""From this share of rightly ordered answers on, length alone tells the sides apart."""


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of both sides, and ``auc``, the chance that a negative answer is longer than a positive one."""

    positive: float
    negative: float
    auc: float

    @property
    def separates(self) -> bool:
        """Whether length alone tells the sides apart."""
        return max(self.auc, 1 - self.auc) >= SEPARATES

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        return {
            "positive": self.positive,
            "negative": self.negative,
            "auc": self.auc,
            "separates": self.separates,
        }


def lengths(positive: Sequence[int], negative: Sequence[int]) -> Lengths:
    """The lengths of two sides, in tokens; ties count half (the area under the ROC curve). Raises ValueError for no answers."""
    if not positive or not negative:
        raise ValueError("lengths of a side without answers")
    ordered = sorted(positive)
    # twice the number of positive answers that are shorter than each negative one
    shorter = sum(bisect_left(ordered, one) + bisect_right(ordered, one) for one in negative)
    auc = shorter / (2 * len(positive) * len(negative))
    return Lengths(sum(positive) / len(positive), sum(negative) / len(negative), auc)
