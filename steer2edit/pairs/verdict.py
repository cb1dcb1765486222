"""The verdict on contrast data: whether it holds a behaviour that the model can be steered by.

The bounds are calibrated by ``benchmarks/data_verdict.py`` on behaviours that work and on swapped labels (docs/data.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer2edit.pairs.measure import Difference
from steer2edit.pairs.separation import LEAST_PROMPTS, Separation, Word

STEERABLE, WEAK = 1.5, 0.8
"""From this d′ on: behaviours that work have 2.4 and more, labels of which a fifth is wrong about 1.1, and swapped ones 0."""
AGREEMENT = 0.1
"""Least mean cosine of two pairs' differences of a behaviour that is called steerable."""


@dataclass(frozen=True)
class Verdict:
    """One word, and why, for people."""

    word: Word
    reasons: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether the data may be compiled without the user's consent."""
        return self.word != "not"

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        return {"word": self.word, "reasons": list(self.reasons)}


def verdict(
    found: Separation | None, differences: Sequence[Difference], answers: tuple[int, int], *, read: bool = True
) -> Verdict:
    """What the numbers mean. ``answers`` counts those that are left of the positive and of the negative side.

    Where the model did not ``read`` the rows, only the metrics of the texts count.
    """
    disobeyed = [
        f"the two sides do not differ in {one.metric} as they should: {one.found}, expected {one.goal}"
        for one in differences
        if not one.obeyed
    ]
    if disobeyed:
        return Verdict("not", tuple(disobeyed))
    if not read:
        return Verdict("not measured", ("the model did not read the rows",))
    if found is None:
        left = f"{answers[0]} positive and {answers[1]} negative answers are left"
        return Verdict("not", (f"{left}, and with fewer than {LEAST_PROMPTS} prompts on a side nothing is said",))
    numbers = f"d′ is {found.d_prime:.2f} (by chance up to {found.chance:.2f}), agreement {found.agreement:.2f}"
    if found.d_prime < WEAK or found.d_prime <= found.chance:
        return Verdict("not", (f"{numbers}: the model tells the two sides apart no better than swapped labels",))
    if found.d_prime < STEERABLE or found.agreement < AGREEMENT:
        return Verdict("weak", (f"{numbers}: expected {STEERABLE} and {AGREEMENT} or more",))
    return Verdict("steerable", (numbers,))
