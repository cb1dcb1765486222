r"""Discriminative layers (Selective Steering, arXiv 2601.19375): the classes lie on both sides of zero there.

With the classes' mean residual streams after a block, centred on the background's, and the vector v there, a layer is
discriminative where ``(μ_+ − μ_B) · v`` and ``(μ_− − μ_B) · v`` have opposite signs. Elsewhere both classes lie on one side of
ordinary text, and the vector says more of how the data differs from other text than of what tells the classes apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from steer2edit.architecture import ModelSpec
from steer2edit.capture.statistics import Statistics
from steer2edit.data.answers import LABELS
from steer2edit.errors import PlanError


def sides(statistics: Statistics, spec: ModelSpec) -> Mapping[int, tuple[float, float]]:
    """Where the positive and the negative class lie along each layer's vector, in its lengths from the background.

    Raises PlanError where no background was captured. Layers whose classes do not differ are left out.
    """
    if not statistics.examples["background"]:
        raise PlanError("--layers discriminative compares the classes with a background, and the statistics hold none")
    found: dict[int, tuple[float, float]] = {}
    for layer in range(spec.layers):
        key = f"residual.{layer}"
        v = statistics.difference(key)
        if bool(v.any()):
            centre = statistics.mean(key, "output", "background")
            positive, negative = (
                float((statistics.mean(key, "output", label) - centre) @ v / (v @ v)) for label in LABELS
            )
            found[layer] = positive, negative
    return found


def discriminative_layers(statistics: Statistics, spec: ModelSpec) -> list[int]:
    """The layers whose classes lie on opposite sides of the background. Raises PlanError where there are none."""
    found = sides(statistics, spec)
    chosen = [layer for layer, (positive, negative) in found.items() if positive * negative < 0]
    if not chosen:
        told = ", ".join(f"{layer}: {p:+.2f} and {n:+.2f}" for layer, (p, n) in list(found.items())[:6])
        raise PlanError(
            "no layer is discriminative: both classes lie on the same side of the background along every vector "
            f"(positions by layer, in lengths of the vector: {told}{', …' if len(found) > 6 else ''}); name layers with --layers"
        )
    return chosen


def within(spec: ModelSpec, layers: Collection[int]) -> ModelSpec:
    """The model with the matrices of some layers alone: what a method edits when it is limited to them."""
    sites, readers = (tuple(site for site in one if site.layer in layers) for one in (spec.sites, spec.readers))
    return replace(spec, sites=sites, readers=readers)
