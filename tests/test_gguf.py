"""GGUF artefacts hold the plan: the adapter exactly, the control vector its constant part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, run, save_tiny
from family_configs import family_config
from mixture_models import MODELS
from safetensors.torch import load_file

from steer2edit import targets
from steer2edit.architecture import read_spec
from steer2edit.architecture.stream import block_scale
from steer2edit.artefact import emit as emitting
from steer2edit.artefact.verify import verify
from steer2edit.checkpoint import open_checkpoint
from steer2edit.checkpoint.gguf import read_control_vector, read_gguf, write_gguf
from steer2edit.errors import PlanError, TargetError
from steer2edit.files.layout import PLAN
from steer2edit.lowering import Lowering
from steer2edit.lowering.constant_part import constant_parts
from steer2edit.methods import make_plan
from steer2edit.plan import Base, Bias, EditPlan, LowRank, Structure, merge
from steer2edit.scoring.scores import Scoring
from steer2edit.targets import gguf, gguf_vector


@pytest.fixture(scope="module")
def case(scoring: Scoring) -> tuple[Scoring, EditPlan]:
    """Scores of the tiny llama and a plan that edits both writers of every layer."""
    from steer2edit.methods.steering import Options

    return scoring, make_plan(scoring, options=Options(sites="both")).scaled(0.5)


def emit(case: tuple[Scoring, EditPlan], to: str, out: Path, plan: EditPlan | None = None) -> Lowering:
    scoring, made = case
    return emitting.emit(plan or made, scoring.checkpoint, scoring.spec, to, out)


def test_the_adapter_reads_back_as_the_plan_and_as_the_peft_adapter(case: Any, tmp_path: Path) -> None:
    scoring, plan = case
    other = replace(plan, edits=tuple(LowRank(e.tensor, e.B.flip(0), e.A.flip(1)) for e in plan.edits[:2]))
    both = merge([plan, other], [1.0, -0.7])
    emit(case, "gguf", tmp_path / "gguf", both)
    emit(case, "lora", tmp_path / "lora", both)
    back = gguf.read_back(tmp_path / "gguf" / gguf.FILE, both.base, scoring.spec)
    assert {edit.tensor for edit in back.edits} == {edit.tensor for edit in both.edits}
    peft = load_file(tmp_path / "lora/adapter_model.safetensors")
    _, tensors = read_gguf(tmp_path / "gguf" / gguf.FILE)
    names = gguf.tensor_names(scoring.spec, "llama")
    for site in scoring.spec.sites:
        ours, planned = back.edit_of(site.tensor), both.edit_of(site.tensor)
        assert isinstance(ours, LowRank) and isinstance(planned, LowRank)
        assert torch.allclose(ours.dense(), planned.dense(), rtol=0, atol=1e-6 * planned.norm)
        for half, key in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            assert torch.equal(
                tensors[f"{names[site.key]}.{half}"], peft[f"base_model.model.{site.module}.{key}.weight"]
            )


@pytest.mark.parametrize("to", ["gguf", "gguf-vector"])
def test_gguf_artefacts_verify_and_are_reproduced_byte_for_byte(case: Any, tmp_path: Path, to: str) -> None:
    scoring, _ = case
    emit(case, to, tmp_path / "one")
    emit(case, to, tmp_path / "two", EditPlan.load(tmp_path / "one" / PLAN))
    file = targets.load(to).FILE
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    result = verify(tmp_path / "one", scoring.checkpoint.path)
    assert result.ok, result.problems
    assert result.numbers["effect"] > 1e-2
    assert to == "gguf-vector" or result.numbers["difference"] <= 1e-4
    shown = run("verify", tmp_path / "one", "--base", scoring.checkpoint.path)
    assert shown.exit_code == 0, shown.output
    card = (tmp_path / "one/README.md").read_text()
    assert "llama-server -m base.gguf" in card and "library_name: gguf" in card


@pytest.mark.parametrize("to", ["gguf", "gguf-vector"])
def test_a_changed_file_is_found(case: Any, tmp_path: Path, to: str) -> None:
    scoring, _ = case
    emit(case, to, tmp_path / "out")
    file = tmp_path / "out" / targets.load(to).FILE
    fields, tensors = read_gguf(file)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.01
    kept = {key: value for key, value in fields.items() if key != "general.architecture"}
    write_gguf(file, fields["general.architecture"], tensors, kept)
    result = verify(tmp_path / "out", scoring.checkpoint.path)
    assert result.problems == (f"{name} differs from the plan",)
    file.write_bytes(file.read_bytes()[:200])
    problems = verify(tmp_path / "out", scoring.checkpoint.path).problems
    assert len(problems) == 1 and "not a readable GGUF file" in problems[0]


def test_a_control_vector_is_the_steering_vectors_of_each_block_together(case: Any, tmp_path: Path) -> None:
    # the steering method pushes by strength * v on the typical input, by construction
    scoring, _ = case
    emit(case, "gguf-vector", tmp_path / "out")
    hint, found = read_control_vector(tmp_path / "out" / gguf_vector.FILE)
    v = {site.key: 0.5 * scoring.statistics.difference(site.key).float() for site in scoring.spec.sites}
    layer = [v[f"attn_out.{i}"] + v[f"mlp_out.{i}"] for i in range(3)]
    assert hint == "llama" and sorted(found) == [1, 2]
    for vector, expected in ((found[1], layer[0] + layer[1]), (found[2], layer[2])):
        assert torch.allclose(vector, expected, atol=1e-5 * float(expected.norm()))


def test_the_push_follows_scaling_merging_and_files(case: Any, tmp_path: Path) -> None:
    scoring, plan = case
    both = merge([plan, plan.scaled(3.0)], [2.0, -1.0])
    both.save(tmp_path / "both.plan.safetensors")
    again = EditPlan.load(tmp_path / "both.plan.safetensors")
    assert again.hash == both.hash
    one, two = (constant_parts(p, scoring.checkpoint, scoring.spec) for p in (plan, again))
    assert all(torch.allclose(two[layer], -one[layer], atol=1e-5) for layer in one)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma4_unified_text"])
def test_behind_a_norm_the_push_is_what_the_stream_gets(
    model_type: str, tmp_path: Path, statistics_of: Callable[..., Any]
) -> None:
    from steer2edit.methods.steering import Options
    from steer2edit.runtime.hooks import steered
    from steer2edit.runtime.model import load_model

    folder = save_tiny(tmp_path / "gemma", family_config(model_type))
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    statistics = statistics_of(folder)
    plan = make_plan(Scoring(checkpoint, spec, statistics), options=Options(sites="attn")).scaled(0.02)
    predicted = constant_parts(plan, checkpoint, spec)[0]
    loaded = load_model(checkpoint, spec)
    site = spec.site("attn_out.0")
    seen: list[torch.Tensor] = []
    norm = loaded.model.get_submodule("model.layers.0.post_attention_layernorm")
    handle = norm.register_forward_hook(lambda _m, _i, out: seen.append(out.flatten(0, 1)))
    ids = torch.randint(4, 60, (8, 24))
    vector = 0.02 * statistics.difference(site.key).float()
    with torch.inference_mode():
        loaded.model(input_ids=ids)
        with steered(loaded, {site.key: vector}, 1.0):
            loaded.model(input_ids=ids)
    handle.remove()
    moved = (seen[1] - seen[0]).mean(dim=0) * block_scale(checkpoint, spec, 0)
    assert torch.cosine_similarity(moved, predicted, dim=0) > 0.9
    assert 0.6 < float(moved.norm() / predicted.norm()) < 1.6


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("gpt2", "gpt2"),
        ("gpt_neox", "gptneox"),
        ("gemma3_text", "gemma3"),
        ("phi", "phi2"),
        ("falcon", "falcon"),
        ("gemma4_text", "gemma4"),
    ],
)
def test_other_families_keep_output_times_input(tmp_path: Path, model_type: str, architecture: str) -> None:
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", family_config(model_type)))
    spec = read_spec(checkpoint)
    edits = tuple(LowRank(s.tensor, torch.randn(s.out_features, 1), torch.randn(1, s.in_features)) for s in spec.sites)
    plan = EditPlan(Base(checkpoint.name, None, checkpoint.fingerprint), edits)
    emitting.emit(plan, checkpoint, spec, "gguf", tmp_path / "out")
    fields, tensors = read_gguf(tmp_path / "out" / gguf.FILE)
    assert fields["general.architecture"] == architecture
    assert tensors["blk.1.ffn_down.weight.lora_a"].shape == (1, spec.site("mlp_out.1").in_features)
    assert tensors["blk.1.ffn_down.weight.lora_b"].shape == (spec.hidden_size, 1)
    result = verify(tmp_path / "out", checkpoint.path)
    assert result.ok, result.problems


def test_block_1_multiplies_block_0s_part_of_a_control_vector(
    tmp_path: Path, statistics_of: Callable[..., Any]
) -> None:
    """In Gemma 4 every block multiplies its whole stream by a number of its own."""
    folder = save_tiny(tmp_path / "gemma", family_config("gemma4_text"))
    checkpoint = open_checkpoint(folder)
    spec = read_spec(checkpoint)
    plan = make_plan(Scoring(checkpoint, spec, statistics_of(folder)))
    parts = constant_parts(plan, checkpoint, spec)
    emitting.emit(plan, checkpoint, spec, "gguf-vector", tmp_path / "out")
    _, vectors = read_control_vector(tmp_path / "out" / gguf_vector.FILE)
    scale = block_scale(checkpoint, spec, 1)
    assert abs(scale - 1) > 0.05
    assert torch.allclose(vectors[1], scale * parts[0] + parts[1]) and torch.allclose(vectors[2], parts[2])


@pytest.mark.parametrize("model_type", ["olmoe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_a_layers_experts_are_one_tensor_whose_products_are_the_plan(tmp_path: Path, model_type: str) -> None:
    checkpoint = open_checkpoint(MODELS[model_type](tmp_path / "model"))
    spec = read_spec(checkpoint)
    experts = [site for site in spec.sites if site.layer == 1 and site.expert is not None]
    attention = spec.site("attn_out.1")
    ranks = {experts[5].matrix: 2, experts[3].matrix: 1, attention.matrix: 1}
    edits = tuple(
        LowRank(site.matrix, torch.randn(site.out_features, rank), torch.randn(rank, site.in_features))
        for site in (*experts, attention)
        if (rank := ranks.get(site.matrix))
    )
    plan = EditPlan(Base(checkpoint.name, None, checkpoint.fingerprint), edits)
    emitting.emit(plan, checkpoint, spec, "gguf", tmp_path / "out")
    fields, tensors = read_gguf(tmp_path / "out" / gguf.FILE)
    stacked = "blk.1.ffn_down_exps.weight"
    assert set(tensors) == {
        f"{name}.{half}" for name in (stacked, "blk.1.attn_output.weight") for half in ("lora_a", "lora_b")
    }
    a, b = tensors[f"{stacked}.lora_a"], tensors[f"{stacked}.lora_b"]
    # llama.cpp checks both shapes against the base's tensor [experts, out, in], and multiplies by alpha / rank
    assert a.shape == (len(experts), 2, experts[0].in_features)
    assert b.shape == (len(experts), spec.hidden_size, 2)
    assert fields["adapter.lora.alpha"] == 2
    for site in experts:
        edit = plan.edit_of(site.matrix)
        dense = edit.dense() if isinstance(edit, LowRank) else torch.zeros(site.out_features, site.in_features)
        assert site.expert is not None
        assert torch.allclose(b[site.expert] @ a[site.expert], dense, atol=1e-5)
    back = gguf.read_back(tmp_path / "out" / gguf.FILE, plan.base, spec)
    for edit in edits:
        again = back.edit_of(edit.tensor)
        assert isinstance(again, LowRank) and torch.allclose(again.dense(), edit.dense(), atol=1e-5)


def test_experts_that_are_not_in_the_model_are_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(MODELS["mixtral"](tmp_path / "model"))
    spec = read_spec(checkpoint)
    site = next(site for site in spec.sites if site.expert == 2)
    base = Base(checkpoint.name, None, checkpoint.fingerprint)
    edit = LowRank(site.matrix, torch.ones(site.out_features, 1), torch.ones(1, site.in_features))
    emitting.emit(EditPlan(base, (edit,)), checkpoint, spec, "gguf", tmp_path / "out")
    file = tmp_path / "out" / gguf.FILE
    fields, tensors = read_gguf(file)
    kept = {key: value for key, value in fields.items() if key != "general.architecture"}
    write_gguf(file, fields["general.architecture"], {name: one[:-1] for name, one in tensors.items()}, kept)
    with pytest.raises(PlanError, match=r"ffn_down_exps.weight has factors of 7 experts, expected 8"):
        gguf.read_back(file, base, spec)


def test_every_type_whose_experts_are_carried_has_their_tensor_in_gguf() -> None:
    library = pytest.importorskip("gguf")
    kinds = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    for model_type in gguf.EXPERTS:
        tensors = library.MODEL_TENSORS[kinds[gguf.ARCHITECTURES[model_type]]]
        assert library.MODEL_TENSOR.FFN_DOWN_EXP in tensors, model_type


def test_what_gguf_cannot_carry_is_refused_with_the_reason(case: Any, tmp_path: Path) -> None:
    _, plan = case
    unknown = replace(plan, edits=tuple(replace(e, mean_effect=None) for e in plan.edits))  # type: ignore[type-var]
    with pytest.raises(TargetError, match="typical input is not known"):
        emit(case, "gguf-vector", tmp_path / "out", unknown)
    biased = open_checkpoint(save_tiny(tmp_path / "biased", llama_config(attention_bias=True)))
    spec = read_spec(biased)
    edit = Bias(str(spec.site("attn_out.0").bias), torch.ones(32))
    base = Base(biased.name, None, biased.fingerprint)
    with pytest.raises(TargetError, match="a bias"):
        emitting.emit(EditPlan(base, (edit,)), biased, spec, "gguf", tmp_path / "out")
    with pytest.raises(TargetError, match="no-such-family"):
        emitting.emit(
            EditPlan(base, (LowRank(spec.sites[0].tensor, torch.ones(32, 1), torch.ones(1, 64)),)),
            biased,
            replace(spec, model_type="no-such-family"),
            "gguf",
            tmp_path / "out",
        )
    mixture = open_checkpoint(MODELS["mellum"](tmp_path / "mixture"))
    expert = next(site for site in read_spec(mixture).sites if site.expert is not None)
    low = LowRank(expert.matrix, torch.ones(expert.out_features, 1), torch.ones(1, expert.in_features))
    with pytest.raises(TargetError, match="an expert among several"):
        fitting = EditPlan(Base(mixture.name, None, mixture.fingerprint), (low,))
        emitting.emit(fitting, mixture, read_spec(mixture), "gguf", tmp_path / "out")
    for to in ("lora", "gguf", "gguf-vector"):
        with pytest.raises(TargetError, match="cannot remove experts"):
            emit(case, to, tmp_path / "out", replace(plan, structure=Structure(top_k=1)))
    assert not (tmp_path / "out").exists()
