r"""LinEAS: affine maps of writers' outputs that are trained together on contrast data (arXiv 2503.10679).

The maps are those that bring the negative class's outputs, all maps on the model, nearest to the positive class's in the base:

    minimise  Σ_l D_l(ω, b)  +  λ Σ_l ( α ‖θ_l‖₁ + (1 − α) √|θ_l| ‖θ_l‖₂ ),   α = ½

with D of ``capture.affine_maps``, summed over a place's coordinates, and the sparse group lasso over a place's parameters θ. They
are 0 for the identity and count in units of the coordinate's spread s:

    y' = (1 + θ₀)(y − μ) + μ + s θ₁,          so that  ω = 1 + θ₀,  b = s θ₁ − θ₀ μ
    y' = (1 + θ₀ s / √E y²) y                  without a constant

The transport plan of each coordinate is monotone, so an output's target is the positive class's quantile at the output's rank.
Ranks are those within all outputs that fit, as they were seen in the last round through the examples: a batch of a few examples
is not taken for the class. An output keeps its rank for a round, wherever earlier maps move it: a rank in the base's distribution
would rise with the output, and its target would run away from it.

Each step is a proximal gradient step. A coordinate's step is the rate over twice the curvature that its parameters have in the
Gauss-Newton sense, the squared length of the loss's residuals' derivative. It is estimated before the first step by ``PROBES``
backward passes with random signs, E (Jᵀε)² = diag JᵀJ, and is 1 at least, which is what the place itself gives. Without it few
coordinates, those that the massive activations of early layers hang on, would hold all others up. The first rate is the one of
``RATES`` that lowers the loss of the first examples most: maps of many layers act on each other, and a step that is right for one
place is too long for sixty. The rate falls linearly to 0, and is halved where the loss gets ``WORSE``.

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
"""First rates that are tried; 1 is Newton's step where no two parameters act on each other."""
PROBES = 4
"""Backward passes that estimate the curvature."""
WORSE = 1.2
"""A loss so many times the first one is that of a step that was too long."""
ROWS = 16
"""Examples of a step, fewer where they would have more than ``batch_tokens`` tokens."""
_SHARE = 0.5
_HALVINGS = 40


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
        self.ranks = torch.empty(0, dtype=torch.uint8)
        self.curvature = torch.ones_like(self.spread)

    def wide(self) -> tuple[torch.Tensor, torch.Tensor]:
        """omega and beta, with a gradient."""
        if not self.constant:
            return 1 + self.theta[0] * self.spread / self.root, torch.zeros_like(self.spread)
        return 1 + self.theta[0], self.spread * self.theta[1] - self.theta[0] * self.mean

    def targets(self, rows: torch.Tensor) -> torch.Tensor:
        """Of some rows of the outputs that fit, the positive class's quantiles at their ranks, [n, out]."""
        ranks = self.ranks[rows].to(self.target.device, torch.long)
        return self.target.gather(1, ranks.T).T

    def move(self, gradient: torch.Tensor, rate: float, sparse: float) -> None:
        """One proximal gradient step."""
        step = rate / (2 * self.curvature)
        with torch.no_grad():
            self.theta -= step * gradient
            self.theta.copy_(proximal(self.theta, step, sparse))
            unit = torch.ones_like(self.spread) if self.constant else self.spread / self.root
            low, high = (1 / self.most_gain - 1) / unit, (self.most_gain - 1) / unit
            self.theta[0].copy_(self.theta[0].clamp(low, high))

    def map(self) -> AffineMap:
        """The map as it is now."""
        with torch.no_grad():
            omega, beta = self.wide()
        return AffineMap(omega.double().cpu(), beta.double().cpu())


