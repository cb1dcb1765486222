"""Running moments of activations, mergeable and exact enough that batching does not matter.

Every example counts once, whatever its length: a moment is the mean over examples of the mean over the tokens of
the response span. Sums are float64. Beside the moments themselves two kinds of resampled class means are kept, each by
one streaming pass (the online bootstrap of Oza and Russell): ``bootstrap``, where every row of the data counts
Poisson(1) times, and ``shuffled``, where every row's labels are swapped by a coin, which is what a direction looks like
when the labels mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch

from steer2edit.errors import PlanError
from steer2edit.files import load_tensors, save_tensors

Label = Literal["positive", "negative"]
Population = Literal["positive", "negative", "neutral"]
Source = Literal["contrast", "neutral"]
Side = Literal["input", "output"]
Kind = Literal["bootstrap", "shuffled"]
LABELS: tuple[Label, Label] = ("positive", "negative")
SOURCES: tuple[Source, Source] = ("contrast", "neutral")
POPULATIONS: tuple[Population, ...] = (*LABELS, "neutral")
RESAMPLES: Mapping[Kind, int] = {"bootstrap": 32, "shuffled": 8}
FORMAT = "steer2edit.statistics.2"
_SOURCES: Mapping[Population, Source] = {"positive": "contrast", "negative": "contrast", "neutral": "neutral"}


@dataclass(frozen=True)
class Moments:
    """First and elementwise second moment of one activation, each ``[features]``, float64."""

    mean: torch.Tensor
    m2: torch.Tensor


@dataclass(frozen=True)
class Resampled:
    """Class means under resampled rows: ``means`` ``[resamples, 2 labels, features]``, float32."""

    means: torch.Tensor

    def difference(self) -> torch.Tensor:
        """Positive minus negative, ``[resamples, features]``."""
        return self.means[:, 0] - self.means[:, 1]

    def x_bar(self) -> torch.Tensor:
        """Half the sum of both classes, ``[resamples, features]``."""
        return self.means.mean(dim=1)


@dataclass(frozen=True)
class Statistics:
    """Moments by ``(site key, side, population)``; ``examples`` and ``tokens`` count each population's.

    Besides the writers there is one pseudo-site per block, ``residual.N``: the residual stream after block N
    (side ``output``). ``blocks`` holds ``E[x_j x_jᵀ]`` of each head's input ``x_j``, ``[heads, d, d]`` float32, by
    ``(site key, "contrast" or "neutral")``; ``resampled`` is by ``(kind, site key, side)``, with the total weight of each
    resample and label in ``weights`` ``[resamples, 2]``. ``source`` says what was captured.
    """

    moments: Mapping[tuple[str, Side, Population], Moments]
    examples: Mapping[Population, int]
    tokens: Mapping[Population, int]
    source: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[tuple[str, Source], torch.Tensor] = field(default_factory=dict)
    resampled: Mapping[tuple[Kind, str, Side], Resampled] = field(default_factory=dict)
    weights: Mapping[Kind, torch.Tensor] = field(default_factory=dict)

    def mean(self, key: str, side: Side, population: Population) -> torch.Tensor:
        """The mean activation, float64 ``[features]``. Raises PlanError where it was not captured."""
        return self._moments(key, side, population).mean

    def x_bar(self, key: str) -> torch.Tensor:
        """The typical input of a site: half the sum of both classes' means (Steer2Edit, section 3)."""
        return (self.mean(key, "input", "positive") + self.mean(key, "input", "negative")) / 2

    def energy(self, key: str, source: Source = "contrast") -> torch.Tensor:
        """``E[x²]`` of a site's input, elementwise; for the contrast data half the sum of both classes'."""
        if source == "neutral":
            return self._moments(key, "input", "neutral").m2
        return (self._moments(key, "input", "positive").m2 + self._moments(key, "input", "negative").m2) / 2

    def block_moments(self, key: str, source: Source) -> torch.Tensor:
        """``E[x_j x_jᵀ]`` of each head's input, float32 ``[heads, d, d]``. Raises PlanError where it was not captured."""
        try:
            return self.blocks[key, source]
        except KeyError:
            raise PlanError(_missing(f"{source} second moments of the heads of {key}")) from None

    def difference(self, key: str) -> torch.Tensor:
        """The steering vector of a site: mean output of the positive class minus that of the negative."""
        return self.mean(key, "output", "positive") - self.mean(key, "output", "negative")

    def resamples(self, kind: Kind, key: str, side: Side) -> Resampled:
        """A site's resampled means. Raises PlanError where they were not captured."""
        try:
            return self.resampled[kind, key, side]
        except KeyError:
            raise PlanError(_missing(f"{kind} means of {key}")) from None

    def shuffled(self, index: int) -> Statistics:
        """The statistics as they are under labels dealt out by coins: what a method makes of no behaviour at all."""
        moments = dict(self.moments)
        for (kind, key, side), one in self.resampled.items():
            if kind == "shuffled":
                for label, mean in zip(LABELS, one.means[index].double(), strict=True):
                    moments[key, side, label] = replace(moments[key, side, label], mean=mean)
        return replace(self, moments=moments, resampled={}, weights={})

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of examples together. Raises PlanError where they are of different models."""
        sites = ({(key, side) for key, side, _ in one.moments} for one in (self, other))
        if self.source.get("fingerprint") != other.source.get("fingerprint") or len(set(map(frozenset, sites))) > 1:
            raise PlanError("statistics of different models or sites cannot be merged")

        def average(mine: Any, theirs: Any, a: float, b: float) -> Any:
            return theirs if mine is None else mine if theirs is None else (mine * a + theirs * b) / max(a + b, 1)

        moments = {}
        for key in self.moments.keys() | other.moments.keys():
            a, b = self.examples[key[2]], other.examples[key[2]]
            one, two = self.moments.get(key), other.moments.get(key)
            parts = [(getattr(one, name, None), getattr(two, name, None)) for name in ("mean", "m2")]
            moments[key] = Moments(*(average(mine, theirs, a, b) for mine, theirs in parts))
        count = {
            source: [sum(one.examples[p] for p in POPULATIONS if _SOURCES[p] == source) for one in (self, other)]
            for source in SOURCES
        }
        blocks = {
            key: average(self.blocks.get(key), other.blocks.get(key), *count[key[1]])
            for key in self.blocks.keys() | other.blocks.keys()
        }
        resampled = {}
        for name, drawn in self.resampled.items():
            wa, wb = (statistics.weights[name[0]].float()[:, :, None] for statistics in (self, other))
            means = (drawn.means * wa + other.resampled[name].means * wb) / (wa + wb).clamp(min=1)
            resampled[name] = Resampled(means)
        return Statistics(
            moments,
            {p: self.examples[p] + other.examples[p] for p in POPULATIONS},
            {p: self.tokens[p] + other.tokens[p] for p in POPULATIONS},
            self.source,
            blocks,
            resampled,
            {kind: self.weights[kind] + other.weights[kind] for kind in self.weights},
        )

    def save(self, path: str | Path) -> None:
        """Write ``*.stats.safetensors``: ``<site>.<side>.<population>.<mean|m2>`` float64, and float32 besides:
        ``<site>.input.<contrast|neutral>.blocks``, ``<site>.<side>.<bootstrap|shuffled>.means``.
        """
        tensors = {f"{kind}.weights": weights for kind, weights in self.weights.items()}
        for (key, side, population), moments in self.moments.items():
            tensors[f"{key}.{side}.{population}.mean"] = moments.mean
            tensors[f"{key}.{side}.{population}.m2"] = moments.m2
        tensors |= {f"{key}.input.{source}.blocks": blocks for (key, source), blocks in self.blocks.items()}
        tensors |= {f"{key}.{side}.{kind}.means": one.means for (kind, key, side), one in self.resampled.items()}
        described = {
            "format": FORMAT,
            "examples": self.examples,
            "tokens": self.tokens,
            "source": self.source,
        }
        save_tensors(Path(path), tensors, {"statistics": json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what :meth:`save` wrote. Raises PlanError for any other file."""
        tensors, metadata = load_tensors(Path(path))
        try:
            described = json.loads(metadata["statistics"])
            if described["format"] != FORMAT:
                raise PlanError(
                    f"{path} has the format {described['format']!r}, expected {FORMAT!r}; capture the statistics again"
                )
            moments: dict[Any, Moments] = {}
            blocks: dict[Any, torch.Tensor] = {}
            resampled: dict[Any, Resampled] = {}
            weights: dict[Any, torch.Tensor] = {}
            for name, tensor in tensors.items():
                if name.endswith(".weights"):
                    weights[name.removesuffix(".weights")] = tensor
                    continue
                key, side, group, what = name.rsplit(".", 3)
                if what == "mean":
                    moments[key, side, group] = Moments(tensor, tensors[f"{key}.{side}.{group}.m2"])
                elif what == "blocks":
                    blocks[key, group] = tensor
                elif what == "means":
                    resampled[group, key, side] = Resampled(tensor)
            examples, tokens = ({p: int(described[name][p]) for p in POPULATIONS} for name in ("examples", "tokens"))
            return cls(moments, examples, tokens, dict(described["source"]), blocks, resampled, weights)
        except (KeyError, ValueError, TypeError) as error:
            raise PlanError(f"{path} is not a statistics file of steer2edit: {error!r}") from None

    def _moments(self, key: str, side: Side, population: Population) -> Moments:
        try:
            return self.moments[key, side, population]
        except KeyError:
            raise PlanError(_missing(f"{population} {side} of {key}")) from None


