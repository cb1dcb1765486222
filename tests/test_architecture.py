"""What a checkpoint's config and headers say of its residual writers, and what is refused and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steer2edit.architecture import MatrixRole, ModelSpec, read_spec
from steer2edit.architecture.refusals import REFUSED
from steer2edit.checkpoint import open_checkpoint
from steer2edit.errors import ArchitectureError

Tensors = dict[str, torch.Tensor]
Make = Callable[..., ModelSpec]
LAYERS, HIDDEN, HEADS, INNER, VOCABULARY = 3, 8, 2, 12, 10
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "tie_word_embeddings": False,
}
# in place of a value: the key is left out
ABSENT = object()


def llama(prefix: str = "model.", attention: int = HIDDEN) -> Tensors:
    shapes = {
        f"{prefix}embed_tokens": (VOCABULARY, HIDDEN),
        f"{prefix}norm": (HIDDEN,),
        "lm_head": (VOCABULARY, HIDDEN),
    }
    for block in (f"{prefix}layers.{i}." for i in range(LAYERS)):
        shapes |= {f"{block}self_attn.{name}_proj": (attention, HIDDEN) for name in "qkv"}
        shapes |= {f"{block}mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{block}{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
        shapes |= {f"{block}self_attn.o_proj": (HIDDEN, attention), f"{block}mlp.down_proj": (HIDDEN, INNER)}
    return {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.fixture
def spec_of(tmp_path: Path) -> Make:
    """``spec_of(tensors, hidden_size=…)``: the spec of these tensors under CONFIG with changes."""

    def make(tensors: Tensors | None = None, config: Mapping[str, Any] | None = None, **changes: Any) -> ModelSpec:
        settings = {**(CONFIG if config is None else config), **changes}
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ABSENT}))
        save_file(llama() if tensors is None else tensors, folder / "model.safetensors")
        return read_spec(open_checkpoint(folder))

    return make


def refusal(make: Make, *args: Any, **changes: Any) -> str:
    with pytest.raises(ArchitectureError) as caught:
        make(*args, **changes)
    return str(caught.value)


def test_sites_are_the_writers_layer_by_layer(spec_of: Make) -> None:
    spec = spec_of()
    assert [site.key for site in spec.sites] == [
        f"{role}.{i}" for i in range(LAYERS) for role in ("attn_out", "mlp_out")
    ]
    attention, mlp = spec.sites[2:4]
    assert (attention.out_features, attention.in_features, attention.components) == (HIDDEN, HIDDEN, HEADS)
    assert (mlp.out_features, mlp.in_features, mlp.components) == (HIDDEN, INNER, INNER)
    assert attention.tensor == attention.module + ".weight" == "model.layers.1.self_attn.o_proj.weight"
    assert spec.site("mlp_out.1") is mlp
    assert (spec.embedding.role, spec.embedding.tensor) == (MatrixRole.EMBED, "model.embed_tokens.weight")
    assert (spec.embedding.in_features, spec.embedding.out_features) == (VOCABULARY, HIDDEN)


@pytest.mark.parametrize(
    ("chosen", "expected"), [(None, (0, LAYERS - 1)), ((1, 1), (1, 1)), ((0, LAYERS - 1), (0, LAYERS - 1))]
)
def test_layer_ranges_lie_within_the_model(spec_of: Make, chosen: Any, expected: Any) -> None:
    assert spec_of().layer_range(chosen) == expected


@pytest.mark.parametrize("chosen", [(-1, 1), (2, 1), (0, LAYERS)])
def test_other_layer_ranges_are_refused(spec_of: Make, chosen: tuple[int, int]) -> None:
    spec = spec_of()
    with pytest.raises(ArchitectureError, match=r"layers .* 0-2"):
        spec.layer_range(chosen)


@pytest.mark.parametrize("writer", ["self_attn.o_proj", "mlp.down_proj"])
def test_a_missing_writer_is_named(spec_of: Make, writer: str) -> None:
    tensors = llama()
    del tensors[f"model.layers.1.{writer}.weight"]
    message = refusal(spec_of, tensors)
    assert f"layer 1: model.layers.1.{writer}.weight is missing" in message
    assert "layer 0" not in message and "layer 2" not in message


@pytest.mark.parametrize(
    "leaf", ["conv.out_proj", "mlp2.down_proj", "mamba.out_proj", "feed_forward.w2", "extra.c_proj"]
)
def test_a_left_over_writer_is_named(spec_of: Make, leaf: str) -> None:
    message = refusal(spec_of, {**llama(), f"model.layers.2.{leaf}.weight": zeros(HIDDEN, 4)})
    assert f"layer 2: model.layers.2.{leaf}.weight looks like a writer and belongs to no site" in message


@pytest.mark.parametrize(
    "name",
    [f"model.layers.{LAYERS}.self_attn.o_proj.weight", f"model.layers.{LAYERS}.eh_proj.weight", "mtp.fc2.weight"],
)
def test_prediction_layers_past_the_last_are_ignored(spec_of: Make, name: str) -> None:
    spec = spec_of({**llama(), name: zeros(HIDDEN, HIDDEN)})
    assert len(spec.sites) == 2 * LAYERS


def test_every_problem_is_told_at_once(spec_of: Make) -> None:
    tensors = llama()
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    tensors["model.layers.1.mlp.down_proj.weight"] = zeros(HIDDEN + 1, INNER)
    tensors["model.layers.2.mlp.down_proj.weight"] = zeros(HIDDEN, INNER, dtype=torch.int8)
    message = refusal(spec_of, tensors)
    assert all(part in message for part in ("layer 0", "[9, 12]", "stored as I8"))


@pytest.mark.parametrize("shape", [(HIDDEN,), (HIDDEN, 2, HIDDEN), (HIDDEN + 1, HIDDEN), ()])
def test_a_writer_is_a_matrix_onto_the_stream(spec_of: Make, shape: tuple[int, ...]) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    assert f"{name} has the shape {list(shape)}" in refusal(spec_of, {**llama(), name: zeros(*shape)})


def test_an_embedding_is_needed(spec_of: Make) -> None:
    tensors = llama()
    del tensors["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight is missing" in refusal(spec_of, tensors)


def test_a_family_with_norms_after_its_writers_needs_them(spec_of: Make) -> None:
    message = refusal(spec_of, model_type="gemma2")
    assert "model.layers.0.post_feedforward_layernorm.weight is missing (the norm after mlp.down_proj)" in message


def test_unknown_types_with_common_names_compile(spec_of: Make) -> None:
    spec = spec_of(model_type="brand_new")
    assert (spec.model_type, spec.family, len(spec.sites)) == ("brand_new", "llama", 2 * LAYERS)


@pytest.mark.parametrize("model_type", ["llama7", "gemma9", None, ABSENT])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("model.layers.1.post_mlp_norm.weight", (HIDDEN,), id="norm"),
        pytest.param("model.layers.1.mlp.inner_layernorm.weight", (INNER,), id="nested-norm"),
        pytest.param("model.layers.1.layer_scale", (HIDDEN,), id="gain"),
        pytest.param("model.layers.1.layer_scalar", (), id="scalar"),
        pytest.param("model.layers.1.self_attn.o_proj.weight", None, id="writer"),
    ],
)
def test_unknown_types_of_another_layout_are_shown(
    spec_of: Make, name: str, shape: tuple[int, ...] | None, model_type: Any
) -> None:
    tensors = llama()
    tensors.pop(name, None)
    if shape is not None:
        tensors[name] = zeros(*shape)
    message = refusal(spec_of, tensors, model_type=model_type)
    assert "is not known" in message and "nearest known family" in message and "families.py" in message
    assert all(f"  - {leaf}.weight" in message for leaf in ("mlp.down_proj", "self_attn.o_proj", "input_layernorm"))
    assert shape is None or name.removeprefix("model.layers.1.").removesuffix(".weight") in message


def test_an_unknown_type_is_refused_with_where_its_code_is(spec_of: Make) -> None:
    tensors = {name.replace("o_proj", "output"): tensor for name, tensor in llama().items()}
    config = {"model_type": "llama_next", "transformers_version": "99.1.0", "auto_map": {"AutoModel": "own.Own"}}
    message = refusal(spec_of, tensors, **config)
    assert "its code comes with it (auto_map" in message and "written by transformers 99.1.0, this list" in message


@pytest.mark.parametrize(
    ("model_type", "nearest"), [("llamma", "llama"), ("gemma22", "gemma2"), ("gpt_neoxx", "gpt_neox")]
)
def test_the_nearest_family_is_the_likeliest_typo(spec_of: Make, model_type: str, nearest: str) -> None:
    tensors = {name.replace("o_proj", "output"): tensor for name, tensor in llama().items()}
    assert repr(nearest) in refusal(spec_of, tensors, model_type=model_type)


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_known_to_be_unfit_are_refused_with_the_reason(spec_of: Make, model_type: str) -> None:
    assert REFUSED[model_type] in refusal(spec_of, model_type=model_type)


def test_a_wrapper_of_an_unfit_family_is_refused(spec_of: Make) -> None:
    config = {"model_type": "gemma3n", "text_config": {**CONFIG, "model_type": "other"}}
    assert REFUSED["gemma3n"] in refusal(spec_of, config=config)


def test_opt_that_normalises_its_stream_is_refused(spec_of: Make) -> None:
    assert "do_layer_norm_before" in refusal(spec_of, model_type="opt", do_layer_norm_before=False)


def test_chameleon_whose_norms_are_after_its_writers_is_refused(spec_of: Make) -> None:
    assert "swin_norm is true" in refusal(spec_of, model_type="chameleon", swin_norm=True)


FP8 = torch.float8_e4m3fn
O_PROJ = "model.layers.0.self_attn.o_proj"
QUANTISED = {
    "fp8": {f"{O_PROJ}.weight": zeros(HIDDEN, HIDDEN, dtype=FP8), f"{O_PROJ}.weight_scale_inv": zeros(1, 1)},
    "mxfp4": {"model.layers.0.mlp.down_proj_blocks": zeros(HIDDEN, 1, 4, dtype=torch.uint8)},
    "gptq": {f"{O_PROJ}.qweight": zeros(1, HIDDEN, dtype=torch.int32), f"{O_PROJ}.g_idx": zeros(8, dtype=torch.int32)},
    "awq": {f"{O_PROJ}.qweight": zeros(HIDDEN, 1, dtype=torch.int32), f"{O_PROJ}.qzeros": zeros(1, 1)},
    "bitsandbytes-4bit": {
        f"{O_PROJ}.weight.absmax": zeros(1),
        f"{O_PROJ}.weight.quant_state.bitsandbytes__nf4": zeros(1),
    },
    "bitsandbytes-8bit": {f"{O_PROJ}.weight": zeros(HIDDEN, HIDDEN, dtype=torch.int8), f"{O_PROJ}.SCB": zeros(HIDDEN)},
    "compressed-tensors": {f"{O_PROJ}.weight_packed": zeros(HIDDEN, 1, dtype=torch.int32)},
    "modelopt": {f"{O_PROJ}.weight_scale_2": zeros()},
    "mlx": {f"{O_PROJ}.scales": zeros(HIDDEN, 1), f"{O_PROJ}.biases": zeros(HIDDEN, 1)},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_tensors_are_refused_with_the_way_out(spec_of: Make, kind: str) -> None:
    message = refusal(spec_of, {**llama(), **QUANTISED[kind]})
    assert "is quantised" in message and "unquantised model" in message
    assert any(name in message for name in QUANTISED[kind])


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "awq", "bitsandbytes", None])
def test_quantised_configs_are_refused(spec_of: Make, method: str | None) -> None:
    message = refusal(spec_of, quantization_config={"quant_method": method, "bits": 4})
    assert (method or "unknown format") in message


@pytest.mark.parametrize(
    "name",
    [
        "mlp.experts.0.down_proj.weight",
        "mlp.experts.down_proj",
        "block_sparse_moe.experts.0.w2.weight",
        "block_sparse_moe.output_linear.weight",
        "mlp.shared_expert.down_proj.weight",
        "feed_forward.experts.3.w2.weight",
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "new_moe"])
def test_mixtures_of_experts_are_refused(spec_of: Make, model_type: str, name: str) -> None:
    message = refusal(spec_of, {**llama(), f"model.layers.1.{name}": zeros(2, HIDDEN, 4)}, model_type=model_type)
    assert "mixture of experts" in message and name in message


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
@pytest.mark.parametrize(
    ("on_disk", "module"),
    [
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "model.language_model."),
        ("model.text_model.", "model.text_model."),
        ("model.", "model.language_model."),
        ("", "model.language_model."),
    ],
)
def test_language_models_are_found_inside_their_wrappers(spec_of: Make, key: str, on_disk: str, module: str) -> None:
    vision = {"vision_tower.layers.0.self_attn.out_proj.weight": zeros(4, 4)}
    spec = spec_of({**llama(on_disk), **vision}, {"model_type": "wrapper", "hidden_size": 4, key: CONFIG})
    assert (spec.hidden_size, spec.layers, spec.model_type) == (HIDDEN, LAYERS, "llama")
    assert spec.sites[-1].tensor == f"{on_disk}layers.2.mlp.down_proj.weight"
    assert spec.sites[-1].module == f"{module}layers.2.mlp.down_proj"
    assert (spec.embedding.tensor, spec.embedding.module) == (f"{on_disk}embed_tokens.weight", f"{module}embed_tokens")


@pytest.mark.parametrize("size", [2, 4, 6])
def test_heads_need_not_fill_the_hidden_size(spec_of: Make, size: int) -> None:
    spec = spec_of(llama(attention=HEADS * size), head_dim=size)
    assert {site.in_features for site in spec.sites if site.heads} == {HEADS * size}


@pytest.mark.parametrize("missing", [None, ABSENT])
def test_without_head_dim_heads_fill_the_hidden_size(spec_of: Make, missing: object) -> None:
    assert spec_of(head_dim=missing).sites[0].in_features == HIDDEN


@pytest.mark.parametrize(
    "changes",
    [{"head_dim": 3}, {"num_attention_heads": 3}, {"num_attention_heads": 16}, {"v_head_dim": 2, "head_dim": 4}],
)
def test_heads_that_do_not_divide_the_columns_are_refused(spec_of: Make, changes: dict[str, int]) -> None:
    assert f"{HIDDEN} input columns; expected" in refusal(spec_of, **changes)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("value", ["8", 0, -1, True, 2.0, 1 << 40, [8], {"a": 1}])
def test_bad_numbers_in_the_config_are_named(spec_of: Make, key: str, value: Any) -> None:
    message = refusal(spec_of, **{key: value})
    assert key in message and repr(value) in message


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize(("model_type", "missing"), [("llama", None), ("my_llama", ABSENT)])
def test_missing_numbers_are_named(spec_of: Make, key: str, model_type: str, missing: object) -> None:
    assert f"config.json has no {key}" in refusal(spec_of, **{key: missing, "model_type": model_type})


@pytest.mark.parametrize(("key", "default"), [("hidden_size", 4096), ("num_attention_heads", 32)])
def test_a_default_that_does_not_fit_is_named(spec_of: Make, key: str, default: int) -> None:
    assert f"leaves out what its class sets by default: {key} {default}" in refusal(spec_of, **{key: ABSENT})


def test_keys_and_values_that_do_not_fit_the_heads_are_named(spec_of: Make) -> None:
    tensors = {**llama(), "model.layers.1.self_attn.k_proj.weight": zeros(4, HIDDEN)}
    message = refusal(spec_of, tensors)
    assert "model.layers.1.self_attn.k_proj.weight has the shape [4, 8]; expected 8 rows" in message
    assert "num_key_value_heads" in message and "layers.0" not in message


@pytest.mark.parametrize("value", ["8", 0, -4, True, 4.0, [4], {"a": 4}])
def test_a_bad_head_dim_is_named(spec_of: Make, value: Any) -> None:
    assert "head_dim" in refusal(spec_of, head_dim=value)


def test_more_layers_than_tensors_are_refused_at_once(spec_of: Make) -> None:
    assert "10000000 layers" in refusal(spec_of, num_hidden_layers=10_000_000)


@pytest.mark.parametrize("value", [[], {}, "x", 3, False])
@pytest.mark.parametrize("key", ["model_type", "text_config", "quantization_config", "tie_word_embeddings"])
def test_other_keys_of_any_type_end_in_a_spec_or_a_refusal(spec_of: Make, key: str, value: Any) -> None:
    with suppress(ArchitectureError):
        assert len(spec_of(**{key: value}).sites) == 2 * LAYERS


@pytest.mark.parametrize(
    ("flags", "head", "tied"),
    [
        ((ABSENT, ABSENT), True, False),
        ((ABSENT, ABSENT), False, True),
        ((ABSENT, False), True, False),
        ((True, False), True, True),
        ((False, True), True, True),
        ((None, True), True, True),
    ],
)
def test_embeddings_are_tied_by_flag_or_for_want_of_a_head(spec_of: Make, flags: Any, head: bool, tied: bool) -> None:
    tensors = llama()
    if not head:
        del tensors["lm_head.weight"]
    outer, inner = flags
    text = {key: value for key, value in {**CONFIG, "tie_word_embeddings": inner}.items() if value is not ABSENT}
    config = {"model_type": "wrapper", "text_config": text, "tie_word_embeddings": outer}
    assert spec_of(tensors, config).tied_embeddings is tied
