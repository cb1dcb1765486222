"""Layers that are removed: the smaller model is the whole one that skips them, and models that need their layers refuse."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, run, save_tiny
from family_configs import family_config
from family_models import CONTEXTS
from mixture_models import MIXTURE_TYPES, mixture_config, save_mixture

from steer2edit.architecture import ModelSpec, read_spec
from steer2edit.architecture.removal import TYPES, layer_problems
from steer2edit.artefact.emit import emit
from steer2edit.artefact.revert import revert
from steer2edit.artefact.verify import verify
from steer2edit.capture.statistics import Statistics
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.compose import rescale
from steer2edit.errors import PlanError, TargetError
from steer2edit.methods import make_plan, silence
from steer2edit.plan import Base, EditPlan, LowRank, Structure, merge
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel, load_weights
from steer2edit.scoring.scores import Scoring


def saved(folder: Path, model_type: str) -> tuple[Checkpoint, ModelSpec]:
    if model_type in MIXTURE_TYPES:
        dense = {"mlp_only_layers": []} if model_type == "qwen3_moe" else {}
        save_mixture(folder, mixture_config(model_type, num_hidden_layers=4, **dense))
    else:
        save_tiny(folder, family_config(model_type, num_hidden_layers=4))
    checkpoint = open_checkpoint(folder)
    return checkpoint, read_spec(checkpoint)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=CONTEXTS, use_cache=False).logits  # type: ignore[no-any-return]


@contextmanager
def skipping(model: Any, spec: ModelSpec, layers: tuple[int, ...]) -> Any:
    """Blocks that give what they are given, without running: written from the definition."""
    kept = {}
    for layer in layers:
        block = model.get_submodule(f"{spec.block_modules}{layer}")
        kept[block] = block.forward

        def forward(*args: Any, block: Any = block, **kwargs: Any) -> Any:
            output = kept[block](*args, **kwargs)
            stream = args[0] if args else kwargs["hidden_states"]
            return (stream, *output[1:]) if isinstance(output, tuple) else stream

        block.forward = forward
    yield
    for block, forward in kept.items():
        block.forward = forward


def planned(checkpoint: Checkpoint, spec: ModelSpec, *layers: int) -> EditPlan:
    names = ",".join(f"layer.{layer}" for layer in layers)
    scoring = Scoring(checkpoint, spec, Statistics.nothing(checkpoint))
    return make_plan(scoring, method="silence", options=silence.Options(components=names, prune=True))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_model_without_layers_is_the_one_that_skips_them(model_type: str, tmp_path: Path) -> None:
    checkpoint, spec = saved(tmp_path / "base", model_type)
    plan = planned(checkpoint, spec, 1, 2) if spec.layers > 3 else planned(checkpoint, spec, 1)
    layers = plan.structure.layers
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    assert read_spec(open_checkpoint(tmp_path / "out")).layers == spec.layers - len(layers)
    base = load_weights(checkpoint.path)
    with skipping(base, spec, layers):
        expected = logits(base)
    whole = logits(base)
    assert (expected - whole).abs().max() > 1e-3
    with edited(LoadedModel(base, None, spec), plan):
        assert torch.equal(logits(base), expected)
    assert torch.allclose(logits(load_weights(tmp_path / "out")), expected, atol=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ModelSpec]:
    folder = tmp_path_factory.mktemp("removal") / "llama"
    save_tiny(folder, llama_config(num_hidden_layers=4), torch.bfloat16, max_shard_size="20KB")
    checkpoint = open_checkpoint(folder)
    return checkpoint, read_spec(checkpoint)


def test_edits_of_other_layers_go_along_and_all_of_it_verifies(
    llama: tuple[Checkpoint, ModelSpec], tmp_path: Path
) -> None:
    checkpoint, spec = llama
    site = spec.site("mlp_out.3")
    edit = LowRank(site.matrix, torch.full((site.out_features, 1), 0.3), torch.full((1, site.in_features), 0.3))
    plan = EditPlan(Base.of(checkpoint), (edit,), structure=Structure(layers=(0, 2)))
    plan.save(tmp_path / "x.plan.safetensors")
    assert EditPlan.load(tmp_path / "x.plan.safetensors").structure == plan.structure
    emit(plan, checkpoint, spec, "checkpoint", tmp_path / "out")
    result = verify(tmp_path / "out", base=checkpoint.path)
    assert result.ok, result.problems
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    with pytest.raises(PlanError, match="lost whole layers"):
        revert(tmp_path / "out", checkpoint.path)
    shard = next((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert not verify(tmp_path / "out", base=checkpoint.path).ok


def test_what_cannot_go_is_refused(llama: tuple[Checkpoint, ModelSpec], tmp_path: Path) -> None:
    checkpoint, spec = llama
    plan = planned(checkpoint, spec, 1)
    with pytest.raises(TargetError, match="lora cannot remove layers; use --to checkpoint"):
        emit(plan, checkpoint, spec, "lora", tmp_path / "lora")
    with pytest.raises(PlanError, match="has no strength"):
        rescale(plan, factor=0.5)
    with pytest.raises(PlanError, match="cannot be merged"):
        merge([plan, plan])
    scoring = Scoring(checkpoint, spec, Statistics.nothing(checkpoint))
    with pytest.raises(PlanError, match="--prune removes whole layers"):
        make_plan(scoring, method="silence", options=silence.Options(components="attn.1", prune=True))
    with pytest.raises(PlanError, match="no layer would be left"):
        planned(checkpoint, spec, 0, 1, 2, 3)
    site = spec.site("mlp_out.1")
    edit = LowRank(site.matrix, torch.ones(site.out_features, 1), torch.ones(1, site.in_features))
    both = EditPlan(Base.of(checkpoint), (edit,), structure=Structure(layers=(1,)))
    with pytest.raises(PlanError, match="whose layer it removes"):
        emit(both, checkpoint, spec, "checkpoint", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_nextn_predict_layers": 1}, "predict several tokens"),
        ({"num_kv_shared_layers": 2}, "share their keys and values"),
        ({"use_sliding_window": True}, "no layer_types"),
        ({"attention_layers": ["a", "b", "a", "b"]}, "the list attention_layers"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers is"),
    ],
)
def test_layouts_in_which_a_layer_is_not_alone_are_refused(
    llama: tuple[Checkpoint, ModelSpec], settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    from dataclasses import replace

    checkpoint, spec = llama
    other = replace(checkpoint, config={**checkpoint.config, **settings})
    assert any(reason in problem for problem in layer_problems((1,), other, spec))
    assert not layer_problems((1,), checkpoint, spec)


def test_the_command_removes_layers_without_statistics(llama: tuple[Checkpoint, ModelSpec], tmp_path: Path) -> None:
    out = tmp_path / "x.plan.safetensors"
    run("plan", llama[0].path, "--method", "silence", "--components", "layer.1,layer.2", "--prune", "-o", out)
    assert EditPlan.load(out).structure.layers == (1, 2)
    assert "layer 1, layer 2" in run("show", out).stdout


def test_a_layers_change_is_that_of_the_hidden_states(llama: tuple[Checkpoint, ModelSpec]) -> None:
    from steer2edit.capture.layer_changes import layer_changes
    from steer2edit.runtime.model import Runtime, load_model

    checkpoint, spec = llama
    loaded = load_model(checkpoint, spec, Runtime(dtype="float32"))
    text = "the cat was red and not old . the dog was green and new !"
    rows, tokens = layer_changes(loaded, [text], 1.0)
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokens in (ids.shape[1] - 1, ids.shape[1])  # with or without a first token of its own
    if tokens == ids.shape[1]:
        ids = torch.cat((torch.tensor([[loaded.tokenizer.bos_token_id]]), ids), dim=1)
    with torch.inference_mode():
        states = loaded.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    for row in rows[:-1]:  # the last state is behind the final norm
        before, after = (states[row.layer + i][0, 1:].double() for i in (0, 1))
        change = (after - before).norm(dim=-1) / before.norm(dim=-1)
        assert row.change == pytest.approx(float(change.mean()), rel=1e-4)
        assert row.void == pytest.approx(float((change < 1.0).double().mean()))
        assert row.cosine == pytest.approx(float(torch.cosine_similarity(before, after, dim=-1).mean()), rel=1e-4)
    told = run("layers", checkpoint.path, "--threshold", "1.5")
    none = run("layers", checkpoint.path, "--threshold", "1e-9")
    least = min(rows, key=lambda row: row.change).layer
    assert f"--components layer.{least} --prune" in none.stdout
    assert told.exit_code == 0 and "tokens changed by less than 1.5" in told.stdout and "--prune" in told.stdout
