"""Tiny random mixtures of experts of every family, built from configs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer
from family_configs import COMMON_SETTINGS, INSIDE
from family_models import renamed
from releases import config_class

from steer2edit.architecture import ModelSpec, Site, read_spec
from steer2edit.architecture.mixtures import MIXTURES
from steer2edit.checkpoint import Checkpoint, open_checkpoint
from steer2edit.runtime.model import LoadedModel, load_tokenizer, load_weights

MIXTURE_TYPES = [name for family in MIXTURES for name in family.model_types if name not in INSIDE]
EXPERTS, TOP_K, WIDTH = 8, 2, 12
_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
EXPERT_COUNTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), TOP_K),
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 20,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    # the first layer dense, where the family can have that
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
}
_LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "num_hidden_layers": None,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
}  # fmt: skip
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
# what a type needs beside the common settings, or instead of them
_SPECIAL: dict[str, dict[str, Any]] = {
    "axk2": {**_MLA, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 16},
    "sarvam_mla": _MLA,
    "dots3_note_text": {
        **_MLA, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        **{f"swa_{name}": 2 * size for name, size in _MLA.items() if "rope" not in name}, "swa_num_attention_heads": 8,
    },
    "lara_mini": {**_LINEAR, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "granitemoe_swa": {"shared_intermediate_size": 20},
    "minimax_m3_vl_text": {
        "mlp_layer_types": ["dense", "sparse", "sparse"], "dense_intermediate_size": 40, "shared_intermediate_size": 20,
        "intermediate_size": WIDTH, "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16,
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
    },
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "deepseek_v2", "glm4_moe_lite", "glm_moe_dsa", "axk1"), _MLA),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), _LINEAR),
    "mistral4": {
        **_MLA,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "gemma4_text": {
        "enable_moe_block": True, "top_k_experts": TOP_K, "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "global_head_dim": 8,
    },
    "gpt_oss": _ROPE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "jamba": {
        "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8, "mamba_d_state": 8, "mamba_chunk_size": 16, "shared_intermediate_size": 20,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "granitemoeshared": {"shared_intermediate_size": 20},
    "nemotron_h": NEMOTRON_H,
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
    },
    # as published: a dense block is called mlp, which saving would rename
    "kimi_linear": {
        **_MLA, "first_k_dense_replace": 0,
        "linear_attn_config": {
            "head_dim": 16, "num_heads": 4, "short_conv_kernel_size": 4, "full_attn_layers": [2], "kda_layers": [1, 3],
        },
    },
    "bailing_hybrid": {**_MLA, "layer_group_size": 2},
    "llama4_text": {"moe_layers": [1, 2], "intermediate_size_mlp": 40},
}  # fmt: skip


def mixture_config(model_type: str, **changes: Any) -> Any:
    """A config of three layers with eight experts of which two are taken; the first is dense where the family allows it."""
    kind = config_class(model_type)
    known = {*kind().to_dict(), *kind.attribute_map}
    common = {**COMMON_SETTINGS, "num_hidden_layers": 3, **EXPERT_COUNTS}
    settings = {name: value for name, value in common.items() if name in known}
    return kind(**{**settings, **_SPECIAL.get(model_type, {}), **changes})


def save_mixture(folder: Path, config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A random mixture whose experts, routers and biases all matter, saved with a tokenizer."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    # Mistral 4 is known as a part of its multimodal model alone, and MiniMax M3 published so
    wrapped = config.model_type in ("mistral4", "minimax_m3_vl_text")
    auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    if config.model_type == "minimax_m3_vl_text":
        tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes = {"vision_config": tower, "projector_hidden_size": 16}
        config = config_class("minimax_m3_vl")(text_config=config.to_dict(), **sizes)
    model = auto.from_config(config)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or "inv_freq" in name or "A_log" in name or name.endswith(".D"):
                continue
            if value.ndim >= 2 and "conv" not in name and "moe_statics" not in name:
                value.normal_(0, 1 / value.shape[-1] ** 0.5)
            else:
                value.add_(torch.randn_like(value) * 0.1)
    model.to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if config.model_type in _SAVED_AS:
        saved, published = _SAVED_AS[config.model_type]
        return renamed(folder, lambda name: re.sub(saved, published, name))
    return folder


# what transformers 5.15 makes of published names when it saves what it loaded, and 5.24 does not
_SAVED_AS = {
    "nemotron_h": (r"\bembedding\.weight$", "embeddings.weight"),
    "minimax_m3_vl": (r"\.block_sparse_moe\.((gate|up|down)_proj|fc[12])\.", r".mlp.\1."),
}

MODELS: dict[str, Callable[[Path], Path]] = {
    name: (lambda folder, name=name: save_mixture(folder, mixture_config(name)))  # type: ignore[misc]
    for name in MIXTURE_TYPES
}


class Case:
    """A tiny mixture on disk, as the compiler sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.spec: ModelSpec = read_spec(self.checkpoint)
        self.statistics: Any = None

    def loaded(self) -> LoadedModel:
        return LoadedModel(load_weights(self.folder), load_tokenizer(self.folder), self.spec, self.folder)

    def matrix(self, site: Site) -> torch.Tensor:
        stored = self.checkpoint.read(site.locate(self.checkpoint))
        return stored if site.orientation == "out_in" else stored.T


def experts_down(loaded: LoadedModel, site: Site) -> torch.Tensor:
    """An expert's output matrix in memory, [out, in], a view."""
    module = loaded.module(site)
    if hasattr(module, "mlp"):  # DBRX stacks its experts
        width = site.in_features
        stacked: torch.Tensor = module.mlp.w2[site.expert * width : (site.expert + 1) * width].T  # type: ignore[operator]
        return stacked
    down: torch.Tensor = module.down_proj[site.expert]
    return down if down.shape == (site.out_features, site.in_features) else down.T


def writing_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of a writer's module; of all a layer's experts, those of their output matrices."""
    outputs = ("down_proj", "down_proj_bias", "w2")
    named = list(module.named_parameters())
    held = [p for name, p in named if name.rsplit(".", 1)[-1] in outputs]
    return [*held] or [p for _, p in named]