def _missing(what: str) -> str:
    return f"the statistics hold no {what}; capture them from this model again"


class Accumulator:
    """Sums moments batch by batch; :meth:`result` freezes them."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, Side], torch.Tensor] = {}
        self._blocks: dict[tuple[str, Source], torch.Tensor] = {}
        self._total = torch.zeros(_ROWS, dtype=torch.float64)
        self._examples = dict.fromkeys(POPULATIONS, 0)
        self._tokens = dict.fromkeys(POPULATIONS, 0)
        self._weights = torch.empty(0)
        self._populations: list[Population] = []

    def begin(self, examples: Sequence[tuple[Population, int, int]]) -> None:
        """Note the batch that comes next: each example's population, its data row and its tokens."""
        self._populations = [population for population, _, _ in examples]
        self._weights = torch.stack([_example_weights(population, row) for population, row, _ in examples], dim=1)
        self._total += self._weights.double().sum(dim=1)
        for population, _, tokens in examples:
            self._examples[population] += 1
            self._tokens[population] += tokens

    def add(self, key: str, side: Side, values: torch.Tensor, spread: torch.Tensor, heads: int | None = None) -> None:
        """Add ``values`` [tokens, features]; ``spread`` [examples, tokens] holds 1/length at each example's tokens.

        With ``heads``, the second moments of each head's block of features too.
        """
        values = values.to(spread.dtype)
        if self._weights.device != values.device:
            self._weights = self._weights.to(values.device)
        by_example = self._weights @ (spread @ values)
        squares = self._weights[: len(POPULATIONS)] @ (spread @ values.square())
        sums = torch.cat((by_example, squares)).to("cpu", torch.float64)
        if (key, side) in self._sums:
            self._sums[key, side] += sums
        else:
            self._sums[key, side] = sums
        if heads is not None:
            self._add_blocks(key, values.view(len(values), heads, -1).transpose(0, 1), spread)

    def _add_blocks(self, key: str, values: torch.Tensor, spread: torch.Tensor) -> None:
        for source in dict.fromkeys(_SOURCES[population] for population in self._populations):
            rows = [i for i, population in enumerate(self._populations) if _SOURCES[population] == source]
            scaled = values * spread[rows].sum(dim=0)[:, None]
            found = (scaled.transpose(1, 2) @ values).to("cpu", torch.float64)  # [heads, d, d]
            if (key, source) in self._blocks:
                self._blocks[key, source] += found
            else:
                self._blocks[key, source] = found

    def state(self) -> dict[str, torch.Tensor]:
        """Everything summed so far, float64 by name. The states of disjoint examples add up to that of all of them."""
        counts = [[counted[population] for population in POPULATIONS] for counted in (self._examples, self._tokens)]
        state = {"total": self._total.clone(), "counts": torch.tensor(counts, dtype=torch.float64)}
        state |= {f"sums/{key}/{side}": sums for (key, side), sums in self._sums.items()}
        return state | {f"blocks/{key}/{source}": sums for (key, source), sums in self._blocks.items()}

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> Accumulator:
        """The accumulator whose :meth:`state` this was. Raises PlanError for any other tensors."""
        made = cls()
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
                made._blocks[parts[1], cast(Source, parts[2])] = values
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
        counts = {s: sum(self._examples[p] for p in POPULATIONS if _SOURCES[p] == s) for s in SOURCES}
        return Statistics(
            moments,
            dict(self._examples),
            dict(self._tokens),
            dict(source),
            {key: (sums / counts[key[1]]).float() for key, sums in self._blocks.items()},
            resampled,
            {kind: self._total[rows].view(-1, 2).clone() for kind, rows in _RESAMPLED_ROWS.items()},
        )


