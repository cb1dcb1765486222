"""Running moments of activations, mergeable and exact enough that batching does not matter.

Every example counts once, whatever its length: a moment is the mean over examples of the mean over the tokens of
the response span. Sums are float64. Beside the moments themselves two kinds of resampled class means are kept, each by
one streaming pass (the online bootstrap of Oza and Russell): ``bootstrap``, where every row of the data counts
Poisson(1) times, and ``shuffled``, where every row's labels are swapped by a coin, which is what a direction looks like
when the labels mean nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steer2edit.capture.expert_moments import ExpertMoments
from steer2edit.capture.moments import Moments, Resampled
from steer2edit.capture.populations import POPULATIONS, SOURCE_OF, SOURCES, Kind, Population, Side, Source, expert_of
from steer2edit.capture.stored import (
    DESCRIBED,
    FORMAT,
    OLDER,
    check_tensors,
    read_name,
    stored_counts,
    stored_name,
)
from steer2edit.data.answers import LABELS
from steer2edit.errors import PlanError, shown
from steer2edit.files.atomic import load_tensors, save_tensors
from steer2edit.files.schema import check
from steer2edit.files.untrusted import parse_json

if TYPE_CHECKING:
    from steer2edit.checkpoint import Checkpoint

_UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""The relative error of one rounding in dtypes narrower than float32."""
_ROUTING = ("selected.", "mass.", "counts.")


