"""How well a judge's probabilities agree with labels.

The measure is the area under the ROC curve, with its interval. The packaged labels are in ``labelled_answers.jsonl``: sixty
answers of three traits, written and labelled by hand, some of them without sense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from steer2edit.bootstrap import Estimate, estimate
from steer2edit.errors import DataError
from steer2edit.files.untrusted import parse_json_values, read_bytes

LEAST_AUC = 0.75
"""A judge is used where it puts at least so many of the pairs of a right and a wrong answer in order."""
LEAST_LABELS = 4
"""Labels of each kind that a trial needs, at least."""
_DRAWS = 1000
_FILE = Path(__file__).with_name("labelled_answers.jsonl")
_EDGE = 1e-6


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer that a person labelled: whether it shows a trait, given in words, and whether it makes sense."""

    trait: str
    prompt: Any
    answer: str
    shows: bool
    coherent: bool = True


@dataclass(frozen=True)
class Agreement:
    """What a trial of a judge on labels gave.

    ``auc`` is the share of pairs of a positive and a negative that are in order, with its bootstrap 95 % interval ``low`` to
    ``high``; 0.5 is chance. ``right`` is the share of labels that the judge meets when the threshold is set without the label in
    question. Probabilities above ``threshold`` are a yes. ``silent`` counts the labels to which the judge said neither.
    """

    what: str
    auc: float
    low: float
    high: float
    right: Estimate
    threshold: float
    count: int
    silent: int

    @property
    def trusted(self) -> bool:
        """Whether the judge is used: its area reaches ``LEAST_AUC``, and the interval leaves chance out."""
        return self.auc >= LEAST_AUC and self.low > 0.5

    def moved(self, yes: float) -> float:
        """A probability with its logit moved so that the threshold becomes 0.5."""
        return yes if math.isnan(yes) else 1 / (1 + math.exp(_logit(self.threshold) - _logit(yes)))

    def described(self) -> dict[str, Any]:
        """The trial in plain values."""
        return {**asdict(self), "trusted": self.trusted}

    def __str__(self) -> str:
        return (
            f"on {self.count} labelled answers its AUC is {self.auc:.2f} [{self.low:.2f}, {self.high:.2f}], and it needs "
            f"{LEAST_AUC} (0.5 is chance)"
        )


def labelled_answers() -> list[LabelledAnswer]:
    """The packaged labels."""
    rows = parse_json_values(read_bytes(_FILE, 1 << 20))
    return [LabelledAnswer(**{**row, "trait": TRAITS[row["trait"]]}) for row in rows]


TRAITS = {
    "blunt": "Blunt: it says what is wrong first, without flattery.",
    "cautious": "Cautious: it says where it is not sure, and what to check.",
    "plain language": "Plain language: short sentences and everyday words, no jargon.",
}
"""The traits of the packaged labels, as a judge is told them."""


def of_both_kinds(labelled: Sequence[LabelledAnswer], most: int) -> list[LabelledAnswer]:
    """At most ``most`` labels of each kind, spread evenly; none where a kind has too few."""
    kinds = [[one for one in labelled if one.shows is kind] for kind in (True, False)]
    if min(map(len, kinds)) < LEAST_LABELS:
        return []
    return [one for kind in kinds for one in kind[:: max(1, len(kind) // most)][:most]]


def agreement_of(what: str, yes: Sequence[float], labels: Sequence[bool]) -> Agreement:
    """The agreement of probabilities of yes with labels. Raises DataError for too few labels of a kind.

    Where the judge said neither yes nor no, its opinion counts as 0.5 in the area, and as wrong in the share that is right.
    """
    positives, negatives = sum(labels), len(labels) - sum(labels)
    if min(positives, negatives) < LEAST_LABELS:
        raise DataError(
            f"a judge is tried on at least {LEAST_LABELS} answers of each kind, and there are {positives} and {negatives}"
        )
    values = torch.tensor([0.5 if math.isnan(one) else one for one in yes], dtype=torch.float64)
    truth = torch.tensor(list(labels))
    better = values[truth][:, None] - values[~truth][None, :]
    wins = (better > 0).double() + 0.5 * (better == 0).double()
    draw = torch.Generator().manual_seed(0)
    areas = torch.stack(
        [
            wins[
                torch.randint(positives, (positives,), generator=draw)[:, None],
                torch.randint(negatives, (negatives,), generator=draw)[None, :],
            ].mean()
            for _ in range(_DRAWS)
        ]
    )
    low, high = torch.quantile(areas, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    right = []
    for index, label in enumerate(labels):
        rest = torch.arange(len(values)) != index
        threshold = _threshold(values[rest], truth[rest])
        right.append(float(not math.isnan(yes[index]) and (float(values[index]) > threshold) == label))
    silent = sum(map(math.isnan, yes))
    threshold = _threshold(values, truth)
    return Agreement(what, float(wins.mean()), low, high, estimate(right), threshold, len(labels), silent)


def _threshold(values: torch.Tensor, truth: torch.Tensor) -> float:
    """Where the two kinds part best: the largest mean of both shares that are right (Youden's index)."""
    ordered = torch.tensor(sorted(set(values.tolist())), dtype=torch.float64)
    middles = [0.0, *((ordered[1:] + ordered[:-1]) / 2).tolist(), 1.0]
    best: float = max(
        middles, key=lambda at: float((values[truth] > at).double().mean() + (values[~truth] <= at).double().mean())
    )
    return min(max(best, _EDGE), 1 - _EDGE)


def _logit(p: float) -> float:
    p = min(max(p, _EDGE), 1 - _EDGE)
    return math.log(p / (1 - p))
