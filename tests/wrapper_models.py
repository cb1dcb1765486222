"""Tiny multimodal models around a language model, built from configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from family_configs import COMMON_SETTINGS, LINEAR, SPECIAL_SETTINGS
from family_models import renamed
from mixture_models import EXPERT_COUNTS, NEMOTRON_H
from releases import config_class
from safetensors.torch import load_file, save_file

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_MROPE: dict[str, Any] = {
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
_QWEN = {"depth": 1, "num_heads": 2, "patch_size": 8}
_VIT = {**_QWEN, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16}
_CLIP, _SIGLIP = ({**VISION, "model_type": name} for name in ("clip_vision_model", "siglip_vision_model"))


def _around(text: dict[str, Any], vision: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision, **others}


WRAPPED: dict[str, dict[str, Any]] = {
    "aya_vision": _around({"model_type": "cohere2"}, _SIGLIP),
    "deepseek_vl": _around({"model_type": "llama"}, _SIGLIP),
    "exaone4_5": _around({"model_type": "exaone4"}, _VIT),
    "gemma3": _around({"model_type": "gemma3_text", "query_pre_attn_scalar": 16}, VISION, mm_tokens_per_image=4),
    "gemma4": _around(
        {"model_type": "gemma4_text", **SPECIAL_SETTINGS["gemma4_text"]},
        {**VISION, "num_key_value_heads": 2, "head_dim": 8, "pooling_kernel_size": 1, "position_embedding_size": 16},
    ),
    "gemma4_unified": _around(
        {"model_type": "gemma4_unified_text", **SPECIAL_SETTINGS["gemma4_unified_text"]},
        {
            "patch_size": 4,
            "pooling_kernel_size": 1,
            **dict.fromkeys(("mm_embed_dim", "mm_posemb_size"), 16),
            "output_proj_dims": 16,
        },
    ),
    "glm4v": _around(_MROPE, _VIT),
    "got_ocr2": _around({"model_type": "qwen2"}, {**VISION, "mlp_dim": 16, "output_channels": 16}),
    "idefics3": _around({"model_type": "llama"}, VISION),
    "internvl": _around({"model_type": "qwen2"}, {**VISION, "image_size": [16, 16], "patch_size": [8, 8]}),
    "lfm2_vl": _around(
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {**VISION, "model_type": "siglip2_vision_model", "num_patches": 4},
    ),
    "lighton_ocr": _around({"model_type": "qwen3"}, {**VISION, "model_type": "pixtral"}),
    "llava": _around({"model_type": "llama"}, _CLIP),
    "llava_next": _around({"model_type": "mistral"}, _CLIP),
    "llava_onevision": _around({"model_type": "qwen2"}, _SIGLIP),
    "mistral3": _around({"model_type": "mistral"}, {**VISION, "model_type": "pixtral"}),
    "paligemma": _around({"model_type": "gemma"}, _SIGLIP),
    "qwen2_vl": _around(_MROPE, {**_QWEN, "embed_dim": 16, "hidden_size": 32}),
    "qwen2_5_vl": _around(_MROPE, _VIT),
    "qwen3_5": _around({**_MROPE, **LINEAR}, _VIT),
    "qwen3_vl": _around(_MROPE, {**_VIT, "deepstack_visual_indexes": [0]}),
    "smolvlm": _around({"model_type": "llama"}, VISION),
    "video_llava": _around({"model_type": "llama"}, _CLIP),
    "vipllava": _around({"model_type": "llama"}, _CLIP),
}
"""What the config of each multimodal model needs: its language model beside the common settings, and its towers."""


# sizes of what sees and hears, under the names that configs give them
_SMALL: dict[str, Any] = {
    **VISION,
    **dict.fromkeys(("embed_dim", "d_model", "encoder_hidden_size", "hidden_dim", "output_channels", "mlp_dim"), 16),
    **dict.fromkeys(("encoder_ffn_dim", "projection_dim", "downsample_hidden_size", "conv_channels"), 16),
    **dict.fromkeys(("qformer_hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 16),
    **dict.fromkeys(("num_heads", "num_key_value_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("depth", "num_layers", "encoder_layers"), 1),
    **dict.fromkeys(("out_hidden_size", "output_dim"), COMMON_SETTINGS["hidden_size"]),
    "head_dim": 8,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "vocab_size": 64,
}
_SAM = {**VISION, "output_channels": 16, "mlp_dim": 16, "downsample_channels": [16, 16], "global_attn_indexes": [0]}
_CODEBOOK = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "hidden_size": 32}
_MLA = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12},
    **{"num_key_value_heads": 4, "head_dim": 8},
}
AROUND: dict[str, dict[str, Any]] = {
    **{key: {} for key in ("aria", "cohere2_vision", "fuyu", "granite_docling", "idefics2")},
    **{key: {} for key in ("llava_next_video", "kosmos-2.5")},
    **{key: {} for key in ("pp_chart2table", "video_llama_3", "deepseek_vl_hybrid", "qianfan_ocr")},
    **{key: {} for key in ("glmasr", "granite_speech", "granite_speech_plus", "omniasr")},
    **{key: {} for key in ("qwen2_audio", "qwen3_asr", "voxtral")},
    **{key: {"text_config": _MROPE} for key in ("glm46v", "glmga", "glm_ocr", "paddleocr_vl")},
    **{key: {"text_config": _MROPE} for key in ("qwen3_vl_moe",)},
    **{key: {"text_config": LINEAR} for key in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "lfm3_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    # what published configs of a thinker have, and its class has no default of
    **{
        key: {"text_config": _MROPE, "vision_start_token_id": 5}
        for key in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
    },
    "glm4v_moe": {
        "text_config": {**_MROPE, "rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
    },
    "fun_asr_nano": {"adaptor_config": {"hidden_size": COMMON_SETTINGS["hidden_size"], "intermediate_size": 8}},
    "hyperclovax_vision_v2": {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}},
    **{key: {"text_config": _MROPE} for key in ("cosmos3_edge", "cosmos3_omni")},
    "granite4_vision": {
        "text_config": {"model_type": "granite4_vision_text"},
        **{"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0], "downsample_rate": "1/2"},
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": {
        "text_config": {**_MROPE, "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 1, 1]}}
    },
    "kimi_k25": {"text_config": {**_MLA, "first_k_dense_replace": 1}},
    # around a tower that needs no package of its own: published ones are timm's
    "fast_vlm": {"vision_config": _CLIP},
    "perception_lm": {"vision_config": {**_CLIP, "model_args": {"embed_dim": 16}}},
    "nemotron_h_omni": {
        "text_config": NEMOTRON_H,
        "vision_config": {"video_temporal_patch_size": 2},
        **dict.fromkeys(("vision_hidden_size", "projector_hidden_size"), 16),
    },
    "llama4": {"text_config": {"moe_layers": [1], "intermediate_size_mlp": 40}},
    "step3p7": {
        "text_config": {
            **{"mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention", "sliding_attention"]},
            **{"share_expert_dim": 20, "sliding_window": 64, "moe_router_scaling_factor": 1.5},
        }
    },
    "unlimited_ocr": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {"sam_config": _SAM, "encoder_config": {**_SMALL, "max_position_embeddings": 64}},
    },
    "chameleon": {
        **{name: value for name, value in COMMON_SETTINGS.items() if name != "head_dim"},
        **{"vocabulary_map": {"IMGIMGAZ": 3, "<image>": 4}, "vq_config": _CODEBOOK},
    },
    "apertus1p5": {
        **{"image_token_offset": 8, "audio_token_offset": 72},
        "vision_config": {**_CODEBOOK, "codebook_size": 64, "latent_channels": 16},
        "audio_config": {"codebook_size": 56, "codebook_dim": 16, "num_filters": 2, "num_lstm_layers": 1},
    },
    "ovis2": {name: COMMON_SETTINGS[name] for name in ("hidden_size", "vocab_size")},
    "qwen3_5_moe": {"text_config": {**_MROPE, **LINEAR}},
    "muse_glimmer": {"out_hidden_size": 64, "projector_hidden_size": 16},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {"sam_config": _SAM, "encoder_config": {**_SMALL, "max_position_embeddings": 64}},
    },
    "mistral_large4": {"text_config": {"num_key_value_heads": 4}},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 3, "<image>": 4}, "vq_config": _CODEBOOK},
    "minimax_m3_vl": {
        "text_config": {
            **{"dense_intermediate_size": 40, "shared_intermediate_size": 20, "intermediate_size": 12, "rotary_dim": 8},
            **{"mlp_layer_types": ["sparse", "sparse"], "index_n_heads": 2, "index_head_dim": 16},
        },
        "projector_hidden_size": 16,
    },
    "cohere_compass": {"text_config": {**SPECIAL_SETTINGS["cohere_compass_text"], "head_dim": 8}},
    "dots3_note": {
        "text_config": {**_MLA, "layer_types": ["full_attention"] * 2},
        "vision_config": {
            "per_layer_config": {},
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_input_size": 16, "adapter_out_dim": 32},
    },
    "janus": {"vision_config": {"projection_dim": COMMON_SETTINGS["hidden_size"]}, "vq_config": _CODEBOOK},
}
"""Other multimodal models: what their parts need beside small sizes."""

# what some release of transformers makes of published names when it saves what it loaded
_SAVED_AS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("glmasr", "granite_speech", "granite_speech_plus", "qwen2_audio", "voxtral"),
        ("language_model.model.model.", "language_model.model."),
    ),
    "kimi_k25": ("language_model.model.blocks.", "language_model.model.layers."),
    "qianfan_ocr": ("language_model.model.encoder.layers.", "language_model.model.layers."),
}


def _parts(model_type: str) -> dict[str, Any]:
    """The configs of a multimodal model's parts, small, and what it needs beside them."""
    kind, needs = config_class(model_type), dict(AROUND[model_type])
    plain = kind()
    for name in kind.sub_configs:
        inner = needs.get(name, {}).get("model_type")
        part = getattr(plain, name, None) if inner is None else config_class(inner)()
        if part is None:
            continue
        known = {*part.to_dict(), *type(part).attribute_map}
        sizes = {**COMMON_SETTINGS, **EXPERT_COUNTS} if name == "text_config" else _SMALL
        given = {key: value for key, value in sizes.items() if key in known}
        needs[name] = {"model_type": part.model_type, **given, **needs.get(name, {})}
    return needs


