"""Discriminative layers: the classes lie on both sides of the background, and only those layers are edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run

from steer2edit.architecture import ModelSpec, read_spec
from steer2edit.capture.protect import protected
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vector_kinds import with_vector
from steer2edit.capture.vectors import Vectors, substituted
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data.answers import LABELS
from steer2edit.errors import PlanError
from steer2edit.evaluation.baselines import shuffled_labels
from steer2edit.methods import ablation, component, constant, make_plan, steering
from steer2edit.plan import EditPlan
from steer2edit.scoring.discriminative import discriminative_layers, sides, within
from steer2edit.scoring.scores import Scoring


@pytest.fixture(scope="module")
def spec(tiny_llama: Path) -> ModelSpec:
    return read_spec(open_checkpoint(tiny_llama))


@pytest.fixture(scope="module")
def statistics(tiny_llama: Path, statistics_of: Callable[..., Any]) -> Statistics:
    found: Statistics = statistics_of(tiny_llama)
    return found


def moved(statistics: Statistics, layer: int, middle: float) -> Statistics:
    """Both classes ``middle`` lengths of the vector from the background, and half a length to either side."""
    key = f"residual.{layer}"
    v, moments = statistics.difference(key), dict(statistics.moments)
    centre = statistics.mean(key, "output", "background")
    for label, sign in zip(LABELS, (0.5, -0.5), strict=True):
        moments[key, "output", label] = replace(moments[key, "output", label], mean=centre + (middle + sign) * v)
    return replace(statistics, moments=moments)


def placed(statistics: Statistics, *middles: float) -> Statistics:
    for layer, middle in enumerate(middles):
        statistics = moved(statistics, layer, middle)
    return statistics


def test_layers_are_those_with_the_background_between_the_classes(statistics: Statistics, spec: ModelSpec) -> None:
    found = placed(statistics, 0.2, 3.0, -0.4)
    assert discriminative_layers(found, spec) == [0, 2]
    assert sides(found, spec)[1] == pytest.approx((3.5, 2.5))
    with pytest.raises(PlanError, match=r"0: \+2\.50 and \+1\.50"):
        discriminative_layers(placed(statistics, 2.0, 3.0, 4.0), spec)
    bare = replace(statistics, examples={**statistics.examples, "background": 0})
    with pytest.raises(PlanError, match="background"):
        discriminative_layers(bare, spec)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("steering", steering.Options(layers="discriminative", stable=False)),  # type: ignore[arg-type]
        ("component", component.Options(layers="discriminative", stable=False)),  # type: ignore[arg-type]
        ("ablation", ablation.Options(layers="discriminative")),  # type: ignore[arg-type]
        ("constant", constant.Options(layers="discriminative", place="writers")),  # type: ignore[arg-type]
    ],
)
def test_every_method_leaves_the_other_layers_alone(
    tiny_llama: Path, statistics: Statistics, spec: ModelSpec, method: str, options: Any
) -> None:
    scoring = Scoring(open_checkpoint(tiny_llama), spec, placed(statistics, 0.2, 3.0, -0.4))
    plan = make_plan(scoring, method=method, options=options)
    layers = {site.layer for site in spec.sites for edit in plan.edits if f".layers.{site.layer}." in edit.tensor}
    assert layers == {0, 2} and plan.method["discriminative_layers"] == [0, 2]
    # beside the other layers' silence it is the same plan
    whole = make_plan(scoring, method=method, options=replace(options, layers=(0, 2)))
    if method != "component":  # its thresholds are set over all layers
        for edit in plan.edits:
            other = whole.edit_of(edit.tensor)
            assert other is not None and all(torch.equal(a, other.parts()[name]) for name, a in edit.parts().items())
    if method == "steering":
        control = shuffled_labels(scoring, plan, 0)
        assert control.edits and not any(".layers.1." in edit.tensor for edit in control.edits)


def test_within_keeps_the_writers_of_the_layers(spec: ModelSpec) -> None:
    limited = within(spec, [1])
    assert {site.layer for site in limited.sites} == {1} and limited.layers == spec.layers


def test_the_flag_reaches_the_plan_and_the_dry_run(
    tiny_llama: Path, statistics: Statistics, spec: ModelSpec, tmp_path: Path
) -> None:
    stats, out = tmp_path / "x.stats.safetensors", tmp_path / "x.plan.safetensors"
    placed(statistics, 0.2, 3.0, -0.4).save(stats)
    command = ["plan", tiny_llama, "--stats", stats, "--layers", "discriminative", "--all-components", "-o", out]
    assert run(*command).exit_code == 0
    assert EditPlan.load(out).method["discriminative_layers"] == [0, 2]
    shown = run("show", out)
    assert "2 discriminative layers (0, 2)" in shown.output
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    dry = ["compile", tiny_llama, "--data", data, "--layers", "discriminative", "--dry-run", "--out", tmp_path / "out"]
    assert run(*dry).exit_code == 0
    assert run(*command[:4], "--layers", "some", "-o", out).exit_code == 2


def test_the_streams_length_is_kept_at_the_last_layer_alone(
    tiny_llama: Path, statistics: Statistics, spec: ModelSpec
) -> None:
    scoring = Scoring(open_checkpoint(tiny_llama), spec, statistics)
    kept = make_plan(scoring, method="constant", options=constant.Options(layer=2, norm_preserving=True))
    plain = make_plan(scoring, method="constant", options=constant.Options(layer=2))
    assert torch.equal(kept.edits[0].parts()["bias"], plain.edits[0].parts()["bias"])
    for options in (
        constant.Options(layer=1, norm_preserving=True),
        constant.Options(layers=(1, 2), norm_preserving=True),
        constant.Options(layer=2, place="after-attention", norm_preserving=True),
    ):
        with pytest.raises(PlanError, match=r"depends on the token.*--layer 2"):
            make_plan(scoring, method="constant", options=options)
    with pytest.raises(PlanError, match="is not described"):
        unknown = replace(spec, model_type="nobody_knows")
        make_plan(
            replace(scoring, spec=unknown), method="constant", options=constant.Options(layer=2, norm_preserving=True)
        )


@pytest.mark.parametrize("kind", ["pca", "median"])
def test_any_vector_is_cleared_of_several_directions(
    tiny_llama: Path, statistics: Statistics, spec: ModelSpec, kind: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = [
        Vectors({f"residual.{layer}": torch.randn(32, generator=generator) for layer in range(3)}) for _ in range(2)
    ]
    checkpoint = open_checkpoint(tiny_llama)
    others = [substituted(one, statistics, checkpoint, spec) for one in directions]
    found = protected(with_vector(statistics, kind), others)
    for key in ("residual.1", "attn_out.2"):
        for other in others:
            u = other.difference(key)
            assert float(found.difference(key) @ u / u.norm()) == pytest.approx(0, abs=1e-4)
            drawn = found.resamples("bootstrap", key, "output").difference().double()
            assert float((drawn @ (u / u.norm())).abs().max()) < 1e-3
