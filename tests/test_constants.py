"""Constants as a method: what a plan of them does, and what carries none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from constant_models import Model, logits, models_in

from steer2edit.architecture.stream import factor
from steer2edit.capture.vectors import Vectors, substituted
from steer2edit.errors import PlanError
from steer2edit.methods import make_plan
from steer2edit.plan import Bias, LowRank, NewBias
from steer2edit.runtime.hooks import edited, stream_shifted


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, statistics_of: Callable[..., Any]) -> Callable[[str], Model]:
    return models_in(tmp_path_factory.mktemp("constants"), statistics_of)


@pytest.mark.parametrize("name", ["llama", "granite", "gpt2", "cohere"])
def test_a_constant_is_the_vector_added_to_the_stream_after_the_block(
    name: str, model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    """Created where the base has no bias; added to the bias that GPT-2 has; in a block whose parts are added at once."""
    model = model_of(name)
    plan = model.plan(layer=1).scaled(0.5)
    assert [type(edit) for edit in plan.edits] == [Bias if name == "gpt2" else NewBias]
    out = model.emit(plan, "checkpoint", tmp_path / "out")
    v = 0.5 * model.statistics.difference("residual.1").float()
    loaded = model.loaded()
    with stream_shifted(loaded, {1: v}):
        hooked = logits(loaded)
    with edited(loaded, plan):
        planned = logits(loaded)
    assert (hooked - logits(loaded)).abs().max() > 1e-3
    assert (planned - hooked).abs().max() < 1e-5
    assert (logits(model.loaded(out)) - hooked).abs().max() < 1e-5


def test_the_middle_layer_is_the_default_and_several_take_their_own_vectors(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    assert [edit.tensor for edit in model.plan().edits] == ["model.layers.1.mlp.down_proj.bias"]
    plan = model.plan(layers=(1, 2), place="after-attention")
    assert [edit.tensor for edit in plan.edits] == [f"model.layers.{i}.self_attn.o_proj.bias" for i in (1, 2)]
    for layer, edit in zip((1, 2), plan.edits, strict=True):
        assert isinstance(edit, NewBias)
        assert torch.equal(edit.delta, model.statistics.difference(f"residual.{layer}").float())


def test_at_all_writers_each_gets_its_own_difference(model_of: Callable[[str], Model]) -> None:
    model = model_of("granite")
    plan = model.plan(place="writers")
    assert len(plan.edits) == len(model.spec.sites)
    for site in model.spec.sites:
        edit = plan.edit_of(str(site.new_bias))
        assert isinstance(edit, NewBias)
        assert torch.allclose(edit.delta, model.statistics.difference(site.key).float(), atol=1e-6)
        assert factor(model.checkpoint, site) == 1.0 or site.multiplier != 1.0
    only = model.plan(place="writers", sites="attn", layers=(0, 0))
    assert [edit.tensor for edit in only.edits] == ["model.layers.0.self_attn.o_proj.bias"]


def test_imported_vectors_go_to_their_own_layers(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    v = torch.linspace(-1, 1, model.spec.hidden_size)
    vectors = Vectors({"residual.2": v}, source={"format": "test"})
    scoring = replace(model.scoring, statistics=substituted(vectors, model.statistics, model.checkpoint, model.spec))
    plan = make_plan(scoring, method="constant")
    (edit,) = plan.edits
    assert isinstance(edit, NewBias) and edit.tensor == "model.layers.2.mlp.down_proj.bias"
    assert torch.allclose(edit.delta, v, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("qwen3", {}, "--place after-attention adds it exactly"),
        ("qwen3", {"place": "writers"}, "--place writers --sites attn adds attention's vectors exactly"),
        ("mistral", {}, "relative squared error \\(estimated\\): attn_out.1 0"),
        ("gemma2", {}, "a norm stands between it and the stream.*The method steering"),
        ("llama", {"layer": 9}, "--layer 9 is not in this model, which has the layers 0-2"),
        ("llama", {"layer": 1, "layers": (0, 2)}, "exclude each other"),
        ("llama", {"layer": 1, "sites": "attn"}, "--sites chooses among writers"),
    ],
)
def test_what_carries_no_constant_is_refused_with_what_comes_nearest(
    name: str, options: dict[str, Any], told: str, model_of: Callable[[str], Model]
) -> None:
    with pytest.raises(PlanError, match=f"(?s){told}"):
        model_of(name).plan(**options)


def test_the_stand_in_is_the_best_edit_of_rank_1_and_its_error_stands_in_the_plan(
    model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    model = model_of("mistral")
    plan = model.plan(layer=1, stand_in=True)
    (edit,) = plan.edits
    assert isinstance(edit, LowRank) and edit.tensor == "model.layers.1.self_attn.o_proj.weight"
    assert torch.allclose(edit.B[:, 0], model.statistics.difference("residual.1").float(), atol=1e-6)
    statistics, key = model.statistics, "attn_out.1"
    sources = [one for one in ("contrast", "background", "chat") if one == "contrast" or statistics.examples[one]]
    # on a mixture of all texts the push is one on average, and with moments between heads as assumed 1 - κ is its error
    means = [statistics.x_bar(key) if one == "contrast" else statistics.mean(key, "input", one) for one in sources]
    a = edit.A[0].double()
    assert float(a @ torch.stack(means).mean(dim=0)) == pytest.approx(1, abs=1e-4)
    S = torch.zeros(len(a), len(a), dtype=torch.float64)
    width = len(a) // 4
    for one, mean in zip(sources, means, strict=True):
        here = torch.outer(mean, mean)
        for head, block in enumerate(statistics.block_moments(key, one)):
            rows = slice(head * width, (head + 1) * width)
            here[rows, rows] = block.double()
        S += here / len(sources)
    error = plan.method["stand_ins"][key]
    energy = float(a @ S @ a)
    # the ridge of the solver is a part of S for it
    assert (energy - 1) / energy <= error < 1
    other = a + 0.1 * torch.randn(len(a), generator=torch.Generator().manual_seed(0)).double() * a.abs().mean()
    other = other / float(other @ torch.stack(means).mean(dim=0))
    assert float(other @ S @ other) > energy * 0.999
    plan.save(tmp_path / "x.plan.safetensors")
    assert (
        "stands in for the constant, with a relative squared error of about: attn_out.1"
        in run("show", tmp_path / "x.plan.safetensors").output
    )
    out = model.emit(plan, "checkpoint", tmp_path / "out")
    assert json.loads((out / "steer2edit.json").read_text())["method"]["stand_ins"] == {key: error}
    assert "stand ins" in (out / "README.md").read_text()
