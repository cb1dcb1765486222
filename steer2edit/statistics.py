"""Running means of activations, mergeable and exact enough that batching does not matter.

Every example counts once, whatever its length: a moment is the mean over examples of the mean over the tokens of
the response span. Sums are float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from steer2edit.errors import PlanError
from steer2edit.files import load_tensors, save_tensors

Label = Literal["positive", "negative"]
Side = Literal["input", "output"]
LABELS: tuple[Label, Label] = ("positive", "negative")
FORMAT = "steer2edit.statistics.1"


@dataclass(frozen=True)
class Moments:
    """First and elementwise second moment of one activation, each ``[features]``, float64."""

    mean: torch.Tensor
    m2: torch.Tensor


@dataclass(frozen=True)
class Statistics:
    """Moments by ``(site key, side, label)``; ``examples`` and ``tokens`` count each label's; ``source`` says of what.

    Besides the writers there is one pseudo-site per block, ``residual.N``: the residual stream after block N
    (side ``output``).
    """

    moments: Mapping[tuple[str, Side, Label], Moments]
    examples: Mapping[Label, int]
    tokens: Mapping[Label, int]
    source: Mapping[str, Any] = field(default_factory=dict)

    def mean(self, key: str, side: Side, label: Label) -> torch.Tensor:
        """The mean activation, float64 ``[features]``. Raises PlanError where it was not captured."""
        try:
            return self.moments[key, side, label].mean
        except KeyError:
            raise PlanError(
                f"the statistics hold no {label} {side} of {key}; capture them from this model again"
            ) from None

    def x_bar(self, key: str) -> torch.Tensor:
        """The typical input of a site: half the sum of both classes' means (Steer2Edit, section 3)."""
        return (self.mean(key, "input", "positive") + self.mean(key, "input", "negative")) / 2

    def energy(self, key: str) -> torch.Tensor:
        """``E[x²]`` of a site's input, elementwise, half the sum of both classes'."""
        self.x_bar(key)  # raises where it was not captured
        return (self.moments[key, "input", "positive"].m2 + self.moments[key, "input", "negative"].m2) / 2

    def difference(self, key: str) -> torch.Tensor:
        """The steering vector of a site: mean output of the positive class minus that of the negative."""
        return self.mean(key, "output", "positive") - self.mean(key, "output", "negative")

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of examples together. Raises PlanError where they are of different models."""
        if (
            self.source.get("fingerprint") != other.source.get("fingerprint")
            or self.moments.keys() != other.moments.keys()
        ):
            raise PlanError("statistics of different models or sites cannot be merged")

        def average(name: str, key: tuple[str, Side, Label]) -> torch.Tensor:
            a, b = self.examples[key[2]], other.examples[key[2]]
            mine, theirs = getattr(self.moments[key], name), getattr(other.moments[key], name)
            return (mine * a + theirs * b) / max(a + b, 1)  # type: ignore[no-any-return]

        return Statistics(
            {key: Moments(average("mean", key), average("m2", key)) for key in self.moments},
            {label: self.examples[label] + other.examples[label] for label in LABELS},
            {label: self.tokens[label] + other.tokens[label] for label in LABELS},
            self.source,
        )

    def save(self, path: str | Path) -> None:
        """Write ``*.stats.safetensors``: tensors ``<site>.<side>.<label>.<mean|m2>``, float64."""
        tensors = {}
        for (key, side, label), moments in self.moments.items():
            tensors[f"{key}.{side}.{label}.mean"] = moments.mean
            tensors[f"{key}.{side}.{label}.m2"] = moments.m2
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
                raise PlanError(f"{path} has the format {described['format']!r}, expected {FORMAT!r}")
            moments: dict[tuple[str, Side, Label], Moments] = {}
            for name, mean in tensors.items():
                key, side, label, moment = name.rsplit(".", 3)
                if moment == "mean":
                    moments[key, side, label] = Moments(mean, tensors[f"{key}.{side}.{label}.m2"])  # type: ignore[index]
            return cls(moments, described["examples"], described["tokens"], described["source"])
        except (KeyError, ValueError, TypeError) as error:
            raise PlanError(f"{path} is not a statistics file of steer2edit: {error!r}") from None


class Accumulator:
    """Sums moments batch by batch; :meth:`result` freezes them."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, Side], torch.Tensor] = {}
        self._examples = dict.fromkeys(LABELS, 0)
        self._tokens = dict.fromkeys(LABELS, 0)

    def count(self, label: Label, tokens: int) -> None:
        """Note one example of ``tokens`` response tokens."""
        self._examples[label] += 1
        self._tokens[label] += tokens

    def add(self, key: str, side: Side, values: torch.Tensor, weights: torch.Tensor) -> None:
        """Add ``values`` [tokens, features] under ``weights`` [2 labels, tokens], 1/length of each token's example."""
        values = values.to(weights.dtype)
        sums = torch.stack((weights @ values, weights @ values.square())).to("cpu", torch.float64)
        if (key, side) in self._sums:
            self._sums[key, side] += sums
        else:
            self._sums[key, side] = sums

    def result(self, source: Mapping[str, Any]) -> Statistics:
        """The statistics so far."""
        moments: dict[tuple[str, Side, Label], Moments] = {}
        for (key, side), sums in self._sums.items():
            for index, label in enumerate(LABELS):
                count = max(self._examples[label], 1)
                moments[key, side, label] = Moments(sums[0, index] / count, sums[1, index] / count)
        return Statistics(moments, dict(self._examples), dict(self._tokens), dict(source))