@dataclass(frozen=True)
class Statistics:
    """Moments by ``(site key, side, population)``; ``examples`` and ``tokens`` count each population's.

    Besides the writers there is one pseudo-site per block, ``residual.N``: the residual stream after block N
    (side ``output``). ``blocks`` holds ``E[x_j x_jᵀ]`` of each head's input ``x_j``, ``[heads, d, d]`` float32, by
    ``(site key, source)``; ``resampled`` is by ``(kind, site key, side)``, with the total weight of each
    resample and label in ``weights`` ``[resamples, 2]``. ``pairs`` holds, by site, each pair's difference of mean outputs,
    ``[pairs, features]`` float32. ``source`` says what was captured.
    """

    moments: Mapping[tuple[str, Side, Population], Moments]
    examples: Mapping[Population, int]
    tokens: Mapping[Population, int]
    source: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[tuple[str, Source], torch.Tensor] = field(default_factory=dict)
    resampled: Mapping[tuple[Kind, str, Side], Resampled] = field(default_factory=dict)
    weights: Mapping[Kind, torch.Tensor] = field(default_factory=dict)
    experts: Mapping[tuple[int, Population], ExpertMoments] = field(default_factory=dict)
    pairs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def nothing(cls, checkpoint: Checkpoint) -> Statistics:
        """Statistics of a model of which nothing was captured."""
        none: Mapping[Population, int] = dict.fromkeys(POPULATIONS, 0)
        return cls({}, none, none, {"model": checkpoint.name, "fingerprint": checkpoint.fingerprint, "prompts": []})

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Raise PlanError unless the statistics were captured from this checkpoint's weights."""
        theirs = self.source.get("fingerprint")
        if theirs != checkpoint.fingerprint:
            raise PlanError(
                f"the statistics are of {self.source.get('model')} (fingerprint {str(theirs)[:12]}), but {checkpoint.name} has "
                f"the fingerprint {checkpoint.fingerprint[:12]}; capture them from this model"
            )

    def mean(self, key: str, side: Side, population: Population) -> torch.Tensor:
        """The mean activation, float64 ``[features]``. Raises PlanError where it was not captured."""
        return self._moments(key, side, population).mean

    def x_bar(self, key: str) -> torch.Tensor:
        """The typical input of a site: half the sum of both classes' means (Steer2Edit, section 3).

        For an expert that of the classes whose tokens were routed to it.
        """
        return self._typical(key, [self._moments(key, "input", label).mean for label in LABELS])

    def energy(self, key: str, source: Source = "contrast") -> torch.Tensor:
        """``E[x²]`` of a site's input, elementwise; for the contrast data half the sum of both classes'."""
        if source != "contrast":
            return self._moments(key, "input", source).m2
        return self._typical(key, [self._moments(key, "input", label).m2 for label in LABELS])

    def routed_tokens(self, key: str) -> int | None:
        """How many tokens of the contrast data an expert was given; None for a site that is not an expert."""
        expert = expert_of(key)
        if expert is None:
            return None
        return sum(int(self._experts(expert[0], label).tokens[expert[1]]) for label in LABELS)

    def _typical(self, key: str, both: list[torch.Tensor]) -> torch.Tensor:
        expert = expert_of(key)
        if expert is not None:
            there = [float(self._experts(expert[0], label).weight[expert[1]] > 0) for label in LABELS]
            return (both[0] * there[0] + both[1] * there[1]) / max(sum(there), 1.0)
        return (both[0] + both[1]) / 2

    def block_moments(self, key: str, source: Source) -> torch.Tensor:
        """``E[x_j x_jᵀ]`` of each head's input, float32 ``[heads, d, d]``. Raises PlanError where it was not captured."""
        try:
            return self.blocks[key, source]
        except KeyError:
            raise PlanError(_missing(f"{source} second moments of the heads of {key}")) from None

    def difference(self, key: str) -> torch.Tensor:
        """The steering vector of a site: mean output of the positive class minus that of the negative.

        It is zero where it is not larger than rounding: a direction of noise is not a behaviour.
        """
        v = self.mean(key, "output", "positive") - self.mean(key, "output", "negative")
        return v if float(v.norm()) > self._rounding(key) else torch.zeros_like(v)

    def _rounding(self, key: str) -> float:
        """How long a difference of means may get by rounding alone.

        Measured where both classes were the same text: at most 6e-8 of the output's root mean square in float32, which has
        a rounding unit of 6e-8. In narrower dtypes single outputs are rounded, and their mean over examples is taken.
        """
        squares = [float(self._moments(key, "output", label).m2.sum()) for label in LABELS]
        size = math.sqrt(max(sum(squares) / 2, 0.0))
        if "vectors" in self.source:  # theirs stand in float64 about the means
            return 1e-12 * size
        unit = _UNITS.get(str(self.source.get("dtype")), 0.0)
        examples = max(min(self.examples[label] for label in LABELS), 1)
        return (1e-6 + 4 * unit / math.sqrt(examples)) * size

    @property
    def distinct(self) -> Mapping[str, int]:
        """How many distinct prompts each class has; empty in statistics of older versions."""
        counts: Mapping[str, int] = self.source.get("distinct_prompts") or {}
        return counts

    @property
    def distinct_prompts(self) -> int | None:
        """How many distinct prompts the smaller class has, or, in statistics of older versions, both; None if not known."""
        prompts = self.source.get("prompts")
        return min(self.distinct.values(), default=len(prompts) if prompts else None)

    @property
    def pair_rows(self) -> tuple[int, ...]:
        """The numbers of the rows whose pairs' differences are kept, in their order; empty in older statistics."""
        return tuple(self.source.get("pairs", ())) if self.pairs else ()

    @property
    def directions(self) -> frozenset[str]:
        """The places, writers and blocks, at which the classes' outputs differ by a steering vector."""
        keys = {key for key, side, population in self.moments if side == "output" and population == "positive"}
        return frozenset(key for key in keys if "." in key and not key.startswith(_ROUTING))

    def check_contrast(self) -> None:
        """Raise PlanError where the classes differ nowhere by more than rounding."""
        if self.directions and not any(bool(self.difference(key).any()) for key in self.directions):
            raise PlanError(
                "both classes have the same mean activations, up to rounding, at every layer: there is no behaviour to compile; "
                "are their responses the same?"
            )

    def resamples(self, kind: Kind, key: str, side: Side) -> Resampled:
        """A site's resampled means. Raises PlanError where they were not captured."""
        try:
            return self.resampled[kind, key, side]
        except KeyError:
            raise PlanError(_missing(f"{kind} means of {key}")) from None

    def shuffled(self, index: int) -> Statistics:
        """The statistics with randomly swapped labels (permutation ``index``): what a method makes of no behaviour at all."""
        moments = dict(self.moments)
        for (kind, key, side), one in self.resampled.items():
            if kind == "shuffled":
                for label, mean in zip(LABELS, one.means[index].double(), strict=True):
                    moments[key, side, label] = replace(moments[key, side, label], mean=mean)
        return replace(self, moments=moments, resampled={}, weights={})  # experts' inputs are what both classes share

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
            source: [sum(one.examples[p] for p in POPULATIONS if SOURCE_OF[p] == source) for one in (self, other)]
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
        pairs = {key: torch.cat((self.pairs[key], other.pairs[key])) for key in self.pairs.keys() & other.pairs.keys()}
        source = {key: value for key, value in self.source.items() if key != "pairs"}
        return Statistics(
            moments,
            {p: self.examples[p] + other.examples[p] for p in POPULATIONS},
            {p: self.tokens[p] + other.tokens[p] for p in POPULATIONS},
            {**source, **({"pairs": [*self.pair_rows, *other.pair_rows]} if pairs else {})},
            blocks,
            resampled,
            {kind: self.weights[kind] + other.weights[kind] for kind in self.weights},
            self._merged_experts(other),
            pairs,
        )

    def _merged_experts(self, other: Statistics) -> dict[tuple[int, Population], ExpertMoments]:
        merged = {**other.experts, **self.experts}
        for key in self.experts.keys() & other.experts.keys():
            counts = self.examples[key[1]], other.examples[key[1]]
            merged[key] = self.experts[key].merged(other.experts[key], *counts)
        return merged

    def save(self, path: str | Path) -> None:
        """Write ``*.stats.safetensors``: ``<site>.<side>.<population>.<mean|m2>`` float64, and float32 besides:
        ``<site>.input.<contrast|neutral|chat|keep>.blocks``, ``<site>.<side>.<bootstrap|shuffled>.means``,
        ``<site>.output.pairs.differences``, and of experts
        ``routed.<layer>.<population>.<mean|m2|weighted|weight|tokens>``.
        """
        tensors = {f"{kind}.weights": weights for kind, weights in self.weights.items()}
        for (key, side, population), moments in self.moments.items():
            tensors[f"{key}.{side}.{stored_name(population)}.mean"] = moments.mean
            tensors[f"{key}.{side}.{stored_name(population)}.m2"] = moments.m2
        tensors |= {
            f"{key}.input.{stored_name(source)}.blocks": blocks for (key, source), blocks in self.blocks.items()
        }
        tensors |= {f"{key}.{side}.{kind}.means": one.means for (kind, key, side), one in self.resampled.items()}
        tensors |= {f"{key}.output.pairs.differences": one for key, one in self.pairs.items()}
        for (layer, population), experts in self.experts.items():
            name = f"routed.{layer}.{stored_name(population)}"
            tensors |= {f"{name}.{what}": value for what, value in experts.tensors().items()}
        described = {
            "format": FORMAT,
            "examples": stored_counts(self.examples),
            "tokens": stored_counts(self.tokens),
            "source": self.source,
        }
        save_tensors(Path(path), tensors, {"statistics": json.dumps(described)})

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what :meth:`save` wrote. Raises PlanError for any other file."""
        tensors, metadata = load_tensors(Path(path))
        try:
            described = parse_json(metadata["statistics"].encode(), unique=True)
            if described["format"] not in (FORMAT, *OLDER):
                raise PlanError(
                    f"{path} has the format {shown(described['format'])}, expected {FORMAT!r}; capture the statistics again"
                )
            check(described, DESCRIBED, "the statistics")
            check_tensors(tensors)
            moments: dict[Any, Moments] = {}
            blocks: dict[Any, torch.Tensor] = {}
            resampled: dict[Any, Resampled] = {}
            weights: dict[Any, torch.Tensor] = {}
            experts: dict[Any, dict[str, torch.Tensor]] = {}
            pairs: dict[str, torch.Tensor] = {}
            for name, tensor in tensors.items():
                if name.endswith(".weights"):
                    weights[name.removesuffix(".weights")] = tensor
                    continue
                key, side, stored, what = name.rsplit(".", 3)
                group = read_name(stored)
                if key == "routed":
                    experts.setdefault((int(side), group), {})[what] = tensor
                elif what == "mean":
                    moments[key, side, group] = Moments(tensor, tensors[f"{key}.{side}.{stored}.m2"])
                elif what == "blocks":
                    blocks[key, group] = tensor
                elif what == "differences":
                    pairs[key] = tensor
                elif what == "means":
                    resampled[group, key, side] = Resampled(tensor)
            examples, tokens = (
                {p: int(described[name].get(stored_name(p), 0)) for p in POPULATIONS} for name in ("examples", "tokens")
            )
            routed = {key: ExpertMoments.of(values) for key, values in experts.items()}
            source = dict(described["source"])
            if wrong := [key for key, one in pairs.items() if len(one) != len(source.get("pairs", ()))]:
                raise ValueError(f"it has {len(pairs[wrong[0]])} pairs at {wrong[0]}, and its description names others")
            return cls(moments, examples, tokens, source, blocks, resampled, weights, routed, pairs)
        except (KeyError, ValueError, TypeError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise PlanError(f"{path} is not a statistics file of steer2edit: {reason}") from None

    def _experts(self, layer: int, population: Population) -> ExpertMoments:
        try:
            return self.experts[layer, population]
        except KeyError:
            raise PlanError(_missing(f"{population} inputs of the experts of layer {layer}")) from None

    def _moments(self, key: str, side: Side, population: Population) -> Moments:
        expert = expert_of(key)
        if expert is not None and side == "input":
            found = self._experts(expert[0], population)
            return Moments(found.mean[expert[1]], found.m2[expert[1]])
        try:
            return self.moments[key, side, population]
        except KeyError:
            raise PlanError(_missing(f"{population} {side} of {key}")) from None


def _missing(what: str) -> str:
    return f"the statistics hold no {what}; capture them from this model again"
