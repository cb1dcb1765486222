r"""Affine maps of writers' outputs, and how far they bring one class's outputs to the other's.

A map takes each coordinate of an output to ``omega * y + beta``. The distance of two classes at a place is the squared
Wasserstein distance of order 2, coordinate by coordinate, in units of the coordinate's variance within the classes:

    D = mean_j  ∫ (F_j⁻¹(t) − G_j⁻¹(t))² dt / s_j²,   s_j² = (var_pos_j + var_neg_j) / 2

The integral is a mean over ``LEVELS`` quantiles. The loss of a set of maps is the mean of D over their places, where the
negative class is read under all maps at once, and the positive class in the base. A part of the pairs is held out: the loss
there tells what a fit is worth on prompts that had no part in it.

Each example counts once. Of its counted positions at most ``POSITIONS`` are kept, evenly spread, and fewer where all outputs
would take more than ``MOST_BYTES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

from steer2edit.architecture import Site
from steer2edit.capture.evidence import checked
from steer2edit.capture.moments import Moments
from steer2edit.data.answers import LABELS, Label
from steer2edit.data.behavior import Behavior
from steer2edit.data.tokens import Encoded
from steer2edit.errors import DataError
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import batches, pad_right
from steer2edit.runtime.model import LoadedModel

LEVELS = 256
"""Quantiles by which a distribution is known, at the middles of as many equal parts."""
POSITIONS = 16
MOST_BYTES = 1 << 31
HELD_OUT = 4
"""One in so many prompts is held out."""
LEAST_PROMPTS = 8
_FLOOR = 1e-6

Part = Literal["fit", "held_out"]
PARTS: tuple[Part, ...] = ("fit", "held_out")
Visit = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Takes a place, its outputs, and what the map makes of them, both float32 with all rows and positions."""


@dataclass(frozen=True)
class AffineMap:
    """``omega`` and ``beta`` [out], float64."""

    omega: torch.Tensor
    beta: torch.Tensor

    @property
    def identity(self) -> bool:
        """Whether nothing changes."""
        return bool((self.omega == 1).all()) and not bool(self.beta.any())


