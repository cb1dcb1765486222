"""The adapter for mlx-lm holds the plan, by the rules by which mlx-lm loads it. It runs without MLX."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, run, save_tiny
from family_configs import family_config
from mixture_models import MODELS
from safetensors.torch import load_file, save_file
from wrapper_models import WRAPPERS

from steer2edit.architecture import read_spec
from steer2edit.architecture.find_family import KNOWN
from steer2edit.architecture.wrappers import MULTIMODAL
from steer2edit.artefact import emit as emitting
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.errors import PlanError, TargetError
from steer2edit.evaluation.candidates import open_candidate
from steer2edit.files.layout import ADAPTER_CONFIG, PLAN
from steer2edit.lowering import Place, resolve
from steer2edit.methods import make_plan
from steer2edit.plan import Base, Bias, EditPlan, LowRank, Structure, merge
from steer2edit.runtime.hooks import edited
from steer2edit.runtime.model import LoadedModel, load_model
from steer2edit.targets import mlx

IDS = torch.tensor([[1, 5, 9, 44, 7, 20]])


@pytest.fixture(scope="module")
def case(scoring: Any) -> tuple[Any, EditPlan]:
    """Scores of the tiny llama and a plan of its last two layers."""
    from steer2edit.methods.steering import Options

    return scoring, make_plan(scoring, options=Options(sites="both", layers=(1, 2))).scaled(0.5)


def random_plan(checkpoint: Checkpoint, rank: int = 1, keys: Callable[[str], bool] = lambda _: True) -> EditPlan:
    """A plan of random low-rank edits of every dense writer whose site key is chosen."""
    generator = torch.Generator().manual_seed(rank)
    edits = []
    for site in (site for site in read_spec(checkpoint).sites if site.expert is None and keys(site.key)):
        B, A = (
            torch.randn(site.out_features, rank, generator=generator),
            torch.randn(rank, site.in_features, generator=generator),
        )
        edits.append(LowRank(site.matrix, B, 0.02 * A))
    return EditPlan(Base(checkpoint.name, None, checkpoint.fingerprint), tuple(edits))


def emit(checkpoint: Checkpoint, plan: EditPlan, out: Path) -> Path:
    emitting.emit(plan, checkpoint, read_spec(checkpoint), "mlx", out)
    return out


def load_as_mlx_does(loaded: LoadedModel, blocks: str, folder: Path) -> None:
    """Wrap modules as mlx-lm's ``load_adapters`` does, here in PyTorch. ``blocks`` is mlx-lm's path of the list of blocks."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    settings, factors = config["lora_parameters"], load_file(folder / mlx.FILE)
    assert config["fine_tune_type"] == "lora" and settings["dropout"] == 0
    layers = list(range(loaded.spec.layers))[-config["num_layers"] :]
    used = set()
    for layer in layers:
        block = loaded.model.get_submodule(f"{loaded.spec.block_modules}{layer}")
        for key, module in list(block.named_modules()):
            if key not in settings["keys"]:
                continue
            names = [f"{blocks}.{layer}.{key}.{half}" for half in ("lora_a", "lora_b")]
            a, b = (factors[name] for name in names)
            used.update(names)
            assert a.shape[1] == b.shape[0] == settings["rank"] and a.dtype == b.dtype == torch.float32

            def add(_m: Any, args: Any, y: Any, a: Any = a, b: Any = b) -> Any:
                return y + settings["scale"] * ((args[0] @ a) @ b)

            module.register_forward_hook(add)
    # mlx-lm stops at tensors that belong to no wrapped module; older releases passed over them
    assert used == set(factors)


@pytest.mark.parametrize("rank", [1, 3])
def test_what_mlx_lm_computes_from_the_files_is_the_plan(tiny_llama: Path, tmp_path: Path, rank: int) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    plan = random_plan(checkpoint, rank, lambda key: key in ("attn_out.1", "mlp_out.2"))
    folder = emit(checkpoint, plan, tmp_path / "out")
    loaded, adapted = (load_model(checkpoint, read_spec(checkpoint)) for _ in range(2))
    load_as_mlx_does(adapted, "model.layers", folder)
    with torch.inference_mode():
        base = loaded.model(input_ids=IDS).logits
        ours = adapted.model(input_ids=IDS).logits
        with edited(loaded, plan):
            expected = loaded.model(input_ids=IDS).logits
    assert float((expected - base).abs().max()) > 1e-2
    assert torch.allclose(ours, expected, atol=1e-5)


