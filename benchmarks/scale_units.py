"""In what unit should Steer2Edit's lambda be measured, so that one strength suits every model?

For each model and behaviour, and for each candidate unit, the strength at which the measured KL on neutral text meets the
budget. The unit whose strengths spread least over models carries over best.

    python benchmarks/scale_units.py MODEL [MODEL …] --behavior concise --behavior truthful
    python benchmarks/scale_units.py embedded MODEL …        (the demo's model, with its own behaviours)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from tabulate import tabulate

from steer2edit.architecture import read_spec
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.data import contrast
from steer2edit.data.behavior import Behavior
from steer2edit.demo import invented_world
from steer2edit.demo.run import demo_behavior, model_folder, neutral_documents
from steer2edit.errors import Steer2EditError
from steer2edit.methods import component
from steer2edit.plan import EditPlan, LowRank
from steer2edit.plan.measured import Divergence
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel, Runtime, load_model
from steer2edit.scoring.scores import Scoring, analyse
from steer2edit.strength.kl import NeutralText
from steer2edit.strength.line_search import find_strength

UNITS = ("1 (absolute)", "‖W_j‖", "‖W_jᵀ v_hat‖", "‖v‖ / rms(k·x)", "‖v‖ / mean push of the site")


def units(checkpoint: Checkpoint, loaded: LoadedModel, statistics: Statistics, plan: EditPlan) -> Iterator[EditPlan]:
    """The absolute plan with its lam in each unit, in the order of UNITS."""
    scaled: list[list[LowRank]] = [[] for _ in UNITS]
    for edit in plan.edits:
        assert isinstance(edit, LowRank)
        site = next(site for site in loaded.spec.sites if site.tensor == edit.tensor)
        v = statistics.difference(site.key).float()
        x_bar, energy = statistics.x_bar(site.key).float(), statistics.energy(site.key).float()
        found = analyse(checkpoint, site, (v / v.norm())[None])
        blocks = site.components

        def by_component(values: torch.Tensor, blocks: int = blocks) -> torch.Tensor:
            norms: torch.Tensor = torch.linalg.vector_norm(values.view(blocks, -1), dim=1)
            return norms

        k_hat = found.projection.view(blocks, -1)
        k_hat = k_hat / k_hat.norm(dim=1, keepdim=True).clamp(min=1e-12)
        rms = (k_hat.square() * energy.view(blocks, -1)).sum(1).sqrt().clamp(min=1e-12)
        push = float(edit.A[0] @ x_bar)
        factors = (
            torch.ones(blocks),
            by_component(found.norms),
            by_component(found.projection),
            v.norm() / rms,
            torch.full((blocks,), float(v.norm()) / max(push, 1e-12)),
        )
        for edits, factor in zip(scaled, factors, strict=True):
            columns = factor.repeat_interleave(site.in_features // blocks)
            edits.append(replace(edit, A=edit.A * columns))
    for edits in scaled:
        yield replace(plan, edits=tuple(edits), scores={})


def cases(
    models: Sequence[str], behaviors: Sequence[str], dtype: str
) -> Iterator[tuple[str, Behavior, str | list[str]]]:
    for model in models:
        if model == "embedded":
            for name in invented_world.BEHAVIORS:
                yield str(model_folder()), demo_behavior(name), neutral_documents()
        else:
            for name in behaviors:
                yield model, Behavior.named(name), contrast.neutral_text()


def strength_at(loaded: LoadedModel, plan: EditPlan, text: NeutralText, budget: float) -> float:
    def measure(strength: float) -> Divergence:
        with edited(loaded, plan, strength):
            return text.measure()

    return find_strength(measure, budget, tolerance=0.1).strength


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--behavior", action="append", default=None)
    parser.add_argument("--kl-budget", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=1200, help="of neutral text")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    rows: list[list[object]] = []
    strengths: dict[str, list[float]] = {unit: [] for unit in UNITS}
    for model, behavior, neutral in cases(options.models, options.behavior or ["concise", "truthful"], options.dtype):
        checkpoint = open_checkpoint(model)
        loaded = load_model(checkpoint, read_spec(checkpoint), Runtime(dtype=options.dtype))
        statistics = capture_statistics(loaded, checkpoint, behavior)
        text = NeutralText(loaded, neutral, max_tokens=options.tokens)
        plan = component.plan(
            Scoring(checkpoint, loaded.spec, statistics), component.Options(scale="absolute", stable=False)
        )
        row: list[object] = [checkpoint.name, behavior.name]
        for unit, candidate in zip(UNITS, units(checkpoint, loaded, statistics, plan), strict=True):
            try:
                found = strength_at(loaded, candidate, text, options.kl_budget)
                strengths[unit].append(found)
                row.append(f"{found:.3g}")
            except Steer2EditError:
                row.append("none")
        rows.append(row)
        print(*row, flush=True)
    rows.append(["largest / smallest", "", *(f"{max(s) / min(s):.1f}" for s in strengths.values())])
    print(tabulate(rows, headers=["model", "behaviour", *UNITS], disable_numparse=True))


if __name__ == "__main__":
    main()
