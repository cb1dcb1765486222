"""What ablation takes out: its own layer's direction, a cleaned one, several, by LEACE, with columns' lengths or a mean kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, run, save_tiny
from family_configs import family_config
from family_models import Case

from steer2edit.architecture import Site, read_spec
from steer2edit.artefact.emit import emit
from steer2edit.capture.run import capture_statistics
from steer2edit.capture.statistics import Statistics
from steer2edit.capture.vectors import Vectors
from steer2edit.checkpoint import open_checkpoint
from steer2edit.data import contrast
from steer2edit.data.answers import LABELS
from steer2edit.data.behavior import Behavior
from steer2edit.errors import PlanError, TargetError
from steer2edit.files.layout import PLAN
from steer2edit.lowering import resolve
from steer2edit.lowering.rewrite import edited_blocks
from steer2edit.methods import ablation, covariance_layers, make_plan, own_strength
from steer2edit.plan import Bias, EditPlan, LowRank, NewBias
from steer2edit.runtime.model import load_model
from steer2edit.scoring.scores import Scoring


@pytest.fixture(scope="module")
def case(tiny_llama: Path, statistics_of: Callable[..., Any]) -> Scoring:
    checkpoint = open_checkpoint(tiny_llama)
    return Scoring(checkpoint, read_spec(checkpoint), statistics_of(tiny_llama))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, statistics_of: Callable[..., Any]) -> Scoring:
    folder = save_tiny(tmp_path_factory.mktemp("ablation") / "gpt2", family_config("gpt2"))
    return Scoring(Case(folder, statistics_of).checkpoint, Case(folder, statistics_of).spec, statistics_of(folder))


def after(scoring: Scoring, plan: EditPlan, site: Site) -> torch.Tensor:
    """W' [out, in], as it is stored."""
    edit, _ = resolve(plan, scoring.checkpoint, scoring.spec).edits[site.matrix]
    stored = torch.cat([block.new.clone() for block in edited_blocks(scoring.checkpoint, edit, site)])
    return stored if site.orientation == "out_in" else stored.T


def planned(scoring: Scoring, **options: Any) -> EditPlan:
    return make_plan(scoring, method="ablation", options=ablation.Options(**options))


def unit(vector: torch.Tensor) -> torch.Tensor:
    return (vector / vector.norm()).float()


def test_each_writer_loses_its_own_layers_direction(case: Scoring) -> None:
    plan = planned(case, per_layer=True)
    for site in case.spec.sites:
        r = unit(case.statistics.difference(f"residual.{site.layer}"))
        assert float((r @ after(case, plan, site)).abs().max()) < 1e-5
    with pytest.raises(PlanError, match="exclude each other"):
        planned(case, per_layer=True, direction_layer=1)


def test_a_projected_direction_leaves_the_backgrounds_mean(case: Scoring) -> None:
    plan = planned(case, projected=True, direction_layer=1)
    mean = unit(case.statistics.mean("residual.1", "output", "background"))
    r = unit(case.statistics.difference("residual.1"))
    for site in case.spec.sites:
        W = case.checkpoint.read(site.tensor)
        edited = after(case, plan, site)
        assert torch.allclose(mean @ edited, mean @ W, atol=1e-5)
        assert float((unit(r - (r @ mean) * mean) @ edited).abs().max()) < 1e-5


def test_several_directions_go_together(case: Scoring, tmp_path: Path) -> None:
    other = torch.randn(case.spec.hidden_size, generator=torch.Generator().manual_seed(3))
    Vectors({"residual.1": other}, source={"name": "other"}).save(tmp_path / "other.vectors.safetensors")
    plan = planned(case, also=(str(tmp_path / "other.vectors.safetensors"),), direction_layer=1)
    for site in case.spec.sites:
        edited = after(case, plan, site)
        for r in (other, case.statistics.difference("residual.1")):
            assert float((unit(r) @ edited).abs().max()) < 1e-4
        assert isinstance(edit := plan.edit_of(site.matrix), LowRank) and edit.B.shape[1] == 2
    case.statistics.save(tmp_path / "same.stats.safetensors")
    with pytest.raises(PlanError, match="mixture of the others"):
        planned(case, also=(str(tmp_path / "same.stats.safetensors"),))
    with pytest.raises(PlanError, match="neither a statistics file"):
        plan.save(tmp_path / "x.plan.safetensors")
        planned(case, also=(str(tmp_path / "x.plan.safetensors"),))


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_columns_keep_their_length(case: Scoring, alpha: float, tmp_path: Path) -> None:
    options = {"norm_preserving": True, "direction_layer": 1, "alpha": alpha}
    plan = planned(case, **options)
    r = unit(case.statistics.difference("residual.1"))
    for site in case.spec.sites:
        W = case.checkpoint.read(site.tensor)
        cut = W - alpha * torch.outer(r, r @ W)
        assert torch.allclose(after(case, plan, site), cut * (W.norm(dim=0) / cut.norm(dim=0)), atol=1e-5)
    assert own_strength(ablation.Options(**options)) == 1.0
    with pytest.raises(TargetError, match="full rank"):
        emit(plan, case.checkpoint, case.spec, "lora", tmp_path / "lora")


