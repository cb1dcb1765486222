"""Which rows of the data are pairs, and where each difference is summed.

Of each pair the difference of its mean activations is kept, positive minus negative, at every place that a vector can be added.
At most ``MOST_PAIRS`` are kept, so that memory does not grow with the data: of more pairs a random choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from steer2edit.capture.populations import Population
from steer2edit.data.answers import LABELS

MOST_PAIRS = 128


@dataclass(frozen=True)
class Pairs:
    """``rows`` are the numbers of the pairs that are kept. ``counts`` says how many examples of each label a row has."""

    rows: tuple[int, ...] = ()
    counts: Counter[tuple[Population, int]] = field(default_factory=Counter)

    @classmethod
    def of(cls, examples: Iterable[tuple[Population, int]]) -> Pairs:
        """The pairs among examples, of each of which the population and the row are given."""
        counts = Counter(one for one in examples if one[0] in LABELS)
        rows = sorted({row for _, row in counts if all(counts[label, row] for label in LABELS)})
        if len(rows) > MOST_PAIRS:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:MOST_PAIRS]
            rows = sorted(rows[int(i)] for i in order)
        return cls(tuple(rows), counts)

    def shares(self, batch: Sequence[tuple[Population, int]]) -> torch.Tensor | None:
        """What each example of a batch adds to each pair's difference, [pairs, examples]; None where it adds nothing."""
        places = {row: place for place, row in enumerate(self.rows)}
        shares = torch.zeros(len(self.rows), len(batch))
        for number, (population, row) in enumerate(batch):
            if population in LABELS and row in places:
                sign = 1.0 if population == LABELS[0] else -1.0
                shares[places[row], number] = sign / self.counts[population, row]
        return shares if bool(shares.any()) else None
