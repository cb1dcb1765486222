"""Steering vectors made elsewhere: their file, and statistics in which they stand in place of the captured difference.

A vector is known by its place: ``residual.N`` is added to the residual stream after block N, as run-time steering does it;
``attn_out.N`` and ``mlp_out.N`` to one writer's output. A residual vector goes to all writers of its layer: the MLP's output
joins the stream exactly where the vector does, the attention's half a block earlier.

Methods need of a site its vector, its typical input and its input's second moments. The vector is the file's; the rest is the
model's own, captured on any text (:func:`substituted`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from steer2edit.architecture import ModelSpec, Site
from steer2edit.architecture.stream import factor, gain
from steer2edit.capture.moments import Moments
from steer2edit.capture.populations import Population, Side
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import Checkpoint
from steer2edit.data.answers import LABELS, Label
from steer2edit.errors import DataError, listing
from steer2edit.files.atomic import load_tensors, save_tensors
from steer2edit.files.untrusted import parse_json

FORMAT = "steer2edit.vectors.1"
# of a norm's mean squared gain: where the gain all but vanishes, no writer can push the stream
_DAMPING = 1e-3


@dataclass(frozen=True)
class Vectors:
    """``directions`` by place, float32 ``[hidden]``; ``inputs`` are typical inputs by writer where the file has them, ``[in]``.

    ``source`` says where they come from: format, file, SHA-256, the model that the file names.
    """

    directions: Mapping[str, torch.Tensor]
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write ``*.vectors.safetensors``: ``<place>.direction`` and ``<writer>.input``."""
        tensors = {f"{place}.direction": vector for place, vector in self.directions.items()}
        tensors |= {f"{key}.input": vector for key, vector in self.inputs.items()}
        save_tensors(Path(path), tensors, {"vectors": json.dumps({"format": FORMAT, "source": dict(self.source)})})

    @classmethod
    def load(cls, path: str | Path) -> Vectors:
        """Read what :meth:`save` wrote. Raises DataError for any other file."""
        tensors, metadata = load_tensors(Path(path))
        try:
            described = parse_json(metadata["vectors"].encode())
            if described["format"] != FORMAT:
                raise DataError(f"{path} has the format {described['format']!r}, expected {FORMAT!r}")
            parts: dict[str, dict[str, torch.Tensor]] = {"direction": {}, "input": {}}
            for name, tensor in tensors.items():
                place, _, what = name.rpartition(".")
                parts[what][place] = tensor.float()
            return cls(parts["direction"], parts["input"], dict(described["source"]))
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path} is not a vectors file of steer2edit: {error!r}") from None

    def check(self, spec: ModelSpec) -> None:
        """Raise DataError, with all problems, where the vectors do not fit a model's layers and width."""
        sites = {site.key: site for site in spec.sites}
        places = {f"residual.{layer}" for layer in range(spec.layers)} | sites.keys()
        problems = []
        for place, vector in self.directions.items():
            if place not in places:
                problems.append(f"{place} is not a place of this model, which has the layers 0-{spec.layers - 1}")
            elif vector.shape != (spec.hidden_size,):
                problems.append(f"{place} has the shape {list(vector.shape)}, expected {[spec.hidden_size]}")
            elif not bool(vector.isfinite().all()):
                problems.append(f"{place} holds NaN or infinity")
        for key, vector in self.inputs.items():
            if key in sites and vector.shape != (sites[key].in_features,):
                problems.append(
                    f"the typical input of {key} has the shape {list(vector.shape)}, expected {[sites[key].in_features]}"
                )
        if not any(bool(vector.any()) for vector in self.directions.values()):
            problems.append("every vector is zero")
        if problems:
            hint = self.source.get("model")
            raise DataError(
                f"the vectors do not fit this {spec.model_type} model of {spec.layers} layers and width {spec.hidden_size}"
                f"{f'; their file names {hint}' if hint else ''}:\n{listing(problems)}{self._numbering(spec)}"
            )

    def _numbering(self, spec: ModelSpec) -> str:
        """What to do about vectors that are numbered as hidden states or from 1; empty where they are not."""
        count = len(self.directions)
        for first, what in ((0, "as transformers' hidden_states, whose entry 0 is the embedding"), (1, "from 1")):
            if self.directions.keys() == {f"residual.{layer}" for layer in range(first, spec.layers + 1)}:
                return (
                    f"\nThese are {count} vectors for {spec.layers} layers, numbered {what}: read them with steer2edit import "
                    "FILE --offset -1 -o x.vectors.safetensors, and give that file."
                )
        return ""


def substituted(vectors: Vectors, statistics: Statistics, checkpoint: Checkpoint, spec: ModelSpec) -> Statistics:
    """Statistics of the same model whose class differences are ``vectors``, zero at writers that have none.

    Inputs are those captured on contrast data, or, where there is none, on the background text; the file's own typical
    inputs come first. Nothing is resampled any more, so no component is left out as unstable. Raises DataError where the
    vectors do not fit.
    """
    vectors.check(spec)
    contrast = bool(statistics.examples["positive"] and statistics.examples["negative"])
    moments = dict(statistics.moments)

    def captured(key: str, side: Side, label: Label) -> Moments:
        population: Population = label if contrast else "background"
        return statistics.moments[key, side, population]

    def place(key: str, direction: torch.Tensor) -> None:
        outputs = {label: captured(key, "output", label) for label in LABELS}
        middle = (outputs["positive"].mean + outputs["negative"].mean) / 2
        for label, sign in zip(LABELS, (0.5, -0.5), strict=True):
            moments[key, "output", label] = replace(outputs[label], mean=middle + sign * direction)

    for site in spec.sites:
        for label in LABELS:
            inputs = captured(site.key, "input", label)
            if site.key in vectors.inputs:
                inputs = replace(inputs, mean=vectors.inputs[site.key].double())
            moments[site.key, "input", label] = inputs
        place(site.vector_key, _at_site(vectors, statistics, checkpoint, site, contrast))
    for layer in range(spec.layers):
        key = f"residual.{layer}"
        place(key, vectors.directions.get(key, torch.zeros(spec.hidden_size)).double())
    blocks = dict(statistics.blocks)
    if not contrast:
        blocks |= {(key, "contrast"): block for (key, _), block in statistics.blocks.items()}
    source = {**statistics.source, "vectors": dict(vectors.source)}
    source["name"] = source.get("name") or vectors.source.get("name")
    return replace(statistics, moments=moments, blocks=blocks, resampled={}, weights={}, source=source)


def _at_site(
    vectors: Vectors, statistics: Statistics, checkpoint: Checkpoint, site: Site, contrast: bool
) -> torch.Tensor:
    """What a writer has to output for the stream to get the vector, float64 ``[out]``."""
    if site.key in vectors.directions:
        return vectors.directions[site.key].double()
    residual = vectors.directions.get(f"residual.{site.layer}")
    if residual is None:
        return torch.zeros(site.out_features, dtype=torch.float64)
    v = residual.double() / factor(checkpoint, site)
    if site.norm is None:
        return v
    # the stream gets gain * y / rms(y)
    g = gain(checkpoint, site).double()
    populations: tuple[Population, ...] = LABELS if contrast else ("background",)
    squares = [float(statistics.moments[site.vector_key, "output", one].m2.mean()) for one in populations]
    rms = math.sqrt(sum(squares) / len(squares))
    return rms * v * g / (g.square() + _DAMPING * g.square().mean())
