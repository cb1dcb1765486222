"""Sums of moments, batch by batch; frozen they are statistics.

Sums are float64 and add up over disjoint examples, so they may be kept, reduced over processes and resumed. They lie on the
device of what they sum, so that no batch waits for a transfer; a device without float64 has its sums on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch

from steer2edit.capture.expert_moments import ExpertSums, add_to
from steer2edit.capture.moments import Moments, Resampled
from steer2edit.capture.pairs import Pairs
from steer2edit.capture.populations import POPULATIONS, RESAMPLES, SOURCE_OF, SOURCES, Kind, Population, Side, Source
from steer2edit.capture.resampling import draws
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.stored import read_name, stored_name
from steer2edit.data.answers import LABELS
from steer2edit.errors import PlanError


class Accumulator:
    """Sums moments batch by batch; :meth:`result` freezes them. Differences are kept of ``pairs``."""

    def __init__(self, pairs: Pairs = Pairs()) -> None:  # noqa: B008
        self.pairs = pairs
        self._differences: dict[str, torch.Tensor] = {}
        self._shares: torch.Tensor | None = None
        self._sums: dict[tuple[str, Side], torch.Tensor] = {}
        self._blocks: dict[tuple[str, Source], torch.Tensor] = {}
        self._experts: dict[int, ExpertSums] = {}
        self._total = torch.zeros(_ROWS, dtype=torch.float64)
        self._examples = dict.fromkeys(POPULATIONS, 0)
        self._tokens = dict.fromkeys(POPULATIONS, 0)
        self._weights = torch.empty(0)
        self._populations: list[Population] = []

    def begin(self, examples: Sequence[tuple[Population, int, int]], again: bool = False) -> None:
        """Note the batch that comes next: each example's population, its data row and its tokens; counted once, not ``again``."""
        self._populations = [population for population, _, _ in examples]
        self._weights = torch.stack([_example_weights(population, row) for population, row, _ in examples], dim=1)
        self._shares = self.pairs.shares([(population, row) for population, row, _ in examples])
        if again:
            return
        self._total += self._weights.double().sum(dim=1)
        for population, _, tokens in examples:
            self._examples[population] += 1
            self._tokens[population] += tokens

    def add(
        self,
        key: str,
        side: Side,
        values: torch.Tensor,
        spread: torch.Tensor,
        heads: int | None = None,
        paired: bool = False,
    ) -> None:
        """Add ``values`` [tokens, features]; ``spread`` [examples, tokens] holds 1/length at each example's tokens.

        With ``heads``, the second moments of each head's block of features too; ``paired`` keeps the pairs' differences.
        """
        values = values.to(spread.dtype)
        if self._weights.device != values.device:
            self._weights = self._weights.to(values.device)
        means = spread @ values
        by_example = self._weights @ means
        squares = self._weights[: len(POPULATIONS)] @ (spread @ values.square())
        add_to(self._sums, (key, side), torch.cat((by_example, squares)))
        if paired and self._shares is not None:
            add_to(self._differences, key, self._shares.to(means.device) @ means)
        if heads is not None:
            self._add_blocks(key, values.view(len(values), heads, -1).transpose(0, 1), spread)

    def _add_blocks(self, key: str, values: torch.Tensor, spread: torch.Tensor) -> None:
        for source in dict.fromkeys(SOURCE_OF[population] for population in self._populations):
            rows = [i for i, population in enumerate(self._populations) if SOURCE_OF[population] == source]
            scaled = values * spread[rows].sum(dim=0)[:, None]
            add_to(self._blocks, (key, source), scaled.transpose(1, 2) @ values)  # [heads, d, d]

    def add_expert(
        self, layer: int, expert: int, experts: int, values: torch.Tensor, spread: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """Add the inputs of one of a layer's ``experts``: ``values`` [n, in].

        ``spread`` [examples, n] has the columns of their tokens, and ``weights`` [n] are the routing's.
        """
        shares = self._weights[: len(POPULATIONS)].to(values.device) @ spread
        sums = self._experts.setdefault(layer, ExpertSums())
        sums.add(expert, experts, values.to(spread.dtype), shares, weights.to(spread.dtype))

    def state(self) -> dict[str, torch.Tensor]:
        """Everything summed so far, float64 on the CPU by name.

        The states of disjoint examples add up to that of all of them.
        """
        counts = [[counted[population] for population in POPULATIONS] for counted in (self._examples, self._tokens)]
        state = {"total": self._total.clone(), "counts": torch.tensor(counts, dtype=torch.float64)}
        state |= {f"sums/{key}/{side}": sums for (key, side), sums in self._sums.items()}
        state |= {f"blocks/{key}/{stored_name(source)}": sums for (key, source), sums in self._blocks.items()}
        state |= {f"pairs/{key}": sums for key, sums in self._differences.items()}
        for layer, experts in self._experts.items():
            state |= {f"experts/{layer}/{name}": sums for name, sums in experts.state().items()}
        return {name: sums.cpu() for name, sums in state.items()}

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor], pairs: Pairs = Pairs()) -> Accumulator:  # noqa: B008
        """The accumulator of ``pairs`` whose :meth:`state` this was. Raises PlanError for any other tensors."""
        made = cls(pairs)
        if strange := [name for name, values in state.items() if values.dtype != torch.float64]:
            raise PlanError(f"the sums {strange[0]!r} are not float64")
        for name, values in state.items():
            if name == "total" and values.shape == (_ROWS,):
                made._total = values
            elif name == "counts" and values.shape == (2, len(POPULATIONS)):
                made._examples, made._tokens = (
                    {p: int(count) for p, count in zip(POPULATIONS, row.tolist(), strict=True)} for row in values
                )
            elif (
                (parts := name.split("/"))[0] == "sums" and len(parts) == 3 and len(values) == _ROWS + len(POPULATIONS)
            ):
                made._sums[parts[1], cast(Side, parts[2])] = values
            elif parts[0] == "blocks" and len(parts) == 3 and values.ndim == 3:
                made._blocks[parts[1], cast(Source, read_name(parts[2]))] = values
            elif parts[0] == "pairs" and len(parts) == 2 and values.ndim == 2 and len(values) == len(pairs.rows):
                made._differences[parts[1]] = values
            elif parts[0] == "experts" and len(parts) == 3 and parts[1].isdigit() and len(values) == len(POPULATIONS):
                layer = int(parts[1])
                made._experts[layer] = ExpertSums({**made._experts.get(layer, ExpertSums()).state(), parts[2]: values})
            else:
                raise PlanError(f"unknown sums {name!r} of shape {list(values.shape)}")
        return made

    def result(self, source: Mapping[str, Any]) -> Statistics:
        """The statistics so far."""
        count = len(POPULATIONS)
        total = self._total.clamp(min=1e-300)[:, None]
        captured = [p for p in POPULATIONS if self._examples[p]]
        moments: dict[tuple[str, Side, Population], Moments] = {}
        resampled: dict[tuple[Kind, str, Side], Resampled] = {}
        for (key, side), sums in self._sums.items():
            means, squares = sums[:_ROWS] / total, sums[_ROWS:] / total[:count]
            for index, population in enumerate(POPULATIONS):
                if population in captured:
                    moments[key, side, population] = Moments(means[index].clone(), squares[index].clone())
            for kind, rows in _RESAMPLED_ROWS.items():
                # a resample that drew none of a class has that class's plain mean
                drawn = torch.where(self._total[rows][:, None] > 0, means[rows], means[[0, 1] * RESAMPLES[kind]])
                resampled[kind, key, side] = Resampled(drawn.view(-1, 2, drawn.shape[1]).float())
        counts = {s: sum(self._examples[p] for p in POPULATIONS if SOURCE_OF[p] == s) for s in SOURCES}
        return Statistics(
            moments,
            dict(self._examples),
            dict(self._tokens),
            {**source, **({"pairs": list(self.pairs.rows)} if self._differences else {})},
            {key: (sums / counts[key[1]]).float() for key, sums in self._blocks.items()},
            resampled,
            {kind: self._total[rows].view(-1, 2).clone() for kind, rows in _RESAMPLED_ROWS.items()},
            {
                (layer, population): sums.moments(index, self._examples[population])
                for layer, sums in self._experts.items()
                for index, population in enumerate(POPULATIONS)
                if population in captured
            },
            {key: sums.float() for key, sums in self._differences.items()},
        )


# rows of the weights: the populations, then for each resample both labels
_ROWS = len(POPULATIONS) + 2 * sum(RESAMPLES.values())
_RESAMPLED_ROWS: Mapping[Kind, slice] = {
    "bootstrap": slice(len(POPULATIONS), len(POPULATIONS) + 2 * RESAMPLES["bootstrap"]),
    "shuffled": slice(len(POPULATIONS) + 2 * RESAMPLES["bootstrap"], _ROWS),
}


@lru_cache(maxsize=4096)
def _example_weights(population: Population, row: int) -> torch.Tensor:
    """How often one example counts in each row of the sums. Both examples of a pair get the same bootstrap weight."""
    weights = torch.zeros(_ROWS)
    weights[POPULATIONS.index(population)] = 1
    if population in LABELS:
        label = LABELS.index(population)
        times, swapped = draws(row)
        weights[_RESAMPLED_ROWS["bootstrap"]].view(-1, 2)[:, label] = times
        weights[_RESAMPLED_ROWS["shuffled"]].view(-1, 2).scatter_(1, (swapped ^ label)[:, None], 1.0)
    return weights