def test_compile_captures_what_leace_needs(tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ("--data", data, "--method", "ablation", "--eraser", "leace", "--no-report", "--strength", 1)
    done = run("compile", tiny_llama, *flags, "--direction-layer", 1, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert EditPlan.load(tmp_path / "out" / PLAN).method["eraser"] == "leace"
    spec = read_spec(open_checkpoint(tiny_llama))
    for options, layers in (({}, (spec.layers // 2,)), ({"per_layer": True}, tuple(range(spec.layers)))):
        assert covariance_layers("ablation", ablation.Options(eraser="leace", **options), spec) == layers
    assert covariance_layers("ablation", ablation.Options(), spec) == covariance_layers("steering", None, spec) == ()


def test_leace_makes_the_classes_means_equal_and_changes_the_stream_least(case: Scoring, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--stream-moments 1"):
        planned(case, eraser="leace", direction_layer=1)
    examples = [
        contrast.Example(row["prompt"], row[label], label, "test", index)
        for index, row in enumerate(ROWS)
        for label in LABELS
    ]
    loaded = load_model(case.checkpoint, case.spec)
    captured = capture_statistics(loaded, case.checkpoint, Behavior("rows", examples), stream_moments=[1])
    captured.save(tmp_path / "x.stats.safetensors")
    statistics = Statistics.load(tmp_path / "x.stats.safetensors")
    scoring = replace(case, statistics=statistics, _known={})
    second = statistics.blocks["residual.1", "contrast"][0].double()
    squares = [statistics.moments["residual.1", "output", label].m2 for label in LABELS]
    assert torch.allclose(second.diagonal(), (squares[0] + squares[1]) / 2, rtol=1e-4)
    plan = planned(scoring, eraser="leace", direction_layer=1)
    edit = plan.edits[0]
    assert isinstance(edit, LowRank)
    site = case.spec.sites[0]
    W, delta = case.checkpoint.read(site.tensor).double(), statistics.difference("residual.1")
    P = torch.eye(len(delta), dtype=torch.float64) + edit.B.double() @ (
        edit.A.double() @ torch.linalg.pinv(W)
    )  # W has full row rank
    assert float((P @ delta).norm()) < 1e-3 * float(delta.norm())
    mean = (
        statistics.mean("residual.1", "output", "positive") + statistics.mean("residual.1", "output", "negative")
    ) / 2
    sigma = second - torch.outer(mean, mean)

    def change(projection: torch.Tensor) -> float:
        gone = torch.eye(len(delta), dtype=torch.float64) - projection
        return float((gone @ sigma @ gone.T).trace())

    hat = delta / delta.norm()
    assert change(P) < change(torch.eye(len(delta), dtype=torch.float64) - torch.outer(hat, hat))


@pytest.mark.parametrize("population", ["negative", "background"])
def test_the_mean_that_is_put_back_is_the_texts(gpt2: Scoring, population: str) -> None:
    plan = planned(gpt2, restore=population, direction_layer=1)
    r = unit(gpt2.statistics.difference("residual.1"))
    for site in gpt2.spec.sites:
        assert site.bias is not None
        bias = plan.edit_of(site.bias)
        assert isinstance(bias, Bias)
        x = torch.randn(site.in_features)
        y = after(gpt2, plan, site) @ x + gpt2.checkpoint.read(site.bias) + bias.delta
        mean = gpt2.statistics.mean(site.key, "output", population)  # type: ignore[arg-type]
        assert float(r @ y) == pytest.approx(float(r.double() @ mean), abs=1e-4)


def test_a_mean_that_has_no_bias_gets_one_or_is_refused(
    case: Scoring, tmp_path: Path, statistics_of: Callable[..., Any]
) -> None:
    plan = planned(case, restore="negative", direction_layer=1)
    assert all(isinstance(plan.edit_of(str(site.new_bias)), NewBias) for site in case.spec.sites)
    folder = save_tiny(tmp_path / "mistral", family_config("mistral"))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(PlanError, match=r"attn_out\.0: it has no bias, and no setting"):
        planned(Scoring(checkpoint, read_spec(checkpoint), statistics_of(folder)), restore="negative")
