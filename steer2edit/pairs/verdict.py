"""The verdict on contrast data: whether it holds a behaviour that the model can be steered by.

The bounds are calibrated by ``benchmarks/data_verdict.py`` on behaviours that work and on swapped labels (docs/data.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer2edit.errors import count_of
from steer2edit.pairs.measure import Difference
from steer2edit.pairs.separation import LEAST_PROMPTS, Separation, Word

CHANCE = 0.01
"""Largest share of swapped labels that may do as well as the labels: so many data without a behaviour are not called "not"."""
RELIABLE, UNRELIABLE = 0.8, 0.5
"""Least expected cosine of the vector with that of endlessly many pairs, of data that is called steerable; and weak."""
STEERABLE, WEAK = 1.5, 0.8
"""Least d′ of two classes of prompts, beyond chance and at all: they differ in their topics too. Pairs have no such bound."""


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
    found: Separation | None,
    differences: Sequence[Difference],
    answers: tuple[int, int],
    captured: int,
    *,
    read: bool = True,
) -> Verdict:
    """What the numbers mean.

    ``answers`` counts those that are left of the positive and of the negative side, ``captured`` the pairs that the vector is
    made of. Where the model did not ``read`` the rows, only the metrics of the texts count.
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
    reliability = found.reliability(captured)
    numbers = (
        f"d′ is {found.d_prime:.2f} (by chance up to {found.chance:.2f}), agreement {found.agreement:.3f}, reliability of the "
        f"vector {reliability:.2f}"
    )
    if found.p > CHANCE:
        why = f"the model tells the two sides apart no better than swapped labels ({found.p:.0%} of them do as well)"
        return Verdict("not", (f"{numbers}: {why}",))
    if not found.paired and found.d_prime < max(WEAK, found.chance):
        return Verdict(
            "not", (f"{numbers}: for two classes of prompts a d′ of {WEAK}, and more than by chance, is expected",)
        )
    if reliability < RELIABLE:
        needed = found.pairs_for(RELIABLE)
        more = "" if needed is None else f", which takes {count_of(needed, 'pair')} in place of {captured}"
        word: Word = "not" if reliability < UNRELIABLE else "weak"
        return Verdict(word, (f"{numbers}: expected a reliability of {RELIABLE} or more{more}",))
    if not found.paired and found.d_prime < STEERABLE + found.chance:
        why = f"for two classes of prompts a d′ of {STEERABLE} beyond chance is expected"
        return Verdict("weak", (f"{numbers}: {why}",))
    return Verdict("steerable", (numbers,))