def wrapper(folder: Path, model_type: str, **changes: Any) -> Path:
    """A multimodal wrapper around a tiny language model; ``changes`` go over its config, part by part."""
    import transformers
    from transformers import AutoModelForMultimodalLM

    torch.manual_seed(0)
    config = config_class(model_type)(**wrapper_settings(model_type, **changes))
    if type(getattr(config, "vision_config", None)).__name__ == "TimmWrapperConfig":
        # older releases take no other tower for Perception LM
        pytest.importorskip(
            "timm", reason=f"transformers {transformers.__version__} builds {model_type} with timm alone"
        )
    AutoModelForMultimodalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if model_type in _SAVED_AS:
        saved, published = _SAVED_AS[model_type]
        return renamed(folder, lambda name: name.replace(saved, published))
    return _experts_transposed(folder) if model_type == "qwen3_vl_moe" else folder


def _experts_transposed(folder: Path) -> Path:
    """Experts as published, [experts, in, out]: transformers saves them as it holds them, [experts, out, in]."""
    path = folder / "model.safetensors"
    tensors = {
        name: tensor.mT.contiguous() if ".experts." in name else tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    return folder


def wrapper_settings(model_type: str, **changes: Any) -> dict[str, Any]:
    """What the config of a multimodal model is made of."""
    settings = {"tie_word_embeddings": False, **(WRAPPED.get(model_type) or _parts(model_type))}
    if model_type in WRAPPED:
        settings["text_config"] = {**COMMON_SETTINGS, **settings["text_config"]}
    for name, value in changes.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    # config classes complete the mappings that they are given
    return deepcopy(settings)


def qwen2_vl_flat(folder: Path) -> Path:
    """The language model's settings beside ``vision_config``, as Qwen2-VL was published."""
    path = wrapper(folder, "qwen2_vl") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config.pop("text_config"), **config}))
    return folder


def gemma3_nested(folder: Path) -> Path:
    """Gemma 3 with the module's names on disk: ``model.language_model.layers``."""
    return renamed(
        wrapper(folder, "gemma3"), lambda name: name.replace("language_model.model.", "model.language_model.")
    )


def voxtral_saved_again(folder: Path) -> Path:
    """Voxtral as transformers 5.15 saves it: ``language_model.model.model.layers``."""
    return renamed(
        wrapper(folder, "voxtral"), lambda name: name.replace("language_model.model.", "language_model.model.model.")
    )


WRAPPERS: dict[str, Callable[[Path], Path]] = {
    **{name: lambda folder, name=name: wrapper(folder, name) for name in (*WRAPPED, *AROUND)},  # type: ignore[misc]
    "gemma3-nested": gemma3_nested,
    "qwen2_vl-flat": qwen2_vl_flat,
    "voxtral-saved-again": voxtral_saved_again,
}
