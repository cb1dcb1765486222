r"""LinEAS: affine maps of writers' outputs that are trained together on contrast data (arXiv 2503.10679).

The maps are those that bring the negative class's outputs, all maps on the model, nearest to the positive class's in the base:

    minimise  Σ_l D_l(ω, b)  +  λ Σ_l ( α ‖θ_l‖₁ + (1 − α) √|θ_l| ‖θ_l‖₂ ),   α = ½

with D of ``capture.affine_maps``, summed over a place's coordinates, and the sparse group lasso over a place's parameters θ. They
are 0 for the identity and count in units of the coordinate's spread s:

    y' = (1 + θ₀)(y − μ) + μ + s θ₁,          so that  ω = 1 + θ₀,  b = s θ₁ − θ₀ μ
    y' = (1 + θ₀ s / √E y²) y                  without a constant

The transport plan of each coordinate is monotone, so an output's target is the positive class's quantile at the output's rank.
Ranks are those within all outputs that fit as they were last seen: a batch of a few examples is not taken for the class. Each
step is a proximal gradient step. A place's step is the rate over the largest root mean square that its gradient had (or that all
places' had, where that is larger), one number for the place, so that its proximal map has a closed form. The first rate is the
one of ``RATES`` that lowers the loss of the first examples most: maps of many layers act on each other, and a step that is right
for one place is far too long for sixty. The rate falls linearly to 0, and is halved where the loss gets ``WORSE``.

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
from steer2edit.data.tokens import Encoded
from steer2edit.notices import notice
from steer2edit.progress import Progress, silent
from steer2edit.runtime.batches import pad_right
from steer2edit.runtime.model import device_of

RATES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""First rates that are tried: the root mean square of the step, in spreads of a coordinate."""
WORSE = 1.2
"""A loss so many times the first one is that of a step that was too long."""
ROWS = 16
"""Examples of a step, fewer where they would have more than ``batch_tokens`` tokens."""
_SHARE = 0.5


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
    taken = _Training(runs, classes, places, settings).run(progress)
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