def test_blocks_are_counted_from_the_last_and_what_is_not_edited_is_zero(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_llama)
    narrow = random_plan(checkpoint, 1, lambda key: key == "attn_out.1")
    wide = random_plan(checkpoint, 2, lambda key: key == "mlp_out.2")
    folder = emit(checkpoint, merge([narrow, wide], [1.0, 1.0]), tmp_path / "out")
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert config["num_layers"] == 2
    assert config["lora_parameters"] == {
        "rank": 2,
        "scale": 1.0,
        "dropout": 0.0,
        "keys": ["mlp.down_proj", "self_attn.o_proj"],
    }
    factors = load_file(folder / mlx.FILE)
    modules = {name.rpartition(".")[0] for name in factors}
    assert modules == {f"model.layers.{i}.{key}" for i in (1, 2) for key in config["lora_parameters"]["keys"]}
    acting = {name for name in modules if factors[f"{name}.lora_b"].any() and factors[f"{name}.lora_a"].any()}
    assert acting == {"model.layers.1.self_attn.o_proj", "model.layers.2.mlp.down_proj"}
    # a rank that is not used is zero
    assert not factors["model.layers.1.self_attn.o_proj.lora_a"][:, 1].any()


def test_it_verifies_and_is_reproduced_byte_for_byte(case: Any, tmp_path: Path) -> None:
    scoring, plan = case
    one = emit(scoring.checkpoint, plan, tmp_path / "one")
    two = emit(scoring.checkpoint, EditPlan.load(one / PLAN), tmp_path / "two")
    for name in (mlx.FILE, ADAPTER_CONFIG):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    shown = run("verify", one, "--base", scoring.checkpoint.path, "--json")
    assert shown.exit_code == 0, shown.output
    numbers = json.loads(shown.stdout)["numbers"]
    assert numbers["difference"] <= 1e-4 and numbers["effect"] > 1e-2
    card = (one / "README.md").read_text()
    assert "mlx_lm.generate --model" in card and "library_name: mlx" in card


def test_measuring_it_here_asks_for_its_plan(case: Any, tmp_path: Path) -> None:
    scoring, plan = case
    folder = emit(scoring.checkpoint, plan, tmp_path / "out")
    loaded = load_model(scoring.checkpoint, scoring.spec)
    with pytest.raises(PlanError, match=r"is for another engine \(--to mlx\).*plan.safetensors"):
        open_candidate(loaded, scoring.checkpoint, str(folder))
    assert open_candidate(loaded, scoring.checkpoint, str(folder / PLAN)).strength == plan.measured.strength


def test_a_changed_adapter_is_found(case: Any, tmp_path: Path) -> None:
    scoring, plan = case
    folder = emit(scoring.checkpoint, plan, tmp_path / "out")
    factors = load_file(folder / mlx.FILE)
    name = next(iter(factors))
    save_file({**factors, name: factors[name] * 1.01}, folder / mlx.FILE, {"format": "mlx"})
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    config["lora_parameters"]["scale"] = 20.0
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    problems = verify(folder, scoring.checkpoint.path).problems
    assert any(f"{name} differs" in one for one in problems)
    assert any(f"{ADAPTER_CONFIG} differs" in one for one in problems)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_layers": 1}, "leaves model.layers.1"),
        ({"lora_parameters": {"rank": 1, "scale": 1.0, "keys": ["mlp.down_proj"]}}, "leaves .*self_attn.o_proj out"),
        ({"lora_parameters": {"rank": 8, "scale": 1.0, "keys": ["mlp.down_proj", "self_attn.o_proj"]}}, "another rank"),
        ({"fine_tune_type": "dora"}, "expected 'lora'"),
        ({"lora_parameters": {}}, "is not the config of an adapter for mlx-lm"),
    ],
)
def test_a_config_by_which_mlx_lm_would_do_something_else_is_refused(
    case: Any, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    scoring, plan = case
    folder = emit(scoring.checkpoint, plan, tmp_path / "out")
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PlanError, match=what):
        mlx.read_back(folder, resolve(plan, scoring.checkpoint, scoring.spec))


def test_every_known_type_is_described() -> None:
    described = {*MULTIMODAL, *(name for family in KNOWN for name in family.model_types)}
    # a type that transformers lacks is llama's or mistral's to it
    assert set(mlx.MODULES) <= described
    assert set(mlx.EXPERTS) <= set(mlx.MODULES)


