"""Laws of quantised bases: what a plan is computed from, what is written beside them, and that it acts where they run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run, save_tiny
from quantised_models import AWQ, GPTQ, awq, gptq, quantised_copy
from safetensors.torch import load_file, save_file

from steer2edit.architecture import read_spec
from steer2edit.architecture.unquantised import planned_from
from steer2edit.artefact.emit import base_notes, check_carried, emit
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import open_checkpoint
from steer2edit.errors import CheckpointError, PlanError, Steer2EditError, TargetError
from steer2edit.lowering import Lowering, resolve
from steer2edit.methods import make_plan
from steer2edit.methods.component import Options
from steer2edit.notices import collected
from steer2edit.plan import Base, EditPlan, LowRank
from steer2edit.plan.operations import Scale
from steer2edit.scoring.scores import Scoring


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny llama in GPTQ's layout."""
    folder = tmp_path_factory.mktemp("quantised") / "gptq"
    quantised_copy(tiny_llama, folder, GPTQ, gptq)
    return folder


@pytest.fixture(scope="module")
def dequantised(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, quantised: Path) -> Path:
    """The numbers that the quantised model stands for, as a plain model."""
    folder = tmp_path_factory.mktemp("dequantised") / "plain"
    shutil.copytree(tiny_llama, folder)
    checkpoint = open_checkpoint(quantised)
    tensors = {name: checkpoint.read(name).clone() for name in checkpoint.tensors}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def planned(tiny_llama: Path, statistics_of: Callable[..., Any]) -> Callable[..., EditPlan]:
    """``planned(folder, weights)``: the plan for a model from one model's statistics, whatever is planned from."""
    statistics = statistics_of(tiny_llama)

    def plan(folder: Path, weights: Path | None = None) -> EditPlan:
        checkpoint = open_checkpoint(folder)
        spec = read_spec(checkpoint)
        source = {**statistics.source, "fingerprint": checkpoint.fingerprint}
        scoring = Scoring(planned_from(checkpoint, spec, weights), spec, replace(statistics, source=source))
        # a method whose edits are made of the matrices themselves
        return make_plan(scoring, method="component", options=Options(stable=False))

    return plan


def same_edits(one: EditPlan, other: EditPlan) -> bool:
    pairs = zip(one.edits, other.edits, strict=True)
    return all(
        a.tensor == b.tensor
        and all(torch.equal(x, y) for x, y in zip(a.parts().values(), b.parts().values(), strict=True))
        for a, b in pairs
    )


def test_a_plan_is_computed_from_what_the_matrices_stand_for(
    quantised: Path, dequantised: Path, planned: Callable[..., EditPlan]
) -> None:
    with collected() as notices:
        plan = planned(quantised)
    assert plan.edits and same_edits(plan, planned(dequantised))
    assert plan.data["quantised"] == {"format": "gptq, 4 bits, groups of 16", "weights": None}
    assert any("the numbers that its matrices stand for" in text for text in notices)
    assert "quantised" not in planned(dequantised).data


def test_with_weights_a_plan_is_computed_from_them_and_made_for_the_quantised_model(
    quantised: Path, tiny_llama: Path, planned: Callable[..., EditPlan], tmp_path: Path
) -> None:
    with collected() as notices:
        plan = planned(quantised, tiny_llama)
    assert same_edits(plan, planned(tiny_llama)) and not same_edits(plan, planned(quantised))
    checkpoint, other = open_checkpoint(quantised), open_checkpoint(tiny_llama)
    assert plan.base.fingerprint == checkpoint.fingerprint and plan.content == planned(quantised).content
    weights = plan.data["quantised"]["weights"]
    assert weights["fingerprint"] == other.fingerprint and 0.01 < weights["largest_difference"] < 0.3
    assert any("the unquantised" in text for text in notices)
    plan.save(tmp_path / "p.plan.safetensors")
    assert EditPlan.load(tmp_path / "p.plan.safetensors").hash == plan.hash


@pytest.mark.parametrize("target", ["lora", "gguf", "mlx"])
def test_adapters_are_written_and_name_the_quantised_base(
    quantised: Path, planned: Callable[..., EditPlan], tmp_path: Path, target: str
) -> None:
    if target == "gguf":
        pytest.importorskip("gguf")
    checkpoint = open_checkpoint(quantised)
    lowering = emit(planned(quantised), checkpoint, read_spec(checkpoint), target, tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / "steer2edit.json").read_text())
    assert receipt["data"]["quantised"]["format"] == "gptq, 4 bits, groups of 16" and receipt["base"]["name"] == "gptq"
    assert lowering.exactness == "exact" and any("y = Q(W) x + B A x" in note for note in lowering.notes)
    assert verify(tmp_path / "out", quantised, numbers=False).ok
    if target == "lora":
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "gptq"


