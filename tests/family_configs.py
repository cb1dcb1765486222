"""Configs of tiny models, one for each model family."""

from __future__ import annotations

from typing import Any

from releases import config_class

INSIDE = {
    *(
        "cosmos3_edge_text",
        "cosmos3_omni",
        "deepseek_ocr2_text",
        "emu3_text_model",
        "glm4v_moe_text",
        "glm4v_text",
        "glm_ocr_text",
    ),
    *("granite4_vision_text", "granite_docling_text", "hunyuan_vl_text", "mistral_large4_text", "muse_glimmer_text"),
    *("paddleocr_vl_text", "qwen2_5_omni_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text"),
    *("qwen3_omni_moe_text", "qwen3_vl_moe_text", "qwen3_vl_text", "unlimited_ocr_text", "chameleon", "step3p5"),
    "kosmos_2_5_text_model",
}
"""Language models that transformers knows as a part of a multimodal model alone."""
COMMON_SETTINGS: dict[str, Any] = dict(  # noqa: C408
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
# what a type needs beside the common settings, or instead of them
SPECIAL_SETTINGS: dict[str, dict[str, Any]] = {
    **{key: {"rope_parameters": _ROPE} for key in ("apertus", "cwm")},
    **{key: {"rotary_dim": 4} for key in ("codegen", "gptj")},
    **{key: {"query_pre_attn_scalar": 16} for key in ("gemma2", "gemma3_text", "vaultgemma")},
    # as the small ones are published: layers of two head sizes, shared keys and values, an input for each layer
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 8,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
    },
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    **dict.fromkeys(("olmo_hybrid", "qwen3_5_text"), LINEAR),
    **{key: {"layer_types": ["conv", "full_attention"]} for key in ("lfm2", "lfm3")},
    **{key: {"state_size": 8, "time_step_rank": 4} for key in ("falcon_mamba", "mamba")},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 32},
    "xlstm": {"embedding_dim": 32, "num_heads": 4, "chunk_size": 16},
    "helium": {"head_dim": 8},
    "minicpm3": _MLA,
    "ministral3": {"rope_parameters": {**_ROPE, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1}},
    "mpt": {"max_seq_len": 128, "expansion_ratio": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "xglm": {"ffn_dim": 48},
    "ctrl": {"dff": 48},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "phi4_multimodal": {
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 8, "crop_size": 16},
        "audio_config": {**_TOWER, "num_blocks": 1},
    },
    "youtu": {**_MLA, "head_dim": 8, "num_key_value_heads": 4, "pad_token_id": None},
}


def family_config(model_type: str, **changes: Any) -> Any:
    """A two-layer config of any model type; heads times head_dim is not hidden_size where the type allows that."""
    kind = config_class(model_type)
    known = {*kind().to_dict(), *kind.attribute_map}
    settings = {name: value for name, value in COMMON_SETTINGS.items() if name in known}
    return kind(**{**settings, **SPECIAL_SETTINGS.get(model_type, {}), **changes})