@pytest.mark.parametrize(
    ("make", "key", "name"),
    [
        (lambda folder: save_tiny(folder, family_config("gptj")), "mlp_out.1", "model.h.1.mlp.fc_out"),
        (WRAPPERS["qwen3_vl"], "attn_out.1", "language_model.model.layers.1.self_attn.o_proj"),
        (MODELS["lfm2_moe"], "mlp_out.0", "model.layers.0.feed_forward.down_proj"),
        (MODELS["nemotron_h"], "attn_out.2", "backbone.layers.2.mixer.o_proj"),
        (MODELS["laguna"], "shared_expert_out.1", "model.layers.1.mlp.shared_expert.down_proj"),
    ],
    ids=["gptj", "qwen3_vl", "lfm2_moe", "nemotron_h", "laguna"],
)
def test_modules_are_called_as_in_mlx_lm(tmp_path: Path, make: Any, key: str, name: str) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "model"))
    plan = random_plan(checkpoint, 1, lambda one: one == key)
    folder = emit(checkpoint, plan, tmp_path / "out")
    factors = load_file(folder / mlx.FILE)
    edit = plan.edits[0]
    assert isinstance(edit, LowRank)
    update = (factors[f"{name}.lora_a"] @ factors[f"{name}.lora_b"]).T
    assert torch.allclose(update, edit.dense(), atol=1e-6)
    back = mlx.read_back(folder, resolve(plan, checkpoint, read_spec(checkpoint)))
    again = back.edit_of(edit.tensor)
    assert isinstance(again, LowRank) and torch.allclose(again.dense(), edit.dense(), atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "model.layers.1.mlp.switch_mlp.down_proj"),
        ("mixtral", "model.layers.1.block_sparse_moe.switch_mlp.down_proj"),
        ("granitemoe", "model.layers.1.block_sparse_moe.switch_mlp.down_proj"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_layers_experts_are_one_module(tmp_path: Path, model_type: str, name: str) -> None:
    checkpoint = open_checkpoint(MODELS[model_type](tmp_path / "model"))
    spec = read_spec(checkpoint)
    experts = [site for site in spec.sites if site.layer == 1 and site.expert is not None]
    chosen = {site.key: rank for rank, site in enumerate(experts[3:5], 1)}
    edits = tuple(
        LowRank(
            site.matrix,
            torch.randn(site.out_features, chosen[site.key]),
            torch.randn(chosen[site.key], site.in_features),
        )
        for site in experts
        if site.key in chosen
    )
    plan = EditPlan(Base(checkpoint.name, None, checkpoint.fingerprint), edits)
    factors = load_file(emit(checkpoint, plan, tmp_path / "out") / mlx.FILE)
    assert {one for one in factors if ".1." in one} == {f"{name}.lora_a", f"{name}.lora_b"}
    # of a later layer's experts, which are not edited, every factor is zero
    assert all(not value.any() for one, value in factors.items() if ".2." in one) and len(factors) == 4
    a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
    for site in experts:
        edit = plan.edit_of(site.matrix)
        dense = edit.dense() if isinstance(edit, LowRank) else torch.zeros(site.out_features, site.in_features)
        assert site.expert is not None
        assert torch.allclose(b[site.expert] @ a[site.expert], dense, atol=1e-5)
    back = mlx.read_back(tmp_path / "out", resolve(plan, checkpoint, spec))
    for edit in edits:
        again = back.edit_of(edit.tensor)
        assert isinstance(again, LowRank) and torch.allclose(again.dense(), edit.dense(), atol=1e-5)


def test_what_mlx_lm_cannot_carry_is_refused_with_the_reason(case: Any, tmp_path: Path) -> None:
    scoring, plan = case
    out = tmp_path / "out"
    with pytest.raises(TargetError, match="the plan is empty"):
        emit(scoring.checkpoint, replace(plan, edits=()), out)
    with pytest.raises(TargetError, match="cannot remove experts"):
        emit(scoring.checkpoint, replace(plan, structure=Structure(top_k=1)), out)
    biased = open_checkpoint(save_tiny(tmp_path / "biased", llama_config(attention_bias=True)))
    edit = Bias(str(read_spec(biased).site("attn_out.0").bias), torch.ones(32))
    with pytest.raises(TargetError, match="a bias"):
        emit(biased, EditPlan(Base(biased.name, None, biased.fingerprint), (edit,)), out)
    lacking = open_checkpoint(save_tiny(tmp_path / "bloom", family_config("bloom")))
    with pytest.raises(TargetError, match="has no model for the type 'bloom'"):
        emit(lacking, random_plan(lacking), out)
    mixture = open_checkpoint(MODELS["qwen3_next"](tmp_path / "mixture"))
    expert = next(site for site in read_spec(mixture).sites if site.expert is not None)
    low = LowRank(expert.matrix, torch.ones(expert.out_features, 1), torch.ones(1, expert.in_features))
    with pytest.raises(TargetError, match="an expert among several"):
        emit(mixture, EditPlan(Base(mixture.name, None, mixture.fingerprint), (low,)), out)
    assert not out.exists()


def test_a_published_adapter_is_fetched_first() -> None:
    base = Base("org/base", "1" * 40, "0" * 64)
    lines = mlx.load_snippet(Place(base, repository="user/concise-mlx")).lines
    assert lines[0] == "hf download user/concise-mlx --local-dir concise-mlx"
    assert "--model org/base --adapter-path concise-mlx" in lines[1]
