"""What capture through a quantised model changes in vectors, typical inputs and plan.

    python benchmarks/quantised_bases.py MODEL --behavior concise --rows 24 --make nf4 --make int8 --quantised FOLDER

``--make`` quantises MODEL with bitsandbytes (pip install bitsandbytes accelerate); ``--quantised`` takes a folder that another
quantiser wrote. Each model captures the same pairs. All numbers are means over the writers, and the smallest:

- v: the cosine of the class difference at a writer's output with the unquantised model's; x: that of the typical inputs.
- rounding: ``‖Q(W) - W‖ / ‖W‖`` of the writers' matrices.
- plan: the cosine of ΔW with the unquantised model's, over all matrices at once: from the dequantised matrices, and with
  --weights.
- score: the correlation of the components' scores with those of the unquantised model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from steer2edit.architecture import ModelSpec, read_spec
from steer2edit.architecture.unquantised import planned_from
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.checkpoint.other_matrices import rounding
from steer2edit.data.behavior import Behavior
from steer2edit.data.contrast import background_text
from steer2edit.methods import METHOD, load, make_plan
from steer2edit.plan import EditPlan, LowRank
from steer2edit.progress import bar
from steer2edit.runtime.model import Runtime, load_model
from steer2edit.scoring.scores import Scoring

_FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {**_FOUR, "bnb_4bit_quant_type": "nf4"},
    "nf4-twice": {**_FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**_FOUR, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@dataclass(frozen=True)
class Captured:
    """A model, and what was captured of it."""

    checkpoint: Checkpoint
    spec: ModelSpec
    statistics: Statistics

    def plan(self, method: str, weights: str | None = None) -> tuple[EditPlan, Scoring]:
        """The plan of a method with all components, and the scores behind it."""
        scoring = Scoring(planned_from(self.checkpoint, self.spec, weights), self.spec, self.statistics)
        return make_plan(scoring, method=method, options=load(method).Options(stable=False)), scoring


def make(model: str, kind: str, folder: Path) -> Path:
    """A copy of the model, quantised by bitsandbytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    place = folder / kind
    quantisation = BitsAndBytesConfig(**KINDS[kind])
    AutoModelForCausalLM.from_pretrained(
        model, quantization_config=quantisation, device_map={"": "cpu"}, dtype="auto"
    ).save_pretrained(place)
    AutoTokenizer.from_pretrained(model).save_pretrained(place)
    return place


def captured(model: str | Path, behavior: Behavior, dtype: str, text: str) -> Captured:
    """What one model captures of the pairs, and of a background text."""
    checkpoint = open_checkpoint(model)
    spec = read_spec(checkpoint)
    loaded = load_model(checkpoint, spec, Runtime(dtype=dtype))
    statistics = capture_statistics(loaded, checkpoint, behavior, background=text, chat=(), progress=bar)
    return Captured(checkpoint, spec, statistics)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two tensors as vectors."""
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30))


def plan_cosine(one: EditPlan, other: EditPlan) -> float:
    """Of all updates at once."""
    theirs = {edit.tensor: edit for edit in other.edits if isinstance(edit, LowRank)}
    ours = {edit.tensor: edit for edit in one.edits if isinstance(edit, LowRank)}
    inner = sum(
        float(((edit.B.double().T @ theirs[name].B.double()) * (edit.A.double() @ theirs[name].A.double().T)).sum())
        for name, edit in ours.items()
        if name in theirs
    )
    return inner / max(one.norm * other.norm, 1e-30)


def told(values: Sequence[float]) -> str:
    """Mean and smallest."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f})"


def row(name: str, base: Captured, other: Captured, model: str, method: str) -> list[str]:
    """One line of the table."""
    sites = base.spec.sites
    v = [cosine(base.statistics.difference(s.vector_key), other.statistics.difference(s.vector_key)) for s in sites]
    x = [cosine(base.statistics.x_bar(s.key), other.statistics.x_bar(s.key)) for s in sites]
    packed = [s.tensor for s in sites if other.checkpoint.tensors[s.tensor].packed is not None]
    far = [rounding(other.checkpoint, base.checkpoint, tensor).difference for tensor in packed]
    reference, scores = base.plan(method)
    plan, own = other.plan(method)
    with_weights, _ = other.plan(method, model)
    pairs = zip(scores.score(sites), own.score(sites), strict=True)
    score = [float(torch.corrcoef(torch.stack((a.table.g, b.table.g)))[0, 1]) for a, b in pairs]
    return [
        name,
        f"{sum(far) / len(far):.3f} ({max(far):.3f})",
        told(v),
        told(x),
        told(score),
        f"{plan_cosine(reference, plan):.3f}",
        f"{plan_cosine(reference, with_weights):.3f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--behavior", default="concise")
    parser.add_argument("--rows", type=int, default=None, help="pairs to capture; all unless given")
    parser.add_argument("--make", action="append", default=[], choices=list(KINDS))
    parser.add_argument("--quantised", action="append", default=[], type=Path)
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--background", type=Path, help="a text file; the packaged text unless given")
    options = parser.parse_args()
    whole = Behavior.named(options.behavior)
    rows = sorted({one.row for one in whole.examples})[: options.rows]
    chosen = [one for one in whole.examples if one.row in set(rows)]
    behavior = replace(whole, examples=chosen)
    text = background_text() if options.background is None else options.background.read_text(encoding="utf-8")
    heads = ("format", "rounding (largest)", "v (least)", "x (least)", "scores (least)", "plan", "plan, --weights")
    with tempfile.TemporaryDirectory() as scratch:
        base = captured(options.model, behavior, options.dtype, text)
        places = {kind: make(options.model, kind, Path(scratch)) for kind in options.make}
        places |= {place.name: place for place in options.quantised}
        for method in options.method or [METHOD]:
            print(f"{method}, {len(chosen)} responses", flush=True)
        tables: dict[str, list[list[str]]] = {method: [] for method in options.method or [METHOD]}
        for name, place in places.items():
            other = captured(place, behavior, options.dtype, text)
            for method, table in tables.items():
                table.append(row(name, base, other, options.model, method))
                print(*table[-1], sep=" | ", flush=True)
        for method, table in tables.items():
            print(f"\n{method}\n{tabulate(table, headers=heads, tablefmt='github')}")


if __name__ == "__main__":
    main()
