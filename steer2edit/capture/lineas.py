r"""LinEAS: affine maps of writers' outputs that are trained together on contrast data (arXiv 2503.10679).

The maps are those that bring the negative class's outputs, all maps on the model, nearest to the positive class's in the base:

    minimise  Σ_l D_l(ω, b)  +  λ Σ_l ( α ‖θ_l‖₁ + (1 − α) √|θ_l| ‖θ_l‖₂ ),   α = ½

with D of ``capture.affine_maps``, summed over a place's coordinates, and the sparse group lasso over a place's parameters θ. They
are 0 for the identity and count in units of the coordinate's spread s:

    y' = (1 + θ₀)(y − μ) + μ + s θ₁,          so that  ω = 1 + θ₀,  b = s θ₁ − θ₀ μ
    y' = (1 + θ₀ s / √E y²) y                  without a constant

The transport plan of each coordinate is monotone, so an output's target is the positive class's quantile at the output's rank.
Ranks are those within all outputs that fit as they were last seen: a batch of a few examples is not taken for the class. Each
step is a proximal gradient step. A place's step is the rate over the root mean square of its gradient (of all places', where that
is larger), one number for the place, so that its proximal map has a closed form. The rate falls linearly to 0.

This is a training of 2 d numbers for each place, the one method of this package that is a training. Like the paper, it starts
at the identity. The paper maps the outputs of norms; here the maps act on what writers give, where one bias carries b and the
rows of one matrix carry ω.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from steer2edit.architecture import Site
from steer2edit.capture.affine_maps import (
    LEVELS,
    AffineMap,
    Classes,
    ContrastRuns,
    losses_under,
    mapped,
    positions_each,
    positions_of,
)
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import pad_right
from steer2edit.runtime.model import device_of

RATE = 0.1
"""The first step's root mean square, in spreads of a coordinate."""
ROWS = 16
"""Examples of a step, fewer where they would have more than ``batch_tokens`` tokens."""
_SHARE = 0.5
_MEMORY = 0.9


@dataclass(frozen=True)
class FitSettings:
    """How long and how sparsely maps are trained.

    At most ``steps`` steps are taken, and none begins after ``seconds``. ``sparse`` is λ. Gains stay between ``most_gain`` and
    its inverse. Without ``constant`` maps have no b.
    """

    steps: int
    seconds: float = math.inf
    sparse: float = 0.0
    seed: int = 0
    most_gain: float = 3.0
    constant: bool = True


@dataclass(frozen=True)
class Fit:
    """Trained maps by place.

    ``fit`` and ``held_out`` are the losses before and after on the two parts, and ``prompts`` counts the prompts of both.
    ``steps`` were taken, and ``parameters`` numbers were trained.
    """

    maps: Mapping[str, AffineMap]
    steps: int
    parameters: int
    fit: tuple[float, float]
    held_out: tuple[float, float]
    prompts: tuple[int, int]

    @property
    def untouched(self) -> list[str]:
        """The places whose map is the identity."""
        return [key for key, one in self.maps.items() if one.identity]


def fit_lineas(runs: ContrastRuns, classes: Classes, settings: FitSettings, progress: Progress = silent) -> Fit:
    """Train the maps of all places of ``classes``; the same settings give the same maps on the same machine.

    A run that ``seconds`` ends is not the same the next time, and says so.
    """
    places = {site.key: _Place(runs, classes, site, settings) for site in classes.sites}
    taken = _descend(runs, classes, places, settings, progress)
    maps = {key: place.map() for key, place in places.items()}
    after = losses_under(runs, classes, maps, progress)
    return Fit(
        maps,
        taken,
        sum(place.theta.numel() for place in places.values()),
        (classes.losses["fit"], after["fit"]),
        (classes.losses["held_out"], after["held_out"]),
        (classes.prompts["fit"], classes.prompts["held_out"]),
    )


class _Place:
    """One writer's parameters, and the two distributions that its targets come from."""

    def __init__(self, runs: ContrastRuns, classes: Classes, site: Site, settings: FitSettings) -> None:
        device = device_of(runs.loaded.module(site))
        source = classes.moments[site.key, "negative", "fit"]
        self.spread = classes.spreads[site.key].to(device)
        self.mean = source.mean.float().to(device)
        self.root = source.m2.sqrt().float().to(device).clamp(min=1e-30)
        self.constant, self.most_gain = settings.constant, settings.most_gain
        self.theta = torch.zeros(2 if settings.constant else 1, site.out_features, device=device, requires_grad=True)
        self.target = classes.targets[site.key, "fit"].to(device)
        self.known = torch.empty(0)
        self.square = 0.0

    def rank_among(self, quantiles: torch.Tensor) -> None:
        """Take these quantiles [out, LEVELS] of the place's own outputs for the negative class."""
        self.known = quantiles.to(self.theta.device)

    def wide(self) -> tuple[torch.Tensor, torch.Tensor]:
        """omega and beta, with a gradient."""
        if not self.constant:
            return 1 + self.theta[0] * self.spread / self.root, torch.zeros_like(self.spread)
        return 1 + self.theta[0], self.spread * self.theta[1] - self.theta[0] * self.mean

    def targets(self, y: torch.Tensor) -> torch.Tensor:
        """Of outputs [n, out], the positive class's quantiles at their ranks."""
        values = y.T.contiguous()
        first = torch.searchsorted(self.known, values)
        last = torch.searchsorted(self.known, values, right=True) - 1
        both = [self.target.gather(1, one.clamp(0, LEVELS - 1)) for one in (first, last)]
        return ((both[0] + both[1]) / 2).T

    def move(self, gradient: torch.Tensor, step: float, sparse: float) -> None:
        """One proximal gradient step."""
        with torch.no_grad():
            self.theta -= step * gradient
            self.theta.copy_(proximal(self.theta, step * sparse))
            unit = torch.ones_like(self.spread) if self.constant else self.spread / self.root
            low, high = (1 / self.most_gain - 1) / unit, (self.most_gain - 1) / unit
            self.theta[0].copy_(self.theta[0].clamp(low, high))

    def map(self) -> AffineMap:
        """The map as it is now."""
        with torch.no_grad():
            omega, beta = self.wide()
        return AffineMap(omega.double().cpu(), beta.double().cpu())