@dataclass(frozen=True)
class ContrastRuns:
    """A loaded model and its encoded contrast data, for methods that run the model on it.

    The examples of a prompt have one row number (``evidence.checked``).
    """

    loaded: LoadedModel
    examples: Sequence[Encoded]
    batch_tokens: int = 4096

    @property
    def enough(self) -> bool:
        """Whether there are prompts enough to hold some out."""
        return len({one.row for one in self.examples}) >= LEAST_PROMPTS and all(
            self._part(part, label) for part in PARTS for label in LABELS
        )

    def part(self, part: Part, label: Label) -> list[Encoded]:
        """The examples of a class whose prompts fit, or are held out. Raises DataError where there are too few prompts."""
        if not self.enough:
            raise DataError(
                f"the data has {len({one.row for one in self.examples})} prompts; maps of outputs take {LEAST_PROMPTS} with both "
                f"classes at least, one in {HELD_OUT} of which is held out"
            )
        return self._part(part, label)

    def _part(self, part: Part, label: Label) -> list[Encoded]:
        rows = sorted({one.row for one in self.examples})
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = {rows[i] for i in order[: len(rows) // HELD_OUT]}
        return [one for one in self.examples if one.label == label and (one.row in held_out) == (part == "held_out")]


def contrast_runs(loaded: LoadedModel, behavior: Behavior | None, batch_tokens: int = 4096) -> ContrastRuns | None:
    """The runs of a behaviour's examples; None without a behaviour, and for one without examples."""
    if behavior is None or not behavior.examples:
        return None
    examples = checked(behavior.examples, behavior.encode(loaded.tokenizer, loaded.context))
    return ContrastRuns(loaded, examples, batch_tokens)


@dataclass(frozen=True)
class Outputs:
    """Outputs of a set of examples by place.

    ``values`` are [n, out] in the model's dtype, and ``weights`` [n] sum to 1. ``spans`` has the rows of each example.
    """

    values: dict[str, torch.Tensor]
    weights: torch.Tensor
    spans: tuple[slice, ...]

    def moments(self, key: str) -> Moments:
        """Mean and second moment of a place."""
        wide, weights = self.values[key].double(), self.weights.double()
        return Moments(weights @ wide, weights @ wide.square())

    def quantiles(self, key: str) -> torch.Tensor:
        """The ``LEVELS`` quantiles of each coordinate of a place, float32 [out, LEVELS]."""
        ordered, order = self.values[key].float().T.contiguous().sort(dim=1)
        reached = self.weights[order].cumsum(dim=1)
        levels = (torch.arange(LEVELS) + 0.5) / LEVELS
        index = torch.searchsorted(reached, levels.expand(len(ordered), -1).contiguous())
        return ordered.gather(1, index.clamp(max=ordered.shape[1] - 1))

    def ranks(self, key: str) -> torch.Tensor:
        """The number of the quantile that each output of a place stands for within its coordinate, uint8 [n, out]."""
        order = self.values[key].float().T.contiguous().argsort(dim=1)
        weights = self.weights[order]
        middles = weights.cumsum(dim=1) - weights / 2
        ranks = torch.empty(order.shape, dtype=torch.uint8)
        ranks.scatter_(1, order, (middles * LEVELS).long().clamp(0, LEVELS - 1).to(torch.uint8))
        return ranks.T.contiguous()


@dataclass(frozen=True)
class Classes:
    """Both classes in the base, at some places.

    ``moments`` are by place, label and part, and ``targets`` the positive class's quantiles by place and part.
    ``spreads`` holds s of the part that fits, [out], and ``negative`` that part's negative outputs. ``losses`` are those
    without any map, and ``prompts`` counts those of the negative class.
    """

    sites: tuple[Site, ...]
    moments: Mapping[tuple[str, Label, Part], Moments]
    targets: Mapping[tuple[str, Part], torch.Tensor]
    spreads: Mapping[str, torch.Tensor]
    negative: Outputs
    losses: Mapping[Part, float]
    prompts: Mapping[Part, int]


def positions_of(example: Encoded, most: int) -> list[int]:
    """The counted positions of an example, at most ``most`` of them, evenly spread."""
    span = range(example.start - 1, len(example.ids) - 1)
    if example.last:
        return [span[-1]]
    count = min(most, len(span))
    return [span[int((i + 0.5) * len(span) / count)] for i in range(count)]


def positions_each(runs: ContrastRuns, sites: Sequence[Site]) -> int:
    """How many positions of an example are kept."""
    width = torch.finfo(runs.loaded.model.dtype).bits // 8
    each = len(runs.examples) * sum(site.out_features for site in sites) * width
    return max(1, min(POSITIONS, MOST_BYTES // max(each, 1)))


@contextmanager
def mapped(
    loaded: LoadedModel,
    sites: Sequence[Site],
    map_of: Callable[[str], tuple[torch.Tensor, torch.Tensor] | None],
    visit: Visit | None = None,
) -> Iterator[None]:
    """Within the block each place's output y becomes ``omega * y + beta``, for float32 ``(omega, beta)`` of ``map_of``.

    Gradients flow through the maps. ``visit`` sees each output and what became of it.
    """

    def hook_of(site: Site) -> Callable[..., torch.Tensor]:
        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            y = output.float()
            found = map_of(site.key)
            changed = y if found is None else y * found[0].to(y.device) + found[1].to(y.device)
            if visit is not None:
                visit(site.key, y, changed)
            return output if found is None else changed.to(output.dtype)

        return hook

    with ExitStack() as stack:
        for site in sites:
            stack.callback(loaded.module(site).register_forward_hook(hook_of(site)).remove)
        yield


def read_outputs(
    runs: ContrastRuns,
    examples: Sequence[Encoded],
    sites: Sequence[Site],
    maps: Mapping[str, AffineMap] | None = None,
    stage: str = "outputs",
    progress: Progress = silent,
) -> Outputs:
    """The mapped outputs of ``examples`` at each place, with all ``maps`` on the model."""
    loaded = runs.loaded
    loaded.check_tokens(one.ids for one in examples)
    most = positions_each(runs, sites)
    places = [positions_of(one, most) for one in examples]
    ends = torch.tensor([0, *map(len, places)]).cumsum(0).tolist()
    spans = tuple(slice(first, last) for first, last in pairwise(ends))
    weights = torch.cat([torch.full((len(one),), 1 / len(one) / len(places)) for one in places])
    dtype = loaded.model.dtype
    values = {site.key: torch.empty(ends[-1], site.out_features, dtype=dtype) for site in sites}
    wide = {
        key: (one.omega.float(), one.beta.float()) for key, one in (maps or {}).items() if not one.identity
    }  # moved to its device at the place
    flat = rows = torch.empty(0, dtype=torch.long)

    def keep(key: str, _output: torch.Tensor, changed: torch.Tensor) -> None:
        found = changed.flatten(0, -2).index_select(0, flat.to(changed.device))
        values[key][rows] = found.to("cpu", dtype)

    lengths = [len(one.ids) for one in examples]
    with mapped(loaded, sites, wide.get, keep), progress(stage, total=sum(lengths)) as advance:
        for indices in batches(lengths, runs.batch_tokens):
            ids, mask = pad_right([examples[i].ids for i in indices], loaded.padding, loaded.device)
            flat = torch.tensor([row * ids.shape[1] + p for row, i in enumerate(indices) for p in places[i]])
            rows = torch.cat([torch.arange(spans[i].start, spans[i].stop) for i in indices])
            with torch.inference_mode():
                loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
            advance(sum(lengths[i] for i in indices))
    return Outputs(values, weights, spans)


def read_classes(runs: ContrastRuns, sites: Sequence[Site], progress: Progress = silent) -> Classes:
    """Both classes and parts in the base. Raises DataError where there are too few prompts."""
    moments: dict[tuple[str, Label, Part], Moments] = {}
    targets: dict[tuple[str, Part], torch.Tensor] = {}
    spreads: dict[str, torch.Tensor] = {}
    losses: dict[Part, float] = {}
    kept: Outputs | None = None
    prompts = {part: len({one.row for one in runs.part(part, "negative")}) for part in PARTS}
    for part in PARTS:
        outputs = {
            label: read_outputs(runs, runs.part(part, label), sites, None, f"{label} outputs", progress)
            for label in LABELS
        }
        for site in sites:
            for label in LABELS:
                moments[site.key, label, part] = outputs[label].moments(site.key)
            targets[site.key, part] = outputs["positive"].quantiles(site.key)
        if part == "fit":
            spreads = {
                s.key: _spread(moments[s.key, "positive", part], moments[s.key, "negative", part]) for s in sites
            }
            kept = outputs["negative"]
        losses[part] = _loss(outputs["negative"], sites, targets, spreads, part)
    assert kept is not None
    return Classes(tuple(sites), moments, targets, spreads, kept, losses, prompts)


def losses_under(
    runs: ContrastRuns, classes: Classes, maps: Mapping[str, AffineMap], progress: Progress = silent
) -> dict[Part, float]:
    """The loss of ``maps``, all on the model at once, by part."""
    losses: dict[Part, float] = {}
    for part in classes.losses:
        examples = runs.part(part, "negative")
        outputs = read_outputs(runs, examples, classes.sites, maps, "mapped outputs", progress)
        losses[part] = _loss(outputs, classes.sites, classes.targets, classes.spreads, part)
    return losses


def _loss(
    outputs: Outputs,
    sites: Sequence[Site],
    targets: Mapping[tuple[str, Part], torch.Tensor],
    spreads: Mapping[str, torch.Tensor],
    part: Part,
) -> float:
    distances = [
        float(((outputs.quantiles(site.key) - targets[site.key, part]) / spreads[site.key][:, None]).square().mean())
        for site in sites
    ]
    return sum(distances) / len(distances)


def _spread(positive: Moments, negative: Moments) -> torch.Tensor:
    """s of each coordinate, float32; never less than ``_FLOOR`` of the place's own."""
    both = [(one.m2 - one.mean.square()).clamp(min=0) for one in (positive, negative)]
    variance = (both[0] + both[1]) / 2
    return variance.clamp(min=_FLOOR**2 * float(variance.mean()) + 1e-30).sqrt().float()
