"""The ends of sorted answers: pairs of one prompt where both ends have one, else classes of several prompts.

Prompts differ in what they ask for: a long answer to a long question is not a behaviour. So answers are compared with the
mean of their own prompt, and an end is a share of all answers by that difference.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

LEAST_PAIRED = 20
"""With fewer prompts that have both ends, the ends are taken over all prompts together, as two classes."""


@dataclass(frozen=True)
class Ends:
    """Indices of answers. ``pairs`` hold the better one first, both of one prompt; the classes are for use without pairs."""

    pairs: tuple[tuple[int, int], ...]
    better: tuple[int, ...]
    worse: tuple[int, ...]
    prompts: int
    """How many prompts have a pair."""

    @property
    def paired(self) -> bool:
        """Whether there are enough prompts with both ends."""
        return self.prompts >= LEAST_PAIRED


def ends(values: Sequence[float], prompts: Sequence[Hashable], share: float, *, more: bool = True) -> Ends:
    """The two ends of ``values``, where ``prompts`` name each answer's prompt; ``more`` says that high values are better.

    ``share`` of all answers make one end, at least one. Within a prompt the best is paired with the worst, the second best
    with the second worst, and so on. Where there are two values only, such as 0 and 1, each is an end, whatever the share.
    Answers whose value is nan are left out.
    """
    known = [i for i, value in enumerate(values) if not math.isnan(value)]
    signed = {i: values[i] if more else -values[i] for i in known}
    groups: dict[Hashable, list[int]] = {}
    for i in known:
        groups.setdefault(prompts[i], []).append(i)
    if len(set(signed.values())) <= 2:
        middle = (max(signed.values()) + min(signed.values())) / 2 if signed else 0.0
        about_prompt = about_all = {i: value - middle for i, value in signed.items()}
        count = len(known)
    else:
        means = {group: sum(signed[i] for i in members) / len(members) for group, members in groups.items()}
        # rounded, so that answers which are equally far from their means stay equal
        about_prompt = {i: round(signed[i] - means[prompts[i]], 9) for i in known}
        overall = sum(signed.values()) / len(signed)
        about_all = {i: round(value - overall, 9) for i, value in signed.items()}
        count = max(1, math.floor(share * len(known)))
    high, low = _end(about_prompt, count), _end({i: -value for i, value in about_prompt.items()}, count)
    pairs: list[tuple[int, int]] = []
    paired = 0
    for members in groups.values():
        # the index decides between equal values, so that the order of the answers does not
        best = sorted((i for i in members if i in high), key=lambda i: (-signed[i], i))
        worst = sorted((i for i in members if i in low), key=lambda i: (signed[i], i))
        own = [(a, b) for a, b in zip(best, worst, strict=False) if signed[a] > signed[b]]
        pairs += own
        paired += bool(own)
    better, worse = _end(about_all, count), _end({i: -value for i, value in about_all.items()}, count)
    return Ends(tuple(pairs), tuple(sorted(better)), tuple(sorted(worse)), paired)


def _end(values: dict[int, float], count: int) -> set[int]:
    """The indices of the ``count`` largest values, with all that equal the last of them; those above 0 alone."""
    ranked = sorted(values.values(), reverse=True)
    if not ranked:
        return set()
    bound = ranked[min(count, len(ranked)) - 1]
    return {i for i, value in values.items() if value >= bound and value > 0}
