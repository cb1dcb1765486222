"""Running moments of activations, mergeable and exact enough that batching does not matter.

Every example counts once, whatever its length: a moment is the mean over examples of the mean over the tokens of
the response span. Sums are float64. Beside the moments themselves two kinds of resampled class means are kept, each by
one streaming pass (the online bootstrap of Oza and Russell): ``bootstrap``, where every row of the data counts
Poisson(1) times, and ``shuffled``, where every row's labels are swapped by a coin, which is what a direction looks like
when the labels mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from steer2edit.capture.expert_moments import ExpertMoments
from steer2edit.errors import PlanError, listing, shown
from steer2edit.files.atomic import load_tensors, save_tensors
from steer2edit.files.schema import TEXT, check
from steer2edit.files.untrusted import parse_json

if TYPE_CHECKING:
    from steer2edit.checkpoint import Checkpoint

Label = Literal["positive", "negative"]
Population = Literal["positive", "negative", "background"]
Source = Literal["contrast", "background"]
Side = Literal["input", "output"]
Kind = Literal["bootstrap", "shuffled"]
Scope = Literal["prompt", "response", "all"]
SCOPES: tuple[Scope, ...] = ("prompt", "response", "all")
LABELS: tuple[Label, Label] = ("positive", "negative")
SOURCES: tuple[Source, Source] = ("contrast", "background")
POPULATIONS: tuple[Population, ...] = (*LABELS, "background")
RESAMPLES: Mapping[Kind, int] = {"bootstrap": 32, "shuffled": 8}
FORMAT = "steer2edit.statistics.2"
SOURCE_OF: Mapping[Population, Source] = {"positive": "contrast", "negative": "contrast", "background": "background"}
_STORED = {"background": "neutral"}
"""How files name what has another name here: once the background text was called neutral."""


def stored_name(population: str) -> str:
    """A population or source as files name it."""
    return _STORED.get(population, population)


def read_name(stored: str) -> str:
    """The population or source that files name ``stored``."""
    return next((name for name, theirs in _STORED.items() if theirs == stored), stored)


def stored_counts(counts: Mapping[Population, int]) -> dict[str, int]:
    """Counts by population as files hold them."""
    return {stored_name(population): count for population, count in counts.items()}


_COUNTS: Any = {stored_name(population): int for population in POPULATIONS}
_DESCRIBED: Any = {
    "examples": _COUNTS,
    "tokens": _COUNTS,
    "source": {
        **{
            f"{name}?": TEXT
            for name in ("name", "data", "system", "span", "background", "fingerprint", "model", "dtype")
        },
        "prompts?": [str],
        "chat_template_kwargs?": dict,
    },
}


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
    ``(site key, "contrast" or "background")``; ``resampled`` is by ``(kind, site key, side)``, with the total weight of each
    resample and label in ``weights`` ``[resamples, 2]``. ``source`` says what was captured.
    """

    moments: Mapping[tuple[str, Side, Population], Moments]
    examples: Mapping[Population, int]
    tokens: Mapping[Population, int]
    source: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[tuple[str, Source], torch.Tensor] = field(default_factory=dict)
    resampled: Mapping[tuple[Kind, str, Side], Resampled] = field(default_factory=dict)
    weights: Mapping[Kind, torch.Tensor] = field(default_factory=dict)
    experts: Mapping[tuple[int, Population], ExpertMoments] = field(default_factory=dict)

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
        if source == "background":
            return self._moments(key, "input", "background").m2
        return self._typical(key, [self._moments(key, "input", label).m2 for label in LABELS])

    def routed_tokens(self, key: str) -> int | None:
        """How many tokens of the contrast data an expert was given; None for a site that is no expert."""
        expert = _expert_of(key)
        if expert is None:
            return None
        return sum(int(self._experts(expert[0], label).tokens[expert[1]]) for label in LABELS)

    def _typical(self, key: str, both: list[torch.Tensor]) -> torch.Tensor:
        expert = _expert_of(key)
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
        """The steering vector of a site: mean output of the positive class minus that of the negative."""
        return self.mean(key, "output", "positive") - self.mean(key, "output", "negative")

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
        return Statistics(
            moments,
            {p: self.examples[p] + other.examples[p] for p in POPULATIONS},
            {p: self.tokens[p] + other.tokens[p] for p in POPULATIONS},
            self.source,
            blocks,
            resampled,
            {kind: self.weights[kind] + other.weights[kind] for kind in self.weights},
            self._merged_experts(other),
        )

    def _merged_experts(self, other: Statistics) -> dict[tuple[int, Population], ExpertMoments]:
        merged = {**other.experts, **self.experts}
        for key in self.experts.keys() & other.experts.keys():
            counts = self.examples[key[1]], other.examples[key[1]]
            merged[key] = self.experts[key].merged(other.experts[key], *counts)
        return merged

    def save(self, path: str | Path) -> None:
        """Write ``*.stats.safetensors``: ``<site>.<side>.<population>.<mean|m2>`` float64, and float32 besides:
        ``<site>.input.<contrast|neutral>.blocks``, ``<site>.<side>.<bootstrap|shuffled>.means``, and of experts
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
            if described["format"] != FORMAT:
                raise PlanError(
                    f"{path} has the format {shown(described['format'])}, expected {FORMAT!r}; capture the statistics again"
                )
            check(described, _DESCRIBED, "the statistics")
            _check_tensors(tensors)
            moments: dict[Any, Moments] = {}
            blocks: dict[Any, torch.Tensor] = {}
            resampled: dict[Any, Resampled] = {}
            weights: dict[Any, torch.Tensor] = {}
            experts: dict[Any, dict[str, torch.Tensor]] = {}
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
                elif what == "means":
                    resampled[group, key, side] = Resampled(tensor)
            examples, tokens = (
                {p: int(described[name][stored_name(p)]) for p in POPULATIONS} for name in ("examples", "tokens")
            )
            routed = {key: ExpertMoments.of(values) for key, values in experts.items()}
            return cls(moments, examples, tokens, dict(described["source"]), blocks, resampled, weights, routed)
        except (KeyError, ValueError, TypeError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise PlanError(f"{path} is not a statistics file of steer2edit: {reason}") from None

    def _experts(self, layer: int, population: Population) -> ExpertMoments:
        try:
            return self.experts[layer, population]
        except KeyError:
            raise PlanError(_missing(f"{population} inputs of the experts of layer {layer}")) from None

    def _moments(self, key: str, side: Side, population: Population) -> Moments:
        expert = _expert_of(key)
        if expert is not None and side == "input":
            found = self._experts(expert[0], population)
            return Moments(found.mean[expert[1]], found.m2[expert[1]])
        try:
            return self.moments[key, side, population]
        except KeyError:
            raise PlanError(_missing(f"{population} {side} of {key}")) from None


def _check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, listing all of them, for tensors of a statistics file that are not finite or do not fit."""
    problems = []
    widths: dict[str, int] = {}
    for name, tensor in sorted(tensors.items()):
        site, _, what = name.rpartition(".")
        site, _, group = site.rpartition(".")
        axes = {"mean": 1, "m2": 1, "means": 3, "blocks": 3, "weights": 2}.get(what)
        if name.startswith("routed."):  # their shapes are ExpertMoments' affair
            axes = tensor.ndim
        if axes is None or tensor.ndim != axes or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            problems.append(f"{name} {list(tensor.shape)} is none of its tensors, or not finite")
        elif name.startswith("routed."):
            continue
        elif what in ("mean", "m2", "means") and widths.setdefault(site, tensor.shape[-1]) != tensor.shape[-1]:
            problems.append(f"{name} has {tensor.shape[-1]} features, others of {site} have {widths[site]}")
        elif what in ("weights", "means"):
            kind = name.removesuffix(".weights") if what == "weights" else group
            if kind not in RESAMPLES or tuple(tensor.shape[:2]) != (RESAMPLES[kind], 2):  # type: ignore[index]
                problems.append(f"{name} has the shape {list(tensor.shape)}, which fits no kind of resampling")
        elif what == "blocks" and tensor.shape[1] != tensor.shape[2]:
            problems.append(f"{name} has the shape {list(tensor.shape)}, expected square blocks")
    if problems:
        raise ValueError(f"its tensors do not fit together:\n{listing(problems)}")


def routing_key(what: str, scope: Scope, layer: int) -> str:
    """Under which name a layer's routing is kept, each example one draw, over the tokens of ``scope``.

    ``what`` is ``selected`` [experts], the share of tokens that chose the expert; ``mass``, its mean weight; or ``counts``
    [experts + 1], how many tokens chose it, and how many there were.
    """
    return f"{what}.{scope}.{layer}"


def _expert_of(key: str) -> tuple[int, int] | None:
    """Layer and number of an expert, of its site's key."""
    role, _, numbers = key.partition(".")
    if role != "expert_out":
        return None
    layer, _, expert = numbers.partition(".")
    return int(layer), int(expert)


def _missing(what: str) -> str:
    return f"the statistics hold no {what}; capture them from this model again"