def proximal(theta: torch.Tensor, step: torch.Tensor, weight: float) -> torch.Tensor:
    r"""The proximal map of the sparse group lasso of one place's parameters [n, out].

    Each coordinate has its own ``step`` [out]. The result x is the minimum of
    ``Σ (x − θ)² / (2 step) + weight (α ‖x‖₁ + (1 − α) √|θ| ‖x‖₂)``. With the soft threshold u of θ it is
    ``u / (1 + step c / ‖x‖)``, c the group's weight: zero where ``‖u / step‖₂ ≤ c``, and else found by bisection for ‖x‖.
    """
    soft = theta.sign() * (theta.abs() - weight * _SHARE * step).clamp(min=0)
    group = weight * (1 - _SHARE) * math.sqrt(theta.numel())
    if not group or not bool(soft.any()):
        return soft
    if float((soft / step).norm()) <= group:
        return torch.zeros_like(soft)
    low, high = 0.0, float(soft.norm())
    for _ in range(_HALVINGS):
        norm = (low + high) / 2
        # the norm of x falls short of a norm that is too large
        low, high = (low, norm) if float((soft / (1 + step * group / norm)).norm()) < norm else (norm, high)
    return soft / (1 + step * group / high)


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
        self._signs: torch.Generator | None = None

    def run(self, progress: Progress) -> int:
        """Take the steps; how many there were."""
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
                        place.ranks = self.seen.ranks(key)
                loss, gradients = self._gradients(indices)
                if taken and loss > WORSE * first:
                    # the step was too long: back to the last place that was good
                    rate /= 2
                    self._put(kept)
                    loss, gradients = self._gradients(indices)
                if not taken:
                    self._probe(indices)
                    first, rate = loss, self._first_rate(indices, gradients, loss)
                kept = [theta.detach().clone() for theta in self._thetas]
                falling = rate * (1 - taken / self.settings.steps)
                for key, place in self.places.items():
                    place.move(gradients[key], falling, self.settings.sparse)
                taken += 1
                advance(1, f"loss {loss / self.width:.3g}")
        return taken

    def _probe(self, indices: Sequence[int]) -> None:
        """Estimate the curvature of every coordinate on these examples."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        sums = {key: torch.zeros_like(place.curvature) for key, place in self.places.items()}
        for _ in range(PROBES):
            with torch.enable_grad():
                found = torch.autograd.grad(self._forward(indices, generator), self._thetas)
            for key, one in zip(self.places, found, strict=True):
                sums[key] += one.square().mean(dim=0) / PROBES
        for key, place in self.places.items():
            place.curvature = sums[key].clamp(min=1)

    def _first_rate(self, indices: Sequence[int], gradients: Mapping[str, torch.Tensor], loss: float) -> float:
        """The rate whose first step lowers the loss of its own examples most; the smallest where none lowers it."""
        before = [theta.detach().clone() for theta in self._thetas]
        found = {}
        for rate in RATES:
            for key, place in self.places.items():
                place.move(gradients[key], rate, 0.0)
            with torch.no_grad():
                found[rate] = float(self._forward(indices))
            self._put(before)
        best = min(found, key=lambda rate: found[rate])
        return best if found[best] < loss else RATES[-1]

    @property
    def _thetas(self) -> list[torch.Tensor]:
        return [place.theta for place in self.places.values()]

    def _put(self, thetas: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            for own, theta in zip(self._thetas, thetas, strict=True):
                own.copy_(theta)

    def _gradients(self, indices: Sequence[int]) -> tuple[float, dict[str, torch.Tensor]]:
        with torch.enable_grad():
            loss = self._forward(indices)
            found = torch.autograd.grad(loss, self._thetas)
        return float(loss.detach()), dict(zip(self.places, found, strict=True))

    def _forward(self, indices: Sequence[int], signs: torch.Generator | None = None) -> torch.Tensor:
        """The loss of some examples, summed over places and coordinates; with ``signs`` its residuals with random signs."""
        loaded, seen = self.runs.loaded, self.seen
        ids, mask = pad_right([self.examples[i].ids for i in indices], loaded.padding, loaded.device)
        chosen = [positions_of(self.examples[i], self.most) for i in indices]
        self._flat = torch.tensor([row * ids.shape[1] + p for row, one in enumerate(chosen) for p in one])
        self._rows = torch.cat([torch.arange(seen.spans[i].start, seen.spans[i].stop) for i in indices])
        self._weights = torch.cat([torch.full((len(one),), 1 / len(one) / len(indices)) for one in chosen])
        self._parts.clear()
        self._signs = signs
        loaded.body()(input_ids=ids, attention_mask=mask, use_cache=False)
        return torch.stack(self._parts).sum()

    def _visit(self, key: str, y: torch.Tensor, changed: torch.Tensor) -> None:
        place, index = self.places[key], self._flat.to(y.device)
        own = y.detach().flatten(0, -2).index_select(0, index)
        self.seen.values[key][self._rows] = own.to("cpu", self.seen.values[key].dtype)
        missing = (changed.flatten(0, -2).index_select(0, index) - place.targets(self._rows)) / place.spread
        weights = self._weights.to(y.device)
        if self._signs is None:
            part = (weights @ missing.square()).sum()
        else:
            signs = torch.randint(0, 2, missing.shape, generator=self._signs).to(missing) * 2 - 1
            part = (weights.sqrt() @ (missing * signs)).sum()
        self._parts.append(part.to(self.runs.loaded.device))


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