# rows of the weights: the populations, then for each resample both labels
_ROWS = len(POPULATIONS) + 2 * sum(RESAMPLES.values())
_RESAMPLED_ROWS: Mapping[Kind, slice] = {
    "bootstrap": slice(len(POPULATIONS), len(POPULATIONS) + 2 * RESAMPLES["bootstrap"]),
    "shuffled": slice(len(POPULATIONS) + 2 * RESAMPLES["bootstrap"], _ROWS),
}


@lru_cache(maxsize=4096)
def _example_weights(population: Population, row: int) -> torch.Tensor:
    """How often one example counts in each row of the sums. A row's examples share their luck, so that pairs stay pairs."""
    weights = torch.zeros(_ROWS)
    weights[POPULATIONS.index(population)] = 1
    if population != "neutral":
        generator = torch.Generator().manual_seed(row)
        label = LABELS.index(population)
        times = torch.poisson(torch.ones(RESAMPLES["bootstrap"]), generator=generator)
        swapped = torch.randint(2, (RESAMPLES["shuffled"],), generator=generator)
        weights[_RESAMPLED_ROWS["bootstrap"]].view(-1, 2)[:, label] = times
        weights[_RESAMPLED_ROWS["shuffled"]].view(-1, 2).scatter_(1, (swapped ^ label)[:, None], 1.0)
    return weights