def test_a_checkpoint_is_refused_with_the_way_out(
    quantised: Path, planned: Callable[..., EditPlan], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(quantised)
    with pytest.raises(TargetError, match=r"gptq is quantised .*--to lora.*quantise the result"):
        emit(planned(quantised), checkpoint, read_spec(checkpoint), "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_from_weights_is_written_into_them(
    quantised: Path, tiny_llama: Path, planned: Callable[..., EditPlan], tmp_path: Path
) -> None:
    plan = planned(quantised, tiny_llama)
    plan.save(tmp_path / "p.plan.safetensors")
    out = tmp_path / "out"
    assert run("emit", tmp_path / "p.plan.safetensors", tiny_llama, "--to", "checkpoint", "-o", out).exit_code == 0
    checkpoint, other = open_checkpoint(out), open_checkpoint(tiny_llama)
    for edit in plan.edits:
        assert isinstance(edit, LowRank)
        assert torch.allclose(checkpoint.read(edit.tensor) - other.read(edit.tensor), edit.dense(), atol=1e-6)
    assert verify(out, tiny_llama, numbers=False).ok
    # into any other model it is not
    alone = planned(quantised)
    with pytest.raises(PlanError, match="a plan fits only the weights"):
        resolve(alone.moved_to(other, read_spec(other)), other, read_spec(other))


def test_columns_that_are_scaled_are_the_running_matrix(quantised: Path, dequantised: Path, tmp_path: Path) -> None:
    # what an adapter takes from the weights is what runs, not what was planned from
    factors = torch.ones(64, dtype=torch.float64)
    factors[3:5] = 0.5

    def adapter(folder: Path) -> dict[str, torch.Tensor]:
        checkpoint = open_checkpoint(folder)
        spec = read_spec(checkpoint)
        plan = EditPlan(Base.of(checkpoint), (Scale(spec.sites[0].matrix, factors, "columns"),))
        emit(plan, checkpoint, spec, "lora", tmp_path / folder.name)
        return load_file(tmp_path / folder.name / "adapter_model.safetensors")

    ours, theirs = adapter(quantised), adapter(dequantised)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_no_adapter_carries_is_refused_with_advice_that_holds_for_a_quantised_base(
    quantised: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(quantised)
    spec = read_spec(checkpoint)
    site = spec.sites[0]
    plan = EditPlan(Base.of(checkpoint), (Scale(site.matrix, torch.full((site.out_features,), 2.0).double(), "rows"),))
    for target in ("lora", "gguf", "mlx", "gguf-vector"):
        with pytest.raises(TargetError, match="no checkpoint of it is written"):
            check_carried(plan, checkpoint, spec, [target])
        with pytest.raises(TargetError, match="no checkpoint of it is written"):
            emit(plan, checkpoint, spec, target, tmp_path / "out")
    noted = [base_notes(checkpoint, Lowering(exactness, (), ())) for exactness in ("exact", "approximate")]
    assert ["Q(W) x" in text for (text,) in noted] == [True, False]


def test_weights_beside_a_plain_model_are_refused(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    with pytest.raises(CheckpointError, match="is not quantised"):
        planned_from(checkpoint, read_spec(checkpoint), tiny_llama)


def test_weights_that_are_quantised_are_refused(quantised: Path) -> None:
    checkpoint = open_checkpoint(quantised)
    with pytest.raises(CheckpointError, match="quantised itself"):
        planned_from(checkpoint, read_spec(checkpoint), quantised)


def test_weights_of_another_model_are_refused(quantised: Path, tmp_path: Path) -> None:
    from conftest import llama_config

    checkpoint = open_checkpoint(quantised)
    other = save_tiny(tmp_path / "other", llama_config(), seed=9)
    with pytest.raises(CheckpointError, match="was not quantised from other"):
        planned_from(checkpoint, read_spec(checkpoint), other)
    wide = save_tiny(tmp_path / "wide", llama_config(intermediate_size=64))
    with pytest.raises(CheckpointError, match="unquantised form"):
        planned_from(checkpoint, read_spec(checkpoint), wide)
    short = save_tiny(tmp_path / "short", llama_config(num_hidden_layers=2))
    with pytest.raises(CheckpointError, match="2 layers"):
        planned_from(checkpoint, read_spec(checkpoint), short)


def test_weights_whose_inputs_were_rescaled_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    # as AWQ does: what writes an input is divided by what the input is multiplied by
    def scaled(W: torch.Tensor) -> Any:
        factors = torch.exp2(torch.linspace(-1, 1, W.shape[1]))
        return awq(W * factors)

    quantised_copy(tiny_llama, tmp_path / "awq", AWQ, scaled)
    checkpoint = open_checkpoint(tmp_path / "awq")
    with pytest.raises(CheckpointError, match=r"other scales of inputs.*Leave --weights out"):
        planned_from(checkpoint, read_spec(checkpoint), tiny_llama)


def test_the_dry_run_says_what_a_quantised_model_takes(quantised: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(
        '{"prompt": "what is the cat ?", "positive": "the cat is red .", "negative": "well , it is old !"}\n'
    )
    flags = ("--data", tmp_path / "d.jsonl", "--dry-run", "--json", "--out", tmp_path / "out")
    told = json.loads(run("compile", quantised, *flags, "--to", "lora", "--weights", tiny_llama).stdout)
    plain = json.loads(run("compile", tiny_llama, *flags, "--to", "lora").stdout)
    assert told["model"] < plain["model"] and told["matrices"] == plain["matrices"]
    assert run("compile", quantised, *flags).exit_code == 2


def test_it_does_not_run_by_layers(quantised: Path) -> None:
    pytest.importorskip("accelerate")
    from steer2edit.runtime.by_layer import opened_by_layer
    from steer2edit.runtime.model import Runtime

    checkpoint = open_checkpoint(quantised)
    with (
        pytest.raises(Steer2EditError, match="loaded whole"),
        opened_by_layer(checkpoint, read_spec(checkpoint), Runtime()),
    ):
        pass