class _Training:
    """The places on the model, and all outputs that fit as they were seen last."""

    def __init__(
        self, runs: ContrastRuns, classes: Classes, places: Mapping[str, _Place], settings: FitSettings
    ) -> None:
        self.runs, self.classes, self.places, self.settings = runs, classes, places, settings
        self.examples = runs.part("fit", "negative")
        self.most = positions_each(runs, classes.sites)
        self.width = sum(place.spread.numel() for place in places.values())
        self.numbers = sum(place.theta.numel() for place in places.values())
        # the classes stay as they are
        self.seen = replace(classes.negative, values={key: one.clone() for key, one in classes.negative.values.items()})
        self._flat, self._rows, self._weights = torch.empty(0), torch.empty(0), torch.empty(0)
        self._parts: list[torch.Tensor] = []

    def run(self, progress: Progress) -> int:
        """Take the steps; how many there were."""
        sizes = dict.fromkeys(self.places, 0.0)
        started, taken, rate, first = time.monotonic(), 0, 0.0, 0.0
        kept: list[torch.Tensor] = []
        stage = f"LinEAS, a training of {self.numbers:,} numbers"
        with (
            progress(stage, total=self.settings.steps) as advance,
            mapped(self.runs.loaded, self.classes.sites, lambda key: self.places[key].wide(), self._visit),
        ):
            for indices, again in _steps(self.runs, self.examples, self.settings):
                if time.monotonic() - started > self.settings.seconds:
                    notice(
                        f"LinEAS ended after {taken} of {self.settings.steps} steps, at the {self.settings.seconds:g} s of "
                        "--fit-seconds: the next run may take another number of steps"
                    )
                    break
                if again:
                    for key, place in self.places.items():
                        place.rank_among(self.seen.quantiles(key))
                loss, gradients = self._gradients(indices)
                if taken and loss > WORSE * first:
                    # the step was too long: back to the last place that was good
                    rate /= 2
                    self._put(kept)
                    loss, gradients = self._gradients(indices)
                sizes = {key: max(sizes[key], _size(one)) for key, one in gradients.items()}
                mean = math.sqrt(sum(size**2 for size in sizes.values()) / len(sizes))
                steps = {key: 1 / max(size, mean) for key, size in sizes.items()} if mean else {}
                if not taken:
                    first, rate = loss, self._first_rate(indices, gradients, steps, loss)
                kept = [place.theta.detach().clone() for place in self.places.values()]
                for key, step in steps.items():
                    falling = rate * (1 - taken / self.settings.steps)
                    self.places[key].move(gradients[key], falling * step, self.settings.sparse)
                taken += 1
                advance(1, f"loss {loss / self.width:.3g}")
        return taken

    def _first_rate(
        self, indices: Sequence[int], gradients: Mapping[str, torch.Tensor], steps: Mapping[str, float], loss: float
    ) -> float:
        """The rate whose first step lowers the loss of its own examples most; the smallest where none lowers it."""
        before = [place.theta.detach().clone() for place in self.places.values()]
        found = {}
        for rate in RATES if steps else ():
            for key, step in steps.items():
                self.places[key].move(gradients[key], rate * step, 0.0)
            found[rate] = self._loss(indices)
            self._put(before)
        best = min(found, key=lambda rate: found[rate], default=RATES[-1])
        return best if found and found[best] < loss else RATES[-1]

    def _put(self, thetas: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for place, theta in zip(self.places.values(), thetas, strict=True):
                place.theta.copy_(theta)

    def _gradients(self, indices: Sequence[int]) -> tuple[float, dict[str, torch.Tensor]]:
        with torch.enable_grad():
            loss = self._forward(indices)
            found = torch.autograd.grad(loss, [place.theta for place in self.places.values()])
        return float(loss.detach()), dict(zip(self.places, found, strict=True))

    def _loss(self, indices: Sequence[int]) -> float:
        with torch.no_grad():
            return float(self._forward(indices))

    def _forward(self, indices: Sequence[int]) -> torch.Tensor:
        """The loss of some examples, summed over places and coordinates."""
        loaded, seen = self.runs.loaded, self.seen
        ids, mask = pad_right([self.examples[i].ids for i in indices], loaded.padding, loaded.device)
        chosen = [positions_of(self.examples[i], self.most) for i in indices]
        self._flat = torch.tensor([row * ids.shape[1] + p for row, one in enumerate(chosen) for p in one])
        self._rows = torch.cat([torch.arange(seen.spans[i].start, seen.spans[i].stop) for i in indices])
        self._weights = torch.cat([torch.full((len(one),), 1 / len(one) / len(indices)) for one in chosen])
        self._parts.clear()
        loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
        return torch.stack(self._parts).sum()

    def _visit(self, key: str, y: torch.Tensor, changed: torch.Tensor) -> None:
        place, index = self.places[key], self._flat.to(y.device)
        own = y.detach().flatten(0, -2).index_select(0, index)
        self.seen.values[key][self._rows] = own.to("cpu", self.seen.values[key].dtype)
        missing = (changed.flatten(0, -2).index_select(0, index) - place.targets(own)) / place.spread
        self._parts.append((self._weights.to(y.device) @ missing.square()).sum().to(self.runs.loaded.device))


def _size(gradient: torch.Tensor) -> float:
    return float(gradient.square().mean().sqrt())


def _steps(runs: ContrastRuns, examples: Sequence[Encoded], settings: FitSettings) -> Iterator[tuple[list[int], bool]]:
    """The examples of each step, and whether a new round through all of them begins."""
    rows = max(1, min(ROWS, runs.batch_tokens // max(len(one.ids) for one in examples)))
    generator = torch.Generator().manual_seed(settings.seed)
    left = settings.steps
    while left > 0:
        order = torch.randperm(len(examples), generator=generator).tolist()
        for first in range(0, len(order), rows):
            if left > 0:
                yield order[first : first + rows], first == 0
                left -= 1