def proximal(theta: torch.Tensor, threshold: float) -> torch.Tensor:
    """The proximal map of ``threshold`` times the sparse group lasso of one place's parameters."""
    soft = theta.sign() * (theta.abs() - threshold * _SHARE).clamp(min=0)
    norm = float(soft.norm())
    shrink = threshold * (1 - _SHARE) * math.sqrt(theta.numel())
    return soft * max(0.0, 1 - shrink / norm) if norm else soft


def _descend(
    runs: ContrastRuns,
    classes: Classes,
    places: Mapping[str, _Place],
    settings: FitSettings,
    progress: Progress,
) -> int:
    """Take the steps; how many there were."""
    loaded, examples = runs.loaded, runs.part("fit", "negative")
    most = positions_each(runs, classes.sites)
    # what was seen last of each output; the classes stay as they are
    outputs = replace(classes.negative, values={key: one.clone() for key, one in classes.negative.values.items()})
    started, taken = time.monotonic(), 0
    average = 0.0
    flat, rows, weights = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0)
    parts: list[torch.Tensor] = []

    def visit(key: str, y: torch.Tensor, changed: torch.Tensor) -> None:
        place, index = places[key], flat.to(y.device)
        own = y.detach().flatten(0, -2).index_select(0, index)
        outputs.values[key][rows] = own.to("cpu", outputs.values[key].dtype)
        missing = (changed.flatten(0, -2).index_select(0, index) - place.targets(own)) / place.spread
        parts.append((weights.to(y.device) @ missing.square()).sum().to(loaded.device))

    stage = f"LinEAS, a training of {sum(one.theta.numel() for one in places.values()):,} numbers"
    keys = list(places)
    with (
        progress(stage, total=settings.steps) as advance,
        mapped(loaded, classes.sites, lambda key: places[key].wide(), visit),
    ):
        for indices, again in _steps(runs, examples, settings):
            if time.monotonic() - started > settings.seconds:
                notice(
                    f"LinEAS ended after {taken} of {settings.steps} steps, at the {settings.seconds:g} s of --fit-seconds: the "
                    "next run may take another number of steps"
                )
                break
            if again:
                for key, place in places.items():
                    place.rank_among(outputs.quantiles(key))
            ids, mask = pad_right([examples[i].ids for i in indices], loaded.padding, loaded.device)
            chosen = [positions_of(examples[i], most) for i in indices]
            flat = torch.tensor([row * ids.shape[1] + p for row, one in enumerate(chosen) for p in one])
            rows = torch.cat([torch.arange(outputs.spans[i].start, outputs.spans[i].stop) for i in indices])
            weights = torch.cat([torch.full((len(one),), 1 / len(one) / len(indices)) for one in chosen])
            parts.clear()
            with torch.enable_grad():
                loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
                loss = torch.stack(parts).sum()
                gradients = torch.autograd.grad(loss, [places[key].theta for key in keys])
            rate = RATE * (1 - taken / settings.steps)
            taken += 1
            for key, gradient in zip(keys, gradients, strict=True):
                places[key].square = _averaged(places[key].square, float(gradient.square().mean()))
            average = sum(place.square for place in places.values()) / len(places)
            for key, gradient in zip(keys, gradients, strict=True):
                size = math.sqrt(max(places[key].square, average) / (1 - _MEMORY**taken))
                if size > 0:
                    places[key].move(gradient, rate / size, settings.sparse)
            width = sum(place.spread.numel() for place in places.values())
            advance(1, f"loss {float(loss.detach()) / width:.3g}")
    return taken


def _averaged(before: float, now: float) -> float:
    return _MEMORY * before + (1 - _MEMORY) * now


def _steps(runs: ContrastRuns, examples: Sequence[object], settings: FitSettings) -> Iterator[tuple[list[int], bool]]:
    """The examples of each step, and whether a new round through all of them begins."""
    lengths = [len(one.ids) for one in examples]  # type: ignore[attr-defined]
    rows = max(1, min(ROWS, runs.batch_tokens // max(lengths)))
    generator = torch.Generator().manual_seed(settings.seed)
    left = settings.steps
    while left > 0:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for first in range(0, len(order), rows):
            if left > 0:
                yield order[first : first + rows], first == 0
                left -= 1
